import math

import pytest
import torch

from unified_rl.policy.grpo import grpo_loss


def loss_of(ratio, advantage, reference=None, mask=None, clip=(0.2, 0.3), beta=0.0):
    """Per-sample loss, metrics and gradient for given ratios [B, S] with old log-probs of log(1/2)."""
    old = torch.full_like(torch.tensor(ratio), math.log(0.5))
    log_probs = (old + torch.tensor(ratio).log()).requires_grad_()
    mask = torch.ones_like(old) if mask is None else torch.tensor(mask)
    delta = (log_probs.detach() if reference is None else torch.tensor(reference)) - log_probs
    delta = delta * mask
    kl = delta.exp() - delta - 1
    loss, metrics = grpo_loss(log_probs, old, kl, torch.tensor(advantage), mask, *clip, beta)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    return loss, metrics, gradient


def test_before_the_first_update_loss_is_minus_advantage_and_gradient_too():
    loss, metrics, gradient = loss_of([[1.0, 1.0]], [0.7])
    assert loss.item() == pytest.approx(-0.7)
    torch.testing.assert_close(gradient, torch.full((1, 2), -0.35))
    assert metrics["ratio_mean"].item() == 1.0 and metrics["ratio_max_deviation"].item() == 0.0


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.5, 2.0, -1.3 * 2.0, 0.0),  # good and already likelier than allowed: bounded, no gradient
        (1.5, -2.0, 1.5 * 2.0, 3.0),  # bad and likelier: pushed back with its full ratio
        (0.5, 2.0, -0.5 * 2.0, -1.0),  # good and rarer: pulled up with its full ratio
        (0.5, -2.0, 0.8 * 2.0, 0.0),  # bad and already rarer than allowed: bounded, no gradient
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_clipped_branches(ratio, advantage, value, slope):
    loss, _, gradient = loss_of([[ratio]], [advantage])
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert gradient.item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_clip_fractions_count_active_bounds_only():
    _, metrics, _ = loss_of([[1.5, 0.5, 1.0, 1.4], [1.5, 0.5, 0.1, 1.0]], [1.0, -1.0])
    assert metrics["clip_high_fraction"].tolist() == [0.5, 0.0]
    assert metrics["clip_low_fraction"].tolist() == [0.0, 0.5]
    assert metrics["ratio_mean"].tolist() == pytest.approx([1.1, 0.775])
    assert metrics["ratio_max_deviation"].tolist() == pytest.approx([0.5, 0.9])


def test_divergence_counts_with_its_coefficient():
    # policy log 0.5, reference log 0.25: d = -log 2, k3 = 1/2 + log 2 - 1; its slope in log pi is 1 - 1/2
    loss, metrics, gradient = loss_of([[1.0]], [0.0], reference=[[math.log(0.25)]], beta=0.1)
    assert metrics["kl"].item() == pytest.approx(math.log(2) - 0.5, rel=1e-6)
    assert loss.item() == pytest.approx(0.1 * (math.log(2) - 0.5), rel=1e-6)
    assert gradient.item() == pytest.approx(0.1 * 0.5, rel=1e-6)


def test_masked_steps_count_neither_in_value_nor_in_gradient():
    loss, metrics, gradient = loss_of([[1.1, 1e30]], [1.0], reference=[[0.0, 1e4]], mask=[[1.0, 0.0]], beta=0.01)
    alone, _, _ = loss_of([[1.1]], [1.0], reference=[[0.0]], beta=0.01)
    assert loss.item() == pytest.approx(alone.item())
    assert gradient[0, 1] == 0 and torch.isfinite(gradient).all()
    assert metrics["ratio_max_deviation"].item() == pytest.approx(0.1, rel=1e-5)


def test_a_sample_without_decisions_gives_zero():
    loss, _, gradient = loss_of([[1.4, 0.3]], [1.0], mask=[[0.0, 0.0]], beta=1.0)
    assert loss.item() == 0 and (gradient == 0).all()


def test_half_precision_inputs_are_computed_in_fp32():
    half = torch.full((1, 4), -3.0, dtype=torch.bfloat16)
    old = half.float() + 1e-3  # a deviation that bf16 could not hold
    loss, metrics = grpo_loss(half, old, torch.zeros(1, 4), torch.ones(1), torch.ones(1, 4), 0.2, 0.2, 0.0)
    assert loss.dtype == torch.float32 and metrics["ratio_max_deviation"].item() == pytest.approx(1e-3, rel=1e-2)
