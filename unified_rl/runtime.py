"""What every stage process needs: ranks, seeds, determinism, signals, exit codes, progress lines.

Nothing heavy is imported at module level, so that `--help`, `status` and error messages are immediate.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, the same command continues

PLAIN_LINE_SECONDS = 10.0
# SLURM numbers the steps of srun from 0; a batch script and an interactive shell have numbers near 2**32, or none.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class StageError(ValueError):
    """An expected failure: the message names what is wrong and what to do, a traceback adds nothing."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True)
class Ranks:
    """Position of this process among the processes of its stage."""

    rank: int
    local_rank: int
    world_size: int


def _integer(variable: str) -> int:
    value = os.environ.get(variable)
    if value is None:
        raise StageError(f"environment variable {variable} is not set although the process has a rank")
    try:
        return int(value)
    except ValueError:
        raise StageError(f"environment variable {variable}={value!r} is not a whole number") from None


def in_srun_task() -> bool:
    """Whether srun started this process: a batch script has SLURM_PROCID=0 too, but what it starts is alone."""
    return (
        "SLURM_PROCID" in os.environ
        and "SLURM_STEP_ID" in os.environ
        and _integer("SLURM_STEP_ID") < FIRST_SPECIAL_STEP
    )


def current_ranks() -> Ranks:
    """Ranks from RANK/LOCAL_RANK/WORLD_SIZE, else srun's SLURM_PROCID/SLURM_LOCALID/SLURM_NTASKS, else 0/0/1.

    Raises:
        StageError: a variable is missing, no number or out of range; the message names it.
    """
    if "RANK" in os.environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif in_srun_task():
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    else:
        return Ranks(0, 0, 1)
    rank, local_rank, world_size = (_integer(name) for name in names)
    if world_size < 1:
        raise StageError(f"environment variable {names[2]}={world_size} must be at least 1")
    for name, value in ((names[0], rank), (names[1], local_rank)):
        if not 0 <= value < world_size:
            raise StageError(f"environment variable {name}={value} must lie in 0..{world_size - 1} ({names[2]})")
    return Ranks(rank, local_rank, world_size)


def sample_seed(run_seed: int, iteration: int, prompt_id: str, sample: int) -> int:
    """Seed in 0..2**63-1 of one image: the same whatever the number of workers or the batch it is drawn in."""
    text = f"{run_seed}|{iteration}|{prompt_id}|{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def set_cpu_threads(n: int) -> None:
    """Use `n` CPU threads for tensor maths here and in child processes."""
    if n < 1:
        raise StageError(f"the number of CPU threads must be at least 1, not {n}")
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(n)
    import torch

    torch.set_num_threads(n)


def enable_determinism() -> None:
    """Choose reproducible kernels. Operations without one warn, they do not stop a run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every buffer would be written once more
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


class StopRequest:
    """Context manager: TERM, USR2 and INT set `.requested`, the stage ends after its current unit of work.

    A second signal acts as if there were no handler, except USR2: that is a scheduler's warning, which may come
    beside its TERM and never means "at once". In forked children the signals keep their default
    action, so that helpers die with the group.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], None] | int | None] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            # Ignored from the start: a launcher's background job, whose launcher turns Ctrl-C into one TERM.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() == self._pid:
            for number, previous in self._previous.items():
                signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGUSR2 and os.getpid() == self._pid:
            return
        if self.requested or os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested = True
        # os.write: print is not reentrant inside a signal handler.
        name = signal.Signals(number).name
        os.write(2, f"{name} received: stopping after the current step; again to stop at once\n".encode())


_stage = "unified_rl"
_active_bar: tqdm | None = None


def set_stage(stage: str) -> None:
    """Name the stage in log lines."""
    global _stage
    _stage = stage


def log(message: str) -> None:
    """Write `[stage rR] message` to stderr at once."""
    line = f"[{_stage} r{current_ranks().rank}] {message}"
    if _active_bar is not None:
        _active_bar.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """Duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Count of finished units: a bar with ETA on a terminal, else a plain line every ten seconds and at the end."""

    def __init__(self, total: int, description: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.description, self.done = total, description, 0
        self._clock = clock
        self._start = self._last = clock()
        self._printed = -1
        watched = sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE") and current_ranks().rank == 0
        self._bar = self._make_bar() if watched else None

    def _make_bar(self) -> tqdm:
        from tqdm import tqdm

        global _active_bar
        plain = "NO_COLOR" in os.environ
        _active_bar = tqdm(
            total=self.total, desc=f"[{_stage}] {self.description}", file=sys.stderr, dynamic_ncols=True,
            smoothing=0.1, colour=None if plain else "green",
        )  # fmt: skip
        return _active_bar

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the mean speed so far; None before the first unit."""
        if self.done == 0:
            return None
        return (self._clock() - self._start) / self.done * (self.total - self.done)

    def update(self, n: int = 1, **postfix: object) -> None:
        """`n` more units are finished; `postfix` is shown beside the count."""
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix({k: _short(v) for k, v in postfix.items()}, refresh=False)
            self._bar.update(n)
            return
        now = self._clock()
        if self.done >= self.total or now - self._last >= PLAIN_LINE_SECONDS:
            self._last = now
            self._print(postfix)

    def _print(self, postfix: dict[str, object]) -> None:
        elapsed = max(self._clock() - self._start, 1e-9)
        parts = [f"{self.description} {self.done}/{self.total}", f"{self.done / elapsed:.3g}/s"]
        if self.done < self.total:
            parts.append(f"eta {format_seconds(self.eta_s)}" if self.done else "eta ?")
        else:
            parts.append(f"took {format_seconds(elapsed)}")
        parts += [f"{key}={_short(value)}" for key, value in postfix.items()]
        self._printed = self.done
        log(", ".join(parts))

    def close(self) -> None:
        """End the bar, or print the last count if it has not been printed."""
        global _active_bar
        if self._bar is not None:
            self._bar.close()
            self._bar = _active_bar = None
        elif self.done and self._printed != self.done:
            self._print({})

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; iterations count from 0")
    return value


def command_parser(module: str, description: str | None, example: str = "") -> argparse.ArgumentParser:
    """Parser of `python -m MODULE`: texts as they are written, with an example below; no abbreviations."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, epilog=f"example:\n  {example}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip


def stage_arguments(
    stage: str, example: str, argv: list[str] | None = None, iteration: bool = True
) -> argparse.Namespace:
    """Arguments shared by all stages, read from `argv` or the command line: see `stage_parser`."""
    return stage_parser(stage, example, iteration).parse_intermixed_args(argv)


def stage_parser(stage: str, example: str, iteration: bool = True) -> argparse.ArgumentParser:
    """Parser of `.run`, `.iteration`, `.recipe`, `.overrides`, which all stages take; sets the log prefix.

    Args:
        stage: One of the stage words; names the module in the usage line.
        example: A complete command, shown by `--help`.
        iteration: Whether the stage works on one iteration.
    """
    set_stage(stage)
    parser = command_parser(f"unified_rl.{stage}", None, example)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder; created when it does not exist")
    parser.add_argument("--recipe", metavar="NAME", help="recipe name or YAML file; needed to create a run")
    if iteration:
        parser.add_argument("--iteration", type=_not_negative, required=True, metavar="K", help="iteration, from 0")
    # The deepspeed launcher appends it; the rank is read from the environment.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values over the recipe's")
    return parser


def run_stage(main: Callable[[], int]) -> None:
    """Run `main` and exit with its code; expected errors end as one `error:` line.

    Exit codes: 0 done, 1 failed, 2 wrong arguments or configuration, 75 stopped on request.
    `UNIFIED_RL_TRACEBACK=1` shows the traceback of expected errors too.
    """
    from unified_rl.config import ConfigError

    try:
        code = main()
    except (StageError, ConfigError) as error:
        code = EXIT_USAGE if isinstance(error, ConfigError) else error.exit_code
        _report(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        code = EXIT_FAILED
        _report(f"{error}; make room or correct the permissions, then run the same command again")
    sys.exit(code)


def _report(message: str) -> None:
    if os.environ.get("UNIFIED_RL_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr, flush=True)
