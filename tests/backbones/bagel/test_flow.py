"""Rectified flow against numbers worked out by hand."""

import math

import pytest
import torch

from unified_rl.backbones.bagel.flow import (
    FlowSampling,
    Gaussian,
    euler_step,
    guided_velocity,
    noised,
    normal_streams,
    schedule,
    sde_std,
    sde_steps,
    shifted,
    squared_error,
    training_times,
)
from unified_rl.backbones.base import BackboneError

PLAIN = torch.tensor([1.0, 0.8, 0.5, 0.0])


def each(value):
    return torch.full((1, 1, 1, 1), float(value))


def test_times_by_hand():
    """t = 1/2 at shift 3: 1.5 / 2 = 3/4."""
    assert shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]
    assert schedule(2, 3.0).tolist() == [1.0, 0.75, 0.0]
    assert schedule(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert training_times(torch.zeros(2), 3.0).tolist() == [0.75, 0.75]
    assert FlowSampling().steps + 1 == 50  # the public code's default number of points


def test_ode_of_the_true_velocity_ends_at_the_image():
    image, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x, times = noise, schedule(5, 3.0).tolist()
    for now, then in zip(times[:-1], times[1:], strict=True):
        x = euler_step(x, noise - image, now, then)
        assert (x - noised(image, noise, torch.full((2,), then))).abs().max() < 1e-5
    assert (x - image).abs().max() < 1e-5


def test_error_is_per_token():
    image, noise = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    velocity = torch.tensor([[[1.0, 1.0], [3.0, 1.0]]])
    assert squared_error(velocity, image, noise).tolist() == [[0.0, 2.0]]


def test_sde_step_by_hand():
    """From 0.8 to 0.5 with eta 0.5: s^2 = .25 * .8 / .2 = 1; x = 2, v = 3.

    mean = 2 (1 - 1 / 1.6 * .3) - 3 (1 + 1 * .2 / 1.6) * .3 = 2 * .8125 - 3 * 1.125 * .3 = .6125; std = sqrt(.3).
    """
    step = sde_steps(each(2), each(3), PLAIN, torch.tensor([[1]]), 0.5)
    assert step.mean.item() == pytest.approx(0.6125, abs=1e-6)
    assert step.std.item() == pytest.approx(math.sqrt(0.3), abs=1e-6)
    expected = -0.5 * (1.0 - 0.6125) ** 2 / 0.3 - 0.5 * math.log(2 * math.pi * 0.3)
    assert step.log_prob(each(1)).item() == pytest.approx(expected, abs=1e-6)


def test_first_step_takes_the_next_time_at_the_pole():
    """From 1 to 0.8 with eta 0.5: s^2 = .25 * 1 / .2 = 1.25; mean = x (1 - .625 * .2) - v * .2; std = sqrt(.25)."""
    step = sde_steps(each(2), each(3), PLAIN, torch.tensor([[0]]), 0.5)
    assert step.mean.item() == pytest.approx(2 * 0.875 - 3 * 0.2, abs=1e-6)
    assert step.std.item() == pytest.approx(0.5, abs=1e-6)
    assert math.isfinite(sde_std(torch.tensor([1.0, 0.0]), torch.tensor([[0]]), 0.7).item())


def test_last_step_is_a_distribution_too():
    """From 0.5 to 0 with eta 1: s^2 = 1, std = sqrt(.5)."""
    assert sde_std(PLAIN, torch.tensor([[2]]), 1.0).item() == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_sde_keeps_the_distribution_of_the_ode():
    """Images and noise both standard normal: x_t has variance (1 - t)^2 + t^2, whatever eta."""
    times, count = schedule(200, 1.0), 40_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 1, 1, generator=generator)
    for i in range(150):
        t = times[i]
        # E[noise - image | x] for independent standard normals.
        velocity = x * (2 * t - 1) / ((1 - t) ** 2 + t**2)
        step = sde_steps(x, velocity, times, torch.full((count, 1), i), 0.7)
        x = step.mean + step.std[..., None, None] * torch.randn(x.shape, generator=generator)
    assert x.var().item() == pytest.approx(0.75**2 + 0.25**2, rel=0.03)


def test_steps_of_a_trajectory_are_independent_of_each_other():
    x, velocity = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    whole = sde_steps(x, velocity, PLAIN, torch.arange(3).expand(2, 3), 0.7)
    each = torch.tensor([[2, 0], [1, 2]])  # rows may differ
    rows = torch.arange(2)[:, None]
    some = sde_steps(x[rows, each], velocity[rows, each], PLAIN, each, 0.7)
    assert torch.equal(some.mean, whole.mean[rows, each])
    assert torch.equal(some.std, whole.std[rows, each])


def test_densities_are_means_over_the_numbers_of_a_latent():
    mean, std = torch.randn(2, 3, 4, 5), torch.tensor([[0.5, 1.0, 2.0], [1.0, 3.0, 0.1]])
    action = torch.randn(2, 3, 4, 5)
    step = Gaussian(mean, std)
    normal = torch.distributions.Normal(mean, std[..., None, None].expand(2, 3, 4, 5))
    assert torch.allclose(step.log_prob(action), normal.log_prob(action).mean((-2, -1)), atol=1e-6)
    assert torch.allclose(step.entropy(), normal.entropy().mean((-2, -1)), atol=1e-6)
    other = torch.distributions.Normal(mean + 1, std[..., None, None].expand(2, 3, 4, 5))
    expected = torch.distributions.kl_divergence(normal, other).mean((-2, -1))
    assert torch.allclose(step.kl(Gaussian(mean + 1, std)), expected, atol=1e-6)
    assert step.kl(step).abs().max() == 0


def test_gradient_of_the_log_probability_reaches_the_velocity():
    velocity = torch.zeros(1, 1, 1, 1, requires_grad=True)
    step = sde_steps(each(0), velocity, PLAIN, torch.tensor([[1]]), 0.5)
    step.log_prob(each(0.3)).sum().backward()
    # d log p / d mean = (action - mean) / std^2 = .3 / .3; d mean / d v = -1.125 * .3
    assert velocity.grad.item() == pytest.approx(-0.3375, abs=1e-6)


def test_half_precision_velocities_give_fp32_steps():
    step = sde_steps(each(2).bfloat16(), each(3).bfloat16(), PLAIN, torch.tensor([[1]]), 0.5)
    assert step.mean.dtype == step.log_prob(each(1).bfloat16()).dtype == torch.float32


def test_unlike_schedules_and_odes_have_no_ratio():
    with pytest.raises(BackboneError, match="unlike schedules"):
        Gaussian(each(0), torch.ones(1, 1)).kl(Gaussian(each(0), torch.full((1, 1), 2.0)))
    with pytest.raises(BackboneError, match="set eta above 0"):
        sde_steps(each(0), each(0), PLAIN, torch.tensor([[0]]), 0.0)


# ---- guidance -----------------------------------------------------------------------------------------------------

# One sample, two tokens: conditional lengths 3 and 4, 5 together. Guided at 2: (6, 0) and (0, 8), 10 together.
CONDITIONAL = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
NOTHING = torch.zeros(1, 2, 2)


def test_guidance_by_hand():
    def guided(unconditional=NOTHING, **values):
        return guided_velocity(CONDITIONAL, unconditional, FlowSampling(guidance_scale=2.0, **values))

    assert torch.allclose(guided(renorm="none"), 2 * CONDITIONAL)
    assert torch.allclose(guided(renorm="global"), CONDITIONAL)
    assert torch.allclose(guided(renorm="global", renorm_min=0.8), 1.6 * CONDITIONAL)
    # Against (-3, 0) in the first token: guided (9, 0) and (0, 8); each token to its own length, or both to 5.
    against = torch.tensor([[[-3.0, 0.0], [0.0, 0.0]]])
    assert torch.allclose(guided(renorm="channel", unconditional=against), CONDITIONAL)
    expected = torch.tensor([[[9.0, 0.0], [0.0, 8.0]]]) * 5 / math.sqrt(145)
    assert torch.allclose(guided(renorm="global", unconditional=against), expected)
    # A guided velocity that is shorter, here (1, 0) and (0, 4), is not lengthened.
    shorter = torch.tensor([[[5.0, 0.0], [0.0, 4.0]]])
    assert torch.allclose(guided(unconditional=shorter), torch.tensor([[[1.0, 0.0], [0.0, 4.0]]]))


def test_guidance_acts_in_its_interval():
    sampling = FlowSampling(guidance_scale=2.0)
    assert [sampling.guides_at(time) for time in (1.0, 0.41, 0.4, 0.1)] == [True, True, False, False]
    assert not FlowSampling(guidance_scale=1.0).guides_at(0.9)


def test_samples_are_renormed_alone():
    together = guided_velocity(
        torch.cat([CONDITIONAL, 100 * CONDITIONAL]), torch.cat([NOTHING, NOTHING + 50]), FlowSampling()
    )
    assert torch.equal(together[:1], guided_velocity(CONDITIONAL, NOTHING, FlowSampling()))


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"sde_window": -1},
        {"sde_before": 0.5},
        {"shift": 0.0},
        {"eta": -0.1},
        {"eta": math.nan},
        {"renorm_min": 2.0},
    ],
)
def test_impossible_settings_are_refused(values):
    with pytest.raises(BackboneError, match=next(iter(values))):
        FlowSampling(**values)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"sde_window": 2}, "set eta above 0"),
        ({"sde_before": 2}, "set eta above 0"),
        ({"eta": 0.7, "steps": 1}, "steps of at least 2"),
        ({"eta": 0.7, "steps": 4, "sde_before": 4}, "sde_before=4 must be below steps=4"),
        ({"eta": 0.7, "steps": 4, "sde_window": 4}, "does not fit into the 3 steps"),
        ({"eta": 0.7, "steps": 4, "sde_window": 3, "sde_before": 2}, "does not fit into the 2 steps"),
    ],
)
def test_impossible_windows_are_refused(values, said):
    with pytest.raises(BackboneError, match=said):
        FlowSampling(**values)


def test_windows_lie_where_they_may():
    def starts(**values):
        sampling = FlowSampling(steps=6, eta=0.7, **values)
        return sampling.decisions, sorted({sampling.window_start(seed) for seed in range(100)})

    assert starts() == (5, [0])
    assert starts(sde_before=3) == (3, [0])
    assert starts(sde_window=2) == (2, [0, 1, 2, 3])
    assert starts(sde_window=2, sde_before=3) == (2, [0, 1])
    assert FlowSampling().decisions == 0


def test_unknown_renorm_is_refused():
    with pytest.raises(BackboneError, match="unknown renorm 'text': global, channel, none"):
        FlowSampling(renorm="text")


def test_settings_round_trip():
    sampling = FlowSampling(steps=8, eta=0.7)
    assert FlowSampling.from_dict(sampling.to_dict()) == sampling
    with pytest.raises(BackboneError, match="eta"):
        FlowSampling.from_dict({k: v for k, v in sampling.to_dict().items() if k != "eta"})


def test_noise_belongs_to_its_seed():
    together = normal_streams([5, 2**62], (3, 4, 2))
    assert together.shape == (2, 3, 4, 2)
    assert torch.equal(together[1], normal_streams([2**62], (3, 4, 2))[0])
    assert not torch.equal(together[0], together[1])


def test_divergence_from_stored_means_is_the_exact_one():
    mean, other = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2, 3), 0.4)
    policy, base = Gaussian(mean, torch.tensor([[0.5]])), Gaussian(other, torch.tensor([[0.5]]))
    stored = base.reference(mean)
    assert policy.kl_to(mean, stored).item() == pytest.approx(0.4**2 / (2 * 0.5**2))  # (difference / std)^2 / 2
    assert policy.kl_to(mean, policy.reference(mean)).item() == 0
