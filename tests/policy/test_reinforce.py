import math

import pytest
import torch

from unified_rl.backbones.base import Categorical
from unified_rl.policy.controllers import RunningMean
from unified_rl.policy.reinforce import reinforce_loss


def test_loss_and_gradient_by_hand():
    log_probs = torch.tensor([[-1.0, -3.0], [-2.0, -9.0]], requires_grad=True)
    kl = torch.tensor([[0.1, 0.3], [0.5, 9.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss, metrics = reinforce_loss(log_probs, torch.tensor([0.5, -2.0]), mask, kl, 0.1)
    # 0.5 * 2 + 0.1 * 0.2; -2 * 2 + 0.1 * 0.5
    assert loss.tolist() == pytest.approx([1.02, -3.95])
    assert metrics["policy_loss"].tolist() == pytest.approx([1.0, -4.0])
    assert metrics["log_prob"].tolist() == pytest.approx([-2.0, -2.0])
    assert metrics["kl"].tolist() == pytest.approx([0.2, 0.5])
    assert not any(m.requires_grad for m in metrics.values())
    slope, pull = torch.autograd.grad(loss.sum(), (log_probs, kl))
    assert slope.flatten().tolist() == pytest.approx([-0.25, -0.25, 2.0, 0.0])
    assert pull.flatten().tolist() == pytest.approx([0.05, 0.05, 0.1, 0.0])


def test_padding_does_not_matter():
    log_probs = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    kl = torch.tensor([[0.5, math.inf]])
    loss, metrics = reinforce_loss(log_probs, torch.ones(1), torch.tensor([[1.0, 0.0]]), kl, 2.0)
    assert loss.item() == 2.0 and all(m.isfinite().all() for m in metrics.values())
    (slope,) = torch.autograd.grad(loss.sum(), log_probs)
    assert slope.tolist() == [[-1.0, 0.0]]


def test_an_answer_without_tokens_gives_zero():
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, _ = reinforce_loss(log_probs, torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2), 1.0)
    (slope,) = torch.autograd.grad(loss.sum(), log_probs)
    assert loss.item() == 0 and (slope == 0).all()


def test_half_precision_is_computed_in_fp32():
    log_probs = torch.full((1, 300), -1.0, dtype=torch.bfloat16)
    loss, _ = reinforce_loss(log_probs, torch.ones(1, dtype=torch.float64), torch.ones(1, 300), torch.zeros(1, 300), 0)
    assert loss.dtype == torch.float32 and loss.item() == 1.0


def test_shapes_that_differ_and_advantages_that_are_no_numbers_are_refused():
    two, three = torch.zeros(1, 2), torch.zeros(1, 3)
    for arguments in (
        (two, torch.ones(1), three, two),
        (two, torch.ones(1), two, three),
        (two, torch.ones(2), two, two),
    ):
        with pytest.raises(ValueError, match="share one shape"):
            reinforce_loss(*arguments, 0.0)
    with pytest.raises(ValueError, match="finite"):
        reinforce_loss(two, torch.tensor([math.nan]), two, two, 0.0)


def test_it_learns_to_give_the_rewarded_answer():
    """Of four answers the third is rewarded: its probability rises, and the penalty holds it back."""

    def trained(coefficient: float) -> torch.Tensor:
        logits, generator = torch.zeros(4, requires_grad=True), torch.Generator().manual_seed(0)
        baseline, optimizer = RunningMean(), torch.optim.SGD([logits], lr=0.5)
        for _ in range(100):
            answers = torch.multinomial(logits.detach().softmax(-1), 8, replacement=True, generator=generator)
            rewards = (answers == 2).float()
            log_probs = logits.log_softmax(-1)[answers][:, None]
            kl = Categorical(logits.expand(8, 1, 4)).kl(Categorical(torch.zeros(8, 1, 4)))
            loss, _ = reinforce_loss(log_probs, rewards - baseline.value, torch.ones(8, 1), kl, coefficient)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            baseline = baseline.updated(rewards.tolist())
        return logits.detach().softmax(-1)

    free, held = trained(0.0), trained(1.0)
    assert free[2] > 0.9 and 0.3 < held[2] < 0.8
