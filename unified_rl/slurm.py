"""What is submitted to SLURM: the jobs of a run, their order and sizes, and the text of their scripts.

    python -m unified_rl.slurm STAGE --site FILE --run RUN [--iteration K] [--recipe NAME] [key=value ...]

STAGE is `loop` for all that is left of a run, or one stage. Writes `RUN/slurm/NAME.sbatch` and `RUN/slurm/config.yaml`
and prints the jobs in the order of submission, a line each: `NAME AFTER,AFTER` (`-`: after nothing), and `after` behind
it where those need only have started. With `--dry-run` the scripts are printed instead, before the jobs and an empty
line. launch/slurm/submit.sh does the submitting.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from unified_rl.config import ConfigError, RunConfig, to_yaml
from unified_rl.files import atomic_write_bytes
from unified_rl.launching import TRAINING_STAGES, open_config, remaining_stages
from unified_rl.ledger import Run, iteration_name
from unified_rl.manifests import MANIFEST_NAME
from unified_rl.runtime import EXIT_OK, command_parser, run_stage

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "launch" / "slurm" / "stage.sbatch"
LAUNCHERS = ("srun", "deepspeed", "torchrun")
MODULES = {"evaluate": "evaluation"}  # where the module has another name than the stage
# What each task of a job does with `task PYTHON MODULE ARGUMENTS`. SLURM_PROCID and its like exist only inside a task.
TASKS = {
    "array": 'export RANK=$SLURM_ARRAY_TASK_ID LOCAL_RANK=0 WORLD_SIZE={workers}; exec "$1" -m "${{@:2}}"',
    "single": 'export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1; exec "$1" -m "${{@:2}}"',
    "srun": "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
    'MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT; exec "$1" -m "${{@:2}}"',
    "deepspeed": 'exec "$1" -m deepspeed.launcher.runner --no_ssh --node_rank "$SLURM_PROCID" --hostfile "$HOSTS" '
    '--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --no_local_rank --quiet --module "${{@:2}}"',
    "torchrun": 'exec "$1" -m torch.distributed.run --nnodes {nodes} --nproc_per_node {ranks} '
    '--node_rank "$SLURM_PROCID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --max_restarts 0 '
    '--module -- "${{@:2}}"',  # without `--` it takes our --run for one of its own, shortened
}


@dataclass(frozen=True)
class Site:
    """Settings of a cluster: upper-case keys of site.env; launch/slurm/site.env.example says what they mean."""

    account: str = ""
    partition: str = ""
    time: str = "04:00:00"
    time_rollout: str = ""
    time_reward: str = ""
    time_train: str = ""
    time_evaluate: str = ""
    gpu_option: str = "--gpus-per-node="
    cpus_per_task: int = 0
    train_nodes: int = 1
    train_launcher: str = "srun"
    sbatch_options: str = ""
    srun_options: str = ""
    container: str = ""
    python: str = ""
    modules: str = ""
    setup: str = ""
    signal_seconds: int = 300
    max_requeues: int = 20
    iterations_ahead: int = 0


@dataclass(frozen=True)
class Job:
    """One submission.

    Attributes:
        after: names of the jobs that must have succeeded before it starts, or have started where it follows them.
        follow: arguments by which the reward stage follows its rollout.
    """

    stage: str
    iteration: int
    after: tuple[str, ...] = ()
    follow: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`rollout-0003`; also the name of the script."""
        return job_name(self.stage, self.iteration)


def job_name(stage: str, iteration: int) -> str:
    """Stage word and iteration."""
    return f"{stage}-{iteration:04d}"


def read_site(path: Path) -> Site:
    """The settings in a file of KEY=VALUE lines, quoted as in a shell but never executed.

    Raises:
        ConfigError: no such file, or a line that is no setting; the message names it.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: copy launch/slurm/site.env.example to it and fill it in")
    types = {f.name.upper(): type(f.default) for f in fields(Site)}
    values: dict[str, str | int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        if not words:
            continue
        key, separator, value = words[0].partition("=")
        if len(words) > 1 or not separator:
            raise ConfigError(f"{where}: not of the form KEY=VALUE; quote a value that has spaces")
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1, cutoff=0.3)
            raise ConfigError(f"{where}: unknown key {key}; the nearest valid key is {(near or sorted(types))[0]}")
        if types[key] is int and not re.fullmatch(r"[0-9]+", value):
            raise ConfigError(f"{where}: {key}={value} is not a whole number")
        values[key.lower()] = int(value) if types[key] is int else value
    return check_site(Site(**values), path)


def check_site(site: Site, path: Path) -> Site:
    """`site` itself when its values are possible."""
    if site.train_launcher not in LAUNCHERS:
        raise ConfigError(f"{path}: TRAIN_LAUNCHER={site.train_launcher} is not one of {', '.join(LAUNCHERS)}")
    if site.train_nodes < 1:
        raise ConfigError(f"{path}: TRAIN_NODES={site.train_nodes} must be at least 1")
    return site


def plan_jobs(stages: list[tuple[str, int]], follow: tuple[str, ...] = ()) -> list[Job]:
    """Jobs for (stage, iteration) pairs in the order of submission.

    A stage waits for what it reads where that is planned too; the report waits for all that nothing else waits for.
    """
    planned = {job_name(*stage) for stage in stages}
    jobs: list[Job] = []
    for stage, iteration in stages:
        if stage == "report":
            awaited = {name for job in jobs for name in job.after}
            after = tuple(job.name for job in jobs if job.name not in awaited)
        else:
            source = {"rollout": ("train", -1), "reward": ("rollout", 0), "train": ("reward", 0)}
            before, offset = source.get(stage, ("train", -1))  # evaluate counts trained iterations
            name = job_name(before, iteration + offset) if iteration + offset >= 0 else ""
            after = (name,) if name in planned else ()
        jobs.append(Job(stage, iteration, after, follow if stage == "reward" else ()))
    return jobs


def stages_ahead(stages: list[tuple[str, int]], iterations: int) -> list[tuple[str, int]]:
    """The first `iterations` iterations of what is left (0: all); without the report where training goes on after."""
    trained = sorted(k for stage, k in stages if stage == "train")
    if not iterations or len(trained) <= iterations:
        return stages
    last = trained[iterations - 1]
    return [
        (stage, k)
        for stage, k in stages
        if (k <= last if stage in TRAINING_STAGES else stage == "evaluate" and k <= last + 1)
    ]


class Shape(NamedTuple):
    """Sizes of a job, of one task of the array where it is an array."""

    kind: str  # of TASKS
    nodes: int
    tasks: int  # on each node
    ranks: int  # processes of the stage on each node
    cpus: int  # for each task


def shape_of(job: Job, config: RunConfig, site: Site) -> Shape:
    """How a stage is laid out over nodes and tasks; CPUs are those of a rank times the ranks in a task."""
    cpus = site.cpus_per_task or config.backbone.threads
    if job.stage != "train":
        return Shape("single" if job.stage == "report" else "array", 1, 1, 1, cpus)
    ranks = config.train.ranks
    if site.train_launcher == "srun":
        return Shape("srun", site.train_nodes, ranks, ranks, cpus)
    return Shape(site.train_launcher, site.train_nodes, 1, ranks, cpus * ranks)


def workers_of(job: Job, config: RunConfig) -> int:
    """Size of the array of a stage whose workers share the shards."""
    return config.reward.workers if job.stage == "reward" else config.rollout.workers


def directives(job: Job, run: Path, config: RunConfig, site: Site) -> list[str]:
    """Options of sbatch, a `#SBATCH` line each.

    Raises:
        ConfigError: a value would not survive the reading of such a line.
    """
    kind, nodes, tasks, ranks, cpus = shape_of(job, config, site)
    label = re.sub(r"[^A-Za-z0-9._-]", "_", run.name)
    options = [f"--job-name={label}-{job.name}", "--open-mode=append", "--requeue", "--kill-on-invalid-dep=yes"]
    # Relative to --chdir of the command line: a path in here would have to escape what SLURM replaces.
    options.append(f"--output={'%x-%A_%a.out' if kind == 'array' else '%x-%j.out'}")
    if kind == "array":
        options.append(f"--array=0-{workers_of(job, config) - 1}")
    options += [
        f"--signal=B:USR2@{site.signal_seconds}",
        f"--time={getattr(site, f'time_{job.stage}', '') or site.time}",
    ]
    options += [f"--{key}={value}" for key in ("account", "partition") if (value := getattr(site, key))]
    options += [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}"]
    if site.gpu_option and config.backbone.device != "cpu" and job.stage != "report":
        options.append(f"{site.gpu_option}{ranks}")
    options += shlex.split(site.sbatch_options)
    for option in options:
        if not re.fullmatch(r"-[A-Za-z0-9_./:=,@%+*&|\[\]()-]+", option):
            raise ConfigError(
                f"sbatch option {option!r} of the site settings has characters that a script cannot carry"
            )
    return [f"#SBATCH {option}" for option in options]


def render(job: Job, run: Path, config: RunConfig, site: Site) -> str:
    """The sbatch script of a job. Every value is quoted for the shell; only SETUP of the site runs as it is."""
    kind, nodes, tasks, ranks, cpus = shape_of(job, config, site)
    workers = workers_of(job, config)
    module = f"unified_rl.{MODULES.get(job.stage, job.stage)}"
    command = [site.python or sys.executable, module, "--run", str(run)]
    if job.stage != "report":
        command += ["--iteration", str(job.iteration), *job.follow]
    # A rank that is done must not end the others: those that were asked to stop leave one after the other.
    step = [
        "srun",
        "--export=ALL",
        "--kill-on-bad-exit=0",
        "--wait=120",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks}",
    ]
    step += [f"--cpus-per-task={cpus}", *shlex.split(site.srun_options), *shlex.split(site.container)]
    mark = run / iteration_name(job.iteration) / "train" / MANIFEST_NAME
    setup = [f"module load {shlex.join(shlex.split(site.modules))}"] if site.modules else []
    values = {
        "JOB": shlex.quote(job.name),
        "LAUNCHER": kind,
        "RUN": shlex.quote(str(run)),
        "DIRECTORY": shlex.quote(os.getcwd()),
        "ROOT": shlex.quote(str(ROOT)),
        "MARK": shlex.quote(str(mark) if job.stage == "train" else ""),
        "RANKS": str(ranks),
        "THREADS": str(config.backbone.threads),
        "ACCELERATOR": "cpu" if config.backbone.device == "cpu" or not site.gpu_option else "''",
        "MAX_REQUEUES": str(site.max_requeues),
        "STEP": shlex.join(step),
        "TASK": shlex.quote(TASKS[kind].format(workers=workers, nodes=nodes, ranks=ranks)),
        "COMMAND": shlex.join(command),
        "SBATCH": "\n".join(directives(job, run, config, site)),
        "SETUP": "\n".join(setup + ([site.setup] if site.setup else [])) or ":",
    }
    return re.sub(r"(?:#|: )?@([A-Z_]+)@", lambda found: values[found[1]], TEMPLATE.read_text())


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = command_parser("unified_rl.slurm", __doc__)
    parser.add_argument("stage", choices=("loop", *TRAINING_STAGES, "evaluate"))
    parser.add_argument("--site", required=True, type=Path, metavar="FILE", help="settings of the cluster")
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder")
    parser.add_argument("--iteration", type=int, metavar="K", help="iteration of a single stage")
    parser.add_argument("--recipe", metavar="NAME", help="recipe name or YAML file; needed to create a run")
    parser.add_argument("--dry-run", action="store_true", help="write nothing, print the scripts")
    parser.add_argument("--follow", action="store_true", help="reward starts with its rollout and follows it")
    parser.add_argument(
        "--follow-timeout", type=float, metavar="SECONDS", help="see `python -m unified_rl.reward --help`"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values over the recipe's")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.stage == "loop") != (arguments.iteration is None):
        parser.error("a single stage needs --iteration K, the loop takes none")
    site = read_site(arguments.site)
    config = open_config(arguments, arguments.overrides)
    run = Path(arguments.run).absolute()
    follow = ("--follow",) if arguments.follow else ()
    if follow and arguments.follow_timeout:
        follow += ("--follow-timeout", f"{arguments.follow_timeout:g}")
    if arguments.stage == "loop":
        jobs = plan_jobs(stages_ahead(remaining_stages(Run(run, config)), site.iterations_ahead), follow)
    else:
        jobs = plan_jobs([(arguments.stage, arguments.iteration)], follow)
    scripts = {f"{job.name}.sbatch": render(job, run, config, site) for job in jobs}
    if arguments.dry_run:
        for name, text in scripts.items():
            print(f"==> {run / 'slurm' / name} <==\n{text}")
    else:
        (run / "slurm/logs").mkdir(parents=True, exist_ok=True)  # SLURM starts in it and logs to it
        for name, text in {**scripts, "config.yaml": to_yaml(config)}.items():
            atomic_write_bytes(run / "slurm" / name, text.encode())
    print("\n".join(f"{job.name} {','.join(job.after) or '-'}{' after' if job.follow else ''}" for job in jobs))
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
