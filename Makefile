# Every target calls one launcher or one Python module. Variables:
#   RUN        run folder                    RECIPE     name or YAML file of a recipe
#   ITERATION  iteration of one stage        ARGS       key=value overrides, or further arguments
#   DRY_RUN=1  print the commands only       PYTHON     interpreter that .venv is built on
#   SLURM_SITE settings of the cluster, default launch/slurm/site.env
#   MODEL, NODES, GPUS                       what `make plan` computes
#   WORKERS, TRAIN_RANKS                     processes of this start, where they differ from the run's
#   FOLLOW=1, FOLLOW_TIMEOUT                 reward beside its rollout (docs/operations.md)
#   PREFETCH=0                               no stage starts before its turn (the same)
#   FAULTS, SEED                             how many faults `make drill` injects, and which
#   METHOD, BACKBONE, SEEDS, CONTROL_SEEDS   what `make evidence` measures
#   TORCH_INDEX_URL                          package index for torch, e.g. one with CPU wheels

SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
STAMP := .venv/.installed
PYTHON ?= python3
METHOD ?= gvu
BACKBONE ?= janus
SEEDS ?= 3
FAULTS ?= 200
SEED ?= 0
RUN_ARGUMENTS = --run "$(or $(RUN),$(error RUN is not set: add RUN=runs/NAME))"
RECIPE_ARGUMENTS = $(if $(RECIPE),--recipe "$(RECIPE)") $(ARGS)
PLAN_ARGUMENTS = --model "$(or $(MODEL),$(error MODEL is not set: add MODEL=janus-pro-1b))" \
  $(if $(NODES),--nodes "$(NODES)") $(if $(GPUS),--gpus "$(GPUS)")
STAGE_ARGUMENTS = $(RUN_ARGUMENTS) --iteration "$(or $(ITERATION),$(error ITERATION is not set: add ITERATION=0))"

# The launchers use .venv; PYTHON is only for building it.
unexport PYTHON
export DRY_RUN SLURM_SITE METHOD BACKBONE SEEDS CONTROL_SEEDS TORCH_INDEX_URL WORKERS TRAIN_RANKS FOLLOW FOLLOW_TIMEOUT PREFETCH

.PHONY: help install test test-slow test-cluster lint format demo loop rollout reward train evaluate export status \
  doctor plan report clean-run evidence drill bench bench-gpu tiny-janus tiny-bagel slurm-loop slurm-rollout \
  slurm-reward slurm-train slurm-evaluate

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16
	@sed -nE 's/^# ? ?(.*)/\1/p;/^$$/q' Makefile

install: $(STAMP)  ## make .venv (PYTHON=..., TORCH_INDEX_URL=...); does nothing when up to date

$(STAMP): setup.py constraints.txt
	@PYTHON="$(PYTHON)" launch/install.sh

test: $(STAMP)  ## run the tests that take seconds
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(STAMP)  ## run the tests that take minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow $(ARGS)

test-cluster: $(STAMP)  ## the slow tests under SLURM's daemons and on two hosts made of namespaces: root, see CONTRIBUTING.md
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -rs tests/cluster $(ARGS)

lint: $(STAMP)  ## ruff, and shellcheck over the launchers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	shellcheck -x launch/*.sh launch/slurm/submit.sh launch/slurm/stage.sbatch .ci/run

format: $(STAMP)  ## format the Python files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(STAMP)  ## improve the tiny Janus by its own understanding and show it: two CPU cores, minutes
	@RUN="$(RUN)" launch/demo.sh $(ARGS)

loop: $(STAMP)  ## run or continue a run: RUN=... RECIPE=... ARGS="key=value ..."
	@launch/loop.sh $(RUN_ARGUMENTS) $(RECIPE_ARGUMENTS)

rollout: $(STAMP)  ## draw the images of one iteration: RUN=... ITERATION=...
	@launch/rollout.sh $(STAGE_ARGUMENTS) $(RECIPE_ARGUMENTS)

reward: $(STAMP)  ## score the images of one iteration: RUN=... ITERATION=...
	@launch/reward.sh $(STAGE_ARGUMENTS) $(RECIPE_ARGUMENTS)

train: $(STAMP)  ## update the policy on one iteration: RUN=... ITERATION=...
	@launch/train.sh $(STAGE_ARGUMENTS) $(RECIPE_ARGUMENTS)

evaluate: $(STAMP)  ## evaluate the weights after ITERATION iterations (0: base): RUN=... ITERATION=...
	@launch/evaluate.sh $(STAGE_ARGUMENTS) $(RECIPE_ARGUMENTS)

export: $(STAMP)  ## write the tuned weights as a whole checkpoint: RUN=... ARGS="--out FOLDER"
	$(PY) -m unified_rl.train.export $(RUN_ARGUMENTS) $(if $(ITERATION),--iteration "$(ITERATION)") $(ARGS)

status: $(STAMP)  ## table of stages and iterations of a run: RUN=... (ARGS=--watch follows it)
	@$(PY) -m unified_rl.ledger status "$(or $(RUN),$(error RUN is not set: add RUN=runs/NAME))" $(ARGS)

doctor: $(STAMP)  ## check GPUs, disk, file system, packages and data before a run: RUN=... RECIPE=... ARGS="key=value ..."
	@$(PY) -m unified_rl.doctor $(RUN_ARGUMENTS) $(RECIPE_ARGUMENTS)

plan: $(STAMP)  ## memory of each stage on a GPU, and the time of an iteration: MODEL=janus-pro-1b NODES=1 GPUS=8
	@$(PY) -m unified_rl.plan $(PLAN_ARGUMENTS) $(RECIPE_ARGUMENTS)

report: $(STAMP)  ## write report.html, pictures and TensorBoard logs of a run: RUN=...
	$(PY) -m unified_rl.report $(RUN_ARGUMENTS)

clean-run:  ## delete a run folder: RUN=...
	@RUN="$(RUN)" launch/clean_run.sh

evidence: $(STAMP)  ## measure the learning claim with its controls: METHOD=gvu BACKBONE=janus SEEDS=3
	@RUN="$(RUN)" launch/evidence.sh $(ARGS)

drill: $(STAMP)  ## hurt real loops at random moments and compare the results bit for bit: FAULTS=200 SEED=0
	OMP_NUM_THREADS=1 $(PY) -m tests.drill --faults $(FAULTS) --seed $(SEED) --out "$(or $(RUN),runs/drill)" $(ARGS)

bench: $(STAMP)  ## measure speed against what people use: two idle CPU cores, 20 minutes
	OMP_NUM_THREADS=1 $(PY) -m benchmarks $(ARGS)

bench-gpu: $(STAMP)  ## the same on a GPU, at public sizes (ARGS=--smoke tries the scripts without one)
	$(PY) -m benchmarks --gpu $(ARGS)

tiny-janus: $(STAMP)  ## train the tiny Janus that ships with the package: about 30 minutes on two cores
	$(PY) -m unified_rl.shapes.train_janus --out unified_rl/assets/tiny_janus $(ARGS)

tiny-bagel: $(STAMP)  ## train the tiny BAGEL that ships with the package: 30 to 45 minutes on two cores
	$(PY) -m unified_rl.shapes.train_bagel --out unified_rl/assets/tiny_bagel_roles $(ARGS)

slurm-loop: $(STAMP)  ## submit what is left of a run to SLURM: RUN=... RECIPE=... ARGS="key=value ... [--dry-run]"
	@launch/slurm/submit.sh loop $(RUN_ARGUMENTS) $(RECIPE_ARGUMENTS)

slurm-rollout: $(STAMP)  ## submit the rollout of one iteration to SLURM: RUN=... ITERATION=...
	@launch/slurm/submit.sh rollout $(STAGE_ARGUMENTS) $(RECIPE_ARGUMENTS)

slurm-reward: $(STAMP)  ## submit the reward of one iteration to SLURM: RUN=... ITERATION=...
	@launch/slurm/submit.sh reward $(STAGE_ARGUMENTS) $(RECIPE_ARGUMENTS)

slurm-train: $(STAMP)  ## submit the update of one iteration to SLURM: RUN=... ITERATION=...
	@launch/slurm/submit.sh train $(STAGE_ARGUMENTS) $(RECIPE_ARGUMENTS)

slurm-evaluate: $(STAMP)  ## submit the evaluation after ITERATION iterations to SLURM: RUN=... ITERATION=...
	@launch/slurm/submit.sh evaluate $(STAGE_ARGUMENTS) $(RECIPE_ARGUMENTS)
