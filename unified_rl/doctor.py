"""Checks before a long wait in a queue: will this run start here, and will it last?

One line a check: ok, warning or error, and what to do. Exit code 1 when there is an error. Nothing of the run is
changed; the file system is tried in a folder that is removed again.
"""

from __future__ import annotations

import ast
import fcntl
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from unified_rl import disk
from unified_rl.config import RunConfig, checkpoint_path, load_run_config, resolve
from unified_rl.launching import free_port
from unified_rl.ledger import Run
from unified_rl.runtime import EXIT_FAILED, EXIT_OK, StageError, command_parser, run_stage, set_stage

SETUP = Path(__file__).parents[1] / "setup.py"
ALL_REDUCE_SECONDS = 60.0
PROCESSES = 8  # at most, that meet in the all-reduce
EXAMPLE = """\
python -m unified_rl.doctor --run runs/big --recipe gvu_janus_pro_1b backbone.path=checkpoints/Janus-Pro-1B
  make doctor RUN=runs/big"""
# One rank of the all-reduce.
ALL_REDUCE = """
import datetime, sys, torch
import torch.distributed as dist
print("ready", flush=True)
backend, device, rank, world, port = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
if device == "cuda":
    torch.cuda.set_device(rank)
dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=float(sys.argv[6])), world, rank)
total = torch.ones(1, device=device)
dist.all_reduce(total)
assert total.item() == world, total.item()
dist.destroy_process_group()  # gloo's threads, left to the interpreter's end, now and then abort it
"""
LOCK = """
import fcntl, sys
file = open(sys.argv[1], "a+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(3)
"""


class Finding(NamedTuple):
    """The result of one check; `level` is ok, warning or error."""

    level: str
    name: str
    text: str


def packages(requirements: list[str]) -> Iterator[Finding]:
    """Installed versions against lines like `torch>=2.6`."""
    wrong = []
    for line in requirements:
        name, _, bound = (part.strip() for part in line.partition(">="))
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if _numbers(found) < _numbers(bound):
            wrong.append(f"{name} is {found}, {bound} or newer is needed")
    if wrong:
        yield Finding("error", "packages", f"{'; '.join(wrong)}. Run `make install`")
    else:
        yield Finding("ok", "packages", f"{len(requirements)} as setup.py asks")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]


def requirements() -> list[str]:
    """`install_requires` of setup.py; of the installed package where there is no checkout."""
    if not SETUP.is_file():
        return [line for line in importlib.metadata.requires("unified-rl") or [] if "extra ==" not in line]
    keywords = [node for node in ast.walk(ast.parse(SETUP.read_text())) if isinstance(node, ast.keyword)]
    return next(ast.literal_eval(node.value) for node in keywords if node.arg == "install_requires")


def checkpoint(config: RunConfig) -> Iterator[Finding]:
    """All files of the checkpoint are there and whole, by their headers."""
    folder = checkpoint_path(config.backbone.path)
    yield Finding("ok", "checkpoint", f"{folder}: {len(disk.weight_shapes(folder))} tensors, all files whole")


def data(config: RunConfig) -> Iterator[Finding]:
    """Shards of prompts or images are readable and enough."""
    from unified_rl.rollout.stage import asks_about_files, iteration_inputs
    from unified_rl.shards import load_prompts

    source = config.data.images if asks_about_files(config) else config.data.prompts
    yield Finding("ok", "data", f"{source}: {len(iteration_inputs(config, 0))} for an iteration")
    if config.evaluate.prompts:
        found = len(load_prompts(Path(config.evaluate.prompts)))
        yield Finding("ok", "data", f"{config.evaluate.prompts}: {found} for evaluation")


def file_system(run: Path) -> Iterator[Finding]:
    """Whether rename replaces, links are hard and locks lock, where the run will be."""
    place = run
    while not place.exists():
        place = place.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            problems = list(_tried(Path(folder)))
    except OSError as error:
        problems = [("error", f"cannot be written: {error.strerror}")]
    for level, text in problems or [("ok", "rename, hard link and lock as they should be")]:
        yield Finding(level, "file system", f"{place}: {text}")


def _tried(folder: Path) -> Iterator[tuple[str, str]]:
    old, new, link = folder / "old", folder / "new", folder / "link"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    os.replace(new, old)
    if old.read_bytes() != b"new" or new.exists():
        yield "error", "rename does not replace a file at once; take another file system"
    try:
        os.link(old, link)
    except OSError as error:
        yield "warning", f"no hard links ({error.strerror}); files will be copied instead"
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield "error", f"no locks ({error.strerror}); mount it with locks (NFS: without nolock)"
            return
        if subprocess.run([sys.executable, "-c", LOCK, str(folder / "lock")], timeout=60).returncode != 3:
            yield "error", "a second process gets a lock that is held; mount it with locks"


def training(config: RunConfig) -> Iterator[Finding]:
    """The DeepSpeed configuration fits the run's."""
    from unified_rl.train.zero3 import load_ds_config

    load_ds_config(config.train.ds_config, config.backbone.dtype, config.train.micro_batch, 1, config.train.ranks, 1.0)
    yield Finding("ok", "training", f"{config.train.ds_config} computes in {config.backbone.dtype}")


def room(run: Run) -> Iterator[Finding]:
    """The disk against the next iteration, and against the rest of the run."""
    config, free = run.config, disk.free_bytes(run.path)
    done = sum(run.manifest(k, "train") is not None for k in range(config.iterations))
    written, left = disk.expected_next(run, done), config.iterations - done
    shards = min(left, config.data.keep_rollouts + 1) if config.data.keep_rollouts else left
    checkpoints = min(left, config.train.keep_checkpoints + 1)
    whole = shards * (written.rollout + written.reward) + left * written.policy + checkpoints * written.checkpoint
    text = f"{disk.gib(free)} free, an iteration writes {disk.gib(written.total)} ({written}), "
    text += f"the rest of the run up to {disk.gib(whole)}"
    if free < written.total:
        yield Finding("error", "disk", f"{text}: the next iteration would be refused; make room")
    elif free < whole:
        yield Finding("warning", "disk", f"{text}: set data.keep_rollouts, or watch it")
    else:
        yield Finding("ok", "disk", text)


def devices(config: RunConfig) -> Iterator[Finding]:
    """What `backbone.device` says against what is here."""
    import torch

    here, wanted = torch.cuda.device_count(), config.backbone.device
    ranks, workers = config.train.ranks, max(config.rollout.workers, config.reward.workers)
    threads, cores = max(ranks, workers) * config.backbone.threads, len(os.sched_getaffinity(0))
    if wanted == "cpu":
        yield Finding("ok", "device", "CPU")
    elif not here:
        level = "warning" if wanted == "auto" else "error"
        yield Finding(
            level, "device", f"backbone.device={wanted}: torch sees no GPU here; check driver and torch's build"
        )
    elif here < ranks:
        yield Finding("error", "device", f"train.ranks={ranks} but {here} GPUs; each rank needs its own")
    elif here < workers:
        yield Finding("warning", "device", f"{workers} workers share {here} GPUs: each holds a whole copy of the model")
    else:
        yield Finding("ok", "device", f"{here} x {torch.cuda.get_device_name(0)}")
    if threads > cores:
        yield Finding("warning", "cores", f"up to {threads} threads at once on {cores} cores; lower the workers")


def all_reduce(config: RunConfig, seconds: float = ALL_REDUCE_SECONDS) -> Iterator[Finding]:
    """A sum over as many processes as there are ranks (eight at most), by NCCL or gloo, within `seconds`."""
    import torch

    gpus = 0 if config.backbone.device == "cpu" else torch.cuda.device_count()
    backend, device = ("nccl", "cuda") if gpus else ("gloo", "cpu")
    world = min(max(2, config.train.ranks), PROCESSES, gpus or PROCESSES)
    command, rest = [sys.executable, "-c", ALL_REDUCE, backend, device], [str(world), str(free_port()), str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), *rest], **pipes) for rank in range(world)]
    for process in ranks:
        process.stdout.readline()  # torch is loaded, which is no part of the time
    problems, started = [], time.monotonic()
    for rank, process in enumerate(ranks):
        try:
            errors = process.communicate(timeout=max(0.1, started + seconds - time.monotonic()))[1]
            if process.returncode:
                problems.append(f"rank {rank}: {(errors.strip().splitlines() or ['?'])[-1]}")
        except subprocess.TimeoutExpired:
            problems.append(f"rank {rank} had no answer within {seconds:.0f} s")
            process.kill()
            process.communicate()
    text = f"{backend}, {world} processes"
    if problems:
        remedy = (
            "check the network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and the firewall; NCCL_DEBUG=INFO"
        )
        yield Finding("error", "all-reduce", f"{text}: {problems[0]}; {remedy}")
    else:
        yield Finding("ok", "all-reduce", f"{text}, {time.monotonic() - started:.1f} s")


def examine(path: Path, config: RunConfig) -> Iterator[Finding]:
    """All checks; one that cannot be made is an error with its reason."""
    checks = {
        "packages": lambda: packages(requirements()), "checkpoint": lambda: checkpoint(config),
        "data": lambda: data(config), "file system": lambda: file_system(path), "training": lambda: training(config),
        "disk": lambda: room(Run(path, config)), "device": lambda: devices(config),
        "all-reduce": lambda: all_reduce(config),
    }  # fmt: skip
    for name, check in checks.items():
        try:
            yield from check()
        except (StageError, ValueError, OSError, ImportError) as error:
            yield Finding("error", name, str(error))


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    set_stage("doctor")
    parser = command_parser("unified_rl.doctor", __doc__, EXAMPLE)
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="run folder; need not exist yet")
    parser.add_argument("--recipe", metavar="NAME", help="recipe name or YAML file, for a run that does not exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values over the recipe's")
    given = parser.parse_intermixed_args(argv)
    config = resolve(given.recipe, given.overrides) if given.recipe else load_run_config(given.run)
    errors = 0
    for finding in examine(given.run, config):
        print(f"{finding.level:8}{finding.name:12} {finding.text}", flush=True)
        errors += finding.level == "error"
    return EXIT_FAILED if errors else EXIT_OK


if __name__ == "__main__":
    run_stage(main)
