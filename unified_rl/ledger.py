"""The run folder: which shards are done, which stages are committed, which weights come next.

    RUN/iter_0003/rollout/shard-00000.tar         written first
                          shard-00000.done.json   its mark: written after the shard
                          manifest.json           written last, by the worker that finds all marks

Marks and manifests contain no times and no process ids: a run restarted after a kill ends with the same bytes.

`python -m unified_rl.ledger status RUN` prints the state of a run.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import math
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from unified_rl.config import RunConfig, config_hash
from unified_rl.files import named, sha256_file
from unified_rl.manifests import (
    SCHEMA_VERSION,
    LedgerError,
    Manifest,
    ShardInfo,
    encode_json,
    finite_or_none,
    is_count,
    read_json,
    read_manifest,
    shard_info,
    store,
    write_manifest,
)
from unified_rl.runtime import current_ranks, run_stage

BASE_VERSION = "base"
STATUS_NAME = "status.json"
LOCKS = ".locks"
MAX_ERROR = 1000  # characters of an error in a lock's file
STATUS_FIELDS = frozenset(
    ("state", "stage", "iteration", "iterations", "done", "total", "eta_s", "reward", "world_size")
)
_STAGE = re.compile(r"[a-z_]+")
_MARK_FIELDS = {"shard", "config_hash", "policy_version", "summary"}


def iteration_name(iteration: int) -> str:
    """Folder name of an iteration; iterations count from 0."""
    return f"iter_{iteration:04d}"


class Run:
    """One run folder and its frozen configuration."""

    def __init__(self, path: str | Path, config: RunConfig) -> None:
        self.path = Path(path)
        self.config = config
        self.config_hash = config_hash(config)

    def iteration_folder(self, iteration: int) -> Path:
        """RUN/iter_0003, whether it exists or not."""
        return self.path / iteration_name(iteration)

    def stage_folder(self, iteration: int, stage: str) -> Path:
        """RUN/iter_0003/rollout; created when missing."""
        if not _STAGE.fullmatch(stage):
            raise LedgerError(f"{stage!r} is no stage name")
        folder = self.iteration_folder(iteration) / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # Manifests

    def manifest(self, iteration: int, stage: str) -> Manifest | None:
        """The manifest of a stage, or None when the stage is not committed.

        Raises:
            LedgerError: the manifest is damaged, or belongs to another stage, iteration or configuration.
        """
        folder = self.iteration_folder(iteration) / stage
        manifest = read_manifest(folder)
        if manifest is None:
            return None
        if (manifest.stage, manifest.iteration) != (stage, iteration):
            raise LedgerError(f"{folder} holds the manifest of {manifest.stage}, iteration {manifest.iteration}")
        if manifest.config_hash != self.config_hash:
            raise LedgerError(
                f"{folder} was made with configuration {manifest.config_hash}, this run has {self.config_hash}; "
                "use a new RUN folder"
            )
        return manifest

    def require_manifest(self, iteration: int, stage: str) -> Manifest:
        """The manifest of a stage that must be committed.

        Raises:
            LedgerError: it is not; the message has the command that makes it.
        """
        manifest = self.manifest(iteration, stage)
        if manifest is None:
            raise LedgerError(
                f"{stage} of iteration {iteration} is not finished in {self.path}; run "
                f"`python -m unified_rl.{stage} --run {self.path} --iteration {iteration}` first"
            )
        return manifest

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest of a stage; the same content again does nothing.

        Raises:
            LedgerError: the stage is already committed with other content, or belongs to another configuration.
        """
        if manifest.config_hash != self.config_hash:
            raise LedgerError(
                f"manifest of {manifest.stage} has configuration {manifest.config_hash}, not {self.config_hash}"
            )
        folder = self.stage_folder(manifest.iteration, manifest.stage)
        existing = self.manifest(manifest.iteration, manifest.stage)
        if existing is None:
            write_manifest(folder, manifest)
        elif encode_json(asdict(existing)) != encode_json(asdict(manifest)):
            raise LedgerError(
                f"{folder} is already committed with different content; delete this stage and all later ones to redo it"
            )

    # Shards of an unfinished stage

    def _mark_path(self, iteration: int, stage: str, index: int) -> Path:
        return self.iteration_folder(iteration) / stage / f"shard-{index:05d}.done.json"

    def mark_shard(
        self, iteration: int, stage: str, index: int, info: ShardInfo, extra: dict, source: str | None = None
    ) -> None:
        """Record that shard `index` is whole. Call it after the shard lies under its final name.

        Args:
            extra: Summary for the manifest. Whole numbers are summed over shards into `counts`; the list
                `failures` is joined; a number `X_sum` becomes the mean `X_mean` per scored image.
            source: SHA-256 of the one shard that this one was made of, where there is one.
        """
        if info.name != f"shard-{index:05d}.tar":
            raise LedgerError(f"shard {index} of {stage} must be named shard-{index:05d}.tar, not {info.name}")
        content = {
            "shard": asdict(info),
            "config_hash": self.config_hash,
            "policy_version": self.current_policy(iteration)[1],
            "summary": extra,
            **({} if source is None else {"source": source}),
        }
        store(self._mark_path(iteration, stage, index), encode_json(content))

    def _read_mark(
        self, iteration: int, stage: str, index: int, source: str | None = None
    ) -> tuple[ShardInfo, dict] | None:
        """Shard and summary of a mark whose shard has the right size; the bytes are not verified."""
        path = self._mark_path(iteration, stage, index)
        content = read_json(path)
        if content is None:
            return None
        if set(content) - {"source"} != _MARK_FIELDS or not isinstance(content["summary"], dict):
            raise LedgerError(f"{path} is not the mark of a shard; delete it and run the stage again")
        if content["config_hash"] != self.config_hash:
            raise LedgerError(f"{path} was made with another configuration; use a new RUN folder")
        info = shard_info(content["shard"], path)
        shard = path.with_name(info.name)
        if content["policy_version"] != self.current_policy(iteration)[1]:
            return None
        if source is not None and content.get("source") != source:
            return None
        if not shard.is_file() or shard.stat().st_size != info.bytes:
            return None
        return info, content["summary"]

    def marked_shard(self, iteration: int, stage: str, index: int) -> ShardInfo | None:
        """Entry of a finished shard of a stage in progress, for who reads and so verifies it; None as `shard_mark`."""
        mark = self._read_mark(iteration, stage, index)
        return None if mark is None else mark[0]

    def shard_mark(self, iteration: int, stage: str, index: int, source: str | None = None) -> dict | None:
        """Summary of a finished shard; None unless the shard exists with the marked size and SHA-256.

        A shard that was made by another policy than this iteration's, or of another shard than `source`, counts as
        not done.
        """
        mark = self._read_mark(iteration, stage, index, source)
        if mark is None:
            return None
        info, summary = mark
        path = self._mark_path(iteration, stage, index).with_name(info.name)
        return summary if sha256_file(path) == info.sha256 else None

    def commit_if_complete(
        self,
        iteration: int,
        stage: str,
        n_shards: int,
        policy_version: str,
        extra: dict | Callable[[list[ShardInfo]], dict] | None = None,
        sources: list[str] | None = None,
    ) -> Manifest | None:
        """Commit the stage when all its shards are marked; every worker calls this after its last shard.

        The content follows from the marks alone, so that two workers that finish together write the same bytes.

        Args:
            n_shards: Number of shards of the whole stage.
            extra: Further entries of the manifest's `extra`, or what makes them from the whole shards.
            sources: SHA-256 of what each shard must be made of.

        Returns:
            The manifest, or None while other workers are still at work.
        """
        existing = self.manifest(iteration, stage)
        if existing is not None:
            return existing
        # Sizes first: hashing all shards is left to the last worker.
        wanted = [(index, sources[index] if sources else None) for index in range(n_shards)]
        marks = [self._read_mark(iteration, stage, *shard) for shard in wanted]
        if any(mark is None for mark in marks):
            return None
        if any(self.shard_mark(iteration, stage, *shard) is None for shard in wanted):
            return None
        counts, failures, means = merge_summaries([summary for _, summary in marks], f"{stage}, iteration {iteration}")
        infos = [info for info, _ in marks]
        more = extra(infos) if callable(extra) else extra or {}
        manifest = Manifest(
            stage, iteration, infos, policy_version, self.config_hash, counts, failures, {**means, **more},
        )  # fmt: skip
        self.commit(manifest)
        return manifest

    # Policies

    def policy_folder(self, iteration: int) -> Path:
        """RUN/iter_0003/policy: the weights after the training of iteration 3; not created here."""
        return self.iteration_folder(iteration) / "policy"

    def current_policy(self, iteration: int) -> tuple[Path | None, str]:
        """Weights that draw in this iteration: (folder, version); (None, "base") in iteration 0.

        Raises:
            LedgerError: the iteration before is not trained, or its weights are missing.
        """
        if iteration == 0:
            return None, BASE_VERSION
        manifest = self.require_manifest(iteration - 1, "train")
        digest = manifest.extra.get("policy_sha256")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise LedgerError(f"the train manifest of iteration {iteration - 1} has no policy_sha256")
        folder = self.policy_folder(iteration - 1)
        if not folder.is_dir():
            raise LedgerError(f"{folder} is missing although iteration {iteration - 1} is trained")
        return folder, f"{iteration - 1:04d}-{digest[:12]}"

    # Processes

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Keep a second process from doing the same work; the lock dies with its process.

        The file names the process until it has ended well; a failure is written behind it, for `status`.

        Args:
            name: What is locked: a stage word, with the worker number where workers share a stage.

        Raises:
            LedgerError: another process holds it; the message names its host and process id.
        """
        folder = self.path / LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{name}.lock", "a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise LedgerError(
                    f"another process is already at work on {name} of {self.path} "
                    f"({file.read(200).strip() or 'unknown'}); wait for it or stop it"
                ) from None
            file.truncate(0)
            with named(Path(file.name)):  # past the file's buffer, which would try again when it is closed
                os.write(file.fileno(), f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
            try:
                yield
            except BaseException as error:
                last = " ".join(traceback.format_exception_only(error)[-1].split())
                with suppress(OSError):  # the disk may be full; past the file's buffer, which would try again
                    os.write(file.fileno(), f"failed: {last[:MAX_ERROR]}\n".encode())
                raise
            file.truncate(0)

    def write_status(self, **fields: object) -> None:
        """Replace RUN/status.json: what the run is doing, for people and monitors.

        Args:
            fields: Any of `STATUS_FIELDS`; state is "running" by default, the last reward is carried over.
        """
        unknown = sorted(set(fields) - STATUS_FIELDS)
        if unknown:
            raise LedgerError(f"unknown status field {', '.join(unknown)}; known: {', '.join(sorted(STATUS_FIELDS))}")
        last = self.read_status() or {}
        status: dict[str, object] = {
            "state": "running",
            "iterations": self.config.iterations,
            "reward": last.get("reward"),
            "world_size": current_ranks().world_size,
            **fields,
        }
        status = {k: finite_or_none(v) if isinstance(v, float) else v for k, v in status.items()}
        status |= {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "schema": SCHEMA_VERSION,
        }
        store(self.path / STATUS_NAME, (json.dumps(status, indent=1, sort_keys=True) + "\n").encode())

    def read_status(self) -> dict | None:
        """Content of RUN/status.json; None when it is absent or unreadable: it is never needed to go on."""
        return read_status(self.path)


def read_status(run: Path) -> dict | None:
    """See `Run.read_status`."""
    try:
        status = json.loads((Path(run) / STATUS_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def merge_summaries(summaries: list[dict], source: str) -> tuple[dict[str, int], list[dict], dict[str, float]]:
    """(counts, failures, means) of a stage from its shards' summaries, in shard order.

    Raises:
        LedgerError: a field of unknown kind, or a mean over no image at all.
    """
    counts: dict[str, int] = {}
    terms: dict[str, list[float]] = {}
    failures: list[dict] = []
    for summary in summaries:
        for name, value in summary.items():
            if name == "failures" and isinstance(value, list):
                failures += value
            elif name.endswith("_sum") and isinstance(value, (int, float)) and math.isfinite(value):
                terms.setdefault(name.removesuffix("_sum") + "_mean", []).append(float(value))
            elif is_count(value):
                counts[name] = counts.get(name, 0) + value
            else:
                raise LedgerError(f"{source}: shard summary field {name}={value!r} is no count, sum or failure list")
    scored = counts.get("images", 0) - counts.get("failed", 0) - counts.get("skipped", 0)
    if terms and scored <= 0:
        raise LedgerError(f"{source}: not one image has a score")
    return counts, failures, {name: math.fsum(values) / scored for name, values in terms.items()}


def main() -> int:
    """Command line: `python -m unified_rl.ledger status RUN [--watch]`."""
    from unified_rl.status import status_command

    return status_command()


if __name__ == "__main__":
    run_stage(main)
