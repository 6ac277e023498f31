"""Checks before a long wait in a queue: will this run start here, and will it last?

One line a check: ok, warning or error, and what to do. Exit code 1 when there is an error. Nothing of the run is
changed; the file system is tried in a folder that is removed again.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unified_rl import disk
from unified_rl.config import RunConfig, checkpoint_path, load_run_config, resolve
from unified_rl.ledger import Run
from unified_rl.runtime import EXIT_FAILED, EXIT_OK, StageError, run_stage, set_stage

SETUP = Path(__file__).parents[1] / "setup.py"
ALL_REDUCE_SECONDS = 60.0
PROCESSES = 8  # at most, that meet in the all-reduce
EXAMPLE = """examples:
  python -m unified_rl.doctor --run runs/big --recipe gvu_janus_pro_1b backbone.path=checkpoints/Janus-Pro-1B
  make doctor RUN=runs/big"""
# One rank of the all-reduce: its arguments are the backend and the device.
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
"""
LOCKED = """
import fcntl, sys
file = open(sys.argv[1], "a+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(3)
"""


@dataclass(frozen=True)
class Finding:
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
        if bound and _numbers(found) < _numbers(bound):
            wrong.append(f"{name} is {found}, {bound} or newer is needed")
    if wrong:
        yield Finding("error", "packages", f"{'; '.join(wrong)}. Run `make install`")
    else:
        yield Finding("ok", "packages", f"{len(requirements)} as setup.py asks")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def requirements() -> list[str]:
    """`install_requires` of setup.py; of the installed package where there is no checkout."""
    if not SETUP.is_file():
        return [r for r in importlib.metadata.requires("unified-rl") or [] if "extra ==" not in r]
    for node in ast.walk(ast.parse(SETUP.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return ast.literal_eval(node.value)
    return []


def devices(config: RunConfig) -> Iterator[Finding]:
    """What `backbone.device` says against what is here."""
    import torch

    here, wanted = torch.cuda.device_count() if torch.cuda.is_available() else 0, config.backbone.device
    ranks = config.train.ranks
    workers = max(config.rollout.workers, config.reward.workers)
    if wanted == "cpu" or (wanted == "auto" and not here):
        level = "warning" if wanted == "auto" else "ok"
        yield Finding(level, "device", "CPU" + ("; there is no GPU here that torch can use" if level != "ok" else ""))
        threads, cores = max(ranks, workers) * config.backbone.threads, len(os.sched_getaffinity(0))
        if threads > cores:
            yield Finding("warning", "cores", f"up to {threads} threads at once on {cores} cores; lower the workers")
    elif not here:
        yield Finding("error", "device", "backbone.device=cuda but torch sees no GPU: check driver and torch's build")
    elif here < ranks:
        yield Finding("error", "device", f"train.ranks={ranks} but {here} GPUs; each rank needs its own")
    elif here < workers:
        yield Finding("warning", "device", f"{workers} workers share {here} GPUs: each holds a whole copy of the model")
    else:
        yield Finding("ok", "device", f"{here} x {torch.cuda.get_device_name(0)}")


def all_reduce(config: RunConfig, seconds: float = ALL_REDUCE_SECONDS) -> Iterator[Finding]:
    """A sum over as many processes as there are ranks (eight at most), by NCCL or gloo, within `seconds`."""
    import torch

    from unified_rl.launching import free_port

    gpus = torch.cuda.device_count() if config.backbone.device != "cpu" and torch.cuda.is_available() else 0
    backend, device = ("nccl", "cuda") if gpus else ("gloo", "cpu")
    world = max(1, min(max(2, config.train.ranks), PROCESSES, gpus or PROCESSES))
    command, port = [sys.executable, "-c", ALL_REDUCE, backend, device], free_port()
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port), str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    for process in ranks:
        process.stdout.readline()  # torch is loaded, which is no part of the time
    problem, started = "", time.monotonic()
    for rank, process in enumerate(ranks):
        try:
            left = seconds - (time.monotonic() - started)
            errors = process.communicate(timeout=max(0.1, left))[1]
            if process.returncode and not problem:
                problem = f"rank {rank}: {(errors.strip().splitlines() or ['?'])[-1]}"
        except subprocess.TimeoutExpired:
            problem = problem or f"rank {rank} had no answer within {seconds:.0f} s"
            process.kill()
            process.communicate()
    remedy = "check the network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and the firewall; NCCL_DEBUG=INFO"
    if problem:
        yield Finding("error", "all-reduce", f"{backend}, {world} processes: {problem}; {remedy}")
    else:
        yield Finding("ok", "all-reduce", f"{backend}, {world} processes, {time.monotonic() - started:.1f} s")


def file_system(run: Path) -> Iterator[Finding]:
    """Whether rename replaces, links are hard and locks lock, where the run will be."""
    place = run
    while not place.exists():
        place = place.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            problems = _tried(Path(folder))
    except OSError as error:
        yield Finding("error", "file system", f"{place} cannot be written: {error.strerror}")
        return
    for level, problem in problems:
        yield Finding(level, "file system", f"{place}: {problem}")
    if not problems:
        yield Finding("ok", "file system", f"{place}: rename, hard link and lock as they should be")


def _tried(folder: Path) -> list[tuple[str, str]]:
    import fcntl

    problems = []
    old, new, link = folder / "old", folder / "new", folder / "link"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    os.replace(new, old)
    if old.read_bytes() != b"new" or new.exists():
        problems.append(("error", "rename does not replace a file at once; take another file system"))
    try:
        os.link(old, link)
    except OSError as error:
        problems.append(("warning", f"no hard links ({error.strerror}); files will be copied instead"))
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            problems.append(("error", f"no locks ({error.strerror}); mount it with locks (NFS: without nolock)"))
        else:
            if subprocess.run([sys.executable, "-c", LOCKED, str(folder / "lock")], timeout=60).returncode != 3:
                problems.append(("error", "a second process gets a lock that is held; mount it with locks"))
    return problems


def checkpoint(config: RunConfig) -> Iterator[Finding]:
    """All files of the checkpoint are there and whole, by their headers."""
    folder = checkpoint_path(config.backbone.path)
    shapes = disk.weight_shapes(folder)
    yield Finding("ok", "checkpoint", f"{folder}: {len(shapes)} tensors, all files whole")


def prompts(config: RunConfig) -> Iterator[Finding]:
    """Prompt shards are readable and enough."""
    from unified_rl.rollout.groups import iteration_prompts
    from unified_rl.shards import load_prompts

    found = load_prompts(Path(config.data.prompts))
    iteration_prompts(found, config.data.prompts_per_iteration, config.seed, 0)
    yield Finding("ok", "prompts", f"{len(found)} in {config.data.prompts}")
    if config.evaluate.prompts:
        held = load_prompts(Path(config.evaluate.prompts))
        yield Finding("ok", "prompts", f"{len(held)} in {config.evaluate.prompts}, for evaluation")


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
    shards = left if not config.data.keep_rollouts else min(left, config.data.keep_rollouts + 1)
    checkpoints = min(left, config.train.keep_checkpoints + 1)
    whole = shards * (written.rollout + written.reward) + left * written.policy + checkpoints * written.checkpoint
    text = f"{disk.gib(free)} free, an iteration writes {disk.gib(written.total)} ({disk.shown(written)})"
    if free < written.total:
        yield Finding("error", "disk", f"{text}: the next iteration would be refused; make room")
    elif free < whole:
        advice = "set data.keep_rollouts, or watch it"
        yield Finding("warning", "disk", f"{text}, the rest of the run up to {disk.gib(whole)}: {advice}")
    else:
        yield Finding("ok", "disk", f"{text}, the rest of the run up to {disk.gib(whole)}")


def examine(path: Path, config: RunConfig) -> Iterator[Finding]:
    """All checks; one that cannot be made is an error with its reason."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", lambda: packages(requirements())),
        ("checkpoint", lambda: checkpoint(config)),
        ("prompts", lambda: prompts(config)),
        ("file system", lambda: file_system(path)),
        ("training", lambda: training(config)),
        ("disk", lambda: room(Run(path, config))),
        ("device", lambda: devices(config)),
        ("all-reduce", lambda: all_reduce(config)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except (StageError, ValueError, OSError, ImportError) as error:
            yield Finding("error", name, str(error))


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    set_stage("doctor")
    parser = argparse.ArgumentParser(
        prog="python -m unified_rl.doctor", description=__doc__, epilog=EXAMPLE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="run folder; need not exist yet")
    parser.add_argument("--recipe", metavar="NAME", help="recipe name or YAML file, for a run that does not exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values over the recipe's")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.recipe is None:
        config = load_run_config(arguments.run)
    else:
        config = resolve(arguments.recipe, arguments.overrides)
    errors = 0
    for finding in examine(arguments.run, config):
        print(f"{finding.level:8}{finding.name:12} {finding.text}", flush=True)
        errors += finding.level == "error"
    return EXIT_FAILED if errors else EXIT_OK


if __name__ == "__main__":
    run_stage(main)
