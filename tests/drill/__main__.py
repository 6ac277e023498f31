"""Fault drill: real loops of two ranks are hurt at random moments, and must end as the undisturbed loop does.

Every fault hits a loop of the tiny Janus (two iterations, two workers, two ranks). Afterwards the same command is run
again, once the cause is mended as the error says. A loop takes many faults on its way to the end. Then its weights,
shards, manifests and metrics are compared bit for bit with those of an undisturbed loop; what was committed is
compared after every fault. In every second loop stages start before their turn.

    identical     the run ended with the same bits
    clear error   so it did, after an error that named the cause, the file or sample, and what to do
    lost          committed work or records are gone
    duplicated    records occur twice
    wrong         anything else: other bits, an unclear error, a hang, processes left behind

Two lanes drill loops of their own side by side. OUT/summary.json has the counts, OUT/lane-N/faults-SEED.jsonl every
fault, OUT/lane-N/loop-SEED-NNN.log what the loops said. The same command continues a drill that was interrupted, at the
loops where it was.

example: python -m tests.drill --faults 200 --seed 0 --out runs/drill
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from multiprocessing import Process, current_process
from pathlib import Path

from tests.drill.comparison import VERDICTS, Snapshot, committed, snapshot
from tests.drill.faults import KINDS, NEEDS_WORKER, WITHOUT_START, Field, Missed, Struck, small_disk
from tests.drill.loops import BETWEEN, COMMIT, ENVIRONMENT, GVU, PLACES, POLL_SECONDS, ROOT, Loop
from unified_rl.launching import TRAINING_STAGES
from unified_rl.runtime import EXIT_FAILED, EXIT_OK, format_seconds

OUTCOMES = ("identical", "clear_error", *VERDICTS)
DISK_KIND = "disk full"
NAN_KIND = "judge NaN"


@dataclass
class Fault:
    """One line of faults-SEED.jsonl; `verdict` is one of `OUTCOMES`."""

    loop: int
    kind: str
    place: str
    iteration: int
    what: str
    message: str
    verdict: str
    why: str
    seconds: float


class LoopBroke(Exception):
    """The loop ended by itself with an error that nothing explains."""


def undisturbed(out: Path, method: Sequence[str] = GVU) -> tuple[Snapshot, dict[str, float]]:
    """The undisturbed run, made once, and the mean CPU seconds of a visit to each place."""
    prompts, times = out / "prompts", out / "places.json"
    if not prompts.is_dir():
        pack = [sys.executable, str(ROOT / "data_tools/pack_prompts.py"), "--shapes", "train", "--out", str(prompts)]
        subprocess.run(pack, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    run = out / "whole"
    if not times.is_file():
        print("the undisturbed loop", flush=True)
        shutil.rmtree(run, ignore_errors=True)
        loop = Loop(run, prompts, out / "whole.log", method)
        loop.start()
        try:
            seconds = loop.watch()
        finally:
            loop.kill()
        if loop.process.returncode:
            sys.exit(f"error: the undisturbed loop failed; see {loop.log}")
        times.write_text(json.dumps(seconds))
    return snapshot(run), json.loads(times.read_text())


# ---- one fault ------------------------------------------------------------------------------------------------------


def choose_kind(field: Field, faults: Sequence[Fault]) -> str:
    """The kind with the fewest faults so far, of those that can happen now."""
    stage = (field.loop.next_stage() or ("",))[0]
    possible = [kind for kind in KINDS if kind != DISK_KIND or field.disk]
    if stage not in ("rollout", "reward"):
        possible.remove(NAN_KIND)
    counts = Counter(fault.kind for fault in faults)
    return min(possible, key=lambda kind: (counts[kind], field.rng.random()))


def choose_place(field: Field, kind: str, faults: Sequence[Fault]) -> str:
    """The place with the fewest hits so far, of those that the loop comes to soon."""
    stage = (field.loop.next_stage() or ("train",))[0]
    following = TRAINING_STAGES[(TRAINING_STAGES.index(stage) + 1) % len(TRAINING_STAGES)]
    places = [stage, following, COMMIT] if kind in NEEDS_WORKER else [BETWEEN, stage, following, COMMIT]
    hits = Counter(fault.place for fault in faults)
    return min(places, key=lambda place: (hits[place], field.rng.random()))


def reach(loop: Loop, place: str) -> bool:
    """Wait until the loop is there, or past it: what is done already is passed over; False when it has finished before.

    Raises:
        LoopBroke: it failed before.
    """
    last = loop.stages_done() + 1
    while loop.running:
        if loop.place()[0] == place or loop.stages_done() > last:
            return True
        time.sleep(POLL_SECONDS)
    if loop.process.returncode:
        raise LoopBroke(loop.said()[-1000:])
    return False


def strike(field: Field, kind: str, place: str, seconds: dict[str, float]) -> tuple[Struck, str, int] | None:
    """One fault: what it did, and the place and iteration it hit; None when the loop finished before it could."""
    loop = field.loop
    if kind in WITHOUT_START:
        if loop.running:
            loop.kill()
        at = loop.next_stage()
        with suppress(Missed):
            return KINDS[kind](field), "reward", at[1] if at else -1
        return None
    waits = True
    while True:
        if not loop.running:
            loop.start()
        if waits:
            if not reach(loop, place):
                return None
            loop.let_run(field.rng.uniform(0, seconds[place]), place)
        here = loop.place()
        if not loop.running:
            if loop.process.returncode:
                raise LoopBroke(loop.said()[-1000:])
            return None
        try:
            return KINDS[kind](field), *here
        except Missed:
            if loop.next_stage() is None:  # nothing is left to strike, however often it is started
                loop.end()
                return None
            waits = False
            time.sleep(5 * POLL_SECONDS)


def check_committed(field: Field, before: set[str], struck: Struck, damaged: set[str]) -> tuple[str, str]:
    """(verdict, what) of the committed files after a fault; empty when all is well.

    Args:
        before: paths that were committed before it.
        damaged: shards that the drill damaged and that have not been made again; changed in place.
    """
    now, files = committed(field.loop.run), snapshot(field.loop.run).files
    if struck.damaged:
        damaged.add(struck.damaged)
    damaged -= {name for name in damaged if files.get(name) == field.whole.files[name]}
    gone = {path for path in before - now if not struck.removed or not path.startswith(struck.removed)} - damaged
    if gone:
        return "lost", f"committed before the fault: {', '.join(sorted(gone))}"
    changed = [p for p in sorted(now & files.keys()) if p not in damaged and field.whole.files.get(p) != files[p]]
    return ("wrong", f"committed with other bits: {', '.join(changed)}") if changed else ("", "")


# ---- one loop -------------------------------------------------------------------------------------------------------


def drill_loop(
    field: Field, number: int, earlier: list[Fault], limit: int, seconds: dict[str, float], started: float
) -> list[Fault]:
    """Faults on one loop until it has finished, or there are `limit` with the `earlier` ones; each with its verdict."""
    faults: list[Fault] = []
    damaged: set[str] = set()
    while len(earlier) + len(faults) < limit:
        begun, before, so_far = time.monotonic(), committed(field.loop.run), earlier + faults
        kind = choose_kind(field, so_far)
        try:
            hit = strike(field, kind, choose_place(field, kind, so_far), seconds)
        except LoopBroke as error:
            if not faults or faults[-1].verdict == "wrong":
                raise
            faults[-1].verdict, faults[-1].why = "wrong", f"the same command failed afterwards: {error}"
            continue
        if hit is None and field.loop.next_stage() is None:
            break
        if hit is None:
            continue
        struck, place, iteration = hit
        verdict, why = check_committed(field, before, struck, damaged)
        if not verdict and struck.complaint:
            verdict, why = "wrong", struck.complaint
        verdict = verdict or ("clear_error" if struck.message else "identical")
        took = round(time.monotonic() - begun, 1)
        faults.append(Fault(number, kind, place, iteration, struck.what, struck.message, verdict, why, took))
        tell(faults[-1], len(earlier) + len(faults), limit, started)
    finish(field, faults)
    return faults


def tell(fault: Fault, count: int, limit: int, started: float) -> None:
    """A line for each fault."""
    rate = (time.monotonic() - started) / max(1, tell.told + 1)
    tell.told += 1
    where = fault.place + (f" of iteration {fault.iteration}" if fault.iteration >= 0 else "")
    print(
        f"{current_process().name}, fault {count}/{limit}, loop {fault.loop}: {fault.kind} ({fault.what}) at {where}: "
        f"{fault.verdict.replace('_', ' ')}, {fault.seconds:.0f} s, eta {format_seconds(rate * (limit - count))}",
        flush=True,
    )


tell.told = 0


def finish(field: Field, faults: list[Fault]) -> None:
    """Let the loop run to its end without faults, and compare everything; a difference counts for all its faults."""
    loop = field.loop
    if not loop.running and (loop.next_stage() or loop.process is None or loop.process.returncode):
        loop.start()
    code = loop.end()
    found = [("wrong", f"the loop ended with {code}: {loop.said()[-1000:]}")] if code else []
    found = found or snapshot(loop.run).differences(field.whole)
    for fault in faults if found else ():
        fault.verdict, fault.why = found[0][0], f"at the end of the loop: {found[0][1]}; {len(found)} differences"


# ---- the drill ------------------------------------------------------------------------------------------------------


def summary_of(faults: Sequence[Fault], seed: int, skipped: list[str]) -> dict:
    """Content of summary.json."""

    def counts(chosen: list[Fault]) -> dict[str, int]:
        verdicts = Counter(fault.verdict for fault in chosen)
        return {"faults": len(chosen), **{outcome: verdicts[outcome] for outcome in OUTCOMES}}

    by_kind = {}
    for kind in KINDS:
        chosen = [fault for fault in faults if fault.kind == kind]
        places = Counter(fault.place for fault in chosen)
        by_kind[kind] = {**counts(chosen), "at": {place: places[place] for place in PLACES}}
    return {**counts(list(faults)), "by_kind": by_kind, "seed": seed, "skipped": skipped}


def table(summary: dict) -> str:
    """The summary as text, a line a kind."""
    heads = [*PLACES, *(outcome.replace("_", " ") for outcome in OUTCOMES)]
    lines = [f"{'kind':<16}{'faults':>7}" + "".join(f"{head:>12}" for head in heads)]
    rows = {**summary["by_kind"], "all": summary}
    for name, row in rows.items():
        at = row.get("at") or {p: sum(kind["at"][p] for kind in summary["by_kind"].values()) for p in PLACES}
        numbers = [*(at[place] for place in PLACES), *(row[outcome] for outcome in OUTCOMES)]
        note = "   skipped: no tmpfs can be mounted here" if name in summary["skipped"] else ""
        lines.append(f"{name:<16}{row['faults']:>7}" + "".join(f"{number:>12}" for number in numbers) + note)
    return "\n".join(lines)


def read_journal(path: Path) -> list[Fault]:
    """The faults so far."""
    return [Fault(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def drill_lane(
    out: Path, lane: int, disk: Path | None, limit: int, seed: int, whole: Snapshot, seconds: dict[str, float]
) -> None:
    """Loop after loop, until the journal of OUT/lane-LANE has `limit` faults."""
    folder = out / f"lane-{lane}"
    journal = folder / f"faults-{seed}.jsonl"
    started, faults = time.monotonic(), read_journal(journal)
    while len(faults) < limit:
        number = faults[-1].loop + 1 if faults else 0
        run = (disk or folder) / f"loop-{seed}-{number:03d}"
        shutil.rmtree(run, ignore_errors=True)
        loop = Loop(run, out / "prompts", folder / f"{run.name}.log", prefetch=number % 2 == 0)
        field = Field(loop, whole, random.Random(f"{seed} {lane} {number}"), disk)
        try:
            hit = drill_loop(field, number, faults, limit, seconds, started)
        finally:
            if loop.process:
                loop.kill()
        faults += hit
        with open(journal, "a") as file:
            file.writelines(json.dumps(asdict(fault)) + "\n" for fault in hit)
        if all(fault.verdict not in VERDICTS for fault in hit):
            shutil.rmtree(run)
        elif disk:
            shutil.move(run, folder / run.name)  # to be looked at


def drill(out: Path, limit: int, seed: int, lanes: int) -> tuple[dict, list[Fault]]:
    """Everything; the summary, and the faults of all lanes."""
    out.mkdir(parents=True, exist_ok=True)
    whole = undisturbed(out)
    with ExitStack() as mounted:
        disks = [mounted.enter_context(small_disk(out / f"lane-{lane}" / "disk")) for lane in range(lanes)]
        workers = []
        for lane, disk in enumerate(disks):
            share = limit * (lane + 1) // lanes - limit * lane // lanes
            workers.append(Process(target=drill_lane, args=(out, lane, disk, share, seed, *whole), name=f"lane {lane}"))
            workers[-1].start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("error: the drill itself failed, see above; the same command continues")
    faults = [fault for lane in range(lanes) for fault in read_journal(out / f"lane-{lane}" / f"faults-{seed}.jsonl")]
    summary = summary_of(faults, seed, [] if all(disks) else [DISK_KIND])
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary, faults


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.drill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200, help="number of faults (200)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, moments and damage (0)")
    parser.add_argument("--out", type=Path, default=Path("runs/drill"), help="folder (runs/drill)")
    parser.add_argument("--lanes", type=int, default=2, help="loops at a time (2); a loop waits half of its time")
    arguments = parser.parse_args()
    summary, faults = drill(arguments.out.absolute(), arguments.faults, arguments.seed, arguments.lanes)
    print(table(summary))
    for fault in faults:
        if fault.verdict in VERDICTS:
            print(f"{fault.verdict}: loop {fault.loop}, {fault.kind}, {fault.what}: {fault.why}")
    return EXIT_FAILED if any(summary[verdict] for verdict in VERDICTS) else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
