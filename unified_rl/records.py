"""The records on disk: what prompts, images, rollouts and rewards are, and how each is checked when read.

Every record is one webdataset sample: `.json` (with `schema`), and where it has them `.safetensors` and `.png`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from unified_rl.config_checks import MAX_REGIONS
from unified_rl.manifests import is_count
from unified_rl.record_parts import (
    MAX_IMAGE_SIDE,
    MAX_SAMPLES,
    PROMPT_ID,
    STATUSES,
    Record,
    Source,
    check_image_id,
    check_tensors,
    decode_content,
    encode_content,
    is_finite,
    is_unicode,
    sample_key,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

MAX_REGION_TEXT = 1000


@dataclass
class PromptRecord:
    """One prompt; `metadata` follows GenEval's schema where there is one."""

    SCHEMA: ClassVar[int] = 1
    MEMBERS: ClassVar[tuple[str, ...]] = ("json",)
    FIELDS: ClassVar[frozenset[str]] = frozenset(("prompt_id", "text", "metadata"))

    prompt_id: str
    text: str
    metadata: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Key of the prompt in its shard."""
        return self.prompt_id

    def to_json(self) -> dict:
        """Fields as stored, here and inside rollouts."""
        return {"prompt_id": self.prompt_id, "text": self.text, "metadata": self.metadata}

    @classmethod
    def from_json(cls, content: dict, source: Source) -> PromptRecord:
        """Checked prompt; RecordError names the source."""
        source.check(set(content) == cls.FIELDS, "a prompt has prompt_id, text and metadata")
        prompt_id = source.text(content, "prompt_id")
        source.check(bool(PROMPT_ID.fullmatch(prompt_id)), f"prompt_id {prompt_id!r} is not {PROMPT_ID.pattern}")
        return cls(prompt_id, source.text(content, "text"), source.mapping(content, "metadata"))

    def to_members(self) -> dict[str, bytes]:
        """Extension -> bytes."""
        source = Source("", self.key)
        self.from_json(self.to_json(), source)
        return {"json": encode_content(source, self.to_json(), self.SCHEMA)}

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes], source: str) -> PromptRecord:
        """Inverse of `to_members`, everything checked."""
        where = Source(source, key)
        content = decode_content(where, members, cls)
        prompt = cls.from_json(content, where)
        where.check(prompt.key == key, f"belongs to prompt {prompt.key}")
        return prompt


TRAJECTORY_TENSORS = {
    "actions": "int [S]", "final": "float [N, D]", "latents": "float [S + 1, N, D]", "steps": "int [S]",
    "log_probs": "float [S]",
}  # fmt: skip
TRAJECTORIES = ({"actions", "log_probs"}, {"final"}, {"final", "latents", "steps", "log_probs"})
REWARD_TENSORS = {
    "token_log_probs": "float [L]", "reward_map": "float [h, w]", "reference_log_probs": "float [S]",
    "reference_means": "float [S, N, D]",
}  # fmt: skip


@dataclass(eq=False)
class RolloutRecord(Record):
    """One image drawn by a policy, with what is needed to replay it.

    `image` is uint8 [H, W, 3]. `tensors` is what a trajectory of `backbones.base` stores of one image: of tokens
    `actions` int [S] and `log_probs` fp32 [S] under the distribution that was sampled (after guidance and temperature);
    of a flow its latents `final` fp32 [N, D] and, where noise was added in S decisions, `latents` fp32 [S + 1, N, D],
    `steps` int [S], `log_probs` fp32 [S].
    """

    SCHEMA: ClassVar[int] = 2  # 2: images of a flow, whose tensors an older program would refuse one by one
    MEMBERS: ClassVar[tuple[str, ...]] = ("json", "png", "safetensors")
    FIELDS: ClassVar[frozenset[str]] = frozenset(("prompt", "sample", "seed", "policy_version", "sampling", "plan"))

    prompt: PromptRecord
    sample: int
    seed: int
    policy_version: str
    sampling: dict
    image: np.ndarray
    tensors: dict[str, torch.Tensor]
    plan: str | None = None

    @property
    def key(self) -> str:
        """`{prompt_id}_{sample:02d}`."""
        return sample_key(self.prompt.prompt_id, self.sample)

    def content(self) -> dict:
        """For JSON; the prompt as it is stored alone."""
        return {**super().content(), "prompt": self.prompt.to_json()}

    @staticmethod
    def restore(content: dict, source: Source) -> dict:
        """Fields from their JSON form."""
        return {**content, "prompt": PromptRecord.from_json(source.mapping(content, "prompt"), source)}

    def check(self, source: Source) -> None:
        """Raise RecordError where the record breaks the contract."""
        PromptRecord.from_json(self.prompt.to_json(), source)
        content = {"policy_version": self.policy_version, "sampling": self.sampling, "plan": self.plan}
        source.check(is_count(self.sample) and self.sample < MAX_SAMPLES, f"sample {self.sample!r} is no sample number")
        source.check(is_count(self.seed) and self.seed < 2**63, f"seed {self.seed!r} is not in 0..2**63-1")
        source.text(content, "policy_version")
        source.mapping(content, "sampling")
        if self.plan is not None:
            source.text(content, "plan", empty=True)
        self._check_trajectory(source)

    def _check_trajectory(self, source: Source) -> None:
        names = set(self.tensors)
        source.check(
            names in TRAJECTORIES, f"tensors {', '.join(sorted(names))} are no trajectory of tokens or of a flow"
        )
        check_tensors(source, self.tensors, TRAJECTORY_TENSORS)
        if "steps" in names:
            steps, latents = self.tensors["steps"].tolist(), len(self.tensors["latents"])
            source.check(latents == len(steps) + 1, f"{latents} latents, not one more than the {len(steps)} steps")
            consecutive = steps[0] >= 0 and steps == list(range(steps[0], steps[0] + len(steps)))
            source.check(consecutive, f"steps {steps[:8]} are not consecutive steps of a schedule")


@dataclass(eq=False)
class RewardRecord(Record):
    """Score of one image. A failed or skipped score is a state with a reason, never a number.

    `tokens` are the L text pieces of the scored prompt (GvU). `regions` are what the judge said of parts of the image
    (SRUM), each `{box, score, object, reason}`: the box [x1, y1, x2, y2] in pixels, x2 and y2 just outside; the score
    null where it could not be read. `tensors` may hold, and an ok record must where it says so:

    * `token_log_probs` fp32 [L], of the tokens under the judge; as many as tokens.
    * `reward_map` fp32 [h, w] in -1..1, SRUM's R on the grid of latents or image tokens, with `alpha` (0..1)
      among the components; needed with regions.
    * `reference_log_probs` fp32 [S], of the image's decisions under the base weights, and `reference_means` fp32
      [S, N, D], of a flow's steps. Not every update needs a reference: training checks what it needs.
    """

    SCHEMA: ClassVar[int] = 2  # 2: `regions`, maps, and no reference where the update needs none
    MEMBERS: ClassVar[tuple[str, ...]] = ("json", "safetensors")
    FIELDS: ClassVar[frozenset[str]] = frozenset(
        ("key", "prompt_id", "policy_version", "status", "reward", "components", "reason", "tokens", "regions")
    )

    key: str
    prompt_id: str
    policy_version: str
    status: str
    reward: float | None
    components: dict[str, float]
    reason: str = ""
    tokens: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    regions: list[dict] = field(default_factory=list)

    def check(self, source: Source) -> None:
        """Raise RecordError where the record breaks the contract."""
        content = self.content()
        source.text(content, "prompt_id")
        source.text(content, "policy_version")
        source.text(content, "reason", empty=True)
        stem, _, number = self.key.rpartition("_")
        source.check(stem == self.prompt_id and number.isdigit(), f"is no sample of prompt {self.prompt_id}")
        source.check(self.status in STATUSES, f"status {self.status!r} is not one of {', '.join(STATUSES)}")
        components = source.mapping(content, "components")
        for name, value in components.items():
            source.check(is_finite(value), f"component {name} is {value!r}, not a finite number")
        texts = isinstance(self.tokens, list) and all(isinstance(t, str) and is_unicode(t) for t in self.tokens)
        source.check(texts, "tokens must be a list of text pieces")
        self._check_regions(source)
        check_tensors(source, self.tensors, REWARD_TENSORS)
        if self.status == "ok":
            source.check(is_finite(self.reward), f"status ok needs a finite reward, not {self.reward!r}")
            self._check_evidence(source)
        else:
            source.check(self.reward is None, f"status {self.status} must not carry a reward ({self.reward!r})")
            source.check(bool(self.reason.strip()), f"status {self.status} needs a reason")

    def _check_evidence(self, source: Source) -> None:
        """What an ok record must hold besides its reward."""
        scored = len(self.tensors.get("token_log_probs", ()))
        source.check(scored == len(self.tokens), f"{scored} token_log_probs but {len(self.tokens)} tokens")
        made = self.tensors.get("reward_map")
        source.check(made is not None or not self.regions, "regions without the tensor reward_map")
        if made is not None:
            source.check(bool((made.abs() <= 1.0).all()), "tensor reward_map has a value outside -1..1")
            alpha = self.components.get("alpha", math.nan)
            source.check(0 <= alpha <= 1, f"tensor reward_map needs the component alpha in 0..1, not {alpha}")

    def _check_regions(self, source: Source) -> None:
        source.check(isinstance(self.regions, list), "regions must be a list")
        source.check(len(self.regions) <= MAX_REGIONS, f"{len(self.regions)} regions, more than {MAX_REGIONS}")
        for number, region in enumerate(self.regions, 1):
            where = f"region {number}"
            named = isinstance(region, dict) and set(region) == {"box", "score", "object", "reason"}
            source.check(named, f"{where} must have exactly box, score, object and reason")
            box, score = region["box"], region["score"]
            whole = isinstance(box, list) and len(box) == 4 and all(is_count(v) and v <= MAX_IMAGE_SIDE for v in box)
            source.check(whole, f"{where}: box {box!r} must be four whole numbers in 0..{MAX_IMAGE_SIDE}")
            source.check(box[0] < box[2] and box[1] < box[3], f"{where}: box {box} is empty or inverted")
            for name in ("object", "reason"):
                text = source.text(region, name, empty=True)
                source.check(len(text) <= MAX_REGION_TEXT, f"{where}: {name} is longer than {MAX_REGION_TEXT}")
            if score is None:
                source.check(bool(region["reason"].strip()), f"{where}: a score that is null needs a reason")
            else:
                source.check(is_finite(score) and -1 <= score <= 1, f"{where}: score {score!r} is not in -1..1")


@dataclass(eq=False)
class ImageRecord(Record):
    """One image to ask about, uint8 [H, W, 3], without any label. `metadata` says at most where it is from."""

    SCHEMA: ClassVar[int] = 1
    MEMBERS: ClassVar[tuple[str, ...]] = ("json", "png")
    FIELDS: ClassVar[frozenset[str]] = frozenset(("image_id", "metadata"))

    image_id: str
    image: np.ndarray
    metadata: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Key of the image in its shard."""
        return self.image_id

    def check(self, source: Source) -> None:
        """Raise RecordError where the record breaks the contract."""
        check_image_id(source, {"image_id": self.image_id})
        source.mapping({"metadata": self.metadata}, "metadata")
