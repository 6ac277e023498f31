"""Rectified flow by BAGEL's convention, as pure functions of tensors.

Time runs from 1, noise, to 0, image: x_t = (1 - t) x_0 + t noise, and the velocity is noise - x_0. A model whose ODE
steps are x - v dt is turned into a policy by an SDE with the same distribution at every time, whose steps are
Gaussians (Flow-GRPO, arXiv 2505.05470).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unified_rl.backbones.base import BackboneError, ReplaySettings

RENORMS = ("global", "channel", "none")
SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class FlowSampling(ReplaySettings):
    """How images are drawn; part of the policy: replaying a trajectory needs the same values.

    Attributes:
        steps: S, evaluations of the velocity. The public code counts points of time: its `num_timesteps` is S + 1.
        shift: s of t <- s t / (1 + (s - 1) t); above 1 spends more steps near the noise.
        eta: strength of the SDE's noise; 0 draws by the ODE, which has no log-probabilities.
        sde_window: how many consecutive steps are those of the SDE, all others are those of the ODE; 0: as many as
            there are before `sde_before`.
        sde_before: the window ends at or before this step; 0: before the last, which is always one of the ODE, because
            nothing would take its noise out of the picture again.
        guidance_scale: w of u + w (c - u) on velocities with and without the prompt; at 1 only the prompt counts.
        guidance_above, guidance_up_to: guidance acts at times in (above, up to].
        renorm: what a guided velocity is shrunk to the length of: the conditional one's over the whole image
            (`global`), in every token (`channel`), or `none`.
        renorm_min: it is not shrunk below this share.
    """

    steps: int = 49
    shift: float = 3.0
    eta: float = 0.0
    sde_window: int = 0
    sde_before: int = 0
    guidance_scale: float = 4.0
    guidance_above: float = 0.4
    guidance_up_to: float = 1.0
    renorm: str = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "steps": (1, math.inf),
            "shift": (1e-3, math.inf),
            "eta": (0, math.inf),
            "sde_window": (0, math.inf),
            "sde_before": (0, math.inf),
            "guidance_scale": (0, math.inf),
            "guidance_above": (-math.inf, math.inf),
            "guidance_up_to": (-math.inf, math.inf),
            "renorm_min": (0, 1),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and least <= value <= most):
                raise BackboneError(f"{name} must be a number from {least} to {most}, not {value!r}")
        for name in ("steps", "sde_window", "sde_before"):
            if not isinstance(getattr(self, name), int):
                raise BackboneError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        if self.renorm not in RENORMS:
            raise BackboneError(f"unknown renorm {self.renorm!r}: {', '.join(RENORMS)}")
        self._check_window()

    def _check_window(self) -> None:
        if self.eta == 0:
            if self.sde_window or self.sde_before:
                raise BackboneError("sde_window and sde_before choose steps of the SDE; set eta above 0, or both to 0")
            return
        if self.steps < 2:
            raise BackboneError("the last step is one of the ODE, so eta above 0 needs steps of at least 2")
        if self.sde_before >= self.steps:
            raise BackboneError(f"sde_before={self.sde_before} must be below steps={self.steps}: the last is the ODE's")
        if self.sde_window > self._limit:
            raise BackboneError(f"sde_window={self.sde_window} does not fit into the {self._limit} steps it may lie in")

    @property
    def _limit(self) -> int:
        """The step before which the window ends."""
        return self.sde_before or self.steps - 1

    @property
    def decisions(self) -> int:
        """Steps of the SDE in the drawing of an image."""
        return (self.sde_window or self._limit) if self.eta else 0

    def window_start(self, seed: int) -> int:
        """First step of the window of a group of images, from a seed; every start that fits is as likely.

        Python's generator and not torch's, which draws the image's noise from the same seed.
        """
        return random.Random(seed).randrange(self._limit - self.decisions + 1) if self.eta else 0

    def guides_at(self, time: float) -> bool:
        """Whether a velocity at this time needs the branch without the prompt."""
        return self.guidance_scale != 1 and self.guidance_above < time <= self.guidance_up_to


# ---- times --------------------------------------------------------------------------------------------------------


def shifted(times: torch.Tensor, shift: float) -> torch.Tensor:
    """Times moved towards the noise; 0 and 1 stay."""
    return shift * times / (1 + (shift - 1) * times)


def schedule(steps: int, shift: float) -> torch.Tensor:
    """fp32 [steps + 1] times from 1 to 0."""
    return shifted(torch.linspace(1, 0, steps + 1), shift)


def training_times(normals: torch.Tensor, shift: float) -> torch.Tensor:
    """Times to train at, from standard normals of any shape, as BAGEL was trained: logistic, then shifted."""
    return shifted(normals.sigmoid(), shift)


# ---- noise and error ----------------------------------------------------------------------------------------------


def normal_streams(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32 [B, *shape] standard normals; row i depends on seeds[i] only.

    Drawn on the CPU up front, so that a sample does not depend on its batch, its worker or its device.
    """
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def noised(images: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """x_t [B, ...] of images and noise [B, ...] at times [B]."""
    times = times.reshape(-1, *[1] * (images.ndim - 1))
    return (1 - times) * images + times * noise


def squared_error(velocity: torch.Tensor, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 [B, N], mean over the last dimension of the squared error against noise - images, all [B, N, D]."""
    return (velocity.float() - (noise - images).float()).pow(2).mean(-1)


# ---- steps --------------------------------------------------------------------------------------------------------


def euler_step(x: torch.Tensor, velocity: torch.Tensor, time: float, next_time: float) -> torch.Tensor:
    """x at `next_time` along the ODE, shapes all [B, N, D]."""
    return x - velocity * (time - next_time)


@dataclass(frozen=True)
class Gaussian:
    """Distributions of the next latent at each of S steps.

    Densities are taken per number: their logarithms are means over the N * D numbers of a latent, not sums, so that
    clip ranges do not depend on the image's size.

    Attributes:
        mean: fp32 [B, S, N, D].
        std: fp32 [B, S], above 0.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """fp32 [B, S] of fp32 [B, S, N, D] latents, nats per number."""
        scaled = ((actions.float() - self.mean) / self.std[..., None, None]).pow(2).mean((-2, -1))
        return -0.5 * scaled - self.std.log() - 0.5 * math.log(2 * math.pi)

    def kl(self, other: Gaussian) -> torch.Tensor:
        """fp32 [B, S]: KL(self || other), nats per number.

        Raises:
            BackboneError: the other has another spread, hence belongs to another schedule.
        """
        if not torch.equal(self.std, other.std):
            raise BackboneError("KL between steps of unlike schedules; compute both with the trajectory's own sampling")
        return ((self.mean - other.mean) / self.std[..., None, None]).pow(2).mean((-2, -1)) / 2

    def reference(self, taken: torch.Tensor) -> torch.Tensor:
        """What `kl_to` needs to know of these distributions when they are the base model's: fp32 [B, S, N, D]."""
        return self.mean

    def kl_to(self, log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """fp32 [B, S]: exact KL towards the base model's steps, nats per number, whatever the actions taken.

        Args:
            reference: the base model's `reference`.
        """
        return self.kl(Gaussian(reference, self.std))

    def entropy(self) -> torch.Tensor:
        """fp32 [B, S], nats per number; constant, because the spread is not learned."""
        return self.std.log() + 0.5 * math.log(2 * math.pi * math.e)


def sde_std(times: torch.Tensor, steps: torch.Tensor, eta: float) -> torch.Tensor:
    """fp32 [B, S'] spread of the chosen steps of a schedule.

    Args:
        times: fp32 [S + 1], see `schedule`.
        steps: int64 [B, S'], each below S.
        eta: above 0.
    """
    return _diffusion(times, steps, eta) * (times[steps] - times[steps + 1]).sqrt()


def sde_steps(
    x: torch.Tensor, velocity: torch.Tensor, times: torch.Tensor, steps: torch.Tensor, eta: float
) -> Gaussian:
    """Distribution of the latents after the chosen steps.

    Args:
        x, velocity: [B, S', N, D] latents before each step and the velocities there; taken to fp32.
        times, steps, eta: as for `sde_std`, on the latents' device.

    Raises:
        BackboneError: eta is 0.
    """
    if not eta > 0:
        raise BackboneError("steps of the ODE have no distribution; set eta above 0")
    time, dt, square = (
        part[..., None, None]
        for part in (times[steps], times[steps] - times[steps + 1], _diffusion(times, steps, eta).pow(2))
    )
    x, velocity = x.float(), velocity.float()
    mean = x * (1 - square / (2 * time) * dt) - velocity * (1 + square * (1 - time) / (2 * time)) * dt
    return Gaussian(mean, sde_std(times, steps, eta))


def _diffusion(times: torch.Tensor, steps: torch.Tensor, eta: float) -> torch.Tensor:
    """eta sqrt(t / (1 - t)) at the start of each step.

    It has a pole at 1, where the first step starts; there the time after that step stands in the denominator. A
    single step from 1 to 0 is then finite as well.
    """
    time = times[steps]
    return eta * (time / (1 - torch.where(time == 1, times[steps + 1], time))).sqrt()


# ---- guidance -----------------------------------------------------------------------------------------------------


def guided_velocity(conditional: torch.Tensor, unconditional: torch.Tensor, sampling: FlowSampling) -> torch.Tensor:
    """fp32 [B, N, D] velocity of the sampled distribution from those with and without the prompt.

    For times at which `sampling.guides_at`; at others the conditional velocity is the answer. Lengths are those of
    each sample, so that no sample depends on its batch; the public code has one sample.
    """
    conditional, unconditional = conditional.float(), unconditional.float()
    guided = unconditional + sampling.guidance_scale * (conditional - unconditional)
    if sampling.renorm == "none":
        return guided
    over = (-2, -1) if sampling.renorm == "global" else (-1,)
    wanted, length = (torch.linalg.vector_norm(v, dim=over, keepdim=True) for v in (conditional, guided))
    # Guidance may only lengthen; a velocity that is already shorter stays as it is.
    return guided * (wanted / (length + SMALLEST_NORM)).clamp(sampling.renorm_min, 1)
