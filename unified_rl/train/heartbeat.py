"""Which rank is lost: each tells the store that the ranks met at that it is alive, and reads what the others told.

An operation that waits for a dead host ends with a time-out that names nobody, and under NCCL with the whole process.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from datetime import timedelta
from itertools import count
from threading import Event, Thread

import torch.distributed as dist

from unified_rl.runtime import Ranks, log

BEAT_SECONDS = 5.0  # at most; shorter with a short time-out
BEATS = 20  # in a time-out, at least
SILENT_BEATS = 6  # after which a rank is named


class Heartbeat:
    """Signs of life of all ranks, exchanged by a thread; made by all together. An operation may take `timeout_s`."""

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self._rank = ranks.rank
        self._seconds = min(BEAT_SECONDS, timeout_s / BEATS)
        self._address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        # A connection of its own: a call that hangs in a dead network must not hold up the others.
        self._store = dist.TCPStore(*self._address, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
        self._keys = [f"unified_rl/alive/{rank}" for rank in range(ranks.world_size)]
        self._told = [b""] * ranks.world_size
        self._heard = [time.monotonic()] * ranks.world_size
        self._ended = Event()
        self._tell(0)
        dist.barrier()  # reading waits for keys that nobody has written
        self._threads = [Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """The ranks part; who is silent from now on is not lost."""
        self._ended.set()
        # A thread that comes back from the store while the interpreter ends would abort the process.
        for thread in self._threads:
            thread.join(self._seconds)  # one that hangs in a dead network never comes back

    def lost(self) -> str:
        """Waits for a sign of life of every rank; who gave none, in words, or nothing."""
        start = time.monotonic()
        while (silent := self._silent_since(start)) and not self._ended.is_set():
            if time.monotonic() - start > SILENT_BEATS * self._seconds:
                return self._describe(silent)
            time.sleep(self._seconds / 2)
        return ""

    def _tell(self, number: int) -> None:
        self._store.set(self._keys[self._rank], f"{number} {socket.gethostname()}")

    def _beat(self) -> None:
        """Tell and read; hangs, or ends, where the store is lost."""
        for number in count(1):
            if self._ended.wait(self._seconds):
                return
            try:
                self._tell(number)
                told = self._store.multi_get(self._keys)
            except RuntimeError:
                return
            for rank, text in enumerate(told):
                if text != self._told[rank]:
                    self._told[rank], self._heard[rank] = text, time.monotonic()

    def _watch(self) -> None:
        """Say at once who has fallen silent: the operation that waits for it may take long to fail."""
        reported: list[int] = []
        while not self._ended.wait(self._seconds):
            silent = self._silent_since(time.monotonic() - SILENT_BEATS * self._seconds)
            if set(silent) > set(reported):
                log(f"no sign of life for {SILENT_BEATS * self._seconds:.0f} s: {self._describe(silent)}")
            reported = silent

    def _silent_since(self, moment: float) -> list[int]:
        return [rank for rank, heard in enumerate(self._heard) if heard < moment]

    def _describe(self, silent: list[int]) -> str:
        hosts = [text.partition(b" ")[2].decode() or "?" for text in self._told]
        if self._rank in silent:  # not even what this rank told comes back
            return (
                f"rank {self._rank} on {socket.gethostname()} has lost rank 0 on {hosts[0]} ({self._address[0]}): "
                "one of the two hosts is cut off from the network, or rank 0 has ended"
            )
        names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in silent)
        return f"{names} cannot be reached: the host is cut off from the network, or the process has ended"
