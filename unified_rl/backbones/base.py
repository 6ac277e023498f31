"""What every backbone speaks: sampling settings, trajectories, step distributions, and per-sample randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import is_flash_attn_2_available

from unified_rl.runtime import StageError

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on

SHOWN = 5  # tensors that a message names
PART, PART_ON_CPU = 256, 16  # distributions that are normalised together; few of them stay in a processor's cache


class BackboneError(StageError):
    """A checkpoint, policy file or input that cannot be used; the message names it and says what to do."""


def tensor_problems(
    expected: Mapping[str, Sequence[int]],
    found: Mapping[str, Sequence[int]],
    unknown: str,
    optional: Iterable[str] = (),
) -> list[str]:
    """What is wrong with the shapes `found` by name; at most SHOWN complaints.

    Args:
        unknown: what to say of names that are not expected.
        optional: expected names that may be missing.
    """
    problems = [
        *_listed("missing", expected.keys() - found.keys() - set(optional)),
        *_listed(unknown, found.keys() - expected.keys()),
    ]
    for name in sorted(expected.keys() & found.keys()):
        if tuple(found[name]) != tuple(expected[name]):
            problems.append(f"{name} has shape {list(found[name])}, the model {list(expected[name])}")
    return problems[:SHOWN]


def _listed(problem: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    if not ordered:
        return []
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return [f"{problem}: {', '.join(ordered[:SHOWN])}{more}"]


def check_picture(image: object, row: int) -> None:
    """Raise when `image`, that of a batch's `row`, is not a uint8 [H, W, 3] array."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
        raise BackboneError(f"image {row} must be a uint8 [H, W, 3] array, not {found}")


def distinct_images(images: Sequence[np.ndarray | None]) -> tuple[list[int], list[int]]:
    """The rows where a picture stands first, and for every row the number of its picture among these, -1 for none.

    Pictures are the same when they are one array or have equal bytes.
    """
    first: list[int] = []
    known: dict[object, int] = {}
    places = []
    kept = list(images)  # rows of one array are made anew each time, and a freed object's id is given out again
    for row, image in enumerate(kept):
        if image is None:
            places.append(-1)
            continue
        check_picture(image, row)
        if id(image) not in known:  # bytes are compared once for each array
            place = known.setdefault((image.shape, image.tobytes()), len(first))
            first += [row] if place == len(first) else []
            known[id(image)] = place
        places.append(known[id(image)])
    return first, places


def images_repeat(images: Sequence[np.ndarray | None]) -> bool:
    """Whether a picture stands in more than one row, so that sharing what is read of it saves anything."""
    return len(distinct_images(images)[0]) < sum(image is not None for image in images)


def check_text(text: str, control: Iterable[str]) -> None:
    """Raise when `text` would be read as one of the `control` tokens, which would silently change the conversation."""
    for token in control:
        if token in text:
            raise BackboneError(f"the text {text!r} contains the control token {token!r}; remove it")


class ReplaySettings:
    """Base of frozen dataclasses that are part of a policy: replaying a trajectory needs exactly the same values."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            BackboneError: a setting is missing or unknown, so the trajectory cannot be replayed faithfully.
        """
        wrong = sorted({f.name for f in fields(cls)} ^ set(values))
        if wrong:
            raise BackboneError(f"sampling settings with a missing or unknown entry: {', '.join(wrong)}")
        return cls(**values)


@dataclass(frozen=True)
class Sampling(ReplaySettings):
    """How images are drawn. Part of the policy: replaying a trajectory needs the same values.

    Attributes:
        temperature: divides the logits; above 0.
        guidance_scale: w of `u + w (c - u)` on logits with and without the prompt; at 1 only the prompt counts.
    """

    temperature: float = 1.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise BackboneError(f"temperature must be a number above 0, not {self.temperature!r}")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise BackboneError(f"guidance_scale must be a number of at least 0, not {self.guidance_scale!r}")


@dataclass
class TokenTraj:
    """B images as sequences of S tokens, each a decision of the policy.

    Attributes:
        actions: int64 [B, S] image tokens.
        log_probs: fp32 [B, S] under the distribution that was sampled, guidance and temperature included.
    """

    actions: torch.Tensor
    log_probs: torch.Tensor

    @property
    def taken(self) -> torch.Tensor:
        """What a step distribution takes for its log-probabilities."""
        return self.actions

    def tensors(self, row: int) -> dict[str, torch.Tensor]:
        """One image for a record."""
        return {"actions": self.actions[row].int().cpu(), "log_probs": self.log_probs[row].float().cpu()}

    @classmethod
    def stack(cls, rows: Sequence[Mapping[str, torch.Tensor]]) -> TokenTraj:
        """Inverse of `tensors`, for many images."""
        return cls(torch.stack([r["actions"].long() for r in rows]), torch.stack([r["log_probs"] for r in rows]))

    def to(self, device: torch.device) -> TokenTraj:
        """The same on `device`."""
        return TokenTraj(self.actions.to(device), self.log_probs.to(device))


@dataclass
class FlowTraj:
    """B images as latents of N cells with D numbers, drawn in S decisions of the policy among steps of the ODE.

    Attributes:
        latents: fp32 [B, S + 1, N, D] before the first decision and after each; decisions are consecutive steps.
        steps: int64 [B, S] which steps of the schedule they are; images of one group share them.
        log_probs: fp32 [B, S] under the distribution that was sampled, guidance included.
        final: fp32 [B, N, D] the image's latents.
    """

    latents: torch.Tensor
    steps: torch.Tensor
    log_probs: torch.Tensor
    final: torch.Tensor

    @property
    def taken(self) -> torch.Tensor:
        """What a step distribution takes for its log-probabilities: fp32 [B, S, N, D]."""
        return self.latents[:, 1:]

    def tensors(self, row: int) -> dict[str, torch.Tensor]:
        """One image for a record; an image drawn by the ODE alone has no decisions, so only `final` is stored."""
        kept = {"final": self.final[row].float().cpu()}
        if self.steps.shape[1]:
            kept["latents"] = self.latents[row].float().cpu()
            kept["steps"] = self.steps[row].int().cpu()
            kept["log_probs"] = self.log_probs[row].float().cpu()
        return kept

    @classmethod
    def stack(cls, rows: Sequence[Mapping[str, torch.Tensor]]) -> FlowTraj:
        """Inverse of `tensors`, for many images with the same number of decisions."""
        final = torch.stack([r["final"] for r in rows])
        if "latents" not in rows[0]:
            none = final.new_zeros(len(rows), 0)
            return cls(final[:, None], none.long(), none, final)
        latents, log_probs = (torch.stack([r[name] for r in rows]) for name in ("latents", "log_probs"))
        return cls(latents, torch.stack([r["steps"].long() for r in rows]), log_probs, final)

    def to(self, device: torch.device) -> FlowTraj:
        """The same on `device`."""
        return FlowTraj(*(part.to(device) for part in (self.latents, self.steps, self.log_probs, self.final)))


Trajectory = TokenTraj | FlowTraj


def stack_trajectories(rows: Sequence[Mapping[str, torch.Tensor]]) -> Trajectory:
    """The trajectory of records' tensors, all of one kind."""
    return (FlowTraj if "final" in rows[0] else TokenTraj).stack(rows)


@dataclass
class TextScore:
    """Teacher-forced responses, right-padded to L tokens.

    Attributes:
        log_probs: fp32 [B, L], 0 at padding.
        mask: fp32 [B, L], 1 at response tokens.
        ids: int64 [B, L].
    """

    log_probs: torch.Tensor
    mask: torch.Tensor
    ids: torch.Tensor

    def mean_log_prob(self) -> torch.Tensor:
        """fp32 [B] mean over the tokens of each response, nats; NaN for an empty response."""
        return (self.log_probs * self.mask).sum(-1) / self.mask.sum(-1)


@dataclass
class TextTraj:
    """Sampled responses, right-padded to T tokens.

    Attributes:
        ids: int64 [B, T], the end-of-turn token included where the model wrote it.
        log_probs: fp32 [B, T] under the whole distribution at the temperature (greedy: at 1), also where `top_p` kept
            only its nucleus; 0 at padding.
        entropies: fp32 [B, T] of that distribution, nats, 0 at padding.
        mask: fp32 [B, T].
        texts: without special tokens and without the space that the chat format puts first.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    entropies: torch.Tensor
    mask: torch.Tensor
    texts: list[str]


class Categorical:
    """Distributions over V tokens at each of S steps, in fp32.

    Args:
        logits: [B, S, V], guidance and temperature applied.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits.float()

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """fp32 [B, S, V]."""
        return self.logits.log_softmax(-1)

    @cached_property
    def log_sums(self) -> torch.Tensor:
        """fp32 [B, S]: logits less these are `log_probs`. Carry no gradient."""
        return _by_parts(lambda rows: rows.logsumexp(-1), self.logits.detach())

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """fp32 [B, S] of int64 [B, S] actions; its backward pass writes over `logits`."""
        return _ChosenLogProbs.apply(self.logits, actions, self.log_sums)

    def kl(self, other: Categorical) -> torch.Tensor:
        """fp32 [B, S]: KL(self || other), summed over all V tokens, nats."""
        # A token of probability zero under both would give inf - inf.
        gap = (self.log_probs - other.log_probs).masked_fill(self.log_probs == -torch.inf, 0.0)
        return (self.log_probs.exp() * gap).sum(-1)

    def reference(self, taken: torch.Tensor) -> torch.Tensor:
        """What `kl_to` needs to know of these distributions when they are the base model's: fp32 [B, S]."""
        return self.log_prob(taken)

    def kl_to(self, log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """fp32 [B, S]: estimate of the KL towards the base model from the actions taken, never negative (k3).

        Args:
            log_probs: fp32 [B, S], `log_prob` of the actions.
            reference: the base model's `reference` of them.
        """
        delta = reference.float() - log_probs
        return torch.expm1(delta) - delta

    def entropy(self) -> torch.Tensor:
        """fp32 [B, S], nats."""

        def of_rows(rows: torch.Tensor, log_sums: torch.Tensor) -> torch.Tensor:
            log_probs = rows - log_sums[:, None]
            return -torch.linalg.vecdot(log_probs.exp(), log_probs)

        return _by_parts(of_rows, self.logits, self.log_sums)


class _ChosenLogProbs(torch.autograd.Function):
    """`logits.log_softmax(-1)` at the actions, by the logarithms of the rows' sums.

    It makes no other tensor as large as the logits, not even their gradient: that is written over them, and autograd
    refuses who still needs them. torch's own way makes several, which with 16,384 image tokens are much of a step's
    memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, actions: torch.Tensor, log_sums: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, actions, log_sums)
        return logits.gather(-1, actions[..., None])[..., 0] - log_sums

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, actions, log_sums = ctx.saved_tensors
        rows, slopes = logits.flatten(0, -2), gradient.flatten()  # a copy, where logits are a slice
        for part, log_sum, slope in _parts(rows, log_sums, slopes):
            part.sub_(log_sum[:, None]).exp_().mul_(-slope[:, None])
        return rows.scatter_add_(-1, actions.flatten()[:, None], slopes[:, None]).view(logits.shape), None, None


def _by_parts(function: Callable[..., torch.Tensor], logits: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """fp32 [B, S] of `function`, of rows [R, V] (and [R] of others) -> [R]; on few rows at a time it needs little."""
    return torch.cat([function(*part) for part in _parts(logits, *others)]).view(logits.shape[:-1])


def _parts(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Few rows at a time of [B, S, V], and of others [B, S]."""
    flat = (logits.flatten(0, -2), *(other.flatten() for other in others))
    return zip(*(tensor.split(PART_ON_CPU if logits.is_cpu else PART) for tensor in flat), strict=True)


def uniform_streams(seeds: Sequence[int], length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Float64 [B, length] uniforms in [0, 1); row i depends on seeds[i] only.

    Drawn on the CPU up front, so that a sample does not depend on its batch, its worker or its device.
    """
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).to(device)


def embedding(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """fp32 [B, D]: the mean of states [B, T, D] over the tokens of mask [B, T], at unit length.

    Raises:
        BackboneError: a row without a token.
    """
    if not mask.any(1).all():
        raise BackboneError(f"text {int((~mask.any(1)).nonzero()[0])} is empty, so it has no embedding")
    mask = mask.float()[..., None]
    return F.normalize((states.float() * mask).sum(1) / mask.sum(1), dim=-1)


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """`requested`, or for `auto` flash_attention_2 where it can run, else sdpa."""
    if requested != "auto":
        return requested
    return "flash_attention_2" if flash_attention_runs(device, dtype) else "sdpa"


def flash_attention_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is a GPU in half precision with the package."""
    return dtype in (torch.float16, torch.bfloat16) and device.type == "cuda" and is_flash_attn_2_available()


def check_text_sampling(
    texts: int, seeds: Sequence[int], max_new_tokens: int, temperature: float, top_p: float = 1.0
) -> None:
    """Raise unless `texts` texts can be written with these settings."""
    if temperature < 0 or max_new_tokens < 1 or len(seeds) != texts or not 0 < top_p <= 1:
        raise BackboneError(
            f"temperature {temperature} below 0, max_new_tokens {max_new_tokens} below 1, top_p {top_p} not in (0, 1], "
            f"or {len(seeds)} seeds for {texts} texts"
        )


@torch.no_grad()
def sampled_text(
    next_logits: Callable[[torch.Tensor | None], torch.Tensor],
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    end: int,
    pad: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids int64, log_probs, entropies, mask fp32, [B, T'] each (see `TextTraj`), until `end` or `max_new_tokens`.

    Args:
        next_logits: [B, V] after the tokens [B] that were taken last, `pad` where a row has ended; first after None.
        temperature: 0 takes the likeliest token.
        top_p: only the nucleus of that much probability is sampled from.
    """
    uniforms = uniform_streams(seeds, max_new_tokens, device)
    running = torch.ones(len(seeds), dtype=torch.bool, device=device)
    columns, token = [], None
    for i in range(max_new_tokens):
        logits = next_logits(token).float() / (temperature or 1.0)
        taken = inverse_cdf(nucleus(logits, top_p), uniforms[:, i]) if temperature else logits.argmax(-1)
        token = taken.masked_fill(~running, pad)
        step = Categorical(logits)
        columns.append((token, step.log_prob(token) * running, step.entropy() * running, running.float()))
        running = running & (token != end)
        if not running.any():
            break
    return tuple(torch.stack(values, 1) for values in zip(*columns, strict=True))


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """`logits` [B, V], minus infinity but for the likeliest tokens: the fewest whose probabilities reach `top_p`."""
    if top_p == 1:
        return logits
    ordered, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    above = F.pad(ordered.cumsum(-1)[:, :-1], (1, 0)) >= top_p  # the likelier ones reach it already
    return logits.masked_fill(torch.zeros_like(above).scatter(-1, order, above), -math.inf)


def inverse_cdf(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """int64 [B]: one token per row, distributed as softmax(logits [B, V]), from float64 uniforms [B].

    In float64, because a cumulative sum of 16384 fp32 probabilities is off by more than the rarest of them.
    """
    weights = (logits.double() - logits.amax(-1, keepdim=True)).exp_()  # whatever their sum
    cumulative = weights.cumsum(-1)
    # right=True: a token of probability zero is never picked, not even by a uniform of exactly 0.
    picked = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return picked[:, 0].clamp_max(logits.shape[-1] - 1)
