"""GenEval: which prompts the exact detector of shapes can judge, and the folder that GenEval's own scorer reads."""

from __future__ import annotations

import json
from pathlib import Path

from unified_rl.manifests import store
from unified_rl.record_parts import encode_png
from unified_rl.records import PromptRecord, RolloutRecord
from unified_rl.shapes.world import SHAPES


def is_shapes_prompt(prompt: PromptRecord) -> bool:
    """Whether the prompt carries GenEval metadata that names shapes only."""
    include = prompt.metadata.get("include")
    if not isinstance(prompt.metadata.get("tag"), str) or not isinstance(include, list) or not include:
        return False
    return all(isinstance(clause, dict) and clause.get("class") in SHAPES for clause in include)


def write_geneval_samples(folder: Path, first: int, records: list[RolloutRecord]) -> None:
    """Write `{i:05d}/metadata.jsonl` and `{i:05d}/samples/{j:04d}.png` for the prompts from number `first` on.

    Temporary files begin with a dot, which GenEval's pattern for images does not match.
    """
    numbers: dict[str, int] = {}
    for record in records:
        i = numbers.setdefault(record.prompt.prompt_id, first + len(numbers))
        place = Path(folder) / f"{i:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        metadata = {**record.prompt.metadata, "prompt": record.prompt.text}
        store(place / "metadata.jsonl", (json.dumps(metadata, ensure_ascii=False) + "\n").encode())
        store(place / "samples" / f"{record.sample:04d}.png", encode_png(record.image, record.key))
