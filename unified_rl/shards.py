"""Tar shards in webdataset's layout: written atomically, checksummed, and read without trust.

A shard holds plain files named `KEY.EXT`; files of one key are adjacent. A writer works under a temporary name,
so a shard under its final name is whole. A reader gets the expected size and SHA-256 from the manifest and
refuses everything that this writer would not have written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from unified_rl.files import fsync, sha256_file
from unified_rl.inquiries import InquiryRecord, InquiryReward
from unified_rl.manifests import Manifest, ShardInfo, read_manifest, remove_temporaries
from unified_rl.record_parts import KEY
from unified_rl.records import ImageRecord, PromptRecord, RewardRecord, RolloutRecord
from unified_rl.runtime import StageError

MAX_MEMBER_BYTES = 256 << 20
BLOCK = 512
_MEMBER = re.compile(rf"({KEY.pattern})\.([a-z0-9_]{{1,11}})")

Record = TypeVar("Record", PromptRecord, ImageRecord, RolloutRecord, RewardRecord, InquiryRecord, InquiryReward)


class ShardError(StageError):
    """A shard that cannot be written or trusted; the message names the shard and, where known, the key."""


class _HashingFile:
    """File-like sink that hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)


def _create(path: Path) -> BinaryIO:
    return open(path, "xb")


def _check_sample(path: Path, key: str, members: dict[str, bytes]) -> None:
    if not members:
        raise ShardError(f"{path}: key {key}: a sample without members")
    for extension, data in members.items():
        if not _MEMBER.fullmatch(f"{key}.{extension}"):
            raise ShardError(
                f"{path}: member name {f'{key}.{extension}'!r} is not KEY.EXT with {KEY.pattern} and no further dots"
            )
        if len(data) > MAX_MEMBER_BYTES:
            raise ShardError(f"{path}: key {key}: .{extension} has {len(data)} bytes, limit {MAX_MEMBER_BYTES}")


def _write_tar(
    path: Path, sink: _HashingFile, samples: Iterable[tuple[str, dict[str, bytes]]], may_be_empty: bool
) -> int:
    from webdataset import TarWriter  # imports torch

    seen: set[str] = set()
    with TarWriter(sink, encoder=False, mtime=0, compress=False) as writer:
        for key, members in samples:
            _check_sample(path, key, members)
            if key in seen:
                raise ShardError(f"{path}: key {key} occurs twice")
            seen.add(key)
            writer.write({"__key__": key, **members})
    if not seen and not may_be_empty:
        raise ShardError(f"{path}: no samples to write")
    return len(seen)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]], may_be_empty: bool = False) -> ShardInfo:
    """Write `(key, {extension: bytes})` samples as a tar; the same samples give the same bytes.

    A crash at any moment leaves the earlier file, or none, under `path`. What a killed writer of the same shard
    left is removed first; should that writer still be alive, it fails and this one wins.

    Raises:
        ShardError: unsafe key, duplicate key, no samples, or the file system refuses (disk full).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(path)
        with _create(temporary) as file:
            sink = _HashingFile(file)
            count = _write_tar(path, sink, samples, may_be_empty)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    except FileNotFoundError as error:
        if error.filename != str(temporary):
            raise
        raise ShardError(f"{path}: another process is writing this shard; stop one of them") from None
    except OSError as error:
        raise ShardError(
            f"{path} could not be written: {error.strerror}; nothing unfinished was left under that name. "
            "Make room or correct the permissions, then run the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return ShardInfo(path.name, count, sink.digest.hexdigest(), sink.size)


def _open_regular(path: Path) -> BinaryIO:
    try:
        # O_NONBLOCK: a FIFO in place of the shard must not hang the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing although its manifest names it; run the stage again") from None
    except OSError as error:
        raise ShardError(f"{path} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ShardError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def _verify(path: Path, file: BinaryIO, info: ShardInfo) -> None:
    """Compare size and SHA-256 of an open shard with its manifest entry; leaves the position at 0."""
    size = os.fstat(file.fileno()).st_size
    remedy = "delete the manifest of its stage and run the stage again"
    if size != info.bytes:
        kind = "truncated" if size < info.bytes else "too long"
        raise ShardError(f"{path} is {kind}: {size} bytes, its manifest says {info.bytes}; {remedy}")
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    if digest.hexdigest() != info.sha256:
        raise ShardError(f"{path} is damaged: its SHA-256 is not the one in its manifest; {remedy}")
    file.seek(0)


def _check_end(path: Path, file: BinaryIO) -> None:
    """After the first zero block: at least one more, and nothing but zeros to the end of the file."""
    rest = 0
    while block := file.read(1 << 16):
        if block.count(0) != len(block):
            raise ShardError(f"{path} has data behind its end mark")
        rest += len(block)
    if rest < BLOCK or rest % BLOCK:
        raise ShardError(f"{path} is truncated: incomplete end mark")


def _member_header(path: Path, header: bytes, last: str) -> tarfile.TarInfo:
    after = f" (behind key {last})" if last else ""
    if len(header) < BLOCK:
        raise ShardError(f"{path} is truncated inside a member header{after}")
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(f"{path} has a damaged member header{after}: {error}") from None
    # Type first: links and devices may carry harmless names.
    if header[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ShardError(f"{path}: member {member.name!r} is not a regular file (tar type {member.type!r})")
    if not _MEMBER.fullmatch(member.name):
        raise ShardError(f"{path}: unsafe member name {member.name!r}: KEY.EXT without folders is required")
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise ShardError(f"{path}: member {member.name} has {member.size} bytes, limit {MAX_MEMBER_BYTES}")
    return member


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, bytes) of every tar member. tarfile's own loop would take a damaged header for the end."""
    key = ""
    while True:
        header = file.read(BLOCK)
        if header == bytes(BLOCK):
            return _check_end(path, file)
        if not header:
            raise ShardError(f"{path} is truncated: no end mark (last key {key or 'none'})")
        member = _member_header(path, header, key)
        key, _, extension = member.name.partition(".")
        data = file.read(member.size)
        padding = file.read(-member.size % BLOCK)
        if len(data) < member.size or len(padding) < -member.size % BLOCK:
            raise ShardError(f"{path} is truncated inside {member.name} (key {key})")
        yield key, extension, data


def _samples(path: Path, file: BinaryIO, required: tuple[str, ...]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Group adjacent members by key."""
    seen: set[str] = set()
    current: str | None = None
    members: dict[str, bytes] = {}

    def complete() -> tuple[str, dict[str, bytes]]:
        missing = [extension for extension in required if extension not in members]
        if missing:
            raise ShardError(f"{path}: key {current} has no member .{', .'.join(missing)}")
        return current, members

    for key, extension, data in _members(path, file):
        if key != current:
            if current is not None:
                yield complete()
            if key in seen:
                raise ShardError(f"{path}: key {key} occurs twice, or its members are not adjacent")
            seen.add(key)
            current, members = key, {}
        if extension in members:
            raise ShardError(f"{path}: key {key} has two members .{extension}")
        members[extension] = data
    if current is not None:
        yield complete()


def read_shard(
    folder: Path, info: ShardInfo, required: tuple[str, ...] = ("json",)
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of one committed shard; size and SHA-256 are verified before the first one is yielded.

    Args:
        folder: Where the shard lies.
        info: Its manifest entry.
        required: Extensions that every sample must have.

    Raises:
        ShardError: the file is missing, truncated, damaged, or not a tar of plain `KEY.EXT` files with unique
            adjacent keys and the required members.
    """
    path = Path(folder) / info.name
    with _open_regular(path) as file:
        _verify(path, file, info)
        count = 0
        for sample in _samples(path, file, required):
            count += 1
            yield sample
    if count != info.count:
        raise ShardError(f"{path} holds {count} samples, its manifest says {info.count}")


def scan_shard(path: Path, required: tuple[str, ...] = ("json",)) -> ShardInfo:
    """Check the structure of a shard that has no manifest entry; return what it is."""
    path = Path(path)
    with _open_regular(path) as file:
        count = sum(1 for _ in _samples(path, file, required))
        size = os.fstat(file.fileno()).st_size
    return ShardInfo(path.name, count, sha256_file(path), size)


def write_records(path: Path, records: Iterable[Record], may_be_empty: bool = False) -> ShardInfo:
    """Write records as one shard."""
    return write_shard(path, ((record.key, record.to_members()) for record in records), may_be_empty)


def read_records(folder: Path, shards: Manifest | Iterable[ShardInfo], kind: type[Record]) -> Iterator[Record]:
    """Validated records of all shards in order; a key may occur once over all of them.

    Raises:
        ShardError: see `read_shard`; RecordError: the content of a member is wrong (names shard and key).
    """
    if isinstance(shards, Manifest) and shards.shards_removed:
        raise ShardError(f"the shards of {folder} were removed once they were trained on (data.keep_rollouts)")
    seen: dict[str, str] = {}
    for info in shards.shards if isinstance(shards, Manifest) else shards:
        path = Path(folder) / info.name
        for key, members in read_shard(folder, info, kind.MEMBERS):
            if key in seen:
                raise ShardError(f"{path}: key {key} is also in {seen[key]}")
            seen[key] = info.name
            yield kind.from_members(key, members, str(path))


def _input_manifest(folder: Path, stage: str, source: str) -> Manifest:
    """The manifest of a folder that `data_tools/pack_STAGE.py` made."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ShardError(
            f"{folder} has no manifest.json: make {stage[:-1]} shards with "
            f"`python data_tools/pack_{stage}.py {source} --out {folder}`"
        )
    if manifest.stage != stage:
        raise ShardError(f"{folder} holds shards of stage {manifest.stage}, not {stage}")
    return manifest


def load_prompts(folder: Path) -> list[PromptRecord]:
    """All prompts of a folder made by `data_tools/pack_prompts.py`, in order."""
    folder = Path(folder)
    prompts = list(read_records(folder, _input_manifest(folder, "prompts", "PROMPTS.txt"), PromptRecord))
    if not prompts:
        raise ShardError(f"{folder} holds no prompts")
    return prompts


def image_shards(folder: Path) -> list[tuple[ShardInfo, list[str]]]:
    """Shards of a folder made by `data_tools/pack_images.py`, each with the ids of its images; none is opened.

    Raises:
        ShardError: no such folder, or its manifest does not list the images.
    """
    folder = Path(folder)
    manifest = _input_manifest(folder, "images", "--folder IMAGES")
    ids = manifest.extra.get("image_ids")
    listed = isinstance(ids, list) and all(isinstance(part, list) for part in ids)
    if not listed or [len(part) for part in ids] != [info.count for info in manifest.shards]:
        raise ShardError(f"{folder}: the manifest does not list the images of its shards; pack them again")
    if not any(ids):
        raise ShardError(f"{folder} holds no images")
    return list(zip(manifest.shards, ids, strict=True))


def load_images(folder: Path, image_ids: Iterable[str]) -> dict[str, ImageRecord]:
    """The images with the given ids. Shards without any of them stay closed, other images are not decoded."""
    wanted, found = set(image_ids), {}
    for info, ids in image_shards(folder):
        if wanted.isdisjoint(ids):
            continue
        for key, members in read_shard(folder, info, ImageRecord.MEMBERS):
            if key in wanted:
                found[key] = ImageRecord.from_members(key, members, str(Path(folder) / info.name))
    missing = sorted(wanted - found.keys())
    if missing:
        raise ShardError(f"{folder} has no image {missing[0]} ({len(missing)} missing); pack the images again")
    return found
