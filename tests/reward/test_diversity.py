import numpy as np
import pytest

from unified_rl.reward.diversity import diversity_scores

LEFT, RIGHT = (20, 80, 50), (70, 130, 100)


def halves(left, right, side=96):
    """A picture of two halves, each of one colour."""
    image = np.empty((side, side, 3), np.uint8)
    image[:, : side // 2], image[:, side // 2 :] = left, right
    return image


def test_by_hand():
    """Five equal pictures, one mirrored (other grey values, same colours), one with red and green exchanged (reverse).

    The grey values are 50 and 100: mirrored, their cosine is .8. Exchanged, two of three histograms share no bin: 2/3.
    """
    usual, mirrored = halves(LEFT, RIGHT), halves(RIGHT, LEFT)
    exchanged = usual[..., [1, 0, 2]]
    scores = diversity_scores([usual] * 5 + [mirrored, exchanged])

    def variety(grey, colour, pairs):
        return 0.6 * grey / pairs / 0.30 + 0.4 * colour / pairs / 0.25

    whole = variety(6 * 0.2, 6 * 2 / 3, 21)
    added = whole - variety(0.0, 5 * 2 / 3, 15), whole - variety(5 * 0.2, 0.0, 15)
    assert scores[:5] == [0.0] * 5 and scores[6] == 1.0
    assert scores[5] == pytest.approx(added[0] / added[1]) and scores[5] == pytest.approx(2 / 9)


def test_what_is_very_different_counts_no_more():
    assert diversity_scores([halves(0, 255), halves(255, 0)]) == [1.0, 1.0]
    # Grey distances .92, 0 and .92 count as 1; of the darker half two of three histograms move: colour distance 1/3,
    # where it exists. All: .6 + .4 (2/9) / .25. Without the mirrored one: .4. Without the coloured one: .6.
    usual = halves(10, 240)
    whole = 0.6 + 0.4 * 2 / 9 / 0.25
    scores = diversity_scores([usual, usual[:, ::-1], halves((0, 10, 20), 240)])
    assert scores == [0.0, 1.0, pytest.approx((whole - 0.6) / (whole - 0.4))]
    # Colour distances 2/3 count as 1. All: .6 (4/30) / .30 + .4. Without the mirrored or the exchanged one: .4.
    usual = halves(LEFT, RIGHT)
    assert diversity_scores([usual, halves(RIGHT, LEFT), usual[..., [1, 0, 2]]]) == pytest.approx([0.0, 1.0, 1.0])


def test_equal_images_add_nothing():
    assert diversity_scores([halves(200, 40)] * 3) == [0.0, 0.0, 0.0]


def test_sizes_may_differ():
    scores = diversity_scores([halves(10, 10), halves(10, 10, side=32), halves(10, 200, side=64)])
    assert scores == [pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9), 1.0]


def test_one_image_has_no_variety():
    with pytest.raises(ValueError, match="at least two"):
        diversity_scores([halves(1, 2)])
