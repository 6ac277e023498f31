"""Manifests: the commit mark of a folder of shards, and small JSON files with a checksum.

A manifest is written last. A folder without one is unfinished, whatever lies in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from unified_rl.files import atomic_write_bytes
from unified_rl.runtime import StageError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_JSON_BYTES = 64 << 20
STORE_ATTEMPTS = 10
REMOVED = "shards_removed"  # in `extra`

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.(.+)\.[^.]+\.tmp")


class LedgerError(StageError):
    """A manifest, mark or run folder that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class ShardInfo:
    """What a committed shard must be: file name, number of samples, SHA-256 of the file, size in bytes."""

    name: str
    count: int
    sha256: str
    bytes: int


@dataclass
class Manifest:
    """Committed output of one stage in one iteration.

    `counts` are totals over the shards, `failures` names failed samples, `extra` belongs to the stage.
    """

    stage: str
    iteration: int
    shards: list[ShardInfo]
    policy_version: str
    config_hash: str
    counts: dict[str, int]
    failures: list[dict] = field(default_factory=list)
    extra: dict = field(default_factory=dict)

    @property
    def shards_removed(self) -> bool:
        """Whether `data.keep_rollouts` has deleted the shards; everything else still holds."""
        return self.extra.get(REMOVED) is True


def remove_temporaries(path: Path) -> None:
    """Delete what writers of `path` that were killed before this process came left behind (`.NAME.*.tmp`).

    A folder is listed once a process: at every write, the work would grow with the square of the files in it.
    """
    path = Path(path)
    for stale in temporaries_in(path.parent).pop(path.name, ()):
        stale.unlink(missing_ok=True)


@lru_cache(maxsize=1024)
def temporaries_in(folder: Path) -> dict[str, list[Path]]:
    """Unfinished files in a folder when it was first asked for, by the name that they were meant to get."""
    found: dict[str, list[Path]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = _TEMPORARY.fullmatch(entry.name)
            if name:
                found.setdefault(name[1], []).append(folder / entry.name)
    return found


def store(path: Path, data: bytes) -> None:
    """Replace a small file atomically; also removes what killed writers of it left.

    Raises:
        LedgerError: the file system refuses (disk full, no permission); the old file is untouched.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(STORE_ATTEMPTS):
            remove_temporaries(path)
            try:
                return atomic_write_bytes(path, data)
            except FileNotFoundError:  # another writer of this file took our temporary for a dead one's
                if attempt == STORE_ATTEMPTS - 1:
                    raise
    except OSError as error:
        raise LedgerError(
            f"{path} could not be written: {error.strerror}. Make room or correct the permissions, "
            "then run the same command again"
        ) from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def strict_json(text: str) -> object:
    """Parsed JSON in which every number is finite.

    Raises:
        ValueError: no JSON, NaN, an infinity, or a number too large for a float; RecursionError: nested too deeply.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def is_count(value: object) -> bool:
    """Whether `value` is a whole number of at least 0 (and no bool)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def encode_json(content: dict) -> bytes:
    """Canonical bytes of `content` (sorted keys, no NaN) with its schema version and own checksum."""
    content = {**content, "schema": SCHEMA_VERSION}
    try:
        body = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        checksum = hashlib.sha256(body.encode()).hexdigest()
    except (ValueError, TypeError) as error:
        raise LedgerError(f"content cannot be stored as JSON: {error}") from None
    text = json.dumps({**content, "checksum": checksum}, sort_keys=True, ensure_ascii=False, indent=1)
    return (text + "\n").encode()


def decode_json(data: bytes, source: str | Path) -> dict:
    """Content of bytes made by `encode_json`, without `schema` and `checksum`.

    Raises:
        LedgerError: no JSON object, another schema version, or changed since it was written.
    """
    try:
        content = strict_json(data.decode())
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"{source} is not valid JSON: {error}; delete it and run the stage again") from None
    if not isinstance(content, dict):
        raise LedgerError(f"{source} is not a JSON object; delete it and run the stage again")
    if content.get("schema") != SCHEMA_VERSION:
        raise LedgerError(
            f"{source} has schema version {content.get('schema')!r}, this program reads version {SCHEMA_VERSION}"
        )
    checksum = content.pop("checksum", None)
    body = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    if checksum != hashlib.sha256(body.encode(errors="replace")).hexdigest():
        raise LedgerError(f"{source} has a wrong checksum: it was changed after it was written; run the stage again")
    del content["schema"]
    return content


def read_json(path: Path) -> dict | None:
    """Checked content of a file made by `encode_json`; None when there is no such file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_JSON_BYTES:
        raise LedgerError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB")
    return decode_json(data, path)


def shard_info(entry: object, source: str | Path) -> ShardInfo:
    """A `ShardInfo` from its JSON form.

    Raises:
        LedgerError: wrong fields, a name that is no plain file name, or impossible numbers.
    """
    if not isinstance(entry, dict) or set(entry) != {"name", "count", "sha256", "bytes"}:
        raise LedgerError(f"{source}: shard entry {entry!r} must have exactly name, count, sha256 and bytes")
    if not isinstance(entry["name"], str) or not _SHARD_NAME.fullmatch(entry["name"]):
        raise LedgerError(f"{source}: shard name {entry['name']!r} is not a plain NAME.tar")
    if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
        raise LedgerError(f"{source}: shard {entry['name']}: sha256 {entry['sha256']!r} is no SHA-256")
    if not is_count(entry["count"]) or not is_count(entry["bytes"]):
        raise LedgerError(f"{source}: shard {entry['name']}: count and bytes must be whole numbers")
    return ShardInfo(**entry)


_FIELDS: dict[str, type] = {
    "stage": str, "iteration": int, "shards": list, "policy_version": str, "config_hash": str,
    "counts": dict, "failures": list, "extra": dict,
}  # fmt: skip


def parse_manifest(content: dict, source: str | Path) -> Manifest:
    """Manifest from its JSON form, every field checked."""
    if set(content) != set(_FIELDS):
        wrong = sorted(set(content) ^ set(_FIELDS))
        raise LedgerError(f"{source}: missing or unknown manifest fields: {', '.join(wrong)}")
    for name, kind in _FIELDS.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise LedgerError(f"{source}: manifest field {name} must be a {kind.__name__}")
    if not is_count(content["iteration"]) or not all(is_count(v) for v in content["counts"].values()):
        raise LedgerError(f"{source}: iteration and counts must be whole numbers of at least 0")
    if not all(isinstance(failure, dict) for failure in content["failures"]):
        raise LedgerError(f"{source}: every entry of failures must be an object")
    shards = [shard_info(entry, source) for entry in content["shards"]]
    if len({shard.name for shard in shards}) != len(shards):
        raise LedgerError(f"{source}: a shard is listed twice")
    return Manifest(**{**content, "shards": shards})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit `folder`: write its manifest atomically. The same content gives the same bytes."""
    path = Path(folder) / MANIFEST_NAME
    data = encode_json(asdict(manifest))
    parse_manifest(decode_json(data, path), path)
    store(path, data)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`, or None when it is not committed."""
    path = Path(folder) / MANIFEST_NAME
    content = read_json(path)
    return None if content is None else parse_manifest(content, path)


def finite_or_none(value: float | None) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
