"""Reward maps: golden cases computed by hand for both presets, resampling, and what is refused."""

import math

import pytest
import torch

from unified_rl.reward.regions import scale_box
from unified_rl.reward.reward_map import MAP_RULES, MapRules, global_factor, is_left_out, paint, resample, reward_map

SRUM, RELEASE = MAP_RULES["srum"], MAP_RULES["srum_release"]
LEFT, TOP, ALL, CENTRE = (0, 0, 2, 4), (0, 0, 4, 2), (0, 0, 4, 4), (1, 1, 3, 3)


def painted(boxes, scores, rules, size=(4, 4)):
    return paint(boxes, scores, size, rules).tolist()


def test_no_region_is_all_background():
    assert painted([], [], SRUM) == [[0.0] * 4] * 4
    assert painted([], [], RELEASE) == [[0.5] * 4] * 4
    assert reward_map([], [], 1.0, (4, 4), (2, 2), SRUM).weights.tolist() == [0.0] * 4
    assert reward_map([], [], 0.0, (4, 4), (2, 2), RELEASE).weights.tolist() == [0.25] * 4


def test_one_region_in_both_scales():
    assert painted([LEFT], [0.6], SRUM) == [[0.6, 0.6, 0.0, 0.0]] * 4
    assert painted([LEFT], [0.6], RELEASE) == [[0.8, 0.8, 0.5, 0.5]] * 4


def test_the_smallest_box_wins_whatever_the_order():
    wanted = [[0.5] * 4, [0.5, -0.75, -0.75, 0.5], [0.5, -0.75, -0.75, 0.5], [0.5] * 4]
    assert painted([ALL, CENTRE], [0.5, -0.75], SRUM) == wanted
    assert painted([CENTRE, ALL], [-0.75, 0.5], SRUM) == wanted


def test_of_equal_boxes_the_first_listed_wins():
    assert painted([LEFT, TOP], [1.0, -1.0], SRUM) == [[1.0, 1.0, -1.0, -1.0]] * 2 + [[1.0, 1.0, 0.0, 0.0]] * 2
    assert painted([LEFT, LEFT], [0.25, -0.5], SRUM)[0][0] == 0.25


def test_the_release_takes_the_highest_value():
    # 0.5 -> 0.75 everywhere; the centre's -0.75 -> 0.125 is below it and the floor
    assert painted([ALL, CENTRE], [0.5, -0.75], RELEASE) == [[0.75] * 4] * 4
    assert painted([ALL, CENTRE], [0.5, 1.0], RELEASE)[1] == [0.75, 1.0, 1.0, 0.75]


def test_a_negative_region_repels_in_the_paper_and_is_invisible_in_the_release():
    assert painted([LEFT], [-0.9], SRUM) == [[-0.9, -0.9, 0.0, 0.0]] * 4
    assert painted([LEFT], [-0.9], RELEASE) == [[0.5] * 4] * 4


def test_zero_counts_as_a_score_where_it_covers_a_larger_box():
    assert painted([ALL, LEFT], [1.0, 0.0], SRUM) == [[0.0, 0.0, 1.0, 1.0]] * 4


@pytest.mark.parametrize(
    "overlap, value", [("max", 1.0), ("min", -0.5), ("mean", 0.25), ("area_weighted", (1 / 16 - 0.5 / 4) / (5 / 16))]
)
def test_other_rules_for_overlap(overlap, value):
    # 16 pixels at 1.0 and 4 pixels at -0.5, the rest of a larger image at the background of -0.25
    rules = MapRules(overlap=overlap, background=-0.25)
    pixels = paint([ALL, CENTRE], [1.0, -0.5], (4, 5), rules)
    assert pixels[1, 1].item() == pytest.approx(value)
    assert pixels[0, 0].item() == 1.0 and pixels[0, 4].item() == -0.25


@pytest.mark.parametrize("rules", [SRUM, RELEASE])
def test_what_lies_outside_the_image_does_not_count(rules):
    inside = painted([(2, 2, 4, 4)], [0.8], rules)
    assert painted([(2, 2, 9, 9)], [0.8], rules) == inside
    assert painted([(2, 2, 4, 4), (4, 0, 6, 4), (-3, -3, 0, 0), (3, 3, 3, 4)], [0.8, -1, -1, -1], rules) == inside


def test_a_box_is_as_small_as_its_visible_part():
    # 2 x 2 of the first box are visible, fewer than the 8 pixels of the second
    assert paint([(-9, -9, 2, 2), LEFT], [0.5, -0.5], (4, 4), SRUM)[0, 0] == 0.5


def test_rescaled_boxes_give_the_same_map():
    boxes, scores = [(0, 0, 8, 4), (2, 1, 6, 3)], [0.5, -1.0]
    scaled = [scale_box(box, (8, 16), (4, 8)) for box in [(0, 0, 16, 8), (4, 2, 12, 6)]]
    assert scaled == boxes
    small = reward_map(scaled, scores, 0.5, (4, 8), (2, 4))
    large = reward_map([(0, 0, 16, 8), (4, 2, 12, 6)], scores, 0.5, (8, 16), (2, 4))
    assert torch.equal(small.local, large.local)


def test_a_region_without_a_score_is_not_painted():
    assert painted([ALL, CENTRE], [0.5, None], SRUM) == [[0.5] * 4] * 4
    assert painted([ALL], [None], SRUM) == [[0.0] * 4] * 4


def test_area_resampling_averages_the_pixels_of_a_cell():
    # cells of 2 x 2 pixels; the box covers 4, 2, 2 and 1 of them
    made = reward_map([(0, 0, 3, 3)], [0.8], 1.0, (4, 4), (2, 2))
    assert made.local.tolist() == [pytest.approx([0.8, 0.4]), pytest.approx([0.4, 0.2])]


def test_area_resampling_is_exact_where_cells_cut_pixels():
    # 3 pixels in 2 cells of 1.5: the cells hold 1 + 0.5 and 0.5 + 1 of them
    assert resample(torch.tensor([[3.0, 6.0, 0.0]]).double(), (1, 2), "area").tolist() == [[4.0, 2.0]]
    # and to a finer grid: cells of half a pixel
    assert resample(torch.tensor([[3.0, 6.0]]).double(), (1, 4), "area").tolist() == [[3.0, 3.0, 6.0, 6.0]]


@pytest.mark.parametrize("size", [(7, 5), (16, 16), (3, 40)])
def test_area_resampling_keeps_the_mean(size):
    pixels = torch.rand(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cells = resample(pixels, (4, 3), "area")
    assert cells.mean().item() == pytest.approx(pixels.mean().item(), abs=1e-12)


def test_bilinear_resampling_sees_only_the_middle_of_a_cell():
    # One cell of 4 pixels: its centre lies between the 2nd and 3rd, so (0.5 + 1.0) / 2 of a box over the last two
    # pixels; a box over the last pixel alone is not seen. By area it would be 0.625.
    assert reward_map([(2, 0, 4, 4)], [1.0], 1.0, (4, 4), (4, 1), RELEASE).local[0, 0].item() == pytest.approx(0.75)
    assert reward_map([(3, 0, 4, 4)], [1.0], 1.0, (4, 4), (4, 1), RELEASE).local[0, 0].item() == pytest.approx(0.5)
    area = MapRules("unit", "max", 0.5, "area")
    assert reward_map([(3, 0, 4, 4)], [1.0], 1.0, (4, 4), (4, 1), area).local[0, 0].item() == pytest.approx(0.625)


def test_the_grid_is_flattened_in_reading_order():
    made = reward_map([(2, 0, 4, 2), (0, 2, 2, 4)], [1.0, -0.5], 1.0, (4, 4), (2, 2))
    assert made.weights.tolist() == [0.0, 1.0, -0.5, 0.0]
    assert made.weights.dtype == torch.float32


@pytest.mark.parametrize("score, alpha", [(1.0, 1.0), (0.5, 0.75), (0.0, 0.5), (-0.4, 0.3), (-1.0, 0.0)])
def test_global_score_as_a_factor(score, alpha):
    for rules in (SRUM, RELEASE):
        assert global_factor(score, rules) == pytest.approx(alpha)
    made = reward_map([ALL], [-0.5], score, (4, 4), (2, 2))
    assert made.weights.tolist() == pytest.approx([-0.5 * alpha] * 4)


def test_two_negatives_do_not_make_a_positive():
    assert reward_map([ALL], [-1.0], -0.9, (4, 4), (1, 1)).weights.item() == pytest.approx(-0.05)


def test_missing_and_neutral_global_scores():
    assert global_factor(None, SRUM) == 1.0 and global_factor(None, RELEASE) == 0.5
    assert not is_left_out(0.0, SRUM) and not is_left_out(None, SRUM)
    assert is_left_out(0.0, RELEASE) and is_left_out(None, RELEASE)
    assert not is_left_out(0.1, RELEASE) and not is_left_out(-0.1, RELEASE)


@pytest.mark.parametrize("rules", [SRUM, RELEASE])
def test_ranges(rules):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 40, (30, 4), generator=generator).tolist()
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    scores = (2 * torch.rand(30, generator=generator, dtype=torch.float64) - 1).tolist()
    local = reward_map(boxes, scores, 0.0, (40, 40), (7, 9), rules).local
    low = -1.0 if rules is SRUM else 0.5
    assert local.shape == (7, 9) and low <= local.min() and local.max() <= 1.0


@pytest.mark.parametrize("score", [1.01, -2.0, math.nan, math.inf, True, "0.5"])
def test_impossible_scores_are_refused(score):
    with pytest.raises(ValueError, match="score of region 2 is .*, not a number in -1..1"):
        paint([ALL, ALL], [0.0, score], (4, 4), SRUM)
    with pytest.raises(ValueError, match="global score"):
        global_factor(score, SRUM)


def test_boxes_and_scores_must_pair():
    with pytest.raises(ValueError, match="2 boxes but 1 scores"):
        reward_map([ALL, LEFT], [0.5], 0.5, (4, 4), (2, 2))


@pytest.mark.parametrize(
    "options", [{"values": "x"}, {"overlap": "x"}, {"resample": "x"}, {"background": 2.0}, {"missing_alpha": -0.1}]
)
def test_impossible_rules_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MapRules(**options)
    with pytest.raises(ValueError, match="background"):
        MapRules(values="unit", background=-0.5)
