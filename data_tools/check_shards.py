"""Check shards: size, checksum, tar structure and every record. For a run folder, all its iterations.

Prints one line a shard and every problem; the exit code is 1 when there was one. A lone .tar has no manifest to be
compared with: its structure is checked and its checksum printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from unified_rl.inquiries import InquiryRecord, InquiryReward
from unified_rl.manifests import LedgerError, Manifest, ShardInfo, read_manifest
from unified_rl.records import ImageRecord, PromptRecord, RewardRecord, RolloutRecord
from unified_rl.runtime import EXIT_FAILED, EXIT_OK, StageError, run_stage, set_stage
from unified_rl.shards import read_records, scan_shard

EXAMPLE = """examples:
  python data_tools/check_shards.py runs/demo
  python data_tools/check_shards.py data/prompts runs/demo/iter_0000/rollout
  python data_tools/check_shards.py some/shard-00000.tar"""
KINDS = {"prompts": PromptRecord, "images": ImageRecord, "rollout": RolloutRecord, "reward": RewardRecord}
INQUIRY_KINDS = {"rollout": InquiryRecord, "reward": InquiryReward}


def check_records(folder: Path, manifest: Manifest) -> tuple[set[str], list[str]]:
    """(keys, problems) of the shards of a committed folder; goes on behind a bad shard."""
    asked = manifest.extra.get("loop") == "understanding"
    kind = (INQUIRY_KINDS if asked else KINDS)[manifest.stage]
    keys: set[str] = set()
    problems = []
    if manifest.shards_removed:
        print(f"--  {folder} was trained on, its shards were removed (data.keep_rollouts)")
    for info in () if manifest.shards_removed else manifest.shards:
        try:
            found = [record.key for record in read_records(folder, [info], kind)]
        except StageError as error:
            problems.append(str(error))
            continue
        problems += [f"{folder / info.name}: key {key} is also in another shard" for key in keys.intersection(found)]
        keys.update(found)
        print(f"ok  {folder / info.name}  {info.count} samples  {info.bytes} bytes")
    listed = {info.name for info in manifest.shards}
    problems += [f"{path} is not in the manifest" for path in sorted(folder.glob("*.tar")) if path.name not in listed]
    return keys, problems


def check_folder(folder: Path) -> tuple[set[str] | None, list[str]]:
    """(keys, problems) of a folder of shards; keys None where it is not committed or holds no shards."""
    try:
        manifest = read_manifest(folder)
    except LedgerError as error:
        return None, [str(error)]
    if manifest is None:
        print(f"--  {folder} is not committed (no manifest.json)")
        return None, []
    if manifest.stage not in KINDS:
        print(f"ok  {folder} manifest of {manifest.stage}")
        return None, []
    return check_records(folder, manifest)


def check_run(run: Path) -> list[str]:
    """Problems of all iterations of a run; a reward stage must score exactly the images of its rollout stage."""
    problems = []
    for iteration in sorted(run.glob("iter_[0-9]*")):
        keys: dict[str, set[str] | None] = {}
        for stage in ("rollout", "reward", "train"):
            if (iteration / stage).is_dir():
                keys[stage], found = check_folder(iteration / stage)
                problems += found
        if keys.get("rollout") is not None and keys.get("reward") is not None:
            lone = sorted(keys["rollout"] ^ keys["reward"])
            problems += [f"{iteration}: key {key} is in one of rollout and reward only" for key in lone[:5]]
    return problems


def check(path: Path) -> list[str]:
    """Problems of a run folder, a folder of shards, or one tar."""
    if path.is_dir():
        return check_run(path) if (path / "config.yaml").is_file() else check_folder(path)[1]
    try:
        info: ShardInfo = scan_shard(path)
    except StageError as error:
        return [str(error)]
    print(f"ok  {path}  {info.count} samples  {info.bytes} bytes  sha256 {info.sha256}")
    return []


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    set_stage("check_shards")
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run folder, shard folder or .tar file")
    problems = [problem for path in parser.parse_args(argv).paths for problem in check(path)]
    for problem in problems:
        print(f"BAD {problem}")
    print(f"{len(problems)} problems" if problems else "no problems")
    return EXIT_FAILED if problems else EXIT_OK


if __name__ == "__main__":
    run_stage(main)
