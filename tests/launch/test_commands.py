"""Golden output: the exact commands of every launcher."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.launch.launching import ROOT, dry_run, launch

ENV = "PYTHONPATH=ROOT DS_ACCELERATOR=cpu OMP_NUM_THREADS=1"
DEEPSPEED, QUIET = "BIN/python -m deepspeed.launcher.runner", "--no_local_rank --quiet --module"
SHAPES = ("--recipe", "gvu_janus_shapes")


def worker_commands(module: str, workers: int, arguments: str) -> list[str]:
    return [
        f"{ENV} RANK={r} LOCAL_RANK={r} WORLD_SIZE={workers} BIN/python -m unified_rl.{module} {arguments}"
        for r in range(workers)
    ]


@pytest.mark.parametrize(
    ("launcher", "module", "workers"),
    [("rollout", "rollout", "rollout.workers=3"), ("reward", "reward", "reward.workers=3"),
     ("evaluate", "evaluation", "rollout.workers=3")],
)  # fmt: skip
def test_stage_starts_the_configured_workers(launcher: str, module: str, workers: str) -> None:
    commands = dry_run(f"{launcher}.sh", "--run", "runs/x", "--iteration", "4", *SHAPES, workers)
    assert commands == worker_commands(module, 3, f"--run runs/x --iteration 4 --recipe gvu_janus_shapes {workers}")


def test_train_goes_through_the_deepspeed_launcher() -> None:
    assert dry_run("train.sh", "--run", "runs/x", "--iteration", "0", *SHAPES, "train.ranks=2") == [
        f"{ENV} {DEEPSPEED} --num_gpus 2 --master_port PORT {QUIET} unified_rl.train "
        "--run runs/x --iteration 0 --recipe gvu_janus_shapes train.ranks=2"
    ]


def test_a_start_may_have_another_number_of_processes_than_the_run() -> None:
    stage = ("--run", "x", "--iteration", "0", *SHAPES)
    for launcher in ("rollout", "reward", "evaluate"):
        commands = dry_run(f"{launcher}.sh", *stage, WORKERS="3")
        assert len(commands) == 3 and all(" WORLD_SIZE=3 " in command for command in commands)
    assert " --num_gpus 3 " in dry_run("train.sh", *stage, TRAIN_RANKS="3")[0]
    for launcher, variable in (("reward", "WORKERS"), ("train", "TRAIN_RANKS")):
        result = launch(f"{launcher}.sh", *stage, DRY_RUN="1", **{variable: "0"})
        assert result.returncode == 2 and f"{variable}=0 is no number of processes" in result.stderr


def test_reward_beside_its_rollout_on_request(tmp_path: Path) -> None:
    arguments = ("--run", str(tmp_path / "run"), *SHAPES, "iterations=1", "rollout.workers=1", "reward.workers=1")
    commands = dry_run("loop.sh", *arguments, "evaluate.prompts=", FOLLOW="1", FOLLOW_TIMEOUT="90")
    assert [c.split("unified_rl.")[1].split()[0] for c in commands] == ["rollout", "reward", "train", "report"]
    assert [c.endswith(" --follow --follow-timeout 90") for c in commands] == [False, True, False, False]
    assert "--follow" not in " ".join(dry_run("loop.sh", *arguments))


def test_train_on_several_machines_and_fixed_port() -> None:
    result = launch(
        "train.sh", "--run", "x", "--iteration", "0", *SHAPES, "train.ranks=8",
        DRY_RUN="1", DS_HOSTFILE="my hosts", MASTER_PORT="12345",
    )  # fmt: skip
    assert "--num_gpus 8 --hostfile 'my hosts' --master_port 12345 " in result.stdout
    assert "PDSH_SSH_ARGS_APPEND='-o BatchMode=yes -o ServerAliveInterval=15 '" in result.stdout


def test_train_on_several_machines_without_ssh() -> None:
    arguments = ("train.sh", "--run", "x", "--iteration", "0", *SHAPES)
    variables = {"DRY_RUN": "1", "DS_HOSTFILE": "hosts", "NODE_RANK": "1", "MASTER_PORT": "12345"}
    result = launch(*arguments, **variables, MASTER_ADDR="first")
    expected = "--hostfile hosts --master_addr first --no_ssh --node_rank 1 --master_port 12345 "
    assert expected in result.stdout
    result = launch(*arguments, **variables)
    assert result.returncode == 2
    assert "NODE_RANK needs MASTER_ADDR and MASTER_PORT" in result.stderr


def test_thread_count_comes_from_the_configuration() -> None:
    commands = dry_run(
        "rollout.sh", "--run", "x", "--iteration", "0", *SHAPES, "backbone.threads=7", "rollout.workers=1"
    )
    assert len(commands) == 1
    assert "OMP_NUM_THREADS=7 " in commands[0]


def test_loop_prints_every_stage_in_order(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    overrides = ["iterations=2", "rollout.workers=1", "reward.workers=1", "train.ranks=1", "data.prompts=/my data/p"]
    commands = dry_run("loop.sh", "--run", str(run), *SHAPES, *overrides)
    tail = f" --recipe gvu_janus_shapes {' '.join(overrides[:-1])} '{overrides[-1]}'"

    def one(module: str, iteration: int) -> str:
        if module == "train":
            start = f"{ENV} {DEEPSPEED} --num_gpus 1 --master_port PORT {QUIET} unified_rl.train"
        else:
            start = f"{ENV} RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 BIN/python -m unified_rl.{module}"
        return f"{start} --run '{run}' --iteration {iteration}{tail}"

    assert commands == [
        one("evaluation", 0),
        one("rollout", 0), one("reward", 0), one("train", 0),
        one("rollout", 1), one("reward", 1), one("train", 1),
        one("evaluation", 2),
        f"PYTHONPATH=ROOT BIN/python -m unified_rl.report --run '{run}'",
    ]  # fmt: skip
    assert not run.exists(), "a dry run writes nothing"
    assert shlex.split(commands[1])[-1] == "data.prompts=/my data/p"


def test_demo_packs_prompts_loops_and_summarizes() -> None:
    commands = dry_run("demo.sh", "iterations=1", "rollout.workers=1", "reward.workers=1", RUN="runs/none such")
    commands = [c for c in commands if "pack_prompts" not in c]  # absent where data/ is made already
    assert [c.split("unified_rl.")[1].split()[0] for c in commands] == [
        "evaluation", "rollout", "reward", "train", "evaluation", "report", "evaluation.summary"
    ]  # fmt: skip
    assert commands[-1] == (
        "PYTHONPATH=ROOT BIN/python -m unified_rl.evaluation.summary --run 'runs/none such' "
        "--setup-seconds-file .venv/setup_seconds"
    )


def test_evidence_runs_each_seed_with_its_control(tmp_path: Path) -> None:
    out = str(tmp_path / "evidence")
    commands = dry_run("evidence.sh", "iterations=1", "rollout.workers=1", SEEDS="2", RUN=out)
    trains = [c.split("unified_rl.train ")[1] for c in commands if "deepspeed" in c]
    fixed = "--iteration 0 --recipe gvu_janus_shapes iterations=1 rollout.workers=1"
    assert trains == [
        f"--run {out}/{kind}-{seed} {fixed} seed={seed}{control}"
        for seed in (1, 2)
        for kind, control in (("main", ""), ("shuffled", " policy.control=shuffled"))
    ]
    assert commands[-1].endswith(
        f"-m unified_rl.evaluation.evidence --method gvu --backbone janus --seeds 2 --control-seeds 2 --out {out}"
    )


@pytest.mark.parametrize("name", ["rollout.sh", "reward.sh", "train.sh", "evaluate.sh", "loop.sh"])
def test_help_is_the_header(name: str) -> None:
    result = launch(name, "--help")
    assert result.returncode == 0
    for word in ("Reads ", "Writes ", "Environment", "Usage ", "Example "):
        assert word in result.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "launch").rglob("*.sh")), ids=lambda p: p.name)
def test_launcher_has_header_and_strict_mode(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert "set -euo pipefail" in lines
    if path.name != "common.sh":
        header = lines[1 : lines.index("set -euo pipefail")]
        assert all(line.startswith("#") for line in header)
        assert 7 <= len(header) <= 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iteration", "0"], "--run RUN is required"),
        (["--run", "x"], "--iteration K is required"),
        (["--run", "x", "--iteration", "-1"], "--iteration K is required"),
        (["--run"], "--run needs a value"),
        (["--run", "x", "--iteration", "0", "--rum", "y"], "unknown argument '--rum'"),
        (["--run", "x", "--iteration", "0"], "no recipe is given; pass --recipe NAME"),
        (["--run", "x", "--iteration", "0", "--recipe", "gvu_janus_shape"], "did you mean gvu_janus_shapes?"),
        (["--run", "x", "--iteration", "0", *SHAPES, "train.rank=2"], "the nearest valid key is train.ranks"),
    ],
)
def test_wrong_arguments_end_with_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = launch("train.sh", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_loop_refuses_another_configuration_with_a_diff(tmp_path: Path) -> None:
    from unified_rl.config import open_run

    open_run(tmp_path / "run", "gvu_janus_shapes")
    result = launch("loop.sh", "--run", str(tmp_path / "run"), *SHAPES, "seed=7")
    assert result.returncode == 2
    assert "-seed: 1234" in result.stderr
    assert "+seed: 7" in result.stderr


def test_missing_interpreter_is_named(tmp_path: Path) -> None:
    result = launch("rollout.sh", "--run", "x", "--iteration", "0", PYTHON=str(tmp_path / "python"))
    assert result.returncode == 2
    assert "is no interpreter" in result.stderr
