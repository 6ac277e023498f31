"""Distributions and per-sample randomness."""

import math

import pytest
import torch

from unified_rl.backbones.base import (
    BackboneError,
    Categorical,
    FlowTraj,
    Sampling,
    TextScore,
    TokenTraj,
    inverse_cdf,
    stack_trajectories,
    uniform_streams,
)


def test_categorical_on_hand_computed_numbers():
    uniform = Categorical(torch.zeros(1, 2, 4))
    assert torch.allclose(uniform.log_prob(torch.tensor([[0, 3]])), torch.full((1, 2), -math.log(4)))
    assert torch.allclose(uniform.entropy(), torch.full((1, 2), math.log(4)))
    # p = (3/4, 1/4): KL(p || uniform) = 3/4 ln(3/2) + 1/4 ln(1/2)
    skewed, flat = Categorical(torch.tensor([[[math.log(3.0), 0.0]]])), Categorical(torch.zeros(1, 1, 2))
    assert skewed.kl(flat).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert flat.kl(skewed).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)
    policy, reference = (Categorical(torch.tensor([[p]]).log()) for p in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    assert policy.kl(reference).item() == pytest.approx(0.25 * math.log(2.0))  # .5 ln 2 + 0 + .25 ln .5
    assert Categorical(policy.logits + 3.0).kl(policy).item() == pytest.approx(0.0, abs=1e-7)  # not normalised


def test_impossible_tokens_add_nothing_to_the_divergence():
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]], requires_grad=True)
    value = Categorical(logits).kl(Categorical(torch.tensor([[[0.0, 1.0, -math.inf]]])))
    # ln(1/2) - mean of ln(softmax(0, 1))
    assert value.item() == pytest.approx(math.log(1 + math.e) - math.log(2) - 0.5, rel=1e-5)
    value.sum().backward()
    assert logits.grad.isfinite().all()


def test_categorical_is_fp32_whatever_the_logits():
    half = Categorical(torch.zeros(1, 1, 3, dtype=torch.bfloat16))
    assert half.log_prob(torch.zeros(1, 1, dtype=torch.long)).dtype == torch.float32


def test_sampler_frequencies_are_softmax_of_logits():
    """Chi-square over 128 tokens, the tail included: nothing is cut off at the likeliest 50."""
    logits = torch.randn(128, generator=torch.Generator().manual_seed(0))
    draws = 100_000
    uniforms = uniform_streams([1], draws)[0]
    picked = torch.cat([inverse_cdf(logits.expand(len(part), -1), part) for part in uniforms.split(20_000)])
    expected = logits.double().softmax(-1) * draws
    statistic = ((picked.bincount(minlength=128) - expected) ** 2 / expected).sum().item()
    assert expected.min() > 10
    assert 127 - 5 * math.sqrt(2 * 127) < statistic < 127 + 5 * math.sqrt(2 * 127)


def test_sampler_boundaries():
    """Uniforms 0, below 1 and at the steps of the cumulative distribution; zero-probability tokens never appear."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(4, -1)
    uniforms = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(logits, uniforms).tolist() == [1, 1, 3, 3]


def test_uniform_streams_belong_to_their_seed():
    together = uniform_streams([5, 2**62, 7], 6)
    assert together.dtype == torch.float64
    assert torch.equal(together[1], uniform_streams([2**62], 6)[0])
    assert torch.equal(together[:, :3], uniform_streams([5, 2**62, 7], 3))
    assert not torch.equal(together[0], together[2])


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"temperature": math.nan}, {"guidance_scale": -1.0}])
def test_impossible_sampling_is_refused(values):
    with pytest.raises(BackboneError, match=next(iter(values))):
        Sampling(**values)


def test_sampling_round_trip_and_foreign_settings():
    sampling = Sampling(0.7, 3.0)
    assert Sampling.from_dict(sampling.to_dict()) == sampling
    with pytest.raises(BackboneError, match="guidance_scale"):
        Sampling.from_dict({"temperature": 1.0})
    with pytest.raises(BackboneError, match="top_k"):
        Sampling.from_dict({"temperature": 1.0, "guidance_scale": 1.0, "top_k": 50})


def test_mean_log_prob_ignores_padding_and_is_nan_for_nothing():
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    score = TextScore(torch.tensor([[-1.0, -3.0, -9.0], [0.0, 0.0, 0.0]]), mask, torch.zeros(2, 3, dtype=torch.long))
    assert score.mean_log_prob()[0].item() == -2.0
    assert math.isnan(score.mean_log_prob()[1].item())


def test_estimated_divergence_by_hand():
    # policy 1/2, base model 1/4: d = -log 2, k3 = 1/2 + log 2 - 1; its slope in log pi is 1 - 1/2
    logits = torch.tensor([[[0.5, 0.5]]]).log().requires_grad_()
    taken = torch.tensor([[0]])
    policy = Categorical(logits)
    log_probs = policy.log_prob(taken)
    estimate = policy.kl_to(log_probs, torch.tensor([[0.25]]).log())
    assert estimate.item() == pytest.approx(math.log(2) - 0.5, rel=1e-6)
    (slope,) = torch.autograd.grad(estimate, log_probs)
    assert slope[0, 0].item() == pytest.approx(0.5, rel=1e-6)
    assert policy.kl_to(log_probs, Categorical(logits).reference(taken)).item() == 0


def test_chosen_log_probs_and_their_gradient_are_those_of_log_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(3, 100, 40, generator=generator)).requires_grad_()  # more rows than a part
    taken = torch.randint(40, (3, 100), generator=generator)
    weights = torch.randn(3, 100, generator=generator)
    expected = logits.log_softmax(-1).gather(-1, taken[..., None])[..., 0]
    (slope,) = torch.autograd.grad((expected * weights).sum(), logits)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    policy = Categorical(logits)
    torch.testing.assert_close(policy.entropy(), entropy, atol=1e-5, rtol=1e-5)
    found = policy.log_prob(taken)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    loss = (found * weights).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0], slope, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="inplace"):  # the logits are gone
        loss.backward()


def test_the_gradient_of_a_slice_of_logits_is_that_of_log_softmax():
    logits = torch.randn(3, 100, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    taken = torch.arange(3 * 40).view(3, 40) % 40
    expected = logits[:, 20:60].log_softmax(-1).gather(-1, taken[..., None]).sum()
    (slope,) = torch.autograd.grad(expected, logits)
    found = Categorical(logits[:, 20:60]).log_prob(taken).sum()
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], slope, atol=1e-6, rtol=1e-5)


def test_estimated_divergence_averages_to_the_true_one():
    logits = torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(0))
    policy, base = Categorical(logits[0].expand(5, 1, 5)), Categorical(logits[1].expand(5, 1, 5))
    every = torch.arange(5)[:, None]  # each token once, weighted by its probability
    estimates = policy.kl_to(policy.log_prob(every), base.reference(every))[:, 0]
    assert (policy.log_probs[0, 0].exp() * estimates).sum().item() == pytest.approx(
        policy.kl(base)[0, 0].item(), rel=1e-5
    )


def test_trajectories_come_back_from_their_records():
    tokens = TokenTraj(torch.arange(6).view(2, 3), -torch.rand(2, 3))
    again = stack_trajectories([tokens.tensors(row) for row in range(2)])
    assert (
        isinstance(again, TokenTraj)
        and torch.equal(again.actions, tokens.actions)
        and again.actions.dtype == torch.int64
    )
    assert torch.equal(again.taken, tokens.actions) and torch.equal(again.log_probs, tokens.log_probs)
    flow = FlowTraj(
        torch.randn(2, 4, 5, 6), torch.tensor([[1, 2, 3], [0, 1, 2]]), torch.randn(2, 3), torch.randn(2, 5, 6)
    )
    again = stack_trajectories([flow.tensors(row) for row in range(2)])
    for name in ("latents", "steps", "log_probs", "final"):
        assert torch.equal(getattr(again, name), getattr(flow, name)), name
    assert torch.equal(again.taken, flow.latents[:, 1:])


def test_an_image_of_the_ode_stores_its_latents_only():
    flow = FlowTraj(
        torch.randn(2, 1, 5, 6), torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0), torch.randn(2, 5, 6)
    )
    assert set(flow.tensors(0)) == {"final"}
    again = stack_trajectories([flow.tensors(row) for row in range(2)])
    assert torch.equal(again.final, flow.final) and again.steps.shape == again.log_probs.shape == (2, 0)
