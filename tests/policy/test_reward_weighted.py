"""The reward-weighted loss: equal to the paper's two terms, by hand on small maps, and pointing the right way."""

import math

import pytest
import torch

from unified_rl.policy.reward_weighted import reward_weighted_loss


def loss_of(losses, rewards, mask=None, **options):
    losses, rewards = torch.tensor(losses).double(), torch.tensor(rewards).double()
    mask = torch.ones_like(losses) if mask is None else torch.tensor(mask)
    return reward_weighted_loss(losses, rewards, mask, **options)


def random_flow(seed):
    generator = torch.Generator().manual_seed(seed)
    velocity, clean, noise = (torch.randn(3, 12, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    rewards = 2 * torch.rand(3, 12, generator=generator, dtype=torch.float64) - 1
    return velocity.requires_grad_(), clean, noise, rewards


@pytest.mark.parametrize("reference_weight", [0.0, 0.1, 0.5, 1.0])
def test_one_weighted_loss_equals_the_two_terms_of_the_paper(reference_weight):
    # Equations 1 to 3 written out, each term with its own forward error; values and gradients agree in fp64.
    velocity, clean, noise, rewards = random_flow(0)
    squared = (velocity - (noise - clean)) ** 2
    reward_term = (rewards[:, :, None] * squared).mean(dim=(1, 2))
    reference_term = ((velocity - (noise - clean)) ** 2).mean(dim=(1, 2))
    two_terms = reward_term + reference_weight * reference_term
    (wanted,) = torch.autograd.grad(two_terms.sum(), velocity)
    cells = ((velocity - (noise - clean)) ** 2).mean(dim=2)
    loss, metrics = reward_weighted_loss(
        cells, rewards, torch.ones(3, 12), reference_weight=reference_weight, min_weight=-math.inf
    )
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, two_terms, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(metrics["reward_loss"], reward_term.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(metrics["reference_loss"], reference_term.detach(), rtol=0, atol=1e-10)


def test_the_identity_holds_for_tokens_too():
    log_probs = -torch.rand(2, 6, dtype=torch.float64) * 5
    rewards = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
    two_terms = (rewards * -log_probs).mean(1) + 0.5 * (-log_probs).mean(1)
    loss, _ = reward_weighted_loss(-log_probs, rewards, torch.ones(2, 6), min_weight=-math.inf)
    torch.testing.assert_close(loss, two_terms, rtol=0, atol=1e-10)


def test_without_constraint_and_with_full_reward_it_is_the_plain_flow_loss():
    velocity, clean, noise, _ = random_flow(1)
    loss, metrics = reward_weighted_loss(
        (velocity - (noise - clean)).square().mean(dim=2), torch.ones(3, 12), torch.ones(3, 12), reference_weight=0.0
    )
    plain = torch.nn.functional.mse_loss(velocity, noise - clean, reduction="none").mean(dim=(1, 2))
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-12)
    assert metrics["weight_mean"].tolist() == [1.0, 1.0, 1.0]


def test_by_hand():
    # weights 1.5, 0.5, 0.25, and -0.5 raised to 0
    loss, metrics = loss_of([[1.0, 2.0, 4.0, 8.0]], [[1.0, 0.0, -0.25, -1.0]])
    assert loss.item() == pytest.approx((1.5 + 1.0 + 1.0 + 0.0) / 4)
    assert metrics["reward_loss"].item() == pytest.approx((1.0 + 0.0 - 1.0 - 8.0) / 4)
    assert metrics["reference_loss"].item() == pytest.approx(15 / 4)
    assert metrics["weight_mean"].item() == pytest.approx(2.25 / 4)
    assert (metrics["weight_min"].item(), metrics["weight_max"].item()) == (0.0, 1.5)
    assert metrics["negative_fraction"].item() == 0.25


@pytest.mark.parametrize(
    "reward, min_weight, slope",
    [
        (1.0, 0.0, 1.5),
        (-0.4, 0.0, 0.1),  # disliked, but the constraint still holds on to it
        (-1.0, 0.0, 0.0),  # let go
        (-1.0, -math.inf, -0.5),  # the paper: pushed away
        (-1.0, -0.2, -0.2),
        (-1.0, 0.1, 0.1),
    ],
)
def test_sign_of_the_gradient_in_a_region(reward, min_weight, slope):
    losses = torch.tensor([[3.0]], requires_grad=True)
    loss, _ = reward_weighted_loss(losses, torch.tensor([[reward]]), torch.ones(1, 1), 0.5, min_weight)
    (gradient,) = torch.autograd.grad(loss.sum(), losses)
    assert gradient.item() == pytest.approx(slope)


def test_a_cell_that_is_pushed_away_stops_at_the_cap():
    losses = torch.tensor([[1.0, 9.0, 9.0]], requires_grad=True)
    rewards = torch.tensor([[-1.0, -1.0, 1.0]])
    loss, _ = reward_weighted_loss(losses, rewards, torch.ones(1, 3), 0.5, -math.inf, repelled_loss_cap=4.0)
    (gradient,) = torch.autograd.grad(loss.sum(), losses)
    assert loss.item() == pytest.approx((-0.5 - 2.0 + 13.5) / 3)
    assert (3 * gradient).tolist() == [[-0.5, 0.0, 1.5]]


def test_padding_counts_neither_in_value_nor_in_gradient():
    losses = torch.tensor([[2.0, math.nan, math.inf]], requires_grad=True)
    rewards = torch.tensor([[0.5, math.nan, 7.0]])
    loss, metrics = reward_weighted_loss(losses, rewards, torch.tensor([[1, 0, 0]]))
    (gradient,) = torch.autograd.grad(loss.sum(), losses)
    assert loss.item() == 2.0 and gradient.tolist() == [[1.0, 0.0, 0.0]]
    assert metrics["weight_min"].item() == metrics["weight_max"].item() == 1.0


def test_an_image_without_cells_gives_zero():
    loss, metrics = loss_of([[1.0, 2.0]], [[1.0, 1.0]], [[0.0, 0.0]])
    assert loss.item() == 0 and all(torch.isfinite(v).all() for v in metrics.values())


def test_half_precision_is_computed_in_fp32():
    losses = torch.full((1, 3), 2.0, dtype=torch.bfloat16)
    loss, _ = reward_weighted_loss(losses, torch.full((1, 3), 0.123), torch.ones(1, 3))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(2 * 0.623, rel=1e-6)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        (((1, 4), (1, 3), (1, 4)), {}, "share one shape"),
        (((4,), (4,), (4,)), {}, "share one shape"),
        (((1, 4), (1, 4), (1, 4)), {"reference_weight": -0.1}, "at least 0"),
        (((1, 4), (1, 4), (1, 4)), {"reference_weight": math.nan}, "at least 0"),
    ],
)
def test_bad_arguments_are_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        reward_weighted_loss(*(torch.ones(shape) for shape in shapes), **options)


@pytest.mark.parametrize("value", [1.1, -1.1, math.nan])
def test_map_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match="outside -1..1"):
        loss_of([[1.0, 1.0]], [[0.0, value]])
