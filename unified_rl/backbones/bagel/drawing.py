"""Drawing behind a context: the sampling loop, its replay with gradients, and the flow's own error."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unified_rl.backbones.bagel import flow
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.flow import FlowSampling, Gaussian
from unified_rl.backbones.bagel.model import BagelModel
from unified_rl.backbones.bagel.sequence import Latent, Packed, SpecialTokens, pack
from unified_rl.backbones.base import BackboneError, FlowTraj


class Painter:
    """A model and the size of the images that it draws.

    Args:
        rows, columns: of latent tokens; N of them.
    """

    def __init__(
        self, model: BagelModel, special: SpecialTokens, rows: int, columns: int, device: torch.device
    ) -> None:
        self.model = model
        self.device = device
        self.shape = (rows * columns, model.config.latent_width)  # N, D
        blank = Latent(torch.zeros(self.shape), rows, columns, noisy=True)
        self.layout = pack([[blank]], model.config, special).to(device)

    def velocity(self, layout: Packed, context: Context, latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """fp32 [R, N, D] of latents of that shape at times fp32 [R], behind R rows of context."""
        noisy = layout.at(latents, times.repeat_interleave(self.shape[0]))
        return self.model.velocity(noisy, context).unflatten(0, latents.shape[:2])

    # ---- without gradients ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, context: Context, seeds: Sequence[int], starts: Sequence[int], sampling: FlowSampling) -> FlowTraj:
        """Draw an image behind every row of `context`.

        Args:
            seeds, starts: of each row, of its noise and its first SDE step.
        """
        device, decisions = self.device, sampling.decisions
        noise = flow.normal_streams(seeds, (1 + decisions, *self.shape), device)
        x, taken = noise[:, 0], torch.empty_like(noise)
        log_probs = torch.zeros(len(seeds), decisions, device=device)
        times = flow.schedule(sampling.steps, sampling.shift)
        first = torch.tensor(starts)
        branches = self._branches(context.reserve(self.layout.positions.shape[1]), sampling)
        for i, (now, then) in enumerate(zip(times.tolist()[:-1], times.tolist()[1:], strict=True)):
            velocity = self._sampled_velocity(branches, x, now, sampling)
            ahead = flow.euler_step(x, velocity, now, then)
            rows = ((first <= i) & (i < first + decisions)).nonzero()[:, 0]
            if len(rows):
                place, rows = (i - first[rows]).to(device), rows.to(device)
                steps = torch.full((len(rows), 1), i, device=device)
                step = flow.sde_steps(x[rows, None], velocity[rows, None], times.to(device), steps, sampling.eta)
                action = step.mean + step.std[..., None, None] * noise[rows, place + 1][:, None]
                log_probs[rows, place] = step.log_prob(action)[:, 0]
                taken[rows, place], taken[rows, place + 1] = x[rows], action[:, 0]
                ahead[rows] = action[:, 0]
            x = ahead
        numbers = first[:, None] + torch.arange(decisions)
        return FlowTraj(taken if decisions else x[:, None], numbers.to(device), log_probs, x)

    def _branches(self, context: Context, sampling: FlowSampling) -> list[tuple[Packed, Context]]:
        """Layout and context of the branch with the prompt, and without it where any step needs that."""
        contexts = [context, Context.empty(context.batch)] if self._is_guided(sampling) else [context]
        return [(self.layout.tiled(c.next_position), c) for c in contexts]

    @staticmethod
    def _is_guided(sampling: FlowSampling) -> bool:
        return any(sampling.guides_at(time) for time in flow.schedule(sampling.steps, sampling.shift).tolist()[:-1])

    def _sampled_velocity(
        self, branches: Sequence[tuple[Packed, Context]], x: torch.Tensor, time: float, sampling: FlowSampling
    ) -> torch.Tensor:
        times = torch.full((len(x),), time, device=x.device)
        if not sampling.guides_at(time):
            branches = branches[:1]
        velocities = [self.velocity(layout, context, x, times) for layout, context in branches]
        return velocities[0] if len(velocities) == 1 else flow.guided_velocity(*velocities, sampling)

    # ---- with gradients -------------------------------------------------------------------------------------------

    def distribution(
        self, context: Context, trajectory: FlowTraj, sampling: FlowSampling, wanted: Sequence[int]
    ) -> Gaussian:
        """Distributions of the chosen decisions of each row, all in one pass; with guidance in two.

        Args:
            context: of B rows; trajectory: of the same, on the model's device.
            wanted: positions among the S decisions.
        """
        numbers, x = trajectory.steps[:, wanted], trajectory.latents[:, wanted]
        schedule = flow.schedule(sampling.steps, sampling.shift).to(x.device)
        flat, times = x.flatten(0, 1), schedule[numbers].flatten()
        each = context.take(torch.arange(context.batch).repeat_interleave(len(wanted)))
        velocity = self.velocity(self.layout.tiled(each.next_position), each, flat, times)
        if self._is_guided(sampling):
            velocity = self._guided_rows(velocity, flat, times, sampling)
        return flow.sde_steps(x, velocity.unflatten(0, x.shape[:2]), schedule, numbers, sampling.eta)

    def _guided_rows(
        self, conditional: torch.Tensor, x: torch.Tensor, times: torch.Tensor, sampling: FlowSampling
    ) -> torch.Tensor:
        """Velocities with guidance in the rows whose time has it.

        The branch without the prompt is computed for one row at least, and stays in the graph: whether any row needs
        it depends on the data, but all ranks must make the same passes.
        """
        acts = [sampling.guides_at(time) for time in times.tolist()]
        rows = torch.tensor([i for i, guided in enumerate(acts) if guided] or [0], device=x.device)
        empty = Context.empty(len(rows))
        unconditional = self.velocity(self.layout.tiled(empty.next_position), empty, x[rows], times[rows])
        guided = flow.guided_velocity(conditional[rows], unconditional, sampling)
        if not any(acts):
            guided = conditional[rows] + 0 * guided
        return conditional.index_copy(0, rows, guided)

    def cell_errors(self, context: Context, images: torch.Tensor, seeds: Sequence[int], shift: float) -> torch.Tensor:
        """fp32 [B, N] squared velocity errors of clean latents [B, N, D].

        Args:
            seeds: of each row, of its time and noise.
        """
        if len(seeds) != len(images):
            raise BackboneError(f"{len(seeds)} seeds for {len(images)} images")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        moments = torch.cat([torch.randn(1, generator=generator) for generator in generators]).to(images.device)
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators])
        times, noise = flow.training_times(moments, shift), noise.to(images.device)
        layout = self.layout.tiled(context.next_position)
        velocity = self.velocity(layout, context, flow.noised(images, noise, times), times)
        return flow.squared_error(velocity, images, noise)
