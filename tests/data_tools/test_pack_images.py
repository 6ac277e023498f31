"""Image shards: from files, from the shapes world, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from tests.data_tools.test_data_tools import script
from unified_rl.manifests import Manifest, read_manifest, write_manifest
from unified_rl.shards import ShardError, image_shards, load_images


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos" / "more"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 20), "red").save(folder / "a.png")
    Image.new("L", (8, 8), 9).save(folder.parent / "b.jpg")
    Image.new("RGB", (40, 20), "red").save(folder / "same.bmp")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(folder / "clear.webp", lossless=True)
    turned = Image.new("RGB", (6, 3), "blue")
    turned.getexif()[0x0112] = 6
    turned.save(folder / "turned.png", exif=turned.getexif())
    (folder / "notes.txt").write_text("no image")
    return folder.parent


def pack(out, *arguments):
    return script("pack_images", "--out", out, *arguments)


def test_pack_a_folder(photos, tmp_path):
    out = tmp_path / "out"
    done = pack(out, "--folder", photos, "--max-side", 20, "--per-shard", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"4 images in 2 shards in {out}\n"
    ids = [i for _, part in image_shards(out) for i in part]
    images = load_images(out, ids)
    assert sorted(images[i].image.shape for i in ids) == [(4, 4, 3), (6, 3, 3), (8, 8, 3), (10, 20, 3)]
    assert all(images[i].metadata == {} for i in ids)
    clear = next(r.image for r in images.values() if r.image.shape == (4, 4, 3))
    assert (clear == 255).all()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert pack(out, "--folder", photos, "--max-side", 20).returncode == 0
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    other = pack(out, "--folder", photos)
    assert other.returncode == 1 and "already holds other images" in other.stderr
    assert script("check_shards", out).stdout.endswith("no problems\n")


def test_bad_files_are_named(photos, tmp_path):
    (photos / "z.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"rubbish" * 9)
    done = pack(tmp_path / "out", "--folder", photos)
    assert done.returncode == 1 and "z.png cannot be read as PNG" in done.stderr
    assert read_manifest(tmp_path / "out") is None
    Image.new("L", (20000, 6000)).save(photos / "z.png")
    done = pack(tmp_path / "out", "--folder", photos)
    assert done.returncode == 1 and "z.png: 20000 x 6000 pixels" in done.stderr
    Image.new("L", (5000, 2)).save(photos / "z.png")
    done = pack(tmp_path / "out", "--folder", photos)
    assert done.returncode == 1 and "a side above 4096 pixels" in done.stderr


def test_pack_the_shapes_world(tmp_path):
    folders = [tmp_path / name for name in ("train", "again", "heldout")]
    for folder in folders:
        split = "heldout" if folder.name == "heldout" else "train"
        assert pack(folder, "--shapes", split, "--count", 12, "--per-shard", 5).returncode == 0
    train, again, heldout = ([i for _, ids in image_shards(f) for i in ids] for f in folders)
    assert train == again and len(set(train)) == 12 and not set(train) & set(heldout)
    pictures = load_images(folders[0], train[3:4])
    assert list(pictures) == train[3:4] and pictures[train[3]].image.dtype == np.uint8


def test_what_an_iteration_cannot_find_is_named(tmp_path):
    with pytest.raises(ShardError, match="pack_images.py --folder IMAGES"):
        image_shards(tmp_path)
    assert pack(tmp_path / "out", "--shapes", "train", "--count", 2).returncode == 0
    with pytest.raises(ShardError, match="has no image lost"):
        load_images(tmp_path / "out", ["lost"])
    (tmp_path / "old").mkdir()
    write_manifest(tmp_path / "old", Manifest("images", 0, image_infos(tmp_path / "out"), "", "", {"images": 2}))
    with pytest.raises(ShardError, match="does not list the images"):
        image_shards(tmp_path / "old")


def image_infos(folder):
    return [info for info, _ in image_shards(folder)]
