"""Shards: reproducible bytes, crashes at any byte, and hostile or damaged files."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from unified_rl import shards
from unified_rl.files import sha256_file
from unified_rl.manifests import Manifest, ShardInfo, temporaries_in, write_manifest
from unified_rl.record_parts import RecordError
from unified_rl.records import PromptRecord, RewardRecord, RolloutRecord
from unified_rl.shards import (
    ShardError,
    load_prompts,
    read_records,
    read_shard,
    scan_shard,
    write_records,
    write_shard,
)

SAMPLES = [
    ("a_00", {"json": b"{}", "png": b"x" * 700}),
    ("a_01", {"json": b'{"k": 1}', "png": b""}),
    ("b_00", {"json": b"[1, 2]", "png": bytes(512)}),
]
NAME = "shard-00000.tar"


def info_of(path: Path, count: int = 3) -> ShardInfo:
    """A manifest entry that fits whatever lies at `path`, so that the structure behind it is what is tested."""
    return ShardInfo(path.name, count, sha256_file(path), path.stat().st_size)


def read_all(path, info, required=("json", "png")):
    return list(read_shard(path.parent, info, required))


def tar_of(path, *members, end=True):
    """A tar of (TarInfo or name, bytes) members."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if not end:
        data = path.read_bytes()
        path.write_bytes(data[: len(data.rstrip(b"\0")) // 512 * 512 + 512])
    return path


# Writing


def test_round_trip(tmp_path):
    info = write_shard(tmp_path / NAME, SAMPLES)
    assert (info.name, info.count) == (NAME, 3)
    assert info == info_of(tmp_path / NAME) == scan_shard(tmp_path / NAME)
    assert read_all(tmp_path / NAME, info) == SAMPLES
    assert os.listdir(tmp_path) == [NAME]


def test_same_samples_same_bytes(tmp_path):
    first = write_shard(tmp_path / "one" / NAME, SAMPLES)
    second = write_shard(tmp_path / "two" / NAME, iter(SAMPLES))
    assert first == second
    # Pinned: another layout of the same samples would make stored runs look damaged on restart.
    expected = [f"{key}.{ext}" for key, members in SAMPLES for ext in members]
    with tarfile.open(tmp_path / "one" / NAME) as tar:
        assert [member.name for member in tar] == expected
        assert {member.mtime for member in tar} == {0}


def test_plain_webdataset_reads_it(tmp_path):
    write_shard(tmp_path / NAME, SAMPLES)
    dataset = webdataset.WebDataset(str(tmp_path / NAME), shardshuffle=False, empty_check=False)
    found = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in dataset]
    assert found == SAMPLES


def test_longest_key(tmp_path):
    samples = [("k" * 88, {"safetensors": b"abc"})]
    info = write_shard(tmp_path / NAME, samples)
    assert read_all(tmp_path / NAME, info, ("safetensors",)) == samples


def test_rewriting_replaces(tmp_path):
    write_shard(tmp_path / NAME, SAMPLES)
    info = write_shard(tmp_path / NAME, SAMPLES[:1])
    assert read_all(tmp_path / NAME, info) == SAMPLES[:1]


@pytest.mark.parametrize("key", ["../x", "/abs", "a/b", "", "a.b", "a\n", "ä", "k" * 89, ".", "a b"])
def test_unsafe_keys_are_not_written(tmp_path, key):
    with pytest.raises(ShardError, match=rf"{NAME}: member name"):
        write_shard(tmp_path / NAME, [("fine", {"json": b""}), (key, {"json": b""})])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("extension", ["a/b", "", "tar.gz", "..", "JSON", "x" * 12])
def test_unsafe_extensions_are_not_written(tmp_path, extension):
    with pytest.raises(ShardError, match="member name"):
        write_shard(tmp_path / NAME, [("k", {extension: b""})])


def test_duplicate_empty_and_missing_samples_are_not_written(tmp_path):
    with pytest.raises(ShardError, match=rf"{NAME}: key a_00 occurs twice"):
        write_shard(tmp_path / NAME, [*SAMPLES, SAMPLES[0]])
    with pytest.raises(ShardError, match=rf"{NAME}: key a_00: a sample without members"):
        write_shard(tmp_path / NAME, [("a_00", {})])
    with pytest.raises(ShardError, match="no samples"):
        write_shard(tmp_path / NAME, [])
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_producer_keeps_the_old_shard(tmp_path):
    info = write_shard(tmp_path / NAME, SAMPLES)

    def samples():
        yield SAMPLES[0]
        raise KeyError("producer")

    with pytest.raises(KeyError, match="producer"):
        write_shard(tmp_path / NAME, samples())
    assert read_all(tmp_path / NAME, info) == SAMPLES
    assert os.listdir(tmp_path) == [NAME]


def test_full_disk(tmp_path, monkeypatch):
    # The kernel's own ENOSPC on the first flushed block.
    monkeypatch.setattr(shards, "_create", lambda path: io.FileIO("/dev/full", "w"))
    with pytest.raises(ShardError, match=rf"{NAME} could not be written: No space left on device.*run the same"):
        write_shard(tmp_path / NAME, [("k", {"json": bytes(1 << 20)})])
    assert os.listdir(tmp_path) == []


def test_full_disk_at_fsync_keeps_the_old_shard(tmp_path, monkeypatch):
    info = write_shard(tmp_path / NAME, SAMPLES)

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ShardError, match="No space left on device"):
        write_shard(tmp_path / NAME, SAMPLES[:1])
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [NAME]
    assert read_all(tmp_path / NAME, info) == SAMPLES


def test_file_size_limit_of_the_system(tmp_path):
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from unified_rl.shards import write_shard, ShardError\n"
        "import webdataset\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        "    write_shard(Path(sys.argv[1]), [(f'k{i}', {'json': bytes(3000)}) for i in range(100)])\n"
        "except ShardError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / NAME)], capture_output=True, text=True, timeout=280, check=True
    )
    assert f"{NAME} could not be written: File too large" in done.stdout
    assert done.stderr == ""
    assert os.listdir(tmp_path) == []


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="shard-00000.tar could not be written"):
        write_shard(tmp_path / "file" / NAME, SAMPLES)


def test_temporary_files_of_this_shard_only_are_removed(tmp_path):
    for name in (f".{NAME}.1.tmp", f".{NAME}.99999.tmp", ".shard-00001.tar.1.tmp", ".other"):
        (tmp_path / name).write_bytes(b"half")
    write_shard(tmp_path / NAME, SAMPLES)
    assert sorted(os.listdir(tmp_path)) == [".other", ".shard-00001.tar.1.tmp", NAME]


def test_second_writer_wins_and_the_first_says_so(tmp_path):
    inner = []

    def samples():
        yield SAMPLES[0]
        # As another process would: same shard, other temporary name.
        os.rename(next(tmp_path.glob(f".{NAME}.*.tmp")), tmp_path / f".{NAME}.1.tmp")
        temporaries_in.cache_clear()
        inner.append(write_shard(tmp_path / NAME, SAMPLES[1:]))

    with pytest.raises(ShardError, match="another process is writing this shard"):
        write_shard(tmp_path / NAME, samples())
    assert read_all(tmp_path / NAME, inner[0]) == SAMPLES[1:]
    assert os.listdir(tmp_path) == [NAME]


# Damage


def interesting_lengths(size):
    edges = {0, 1, 100, 156, 511, size - 1, size - 512, size - 1024, size - 1025}
    for block in range(512, size + 1, 512):
        edges |= {block - 1, block, block + 1}
    return sorted(length for length in edges if 0 <= length < size)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / NAME
    info = write_shard(path, SAMPLES)
    data = path.read_bytes()
    content_end = len(data.rstrip(b"\0"))
    for length in interesting_lengths(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ShardError, match=rf"{NAME} is truncated: {length} bytes"):
            read_all(path, info)
        # Without the manifest's help, the tar's own structure shows it wherever a sample is touched.
        if length <= content_end:
            with pytest.raises(ShardError, match=NAME):
                scan_shard(path, ("json", "png"))


def test_every_flipped_byte_is_refused(tmp_path):
    path = tmp_path / NAME
    info = write_shard(path, SAMPLES)
    data = path.read_bytes()
    positions = {*range(520), *range(0, len(data), 97), len(data) - 1}
    for position in sorted(positions):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=rf"{NAME} is damaged: its SHA-256"):
            read_all(path, info)


def test_flipped_header_bytes_do_not_end_the_shard_early(tmp_path):
    # tarfile takes a damaged header behind the first member for the end of the archive.
    path = tmp_path / NAME
    write_shard(path, SAMPLES)
    data = path.read_bytes()
    second = 1024
    assert data[second:].startswith(b"a_00.png")
    for position in range(second, second + 500, 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x21
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=NAME):
            scan_shard(path)


def test_nothing_is_yielded_before_the_whole_shard_is_verified(tmp_path):
    path = tmp_path / NAME
    info = write_shard(path, SAMPLES)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="damaged"):
        next(read_shard(tmp_path, info, ("json",)))


def test_wrong_checksum_size_and_count(tmp_path):
    path = tmp_path / NAME
    info = write_shard(path, SAMPLES)
    with pytest.raises(ShardError, match=rf"{NAME} is damaged"):
        read_all(path, replace(info, sha256=hashlib.sha256(b"").hexdigest()))
    with pytest.raises(ShardError, match="too long"):
        read_all(path, replace(info, bytes=info.bytes - 1))
    with pytest.raises(ShardError, match="holds 3 samples, its manifest says 4"):
        read_all(path, replace(info, count=4))


def test_missing_shard_and_things_that_are_no_files(tmp_path):
    info = write_shard(tmp_path / NAME, SAMPLES)
    (tmp_path / NAME).unlink()
    with pytest.raises(ShardError, match=rf"{NAME} is missing"):
        read_all(tmp_path / NAME, info)
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(ShardError, match="not a regular file"):
        read_all(tmp_path / NAME, info)
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(ShardError, match=NAME):
        read_all(tmp_path / NAME, info)


# Hostile tars with a manifest that fits them


@pytest.mark.parametrize(
    "name", ["../x.json", "/abs.json", "a/b.json", "./k.json", "k", ".json", "k.", "k.a.json", "a b.json", "k.JSON",
             "..", "a\\b.json", "~.json", "k\n.json", "é.json", "dir/"],
)  # fmt: skip
def test_path_tricks_in_names(tmp_path, name):
    path = tar_of(tmp_path / NAME, ("ok.json", b"{}"), (name, b"{}"))
    with pytest.raises(ShardError, match=rf"{NAME}.*member"):
        read_all(path, info_of(path, 2), ("json",))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("p" * 60 + "/" + "q" * 60 + ".json", tarfile.GNU_FORMAT),
        ("p" * 60 + "/" + "q" * 60 + ".json", tarfile.PAX_FORMAT),
        ("p" * 60 + "/" + "q" * 60 + ".json", tarfile.USTAR_FORMAT),
        ("x" * 120 + ".json", tarfile.GNU_FORMAT),
        ("x" * 120 + ".json", tarfile.PAX_FORMAT),
    ],
)
def test_names_in_extension_headers_and_prefixes(tmp_path, name, layout):
    path = tmp_path / NAME
    with tarfile.open(path, "w", format=layout) as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ShardError, match=rf"{NAME}.*member"):
        read_all(path, info_of(path, 1), ("json",))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
             tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME],
)  # fmt: skip
def test_links_devices_and_other_kinds(tmp_path, kind):
    member = tarfile.TarInfo("k.json")
    member.type, member.linkname = kind, "/etc/passwd"
    path = tmp_path / NAME
    path.write_bytes(member.tobuf(tarfile.USTAR_FORMAT) + bytes(10240))
    with pytest.raises(ShardError, match=rf"{NAME}: member 'k.json.*is not a regular file"):
        read_all(path, info_of(path, 1), ("json",))


def test_symlink_followed_by_a_file_of_its_name(tmp_path):
    link = tarfile.TarInfo("k.json")
    link.type, link.linkname = tarfile.SYMTYPE, "../../target"
    path = tar_of(tmp_path / NAME, (link, b""), ("k.json", b"{}"))
    with pytest.raises(ShardError, match="not a regular file"):
        read_all(path, info_of(path, 1), ("json",))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.json", b""), ("b.json", b""), ("a.json", b"")], "key a occurs twice"),
        ([("a.json", b""), ("b.json", b""), ("a.png", b"")], "key a occurs twice, or its members are not adjacent"),
        ([("a.json", b"1"), ("a.json", b"2")], r"key a has two members \.json"),
        ([("a.json", b""), ("b.png", b"")], r"key b has no member \.json"),
        ([("a.png", b"")], r"key a has no member \.json"),
    ],
)
def test_keys(tmp_path, members, message):
    path = tar_of(tmp_path / NAME, *members)
    with pytest.raises(ShardError, match=rf"{NAME}: {message}"):
        read_all(path, info_of(path, len({name.split(".")[0] for name, _ in members})), ("json",))


@pytest.mark.parametrize("size", [shards.MAX_MEMBER_BYTES + 1, 8 << 30, 2**62])
def test_member_that_claims_to_be_huge(tmp_path, size):
    member = tarfile.TarInfo("k.png")
    member.size = size
    path = tmp_path / NAME
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(ShardError, match=rf"{NAME}: member k\.png has {size} bytes"):
        read_all(path, info_of(path, 1), ())


def test_negative_size(tmp_path):
    member = tarfile.TarInfo("k.png")
    member.size = -512
    path = tmp_path / NAME
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(ShardError, match=NAME):
        read_all(path, info_of(path, 1), ())


def test_no_end_mark_and_data_behind_it(tmp_path):
    path = tar_of(tmp_path / NAME, ("a.json", b"{}"), end=False)
    with pytest.raises(ShardError, match="no end mark"):
        read_all(path, info_of(path, 1), ("json",))
    tar_of(path, ("a.json", b"{}"))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ShardError, match="data behind its end mark"):
        read_all(path, info_of(path, 1), ("json",))


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200, b"\x1f\x8b" + bytes(2000)])
def test_things_that_are_no_tar(tmp_path, content):
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(ShardError, match=NAME):
        read_all(path, info_of(path, 0), ("json",))


# Records


def prompts(*ids):
    return [PromptRecord(i, f"text of {i}", {"tag": "colors"}) for i in ids]


def test_records_of_all_kinds(tmp_path):
    image = np.full((3, 4, 3), 7, np.uint8)
    tensors = {"actions": torch.arange(4), "log_probs": -torch.ones(4)}
    rollouts = [RolloutRecord(prompts("p")[0], i, i, "base", {}, image, tensors) for i in range(2)]
    rewards = [RewardRecord(r.key, "p", "base", "failed", None, {}, "no text") for r in rollouts]
    for records, kind in ((prompts("a", "b"), PromptRecord), (rollouts, RolloutRecord), (rewards, RewardRecord)):
        info = write_records(tmp_path / f"{kind.__name__}.tar", records)
        assert info.count == 2
        back = list(read_records(tmp_path, [info], kind))
        assert [r.key for r in back] == [r.key for r in records]
        assert [r.to_members() for r in back] == [r.to_members() for r in records]


def test_bad_record_names_shard_and_key(tmp_path):
    members = {**prompts("b")[0].to_members(), "json": b'{"schema": 9}'}
    info = write_shard(tmp_path / NAME, [("a", prompts("a")[0].to_members()), ("b", members)])
    with pytest.raises(RecordError, match=rf"{NAME}: key b: schema version 9"):
        list(read_records(tmp_path, [info], PromptRecord))


def test_record_without_its_member_names_shard_and_key(tmp_path):
    info = write_shard(tmp_path / NAME, [("p_00", {"json": b"{}"})])
    with pytest.raises(ShardError, match=rf"{NAME}: key p_00 has no member \.png, \.safetensors"):
        list(read_records(tmp_path, [info], RolloutRecord))


def test_key_in_two_shards(tmp_path):
    infos = [write_records(tmp_path / f"s{i}.tar", prompts("a")) for i in range(2)]
    with pytest.raises(ShardError, match=r"s1\.tar: key a is also in s0\.tar"):
        list(read_records(tmp_path, infos, PromptRecord))


def test_load_prompts(tmp_path):
    infos = [write_records(tmp_path / f"prompts-{i:05d}.tar", prompts(*ids)) for i, ids in enumerate(["ab", "c"])]
    with pytest.raises(ShardError, match="no manifest.json.*pack_prompts"):
        load_prompts(tmp_path)
    write_manifest(tmp_path, Manifest("prompts", 0, infos, "", "", {"prompts": 3}))
    assert load_prompts(tmp_path) == prompts("a", "b", "c")
    write_manifest(tmp_path, Manifest("rollout", 0, infos, "", "", {}))
    with pytest.raises(ShardError, match="stage rollout, not prompts"):
        load_prompts(tmp_path)
