"""A loop of two ranks in a run folder: started, watched from outside, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from unified_rl.launching import TRAINING_STAGES
from unified_rl.ledger import iteration_name
from unified_rl.manifests import MANIFEST_NAME
from unified_rl.train.checkpoints import MARKER

ROOT = Path(__file__).parents[2]
JUDGE = Path(__file__).with_name("judge")
ITERATIONS = 2
ALL_STAGES = [(stage, iteration) for iteration in range(ITERATIONS) for stage in TRAINING_STAGES]
SHARDS = 4
SETTINGS = [
    f"iterations={ITERATIONS}",
    f"data.prompts_per_iteration={2 * SHARDS}",
    "rollout.workers=2",
    "rollout.group_size=4",
    "rollout.groups_per_shard=2",
    "rollout.groups_per_batch=2",
    "reward.workers=2",
    "reward.batch_size=8",
    "reward.max_failed_share=0",
    "train.ranks=2",
    "train.groups_per_step=4",
    "train.micro_batch=8",
    "evaluate.prompts=''",
]
GVU = ("gvu_janus_shapes",)
# An iteration of each loop, about pictures that the Generator draws of the prompts.
ASK_SOLVE_GENERATE = (
    "self_consistency_janus_shapes", "self_consistency.imageless=true", "self_consistency.understanding=1",
    "self_consistency.generation=1", "self_consistency.solver_groups_per_step=2",
)  # fmt: skip
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DRY_RUN")},
    "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
}  # fmt: skip
BETWEEN, COMMIT = "between", "commit"
PLACES = (BETWEEN, *TRAINING_STAGES, COMMIT)
END_SECONDS = 900
POLL_SECONDS = 0.05
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Member:
    """A process of the loop; `stage` and `iteration` are empty and -1 unless it is a worker.

    `cpu` is the CPU time in seconds that it and its ended children have taken.
    """

    pid: int
    words: tuple[str, ...]
    cpu: float

    @property
    def module(self) -> str:
        """What `python -m` runs in it."""
        return self.words[self.words.index("-m") + 1] if "-m" in self.words[:-1] else ""

    @property
    def stage(self) -> str:
        """The stage that it works on."""
        name = self.module.removeprefix("unified_rl.")
        return name if name in TRAINING_STAGES and name != self.module else ""

    @property
    def iteration(self) -> int:
        """The iteration that it works on."""
        return int(self.words[self.words.index("--iteration") + 1]) if self.stage else -1

    @property
    def launches(self) -> bool:
        """Whether it is one of the launchers above the workers."""
        return self.module.startswith("deepspeed.") or any(word.endswith(".sh") for word in self.words[:3])


class Loop:
    """The command of one run folder. A session of its own holds all processes of a start.

    Args:
        run: Run folder.
        prompts: Prompt shards.
        log: Grows by what every start prints.
        method: Recipe, and what else distinguishes it from the drill's loop.
        prefetch: Whether stages start before their turn.
    """

    def __init__(self, run: Path, prompts: Path, log: Path, method: Sequence[str] = GVU, prefetch: bool = True) -> None:
        self.run, self.log = run, log
        self.environment = {**ENVIRONMENT, "PREFETCH": str(int(prefetch))}
        recipe, *overrides = method
        self.settings = ["--run", str(run), "--recipe", recipe, f"data.prompts={prompts}", *SETTINGS, *overrides]
        self.process: subprocess.Popen[bytes] | None = None
        self._said = 0  # bytes of the log before this start
        self._started = 0.0

    def start(self, judge_is_nan: bool = False) -> None:
        """The same command every time."""
        path = os.pathsep.join([str(ROOT), str(JUDGE)]) if judge_is_nan else str(ROOT)
        self._started = time.time()
        with open(self.log, "ab") as log:
            self._said = log.tell()
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "launch/loop.sh"), *self.settings],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**self.environment, "PYTHONPATH": path},
            )  # fmt: skip

    def stage_again(self, stage: str, iteration: int) -> tuple[int, str]:
        """Exit code and output of a stage's launcher beside whatever runs."""
        command = ["bash", str(ROOT / f"launch/{stage}.sh"), "--iteration", str(iteration), *self.settings]
        done = subprocess.run(
            command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=END_SECONDS, start_new_session=True,
        )  # fmt: skip
        return done.returncode, done.stdout

    @property
    def running(self) -> bool:
        """Whether the loop's own launcher lives."""
        return self.process is not None and self.process.poll() is None

    def members(self) -> list[Member]:
        """All processes of this start, orphans too."""
        return list(members_of(self.process.pid)) if self.process else []

    def end(self, seconds: float = END_SECONDS) -> int | None:
        """Exit code once the launcher has ended; None when it has not within `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """SIGKILL of everything, at once."""
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.wait_for_orphans(30)

    def wait_for_orphans(self, seconds: float) -> bool:
        """Whether no process of this start is left within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def said(self) -> str:
        """What this start has printed."""
        with open(self.log, "rb") as log:
            log.seek(self._said)
            return log.read().decode(errors="replace")

    # Where it is

    def next_stage(self) -> tuple[str, int] | None:
        """The first stage that is not committed; None when all are."""
        done = self.stages_done()
        return ALL_STAGES[done] if done < len(ALL_STAGES) else None

    def stages_done(self) -> int:
        """How many stages are committed before the first that is not."""
        whole = [(self.folder(*stage) / MANIFEST_NAME).is_file() for stage in ALL_STAGES]
        return [*whole, False].index(False)

    def folder(self, stage: str, iteration: int) -> Path:
        """Folder of a stage."""
        return self.run / iteration_name(iteration) / stage

    def trained(self, iteration: int) -> bool:
        """Whether the training of an iteration has read all that it will read."""
        return (self.run / "checkpoints" / iteration_name(iteration) / MARKER).is_file()

    def committing(self, stage: str, iteration: int) -> bool:
        """Whether all that the stage computes is on disk, and not much more than its commit is left."""
        folder = self.folder(stage, iteration)
        if stage == "train":
            metrics = folder / "metrics.jsonl"  # of this start: an earlier one may have left its own
            return self.trained(iteration) or metrics.is_file() and metrics.stat().st_mtime > self._started
        return len(list(folder.glob("shard-*.tar"))) == SHARDS

    def place(self) -> tuple[str, int]:
        """(place, iteration) of the moment; between stages the iteration is -1."""
        workers = self.workers()
        if not workers:
            return BETWEEN, -1
        stage, iteration = workers[0].stage, workers[0].iteration
        return COMMIT if self.committing(stage, iteration) else stage, iteration

    def workers(self) -> list[Member]:
        """Workers of the stage whose turn it is; those of later stages stand by."""
        turn = self.next_stage()
        return [m for m in self.members() if (m.stage, m.iteration) == turn]

    def cpu(self) -> float:
        """CPU seconds of this start so far: a clock that other work on the machine does not move."""
        return sum(member.cpu for member in self.members())

    def let_run(self, seconds: float, place: str | None = None) -> bool:
        """Wait until it has taken so many CPU seconds or left the place; whether it still runs."""
        start = self.cpu()
        while self.running and place in (None, self.place()[0]) and self.cpu() < start + seconds:
            time.sleep(POLL_SECONDS)
        return self.running

    def watch(self) -> dict[str, float]:
        """Follow a start to its end; mean CPU seconds of a visit to each place."""
        seconds, visits, last, since = dict.fromkeys(PLACES, 0.0), dict.fromkeys(PLACES, 0), "", 0.0
        while self.running:
            here, now = self.place()[0], self.cpu()
            if last:
                seconds[last] += max(now - since, 0.0)
            visits[here] += here != last
            last, since = here, now
            time.sleep(POLL_SECONDS)
        return {place: seconds[place] / max(visits[place], 1) for place in PLACES}


def members_of(session: int) -> Iterator[Member]:
    """Living processes of a session."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()  # state, parent, group, session, ...
            if int(fields[3]) == session and fields[0] not in "ZX":
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                yield Member(int(folder.name), tuple(words[:-1]), sum(map(int, fields[11:15])) / TICKS)
        except (OSError, ValueError):  # it has just ended
            continue
