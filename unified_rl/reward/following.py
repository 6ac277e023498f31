"""Which shards a worker of the reward stage scores next: of a committed rollout, or of one that it follows.

A rollout that is followed has no manifest yet; its marks say which shards are whole. What was scored so counts only
while the manifest, once it is there, names the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from unified_rl.ledger import LOCKS, Run
from unified_rl.manifests import Manifest, ShardInfo
from unified_rl.runtime import EXIT_STOPPED, Ranks, StageError, StopRequest, log
from unified_rl.status import is_locked, rollout_shards, worker_problems

ROLLOUT, REWARD = "rollout", "reward"
POLL_SECONDS = 0.5
SILENT_SECONDS = 600.0  # default of --follow-timeout


class RolloutFailedError(StageError):
    """The rollout that is followed has ended with an error of its own."""


class RolloutGoneError(StageError):
    """The rollout that is followed was stopped or killed, or never began; the same command continues."""

    exit_code = EXIT_STOPPED


class Arrivals:
    """Shards of this worker that have no score yet.

    Attributes:
        source: the manifest of the rollout, None while it is at work.
        committed_at: `time.monotonic()` when that was first seen.
        scored: SHA-256 of the rollout shards that are scored, by index.
    """

    def __init__(self, run: Run, iteration: int, ranks: Ranks, patience: float | None) -> None:
        """Look at once.

        Args:
            patience: Seconds that a rollout in progress may give no sign of life; None: it must be committed.

        Raises:
            LedgerError: it is not.
        """
        self.run, self.iteration, self.ranks, self.patience = run, iteration, ranks, patience
        self.source: Manifest | None = None if patience is not None else run.require_manifest(iteration, ROLLOUT)
        self.committed_at = time.monotonic()
        self.scored: dict[int, str] = {}
        self.waiting = self.ready()

    @property
    def mine(self) -> range:
        """Indices of all shards of this worker."""
        total = rollout_shards(self.run) if self.source is None else len(self.source.shards)
        return range(self.ranks.rank, total, self.ranks.world_size)

    @property
    def finished(self) -> bool:
        """Whether the rollout is committed, and every shard scored as its manifest names it."""
        return self.source is not None and all(self.scored.get(i) == self.source.shards[i].sha256 for i in self.mine)

    def images(self) -> int:
        """How many are left to score; before the rollout is committed those that were asked for."""
        left = [i for i in self.mine if i not in self.scored]
        if self.source is not None:
            return sum(self.source.shards[i].count for i in left)
        size, groups = self.run.config.rollout.groups_per_shard, self.run.config.data.prompts_per_iteration
        return sum(min(size, groups - i * size) for i in left) * self.run.config.rollout.group_size

    def ready(self) -> list[tuple[int, ShardInfo]]:
        """Index and entry of the shards that can be scored now."""
        if self.source is None:
            self.source = self.run.manifest(self.iteration, ROLLOUT)
            self.committed_at = time.monotonic()
        found = []
        for index in self.mine:
            info = self.source.shards[index] if self.source else self.run.marked_shard(self.iteration, ROLLOUT, index)
            if info is None or self.scored.get(index) == info.sha256:
                continue
            if self.run.shard_mark(self.iteration, REWARD, index, info.sha256) is None:
                found.append((index, info))
            else:
                self.scored[index] = info.sha256
        return found

    def until(self, stop: StopRequest) -> Iterator[tuple[int, ShardInfo]]:
        """Shards to score, as they come; each counts as scored when the next one is asked for.

        Ends when all of a committed rollout are scored, or on a request to stop: see `finished`.

        Raises:
            RolloutGoneError, RolloutFailedError: nothing was heard of the rollout for `patience` seconds.
        """
        heard = time.monotonic()
        if self.source is None:
            log(f"following the rollout of iteration {self.iteration}")
        while True:
            for index, info in self.waiting:
                if stop.requested:
                    return log(f"stopped on request before shard {index}; run the same command again to go on")
                yield index, info
                self.scored[index] = info.sha256
            if self.source is not None:
                return
            if stop.requested:
                return log("stopped on request, waiting for the rollout; run the same command again to go on")
            if self.waiting or any(map(is_locked, (self.run.path / LOCKS).glob(f"{ROLLOUT}-*.lock"))):
                heard = time.monotonic()
            elif time.monotonic() - heard > self.patience:
                self._give_up()
            time.sleep(0 if self.waiting else POLL_SECONDS)
            self.waiting = self.ready()

    def _give_up(self) -> None:
        problems = [p for p in worker_problems(self.run, 0.0) if p.startswith(f"{ROLLOUT}-")]
        text = (
            f"the rollout of iteration {self.iteration} is not finished, and for {self.patience:.0f} s no process "
            f"was at work on it{': ' if problems else ''}{'; '.join(problems)}. Start it, then the same command again"
        )
        raise (RolloutFailedError if any(" failed: " in p for p in problems) else RolloutGoneError)(text)
