"""SLURM: golden scripts, the chain of jobs, submission against a recording `sbatch`, and the batch script's signals."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.launching import ROOT, environment, launch
from unified_rl.config import ConfigError, resolve
from unified_rl.slurm import Job, Site, plan_jobs, read_site, render, stages_ahead

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = '/data/it\'s "a" $(touch gone) `touch gone`; %j @RUN@ \\n'
CONFIG = resolve(
    "gvu_janus_pro_1b",
    ["backbone.path=/models/janus", "data.prompts=/data/prompts", "backbone.threads=6", "rollout.workers=4",
     "reward.workers=2", "train.ranks=8"],
)  # fmt: skip
SITES = {
    "plain": Site(python="/env/bin/python"),
    "full": Site(
        account="team", partition="gpu", time="1-00:00:00", time_train="08:00:00", gpu_option="--gres=gpu:h100:",
        cpus_per_task=12, train_nodes=2, sbatch_options="--qos=long --exclude=node[07-09]",
        srun_options="--mpi=none", container="apptainer exec --nv '/my images/rl.sif'", python="/opt/my env/bin/python",
        modules="cuda/12.8 gcc/12", setup="export NCCL_SOCKET_IFNAME=ib0", signal_seconds=600, max_requeues=3,
    ),
    "deepspeed": Site(python="/env/bin/python", train_nodes=2, train_launcher="deepspeed"),
    "torchrun": Site(python="/env/bin/python", train_nodes=2, train_launcher="torchrun"),
}  # fmt: skip
CASES = [
    ("rollout", "plain", "/runs/x"), ("reward", "plain", "/runs/x"), ("train", "plain", "/runs/x"),
    ("evaluate", "plain", "/runs/x"), ("report", "plain", "/runs/x"), ("train", "full", "/runs/x"),
    ("train", "deepspeed", "/runs/x"), ("train", "torchrun", "/runs/x"), ("rollout", "full", HOSTILE),
    ("reward", "plain", HOSTILE), ("evaluate", "plain", HOSTILE), ("report", "plain", HOSTILE),
    ("train", "full", HOSTILE), ("train", "deepspeed", HOSTILE), ("train", "torchrun", HOSTILE),
]  # fmt: skip
SHAPES = ("--recipe", "gvu_janus_shapes", "iterations=2", "rollout.workers=2")


def rendered(stage: str, site: str, run: str) -> str:
    text = render(Job(stage, 3), Path(run), CONFIG, SITES[site])
    return text.replace(f"DIRECTORY={shlex.quote(os.getcwd())}", "DIRECTORY=HERE").replace(
        f"ROOT={shlex.quote(str(ROOT))}", "ROOT=ROOT"
    )


@pytest.mark.parametrize(("stage", "site", "run"), CASES)
def test_golden_script(stage: str, site: str, run: str) -> None:
    """`GOLDEN=write` renews the files; read the difference before it is committed."""
    path = GOLDEN / f"{stage}-{site}{'-hostile' if run == HOSTILE else ''}.sbatch"
    text = rendered(stage, site, run)
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    assert not re.search(r"(?<!for )@[A-Z]+@", text.replace("@RUN@ \\n", ""))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_golden_scripts_are_clean_under_shellcheck() -> None:
    result = subprocess.run(["shellcheck", *map(str, sorted(GOLDEN.glob("*.sbatch")))], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("run", ["/runs/x", HOSTILE, "/data/two\nlines"])
@pytest.mark.parametrize(("stage", "site"), sorted({case[:2] for case in CASES}))
def test_values_reach_the_script_as_they_are(stage: str, site: str, run: str, tmp_path: Path) -> None:
    text = render(Job(stage, 3), Path(run), CONFIG, SITES[site])
    head = text[: text.index("fail() {")]
    shown = subprocess.run(
        ["bash", "-c", f'{head}\nprintf "%s\\0" "$RUN" "$DIRECTORY" "$MARK" "${{STEP[@]}}" "${{COMMAND[@]}}"'],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout.split("\0")[:-1]  # fmt: skip
    assert shown[:3] == [run, os.getcwd(), f"{run}/iter_0003/train/manifest.json" if stage == "train" else ""]
    module = f"unified_rl.{'evaluation' if stage == 'evaluate' else stage}"
    command = [SITES[site].python, module, "--run", run, *([] if stage == "report" else ["--iteration", "3"])]
    assert shown[-len(command) :] == command
    assert site != "full" or shown[-len(command) - 2 : -len(command)] == ["--nv", "/my images/rl.sif"]
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"#SBATCH -\S+", line) for line in lines)
    assert text.splitlines()[1 : 1 + len(lines)] == lines, "sbatch stops reading at the first other line"


def test_chain_of_two_iterations() -> None:
    stages = [
        ("evaluate", 0), ("rollout", 0), ("reward", 0), ("train", 0), ("rollout", 1), ("reward", 1), ("train", 1),
        ("evaluate", 2), ("report", 2),
    ]  # fmt: skip
    assert [(job.name, job.after) for job in plan_jobs(stages)] == [
        ("evaluate-0000", ()),
        ("rollout-0000", ()),
        ("reward-0000", ("rollout-0000",)),
        ("train-0000", ("reward-0000",)),
        ("rollout-0001", ("train-0000",)),
        ("reward-0001", ("rollout-0001",)),
        ("train-0001", ("reward-0001",)),
        ("evaluate-0002", ("train-0001",)),
        ("report-0002", ("evaluate-0000", "evaluate-0002")),
    ]


def test_reward_that_follows_starts_with_its_rollout(tmp_path: Path, cluster: dict[str, str]) -> None:
    run = tmp_path / "run"
    result = submit("loop", "--run", str(run), *SHAPES, "iterations=1", FOLLOW="1", FOLLOW_TIMEOUT="1800", **cluster)
    assert result.returncode == 0, result.stderr
    given = [re.findall(r"<--dependency=(.*?)>", line) for line in record(cluster)]
    assert given == [[], [], ["after:102"], ["afterok:103"], ["afterok:104"], ["afterok:101:105"]]
    commands = [
        re.findall(r"^COMMAND=\((.*)\)$", path.read_text(), re.M) for path in sorted(run.glob("slurm/*.sbatch"))
    ]
    follows = [command.endswith("--iteration 0 --follow --follow-timeout 1800") for (command,) in commands]
    assert follows == [False, False, False, True, False, False]  # evaluate, evaluate, report, reward, rollout, train


def test_what_is_committed_is_not_waited_for() -> None:
    jobs = plan_jobs([("train", 1), ("evaluate", 2), ("report", 2)])
    assert [job.after for job in jobs] == [(), ("train-0001",), ("evaluate-0002",)]


def test_only_so_many_iterations_ahead() -> None:
    stages = [
        ("train", 1),
        ("evaluate", 2),
        ("rollout", 2),
        ("reward", 2),
        ("train", 2),
        ("evaluate", 3),
        ("report", 3),
    ]
    assert stages_ahead(stages, 1) == [("train", 1), ("evaluate", 2)]
    assert stages_ahead(stages, 2) == stages_ahead(stages, 0) == stages


def test_example_site_file_has_every_setting_at_its_default() -> None:
    path = ROOT / "launch" / "slurm" / "site.env.example"
    assert read_site(path) == Site()
    keys = re.findall(r"^([A-Z_]+)=", path.read_text(), re.MULTILINE)
    assert [key.lower() for key in keys] == list(Site.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ACOUNT=x", "line 1: unknown key ACOUNT; the nearest valid key is ACCOUNT"),
        ("\nTIME=1 2", "line 2: not of the form KEY=VALUE"),
        ("MAX_REQUEUES=-1", "is not a whole number"),
        ("TRAIN_NODES=0", "TRAIN_NODES=0 must be at least 1"),
        ("TRAIN_LAUNCHER=mpirun", "not one of srun, deepspeed, torchrun"),
        ("SETUP='open", "line 1: No closing quotation"),
    ],
)
def test_wrong_settings_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "site.env").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_site(tmp_path / "site.env")


def test_option_that_a_script_cannot_carry_is_refused() -> None:
    with pytest.raises(ConfigError, match="--comment=my run"):
        render(Job("train", 0), Path("/r"), CONFIG, Site(sbatch_options="'--comment=my run'"))


def test_no_gpus_on_request() -> None:
    assert "gpus" not in render(Job("rollout", 0), Path("/r"), CONFIG, Site(gpu_option=""))
    assert "ACCELERATOR=cpu" in render(Job("rollout", 0), Path("/r"), CONFIG, Site(gpu_option=""))


# Submission

FAKE = r"""#!/bin/bash
[[ "$*" != "--oneliner show job"* ]] || { echo "JobId=41 JobName=x ${STATE:-} Requeue=1"; exit; }
{ printf '%s' "${0##*/}"; printf ' <%s>' "$@"; echo; } >>"$RECORD"
case ${0##*/} in
  sbatch) n=$(grep -c ^sbatch "$RECORD"); [[ $n != "${REFUSE:-}" ]] || exit 1; echo "$((100 + n));cluster" ;;
  squeue) echo "${QUEUED:-}" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A PATH whose SLURM commands only record their arguments, one `NAME <ARGUMENT> ...` a line."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sbatch", "scontrol", "squeue", "scancel"):
        (tools / name).write_text(FAKE)
        (tools / name).chmod(0o755)
    (tmp_path / "site.env").write_text("PYTHON=/env/bin/python\n")
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "SLURM_SITE": str(tmp_path / "site.env"),
    }


def record(cluster: dict[str, str]) -> list[str]:
    path = Path(cluster["RECORD"])
    return path.read_text().splitlines() if path.exists() else []


def submit(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return launch("slurm/submit.sh", *arguments, **extra)


def test_submission_chains_the_jobs(tmp_path: Path, cluster: dict[str, str]) -> None:
    run = tmp_path / "it's $(touch gone)"
    result = submit("loop", "--run", str(run), *SHAPES, **cluster)
    assert result.returncode == 0, result.stderr
    folder = run / "slurm"
    start = f"sbatch <--parsable> <--chdir={folder}/logs>"
    names = ["evaluate-0000", "rollout-0000", "reward-0000", "train-0000", "rollout-0001", "reward-0001", "train-0001",
             "evaluate-0002", "report-0002"]  # fmt: skip
    after = ["", "", "102", "103", "104", "105", "106", "107", "101:108"]
    assert record(cluster) == [
        f"{start}{f' <--dependency=afterok:{a}>' if a else ''} <{folder}/{name}.sbatch>"
        for name, a in zip(names, after, strict=True)
    ]
    expected = [f"{number} {name}" for number, name in enumerate(names, 101)]
    assert result.stdout.splitlines() == expected
    assert (folder / "jobs").read_text().splitlines() == expected
    assert (folder / "config.yaml").read_text() == (run / "config.yaml").read_text()
    assert (folder / "logs").is_dir()


def test_dry_run_prints_scripts_and_commands_and_writes_nothing(tmp_path: Path, cluster: dict[str, str]) -> None:
    run = tmp_path / "a run"
    result = submit("loop", "--dry-run", "--run", str(run), *SHAPES, "iterations=1", **cluster)
    assert result.returncode == 0, result.stderr
    scripts = re.findall(r"^==> (.*) <==\n#!/usr/bin/env bash$", result.stdout, re.MULTILINE)
    names = ["evaluate-0000", "rollout-0000", "reward-0000", "train-0000", "evaluate-0001", "report-0001"]
    assert scripts == [f"{run}/slurm/{name}.sbatch" for name in names]
    commands = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("sbatch ")]
    assert [command[-1] for command in commands] == scripts
    assert [c[3] if len(c) == 5 else "" for c in commands] == [
        "", "", "--dependency=afterok:%rollout-0000", "--dependency=afterok:%reward-0000",
        "--dependency=afterok:%train-0000", "--dependency=afterok:%evaluate-0000:%evaluate-0001",
    ]  # fmt: skip
    assert record(cluster) == []
    assert not run.exists()


def test_one_stage_is_one_job(tmp_path: Path, cluster: dict[str, str]) -> None:
    result = submit("train", "--run", str(tmp_path / "run"), "--iteration", "1", *SHAPES, **cluster)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "101 train-0001\n"


def test_refused_submission_cancels_what_went_before(tmp_path: Path, cluster: dict[str, str]) -> None:
    result = submit("loop", "--run", str(tmp_path / "run"), *SHAPES, REFUSE="3", **cluster)
    assert result.returncode == 1
    assert "sbatch refused reward-0000" in result.stderr
    assert record(cluster)[-1] == "scancel <101> <102>"


def test_second_submission_of_what_is_queued_is_refused(tmp_path: Path, cluster: dict[str, str]) -> None:
    arguments = ("loop", "--run", str(tmp_path / "run"), *SHAPES)
    assert submit(*arguments, **cluster).returncode == 0
    result = submit(*arguments, QUEUED="7\n104", **cluster)
    assert result.returncode == 1
    assert "job 104 (train-0000) of this run is still queued or running" in result.stderr
    assert submit(*arguments, QUEUED="7", **cluster).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lop", "--run", "r"], "the first argument is loop or a stage"),
        (["loop", "--run", "r", "--iteration", "0"], "loop takes no --iteration"),
        (["train", "--run", "r"], "--iteration K is required"),
        (["loop", "--run", "r", *SHAPES, "train.rank=2"], "the nearest valid key is train.ranks"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, cluster: dict[str, str]) -> None:
    result = submit(*arguments, **cluster, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "r").exists()


def test_numbers_of_processes_for_one_machine_are_refused(tmp_path: Path, cluster: dict[str, str]) -> None:
    result = submit("loop", "--run", str(tmp_path / "run"), *SHAPES, **cluster, WORKERS="2")
    assert result.returncode == 2
    assert "WORKERS and TRAIN_RANKS count processes of one machine" in result.stderr


def test_missing_site_file_and_missing_sbatch_are_named(tmp_path: Path, cluster: dict[str, str]) -> None:
    arguments = ("loop", "--run", str(tmp_path / "run"), *SHAPES)
    result = submit(*arguments, **{**cluster, "SLURM_SITE": str(tmp_path / "none.env")})
    assert result.returncode == 2
    assert "none.env does not exist: copy launch/slurm/site.env.example" in result.stderr
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "dirname", "basename"):
        (bare / name).symlink_to(shutil.which(name))
    result = submit(*arguments, **{**cluster, "PATH": str(bare)})
    assert result.returncode == 1
    assert "sbatch is not on PATH" in result.stderr


# The batch script

STAGE = """#!/bin/bash
echo "started RANK=$RANK" >>"$RECORD"
trap 'echo stopped >>"$RECORD"; exit {code}' USR2
for ((i = 0; i < {tenths}; i++)); do sleep .1; done
exit {end}
"""


def batch(tmp_path: Path, cluster: dict[str, str], stage: str, job: Job, **extra: str) -> subprocess.Popen[str]:
    """A rendered script under a `srun` that executes its command, with the environment of sbatch."""
    (tmp_path / "bin" / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 exec "$@"\n'
    )
    (tmp_path / "bin" / "srun").chmod(0o755)
    python = tmp_path / "my python"
    python.write_text(stage)
    python.chmod(0o755)
    text = render(job, tmp_path / "run", CONFIG, Site(python=str(python), max_requeues=2))
    script = tmp_path / "script.sbatch"
    script.write_text(text)
    variables = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0"}
    if job.stage != "train":
        variables["SLURM_ARRAY_JOB_ID"] = "40"
    return subprocess.Popen(
        ["bash", str(script)], env={**environment(**cluster), **variables, **extra}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def wait_started(cluster: dict[str, str]) -> None:
    deadline = time.monotonic() + 30
    while not any(line.startswith("started") for line in record(cluster)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)  # the trap of the stage is set after the line


def test_batch_script_ends_with_the_code_of_the_stage(tmp_path: Path, cluster: dict[str, str]) -> None:
    process = batch(tmp_path, cluster, STAGE.format(code=75, tenths=0, end=3), Job("rollout", 0))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert record(cluster) == ["started RANK=3"]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize("code", [75, 1])
def test_a_warning_stops_the_stage_and_requeues_its_task(
    number: signal.Signals, code: int, tmp_path: Path, cluster: dict[str, str]
) -> None:
    process = batch(tmp_path, cluster, STAGE.format(code=code, tenths=300, end=0), Job("rollout", 0))
    wait_started(cluster)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert record(cluster) == ["started RANK=3", "stopped", "scontrol <requeue> <40_3>"]


def test_requeues_are_bounded(tmp_path: Path, cluster: dict[str, str]) -> None:
    stage = STAGE.format(code=75, tenths=0, end=75)
    process = batch(tmp_path, cluster, stage, Job("reward", 0), SLURM_RESTART_COUNT="2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped on request after 2 requeues" in output
    assert record(cluster) == ["started RANK=3"]


@pytest.mark.parametrize(
    ("state", "requeues"),
    [("RUNNING Reason=None", True), ("COMPLETING Reason=TimeLimit", True), ("COMPLETING Reason=None", False)],
)
def test_a_cancelled_job_does_not_come_back(
    state: str, requeues: bool, tmp_path: Path, cluster: dict[str, str]
) -> None:
    stage = STAGE.format(code=75, tenths=0, end=75)
    process = batch(tmp_path, cluster, stage, Job("train", 0), STATE=f"JobState={state}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert ("scontrol <requeue> <41>" in record(cluster)) == requeues
    assert ("cancelled, or already back in the queue" in output) != requeues


def test_training_that_ends_well_without_its_mark_has_failed(tmp_path: Path, cluster: dict[str, str]) -> None:
    process = batch(tmp_path, cluster, STAGE.format(code=75, tenths=0, end=0), Job("train", 0))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "ended without" in output


def test_interpreter_of_the_submitter_is_the_default() -> None:
    assert f"COMMAND=({shlex.quote(sys.executable)} " in render(Job("train", 0), Path("/r"), CONFIG, Site())
