import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_rl.policy.advantage import group_advantages


def test_hand_computed_values():
    advantages, live = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]), std_eps=0.0)
    torch.testing.assert_close(advantages[0], torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    # mean 1, unbiased variance (1 + 1 + 4) / 2 = 3
    torch.testing.assert_close(advantages[1], torch.tensor([-1.0, -1.0, 2.0], dtype=torch.float64) / math.sqrt(3))
    assert live.tolist() == [True, True]


def test_pairs_give_the_sign_only():
    advantages, _ = group_advantages(torch.tensor([[0.2, 0.6], [0.9, 0.1]]), std_eps=0.0)
    half = math.sqrt(0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-half, half], [half, -half]], dtype=torch.float64))


def test_eps_shrinks_a_narrow_group():
    # GvU section 8.1: two rewards 1e-4 apart under the released eps of 1e-4 give +-0.293
    advantages, live = group_advantages(torch.tensor([[0.5, 0.5001]], dtype=torch.float64), std_eps=1e-4)
    assert advantages[0, 1].item() == pytest.approx(0.5e-4 / (1e-4 / math.sqrt(2) + 1e-4), rel=1e-9)
    assert advantages[0, 1].item() == pytest.approx(0.293, abs=5e-4)
    assert live.all()


def test_equal_rewards_are_dead_and_zero():
    advantages, live = group_advantages(torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.2, 0.3]]))
    assert live.tolist() == [False, True]
    assert (advantages[0] == 0).all() and torch.isfinite(advantages).all()


def test_threshold_separates_groups():
    rewards = torch.tensor([[0.0, 1e-3], [0.0, 1.0]])
    assert group_advantages(rewards, min_std=1e-2)[1].tolist() == [False, True]
    assert group_advantages(rewards, min_std=1e-4)[1].tolist() == [True, True]


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2, 2)])
def test_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="at least 2 samples"):
        group_advantages(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_number_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="sample 1 in group 0"):
        group_advantages(torch.tensor([[0.0, value, 1.0]]))


@settings(deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=9).filter(lambda r: max(r) - min(r) > 0.01),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_invariant_to_scale_and_shift(rewards, scale, shift):
    rewards = torch.tensor([rewards], dtype=torch.float64)
    base, _ = group_advantages(rewards, std_eps=0.0)
    moved, _ = group_advantages(rewards * scale + shift, std_eps=0.0)
    torch.testing.assert_close(base, moved, rtol=1e-7, atol=1e-7)
    assert abs(base.sum().item()) < 1e-9 and base.std().item() == pytest.approx(1.0)
