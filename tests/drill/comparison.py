"""What a run has written, and how it differs from what the undisturbed run wrote."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from unified_rl.manifests import MANIFEST_NAME

MEASURED = re.compile("(^|/)(time|throughput|memory)/")  # of a role as well: solver/time/step_s
VERDICTS = ("lost", "duplicated", "wrong")  # the worst first


@dataclass(frozen=True)
class Snapshot:
    """SHA-256 of files by path, and how often each record occurs: samples of shards, and lines of metrics."""

    files: dict[str, str] = field(default_factory=dict)
    records: Counter[str] = field(default_factory=Counter)

    def differences(self, whole: Snapshot) -> list[tuple[str, str]]:
        """(verdict, what) of everything that is not as in `whole`, the worst first."""
        lost = sorted((whole.records - self.records).keys() | (whole.files.keys() - self.files.keys()))
        duplicated = sorted(key for key in self.records - whole.records if key in whole.records)
        wrong = sorted(path for path, digest in self.files.items() if whole.files.get(path) != digest)
        found = zip(VERDICTS, (lost, duplicated, wrong), strict=True)
        return [(verdict, name) for verdict, names in found for name in names]


def snapshot(run: Path) -> Snapshot:
    """Everything in the iterations of a run; measured times are taken out of the metrics."""
    files: dict[str, str] = {}
    records: Counter[str] = Counter()
    for path in sorted(run.glob("iter_*/**/*")):
        if not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # a temporary file of a loop that is at work
            continue
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            records.update(f"{path.parent.relative_to(run)} step {line['step']}" for line in lines)
            kept = [{k: v for k, v in line.items() if not MEASURED.search(k)} for line in lines]
            data = json.dumps(kept, sort_keys=True).encode()
        if path.suffix == ".tar":
            records.update(f"{path.parent.relative_to(run)} {key}" for key in keys_of(path))
        files[name] = hashlib.sha256(data).hexdigest()
    return Snapshot(files, records)


def keys_of(shard: Path) -> list[str]:
    """Keys of the records of a shard, as far as it can be read."""
    keys: list[str] = []
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    keys.append(member.name.removesuffix(".json"))
    except tarfile.TarError:
        pass
    return keys


def committed(run: Path) -> set[str]:
    """Paths of what counts: shards with a mark, the marks, and all files of stages with a manifest."""
    paths: set[Path] = set()
    for mark in run.glob("iter_*/*/shard-*.done.json"):
        shard = mark.with_name(mark.name.replace(".done.json", ".tar"))
        if shard.is_file():
            paths |= {mark, shard}
    for manifest in run.glob(f"iter_*/*/{MANIFEST_NAME}"):
        folders = [manifest.parent]
        if manifest.parent.name == "train":
            folders.append(manifest.parent.with_name("policy"))
        paths |= {path for folder in folders for path in folder.iterdir() if not path.name.endswith(".tmp")}
    return {str(path.relative_to(run)) for path in paths}
