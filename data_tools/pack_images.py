"""Pack unlabelled images into the shards that a run asks about (`data.images`): a folder of files, or the shapes world.

An image's id follows from its pixels, so that the same picture is packed once. Nothing but pixels is kept: no names, no
metadata, no labels.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from unified_rl.manifests import LedgerError, Manifest, read_manifest, write_manifest
from unified_rl.record_parts import MAX_IMAGE_SIDE
from unified_rl.records import ImageRecord
from unified_rl.runtime import EXIT_OK, StageError, run_stage, set_stage
from unified_rl.shards import image_shards, write_records

EXAMPLE = """examples:
  python data_tools/pack_images.py --folder photos --max-side 896 --out data/images
  python data_tools/pack_images.py --shapes train --count 2048 --out data/shapes_images"""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
MAX_PIXELS = 100_000_000  # of a file before it is made smaller: what decoding may cost


class ImageFileError(StageError):
    """An image file that cannot be packed; the message names it."""


def image_record(image: np.ndarray) -> ImageRecord:
    """Record of uint8 [H, W, 3] pixels, with the id that follows from them."""
    digest = hashlib.sha256(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes())
    return ImageRecord(f"i{digest.hexdigest()[:16]}", image)


def read_image(path: Path, max_side: int) -> np.ndarray:
    """uint8 [H, W, 3] of a file, upright, on white where it is transparent, its sides at most `max_side`.

    Raises:
        ImageFileError: no image of the format that its name says, damaged, or too large.
    """
    try:
        with Image.open(path, formats=[FORMATS[path.suffix.lower()]]) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:  # known from the header, nothing is decoded yet
                raise ImageFileError(f"{path}: {width} x {height} pixels, more than {MAX_PIXELS}")
            if getattr(image, "n_frames", 1) != 1:
                raise ImageFileError(f"{path} is an animation")
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except ImageFileError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageFileError(f"{path} cannot be read as {FORMATS[path.suffix.lower()]}: {error}") from None
    flat = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    if max_side and max(flat.size) > max_side:
        flat.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    if max(flat.size) > MAX_IMAGE_SIDE:
        raise ImageFileError(f"{path}: a side above {MAX_IMAGE_SIDE} pixels; pass --max-side {MAX_IMAGE_SIDE} or less")
    return np.asarray(flat).copy()


def folder_images(folder: Path, max_side: int) -> Iterator[np.ndarray]:
    """Pictures of all image files of a folder and the folders in it, by path.

    Raises:
        ImageFileError: there are none, or one cannot be read.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS and p.is_file())
    if not files:
        raise ImageFileError(f"{folder} holds no image files ({', '.join(FORMATS)})")
    return (read_image(path, max_side) for path in files)


def shapes_images(split: str, count: int) -> Iterator[np.ndarray]:
    """`count` different pictures of the world: half show prompts of the split, half scenes of questions.

    Their seeds are not those of any evaluation.
    """
    from unified_rl.shapes.prompts import prompt_records, scene_for
    from unified_rl.shapes.questions import FAMILIES, make_question
    from unified_rl.shapes.world import render

    prompts, families = prompt_records(split), list(FAMILIES)
    seen: set[object] = set()
    for number in itertools.count():
        rng = random.Random(f"image-pool-{split}-{number}")
        if number % 2:
            scene = make_question(rng.choice(families), rng).scene
        else:
            scene = scene_for(rng.choice(prompts).metadata, rng)
        if scene not in seen:
            seen.add(scene)
            yield render(scene)
        if len(seen) == count:
            return


def different(images: Iterable[np.ndarray]) -> Iterator[ImageRecord]:
    """Records of the images, each picture once."""
    seen: set[str] = set()
    for image in images:
        record = image_record(image)
        if record.image_id not in seen:
            seen.add(record.image_id)
            yield record


def pack(records: Iterator[ImageRecord], folder: Path, per_shard: int) -> Manifest:
    """Write shards and their manifest, one shard in memory at a time; packing the same again does nothing new.

    Raises:
        LedgerError: the folder is already committed with other images.
    """
    existing = read_manifest(folder)
    if existing is not None:
        if [i for _, ids in image_shards(folder) for i in ids] != [record.image_id for record in records]:
            raise LedgerError(f"{folder} already holds other images; choose another --out folder or delete this one")
        return existing
    for stale in folder.glob("images-*.tar"):
        stale.unlink()
    infos, ids = [], []
    while chunk := list(itertools.islice(records, per_shard)):
        infos.append(write_records(folder / f"images-{len(infos):05d}.tar", chunk))
        ids.append([record.image_id for record in chunk])
    manifest = Manifest("images", 0, infos, "", "", {"images": sum(map(len, ids))}, extra={"image_ids": ids})
    write_manifest(folder, manifest)
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    set_stage("pack_images")
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path, metavar="FOLDER", help="image files, also in folders within")
    source.add_argument("--shapes", choices=["train", "heldout"], help="pictures of the shapes world")
    parser.add_argument("--count", type=int, default=1024, metavar="N", help="pictures of --shapes (default 1024)")
    parser.add_argument("--max-side", type=int, default=0, metavar="N", help="make larger images this small")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the shards")
    parser.add_argument("--per-shard", type=int, default=64, metavar="N", help="images in one shard (default 64)")
    arguments = parser.parse_args(argv)
    if arguments.per_shard < 1 or arguments.max_side < 0 or not 1 <= arguments.count <= 4096:
        parser.error("--per-shard must be at least 1, --max-side at least 0, --count in 1..4096")
    Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is checked instead, without a warning below it
    if arguments.folder:
        images = folder_images(arguments.folder, arguments.max_side)
    else:
        images = shapes_images(arguments.shapes, arguments.count)
    manifest = pack(different(images), arguments.out, arguments.per_shard)
    print(f"{manifest.counts['images']} images in {len(manifest.shards)} shards in {arguments.out}")
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
