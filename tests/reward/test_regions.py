"""Region proposals, their filter, boxes from a file, and rescaling."""

import json

import numpy as np
import pytest

from unified_rl.reward.regions import (
    REGION_RULES,
    Region,
    RegionError,
    RegionRules,
    UserBoxes,
    box_area,
    box_iou,
    clip_box,
    component_regions,
    filter_regions,
    grid_regions,
    load_boxes,
    scale_box,
    user_regions,
)
from unified_rl.shapes.world import CELL, Object, render


def canvas(height=20, width=30, color=(24, 24, 24)):
    image = np.empty((height, width, 3), np.uint8)
    image[:] = color
    return image


def region(*box):
    return Region(box, box_area(box))


@pytest.mark.parametrize(
    "a, b, iou",
    [
        ((0, 0, 4, 4), (0, 0, 4, 4), 1.0),
        ((0, 0, 4, 4), (2, 0, 6, 4), 8 / 24),
        ((0, 0, 4, 4), (1, 1, 3, 3), 4 / 16),
        ((0, 0, 4, 4), (4, 0, 8, 4), 0.0),  # they only touch
        ((1, 1, 1, 5), (1, 1, 1, 5), 0.0),
    ],
)
def test_iou(a, b, iou):
    assert box_iou(a, b) == box_iou(b, a) == pytest.approx(iou)


def test_clip():
    assert clip_box((-5, 2, 99, 8), 6, 10) == (0, 2, 10, 6)
    assert clip_box((10, 0, 12, 4), 6, 10) is None and clip_box((3, 3, 3, 5), 6, 10) is None


@pytest.mark.parametrize(
    "box, before, after, wanted",
    [
        ((10, 20, 30, 40), (100, 100), (100, 100), (10, 20, 30, 40)),
        ((10, 20, 30, 40), (100, 100), (200, 50), (5, 40, 15, 80)),  # twice as high, half as wide
        ((3, 3, 6, 6), (1024, 1024), (512, 512), (1, 1, 3, 3)),  # outwards, never to nothing
        ((1, 1, 2, 2), (1000, 1000), (10, 10), (0, 0, 1, 1)),
        ((30, 30, 60, 60), (300, 300), (30, 30), (3, 3, 6, 6)),  # 0.1 * 30 is not exactly 3
        ((0.5, 0.5, 1.5, 1.5), (2, 2), (8, 8), (2, 2, 6, 6)),
        ((0, 0, 120, 120), (100, 100), (50, 50), (0, 0, 50, 50)),
        ((100, 0, 120, 20), (100, 100), (50, 50), None),
    ],
)
def test_scale(box, before, after, wanted):
    assert scale_box(box, before, after) == wanted


@pytest.mark.parametrize("size, cells", [((32, 32), (2, 2)), ((33, 31), (4, 3)), ((5, 7), (5, 7))])
def test_grid_covers_every_pixel_once(size, cells):
    cover = np.zeros(size, int)
    regions = grid_regions(*size, *cells)
    for x1, y1, x2, y2 in (r.box for r in regions):
        cover[y1:y2, x1:x2] += 1
    assert len(regions) == cells[0] * cells[1] and (cover == 1).all()
    assert sum(r.area for r in regions) == size[0] * size[1]


def test_grid_is_in_reading_order():
    assert [r.box for r in grid_regions(4, 6, 2, 2)] == [(0, 0, 3, 2), (3, 0, 6, 2), (0, 2, 3, 4), (3, 2, 6, 4)]


@pytest.mark.parametrize("cells", [(0, 1), (1, 0), (5, 1), (1, 7)])
def test_impossible_grid_is_refused(cells):
    with pytest.raises(ValueError, match="does not fit"):
        grid_regions(4, 6, *cells)


def test_components_by_hand():
    image = canvas()
    image[2:6, 3:8] = (230, 40, 40)
    image[10:18, 20:29] = (50, 80, 240)
    regions = component_regions(image)
    assert regions == [Region((0, 0, 30, 20), 600 - 20 - 72), region(3, 2, 8, 6), region(20, 10, 29, 18)]
    # the background's box is the whole image, so the filter takes it away
    kept = filter_regions(regions, 20, 30, REGION_RULES["srum"])
    assert [r.box for r in kept] == [(20, 10, 29, 18), (3, 2, 8, 6)]


def test_components_meet_at_edges_not_at_corners():
    image = canvas(4, 4, (0, 0, 0))
    image[0:2, 0:2] = image[2:4, 2:4] = 255
    assert sorted(r.area for r in component_regions(image)) == [4, 4, 4, 4]


def test_components_bridge_steps_within_the_tolerance():
    ramp = np.repeat(np.arange(0, 200, 20, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(4, axis=0)
    assert len(component_regions(ramp, tolerance=20)) == 1
    assert len(component_regions(ramp, tolerance=19)) == 10


def test_components_of_winding_shapes():
    # A comb: many arms that join only at the far end, the worst case for labels that spread
    image = canvas(41, 61, (0, 0, 0))
    image[::2, :] = 255
    image[:, -1] = 255
    regions = component_regions(image)
    white = [r for r in regions if r.box == (0, 0, 61, 41)]
    assert len(white) == 1 and white[0].area == int((image[..., 0] == 255).sum())
    assert len(regions) == 1 + 20


def test_components_equal_a_flood_fill():
    noise = np.random.default_rng(0).integers(0, 3, (17, 23, 1)).repeat(3, axis=2).astype(np.uint8) * 100
    left, areas = {(y, x) for y in range(17) for x in range(23)}, []
    while left:
        first = min(left)
        todo, before = [first], len(left)
        while todo:
            y, x = todo.pop()
            if (y, x) in left and (noise[y, x] == noise[first]).all():
                left.remove((y, x))
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        areas.append(before - len(left))
    assert [r.area for r in component_regions(noise)] == areas


def test_components_find_the_shapes_of_the_synthetic_world():
    image = render((Object("square", "red"), None, None, Object("circle", "cyan")))
    kept = filter_regions(component_regions(image), *image.shape[:2], REGION_RULES["srum"])
    assert len(kept) == 2
    cells = {(x1 // CELL, y1 // CELL, (x2 - 1) // CELL, (y2 - 1) // CELL) for x1, y1, x2, y2 in (r.box for r in kept)}
    assert cells == {(0, 0, 0, 0), (1, 1, 1, 1)}


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_components_refuse_other_arrays(image):
    with pytest.raises(ValueError, match="uint8"):
        component_regions(image)


def test_filter_ranks_by_covered_area_and_cuts():
    regions = [region(i * 10, 0, i * 10 + 2 + i % 5, 8) for i in range(12)]
    kept = filter_regions(regions, 20, 120, RegionRules(min_share=0.0))
    assert len(kept) == 10
    assert [r.area for r in kept] == sorted((r.area for r in regions), reverse=True)[:10]
    assert [r.box[0] for r in kept[:2]] == [40, 90]  # of equals the first listed


def test_filter_drops_near_duplicates_and_keeps_the_one_that_covers_more():
    loose, tight = Region((0, 0, 10, 10), 60), Region((0, 0, 10, 9), 80)
    apart = region(50, 50, 60, 60)
    assert filter_regions([loose, apart, tight], 100, 100, RegionRules(max_iou=0.89)) == [apart, tight]
    assert filter_regions([loose, apart, tight], 100, 100, RegionRules(max_iou=0.9)) == [apart, tight, loose]


def test_filter_bounds_are_shares_of_the_box_and_belong_to_it():
    boxes = [(0, 0, 100, 95), (0, 0, 100, 96), (0, 0, 10, 5), (0, 0, 7, 7), (4, 4, 4, 9)]
    kept = filter_regions([region(*b) for b in boxes], 100, 100, RegionRules(max_iou=1.0))
    assert [r.box for r in kept] == [(0, 0, 100, 95), (0, 0, 10, 5)]


def test_the_release_only_ranks_and_cuts():
    twice = [region(0, 0, 100, 100), region(0, 0, 100, 100), *(region(i, 0, i + 1, 1) for i in range(11))]
    kept = filter_regions(twice, 100, 100, REGION_RULES["srum_release"])
    assert kept == twice[:10]


def line(prompt_id="p1", size=(100, 200), boxes=((0, 0, 50, 50),)):
    return json.dumps({"prompt_id": prompt_id, "image_size": size, "boxes": boxes})


def test_boxes_from_a_file(tmp_path):
    path = tmp_path / "boxes.jsonl"
    path.write_text(f"\ufeff{line()}\n\n{line('p2', (64, 64), ())}\n{line('p3', boxes=((0.5, 1, 199.5, 100),))}\n")
    boxes = load_boxes(path)
    assert boxes["p1"] == UserBoxes(100, 200, ((0, 0, 50, 50),))
    assert boxes["p2"].boxes == () and list(boxes) == ["p1", "p2", "p3"]
    # the drawn image is half as large
    assert user_regions(boxes["p3"], 50, 100) == [region(0, 0, 100, 50)]
    assert user_regions(boxes["p1"], 50, 100) == [region(0, 0, 25, 25)]


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{", "not valid JSON"),
        ("[]", "exactly prompt_id, image_size and boxes"),
        ('{"prompt_id": "p", "boxes": []}', "exactly prompt_id, image_size and boxes"),
        (line("a b"), "prompt_id 'a b' must match"),
        (line("p1"), "prompt_id p1 is already on line 1"),
        (line("p", (0, 10)), "image_size must be"),
        (line("p", (10.5, 10)), "image_size must be"),
        (line("p", 10), "image_size must be"),
        (line("p", boxes={}), "boxes must be a list"),
        (line("p", boxes=[[0, 0, 5]]), "box 1 is not"),
        (line("p", boxes=[[0, 0, 5, True]]), "box 1 is not"),
        (line("p", boxes=[[0, 0, 5, 5], [0, 0, "5", 5]]), "box 2 is not"),
        (line("p", boxes=[[5, 0, 5, 5]]), "box 1 .* is empty, inverted or not inside 200 x 100"),
        (line("p", boxes=[[6, 0, 5, 5]]), "inverted"),
        (line("p", boxes=[[0, 0, 201, 5]]), "not inside"),
        (line("p", boxes=[[-1, 0, 20, 5]]), "not inside"),
        ('{"prompt_id": "p", "image_size": [9, 9], "boxes": [[0, 0, NaN, 5]]}', "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = tmp_path / "boxes.jsonl"
    path.write_text(f"{line()}\n\n{bad}\n")
    with pytest.raises(RegionError, match=rf"boxes\.jsonl:3: .*{message}"):
        load_boxes(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RegionError, match="none.jsonl cannot be read"):
        load_boxes(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RegionError, match="latin.jsonl: not UTF-8"):
        load_boxes(tmp_path / "latin.jsonl")
