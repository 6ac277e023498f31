"""Pack prompts into the shards that a run reads (`data.prompts`): from a text file, a JSONL file, or the shapes world.

A text file has one prompt a line. A JSONL line is an object with `text` or `prompt`, optionally `prompt_id`; all
other fields become the prompt's metadata (GenEval's evaluation_metadata.jsonl works as it is). A prompt without an
id gets one from its text, so that adding lines changes nothing for the others.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from unified_rl.manifests import LedgerError, Manifest, read_manifest, strict_json, write_manifest
from unified_rl.record_parts import PROMPT_ID, RecordError
from unified_rl.records import PromptRecord
from unified_rl.runtime import EXIT_OK, StageError, log, run_stage, set_stage
from unified_rl.shards import load_prompts, write_records

EXAMPLE = """examples:
  python data_tools/pack_prompts.py prompts.txt --out data/prompts
  python data_tools/pack_prompts.py evaluation_metadata.jsonl --out data/geneval
  python data_tools/pack_prompts.py --shapes train --out data/shapes_train"""
SHOWN_DUPLICATES = 5


class PromptFileError(StageError):
    """A prompt file that cannot be packed; the message names file and line."""


def prompt_id_of(text: str) -> str:
    """Id that follows from the text alone."""
    return "p" + hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_json_line(line: str, where: str) -> PromptRecord:
    """Prompt of one JSONL line."""
    try:
        fields = strict_json(line)
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("text", fields.get("prompt")), str):
        raise PromptFileError(f'{where}: expected an object with "text" or "prompt"')
    text = str(fields.get("text", fields.get("prompt"))).strip()
    prompt_id = fields.get("prompt_id", prompt_id_of(text))
    if not isinstance(prompt_id, str) or not PROMPT_ID.fullmatch(prompt_id):
        raise PromptFileError(f"{where}: prompt_id {prompt_id!r} must match {PROMPT_ID.pattern}")
    nested = fields.get("metadata", {})
    if not isinstance(nested, dict):
        raise PromptFileError(f"{where}: metadata must be an object")
    rest = {name: value for name, value in fields.items() if name not in ("text", "prompt_id", "metadata")}
    # "prompt" belongs to GenEval's schema; alone it is only the text once more.
    metadata = {**rest, **nested} if set(rest) - {"prompt"} else nested
    return PromptRecord(prompt_id, text, metadata)


def read_prompts(path: Path) -> list[tuple[str, PromptRecord]]:
    """(where, prompt) of every line that is not empty.

    Raises:
        PromptFileError: unreadable file or line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise PromptFileError(f"{path}:{line}: not UTF-8 text") from None
    except OSError as error:
        raise PromptFileError(f"{path} cannot be read: {error.strerror}") from None
    prompts = []
    # split, not splitlines: a JSON string may hold other line separators.
    for number, line in enumerate(text.split("\n"), 1):
        line, where = line.strip(), f"{path}:{number}"
        if not line:
            continue
        if path.suffix in (".jsonl", ".json", ".ndjson"):
            prompts.append((where, parse_json_line(line, where)))
        else:
            prompts.append((where, PromptRecord(prompt_id_of(line), line)))
    return prompts


def drop_duplicates(prompts: list[tuple[str, PromptRecord]]) -> tuple[list[PromptRecord], list[str]]:
    """Prompts with every text once, and a line about each one dropped.

    Raises:
        PromptFileError: one id for two texts, or a prompt that breaks the contract.
    """
    first_text: dict[str, str] = {}
    first_id: dict[str, str] = {}
    kept, dropped = [], []
    for where, prompt in prompts:
        if prompt.text in first_text:
            dropped.append(f"{where}: same text as {first_text[prompt.text]}: {prompt.text}")
            continue
        if prompt.prompt_id in first_id:
            raise PromptFileError(
                f"{where}: prompt_id {prompt.prompt_id} is also used at {first_id[prompt.prompt_id]} with another text"
            )
        try:
            prompt.to_members()
        except RecordError as error:
            raise PromptFileError(f"{where}: {error}") from None
        first_text[prompt.text] = first_id[prompt.prompt_id] = where
        kept.append(prompt)
    return kept, dropped


def pack(prompts: list[PromptRecord], folder: Path, per_shard: int) -> Manifest:
    """Write shards and their manifest; the same prompts give the same bytes, packing twice does nothing new.

    Raises:
        LedgerError: the folder is already committed with other prompts.
    """
    existing = read_manifest(folder)
    if existing is not None:
        if load_prompts(folder) != prompts:
            raise LedgerError(f"{folder} already holds other prompts; choose another --out folder or delete this one")
        return existing
    for stale in folder.glob("prompts-*.tar"):
        stale.unlink()
    chunks = [prompts[i : i + per_shard] for i in range(0, len(prompts), per_shard)]
    infos = [write_records(folder / f"prompts-{i:05d}.tar", chunk) for i, chunk in enumerate(chunks)]
    manifest = Manifest("prompts", 0, infos, "", "", {"prompts": len(prompts)})
    write_manifest(folder, manifest)
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    set_stage("pack_prompts")
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("source", nargs="?", type=Path, metavar="FILE", help="text file or .jsonl file of prompts")
    source.add_argument("--shapes", choices=["train", "heldout"], help="prompts of the shapes world")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the shards")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="prompts in one shard (default 1000)")
    arguments = parser.parse_args(argv)
    if arguments.per_shard < 1:
        parser.error("--per-shard must be at least 1")
    if arguments.shapes:
        from unified_rl.shapes.prompts import prompt_records

        prompts, dropped = prompt_records(arguments.shapes), []
    else:
        prompts, dropped = drop_duplicates(read_prompts(arguments.source))
    if not prompts:
        raise PromptFileError(f"{arguments.source} holds no prompts")
    for line in dropped[:SHOWN_DUPLICATES]:
        log(f"dropped {line}")
    manifest = pack(prompts, arguments.out, arguments.per_shard)
    note = f"; {len(dropped)} duplicates dropped" if dropped else ""
    print(f"{len(prompts)} prompts in {len(manifest.shards)} shards in {arguments.out}{note}")
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
