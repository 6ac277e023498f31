"""Contact sheet of an iteration: one row a prompt, its images from left to right with their rewards, as one PNG."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from PIL import Image, ImageDraw

from unified_rl.config import load_run_config, loop_of
from unified_rl.ledger import Run
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.runtime import EXIT_OK, StageError, run_stage, set_stage
from unified_rl.shards import read_records

EXAMPLE = """example:
  python data_tools/show_shards.py runs/demo --iteration 0 --groups 8 --out sheet.png"""
CELL = 112  # pixels of one image on the sheet
LINE = 14  # height of a line of text
GAP = 6


def read_groups(run: Run, iteration: int, limit: int) -> list[list[RolloutRecord]]:
    """The first `limit` groups of images of an iteration."""
    manifest = run.require_manifest(iteration, "rollout")
    if not manifest.counts["images"] or loop_of(run.config, iteration) == "understanding":
        raise StageError(f"nothing was drawn in iteration {iteration}; choose another --iteration")
    records = read_records(run.stage_folder(iteration, "rollout"), manifest, RolloutRecord)
    groups = itertools.groupby(records, key=lambda record: record.prompt.prompt_id)
    return [list(group) for _, group in itertools.islice(groups, limit)]


def read_captions(run: Run, iteration: int) -> dict[str, str]:
    """Key -> reward, or its status where there is none; empty before the reward stage is done."""
    manifest = run.manifest(iteration, "reward")
    if manifest is None:
        return {}
    records = read_records(run.stage_folder(iteration, "reward"), manifest, RewardRecord)
    return {r.key: f"{r.reward:.4f}" if r.reward is not None else r.status for r in records}


def contact_sheet(groups: list[list[RolloutRecord]], captions: dict[str, str]) -> Image.Image:
    """RGB sheet: a line with the prompt, then its images with their captions below."""
    columns = max(len(group) for group in groups)
    row_height = CELL + 2 * LINE + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, len(groups) * row_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, group in enumerate(groups):
        top = GAP + row * row_height
        text = group[0].prompt.text.encode("latin-1", "replace").decode("latin-1")
        draw.text((GAP, top), text, fill="black")
        for column, record in enumerate(group):
            left = GAP + column * (CELL + GAP)
            image = Image.fromarray(record.image)
            enlarge = max(image.size) <= CELL
            scale = CELL / max(image.size)
            size = tuple(max(1, round(side * scale)) for side in image.size)
            image = image.resize(size, Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)
            sheet.paste(image, (left, top + LINE))
            draw.text((left, top + LINE + CELL), captions.get(record.key, "no score yet"), fill="black")
    return sheet


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    set_stage("show_shards")
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--iteration", type=int, default=0, metavar="K", help="iteration, from 0 (default 0)")
    parser.add_argument("--groups", type=int, default=8, metavar="N", help="prompts to show (default 8)")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), metavar="PNG", help="default sheet.png")
    arguments = parser.parse_args(argv)
    if arguments.groups < 1 or arguments.iteration < 0:
        parser.error("--groups must be at least 1 and --iteration at least 0")
    run = Run(arguments.run, load_run_config(arguments.run))
    groups = read_groups(run, arguments.iteration, arguments.groups)
    contact_sheet(groups, read_captions(run, arguments.iteration)).save(arguments.out)
    print(f"{arguments.out}: {len(groups)} prompts, {sum(len(group) for group in groups)} images")
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
