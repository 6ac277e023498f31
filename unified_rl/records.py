"""The records on disk: what a prompt, a rollout and a reward are, and how each is checked when read.

Every record is one webdataset sample: `.json` (with `schema`), and for rollouts and rewards `.safetensors` and
`.png`. numpy, torch, PIL and safetensors are imported where they are used, so that ledger commands start fast.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from unified_rl.config import MAX_REGIONS
from unified_rl.manifests import is_count, strict_json
from unified_rl.runtime import StageError

if TYPE_CHECKING:
    import numpy as np
    import torch

# At most 88 characters: KEY.safetensors fits the 100 bytes of a plain tar name, without extension headers.
KEY = re.compile(r"[A-Za-z0-9_-]{1,88}")
PROMPT_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
MAX_IMAGE_SIDE = 4096
MAX_TEXT_CHARACTERS = 32768
MAX_SAMPLES = 10**6
MAX_REGION_TEXT = 1000
STATUSES = ("ok", "failed", "skipped")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class RecordError(StageError):
    """A record with impossible content; the message names the shard and the key."""


def sample_key(prompt_id: str, sample: int) -> str:
    """Key of sample number `sample` of a prompt."""
    if not PROMPT_ID.fullmatch(prompt_id):
        raise RecordError(f"prompt id {prompt_id!r} does not match {PROMPT_ID.pattern}")
    if not is_count(sample) or sample >= MAX_SAMPLES:
        raise RecordError(f"prompt {prompt_id}: sample number {sample!r} is not in 0..{MAX_SAMPLES - 1}")
    return f"{prompt_id}_{sample:02d}"


class _Source:
    """Where a record comes from: turns a failed check into an error that names shard and key."""

    def __init__(self, source: str, key: str) -> None:
        self.label = f"{source}: key {key}" if source else f"key {key}"

    def check(self, condition: bool, message: str) -> None:
        if not condition:
            raise RecordError(f"{self.label}: {message}")

    def text(self, content: dict, name: str, empty: bool = False) -> str:
        value = content.get(name)
        self.check(isinstance(value, str), f"{name} must be text, not {value!r}")
        self.check(empty or bool(value.strip()), f"{name} is empty")
        self.check(len(value) <= MAX_TEXT_CHARACTERS, f"{name} is longer than {MAX_TEXT_CHARACTERS} characters")
        self.check(_is_unicode(value), f"{name} is not valid Unicode text")
        return value

    def mapping(self, content: dict, name: str) -> dict:
        value = content.get(name)
        self.check(isinstance(value, dict), f"{name} must be an object, not {value!r}")
        return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _encode(source: _Source, content: dict, schema: int) -> bytes:
    try:
        text = json.dumps({**content, "schema": schema}, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (ValueError, TypeError) as error:
        raise RecordError(f"{source.label}: cannot be stored as JSON: {error}") from None


def _decode(
    source: _Source, members: dict[str, bytes], kind: type[PromptRecord | RolloutRecord | RewardRecord]
) -> dict:
    """JSON content with exactly the fields, members and schema of a kind of record."""
    wrong = sorted(set(members) ^ set(kind.MEMBERS))
    source.check(not wrong, f"missing or unexpected member .{', .'.join(wrong)}")
    try:
        content = strict_json(members["json"].decode())
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{source.label}: .json is not valid: {error}") from None
    source.check(isinstance(content, dict), ".json is not an object")
    version = content.pop("schema", None)
    source.check(
        version == kind.SCHEMA and not isinstance(version, bool),
        f"schema version {version!r}, this program reads version {kind.SCHEMA}",
    )
    wrong = sorted(set(content) ^ kind.FIELDS)
    source.check(not wrong, f"missing or unknown field {', '.join(wrong)}")
    return content


def encode_png(image: np.ndarray, label: str) -> bytes:
    """PNG of a uint8 [H, W, 3] image; the same pixels give the same bytes."""
    import numpy as np
    from PIL import Image

    good = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if not good or not all(1 <= side <= MAX_IMAGE_SIDE for side in image.shape[:2]):
        shape = getattr(image, "shape", None)
        raise RecordError(f"{label}: image {shape} must be uint8 [H, W, 3] with sides in 1..{MAX_IMAGE_SIDE}")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def png_size(data: bytes, label: str) -> tuple[int, int]:
    """(width, height) from the header of an 8-bit RGB PNG, without decoding anything.

    Raises:
        RecordError: not such a PNG, or a side above `MAX_IMAGE_SIDE`.
    """
    if len(data) < 33 or data[:8] != _PNG_SIGNATURE or data[8:16] != b"\0\0\0\rIHDR":
        raise RecordError(f"{label}: .png is not a PNG image")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", data[16:29])
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        raise RecordError(f"{label}: .png has a damaged header")
    if not (1 <= width <= MAX_IMAGE_SIDE and 1 <= height <= MAX_IMAGE_SIDE):
        raise RecordError(f"{label}: image of {width} x {height} pixels, sides must lie in 1..{MAX_IMAGE_SIDE}")
    if (depth, colour, compression, filtering, interlace) != (8, 2, 0, 0, 0):
        raise RecordError(f"{label}: .png must be 8-bit RGB without interlacing")
    return width, height


def _png_pixel_stream(data: bytes, label: str) -> bytes:
    """Compressed pixels of a PNG that consists of IHDR, IDAT... and IEND with right checksums, and nothing else."""
    position, kinds, parts = len(_PNG_SIGNATURE), [], []
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        kind, body = data[position + 4 : position + 8], data[position + 8 : end - 4]
        if end > len(data) or zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise RecordError(f"{label}: .png is truncated or damaged in chunk {kind!r}")
        kinds.append(kind)
        if kind == b"IDAT":
            parts.append(body)
        position = end
    # Other chunks (text, palettes, animation, a second header) are never written, and some are bombs.
    if kinds != [b"IHDR", *[b"IDAT"] * len(parts), b"IEND"]:
        raise RecordError(f"{label}: .png must hold IHDR, IDAT and IEND chunks only, found {kinds[:8]}")
    return b"".join(parts)


def decode_png(data: bytes, label: str) -> np.ndarray:
    """uint8 [H, W, 3] of a PNG as `encode_png` writes it. Memory is bounded by the size in the checked header.

    Pillow alone fills missing rows with black and ignores surplus ones, so the amount of pixels is checked first.
    """
    import numpy as np
    from PIL import Image

    width, height = png_size(data, label)
    expected = height * (1 + 3 * width)
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(_png_pixel_stream(data, label), expected + 1)
        if len(raw) != expected or not inflater.eof or inflater.unused_data:
            raise RecordError(f"{label}: .png does not hold exactly {width} x {height} pixels")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image).copy()
    except (OSError, SyntaxError, zlib.error) as error:
        raise RecordError(f"{label}: .png cannot be decoded: {error}") from None


def _encode_tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _decode_tensors(source: _Source, data: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise RecordError(f"{source.label}: .safetensors cannot be read: {error}") from None


def _check_tensors(source: _Source, tensors: dict[str, torch.Tensor], known: dict[str, str]) -> None:
    """Every tensor finite and as `known` describes its name: `int` or `float`, then its dimensions, as `float [S, N]`.

    A dimension is the same in all tensors that name it, and never 0.
    """
    import torch

    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in tensors.items():
        source.check(isinstance(tensor, torch.Tensor), f"tensor {name} is no tensor")
        source.check(name in known, f"tensor {name} is none of {', '.join(known)}")
        kind, shape = known[name].split(" ", 1)
        allowed = (torch.float32,) if kind == "float" else (torch.int32, torch.int64)
        source.check(tensor.dtype in allowed, f"tensor {name} is {tensor.dtype}, expected {allowed[0]}")
        letters = shape.strip("[]").split(", ")
        fits = tensor.ndim == len(letters) and tensor.numel() > 0
        source.check(fits, f"tensor {name} has shape {list(tensor.shape)}, not {shape}")
        source.check(bool(torch.isfinite(tensor).all()), f"tensor {name} has a non-finite value")
        for letter, size in zip(letters, tensor.shape, strict=True):
            first, where = sizes.setdefault(letter, (size, name))
            source.check(first == size, f"{letter} is {first} in tensor {where} but {size} in tensor {name}")


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
    def from_json(cls, content: dict, source: _Source) -> PromptRecord:
        """Checked prompt; RecordError names the source."""
        source.check(set(content) == cls.FIELDS, "a prompt has prompt_id, text and metadata")
        prompt_id = source.text(content, "prompt_id")
        source.check(bool(PROMPT_ID.fullmatch(prompt_id)), f"prompt_id {prompt_id!r} is not {PROMPT_ID.pattern}")
        return cls(prompt_id, source.text(content, "text"), source.mapping(content, "metadata"))

    def to_members(self) -> dict[str, bytes]:
        """Extension -> bytes."""
        source = _Source("", self.key)
        self.from_json(self.to_json(), source)
        return {"json": _encode(source, self.to_json(), self.SCHEMA)}

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes], source: str) -> PromptRecord:
        """Inverse of `to_members`, everything checked."""
        where = _Source(source, key)
        content = _decode(where, members, cls)
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
class RolloutRecord:
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

    def _check(self, source: _Source) -> None:
        content = {"policy_version": self.policy_version, "sampling": self.sampling, "plan": self.plan}
        source.check(is_count(self.sample) and self.sample < MAX_SAMPLES, f"sample {self.sample!r} is no sample number")
        source.check(is_count(self.seed) and self.seed < 2**63, f"seed {self.seed!r} is not in 0..2**63-1")
        source.text(content, "policy_version")
        source.mapping(content, "sampling")
        if self.plan is not None:
            source.text(content, "plan", empty=True)
        self._check_trajectory(source)

    def _check_trajectory(self, source: _Source) -> None:
        names = set(self.tensors)
        source.check(
            names in TRAJECTORIES, f"tensors {', '.join(sorted(names))} are no trajectory of tokens or of a flow"
        )
        _check_tensors(source, self.tensors, TRAJECTORY_TENSORS)
        if "steps" in names:
            steps, latents = self.tensors["steps"].tolist(), len(self.tensors["latents"])
            source.check(latents == len(steps) + 1, f"{latents} latents, not one more than the {len(steps)} steps")
            consecutive = steps[0] >= 0 and steps == list(range(steps[0], steps[0] + len(steps)))
            source.check(consecutive, f"steps {steps[:8]} are not consecutive steps of a schedule")

    def to_members(self) -> dict[str, bytes]:
        """Extension -> bytes; RecordError where the record breaks the contract."""
        source = _Source("", self.key)
        PromptRecord.from_json(self.prompt.to_json(), source)
        self._check(source)
        content = {
            "prompt": self.prompt.to_json(), "sample": self.sample, "seed": self.seed,
            "policy_version": self.policy_version, "sampling": self.sampling, "plan": self.plan,
        }  # fmt: skip
        return {
            "json": _encode(source, content, self.SCHEMA),
            "png": encode_png(self.image, source.label),
            "safetensors": _encode_tensors(self.tensors),
        }

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes], source: str) -> RolloutRecord:
        """Inverse of `to_members`, everything checked; the image size before it is decoded."""
        where = _Source(source, key)
        content = _decode(where, members, cls)
        prompt = PromptRecord.from_json(where.mapping(content, "prompt"), where)
        content["prompt"] = prompt
        image = decode_png(members["png"], where.label)
        record = cls(**content, image=image, tensors=_decode_tensors(where, members["safetensors"]))
        record._check(where)
        where.check(record.key == key, f"belongs to sample {record.key}")
        return record


@dataclass(eq=False)
class RewardRecord:
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

    def _content(self) -> dict:
        return {name: getattr(self, name) for name in self.FIELDS}

    def _check(self, source: _Source) -> None:
        content = self._content()
        source.text(content, "prompt_id")
        source.text(content, "policy_version")
        source.text(content, "reason", empty=True)
        stem, _, number = self.key.rpartition("_")
        source.check(stem == self.prompt_id and number.isdigit(), f"is no sample of prompt {self.prompt_id}")
        source.check(self.status in STATUSES, f"status {self.status!r} is not one of {', '.join(STATUSES)}")
        components = source.mapping(content, "components")
        for name, value in components.items():
            source.check(_is_finite(value), f"component {name} is {value!r}, not a finite number")
        texts = isinstance(self.tokens, list) and all(isinstance(t, str) and _is_unicode(t) for t in self.tokens)
        source.check(texts, "tokens must be a list of text pieces")
        self._check_regions(source)
        _check_tensors(source, self.tensors, REWARD_TENSORS)
        if self.status == "ok":
            source.check(_is_finite(self.reward), f"status ok needs a finite reward, not {self.reward!r}")
            self._check_evidence(source)
        else:
            source.check(self.reward is None, f"status {self.status} must not carry a reward ({self.reward!r})")
            source.check(bool(self.reason.strip()), f"status {self.status} needs a reason")

    def _check_evidence(self, source: _Source) -> None:
        """What an ok record must hold besides its reward."""
        scored = len(self.tensors.get("token_log_probs", ()))
        source.check(scored == len(self.tokens), f"{scored} token_log_probs but {len(self.tokens)} tokens")
        made = self.tensors.get("reward_map")
        source.check(made is not None or not self.regions, "regions without the tensor reward_map")
        if made is not None:
            source.check(bool((made.abs() <= 1.0).all()), "tensor reward_map has a value outside -1..1")
            alpha = self.components.get("alpha", math.nan)
            source.check(0 <= alpha <= 1, f"tensor reward_map needs the component alpha in 0..1, not {alpha}")

    def _check_regions(self, source: _Source) -> None:
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
                source.check(_is_finite(score) and -1 <= score <= 1, f"{where}: score {score!r} is not in -1..1")

    def to_members(self) -> dict[str, bytes]:
        """Extension -> bytes; RecordError where the record breaks the contract."""
        source = _Source("", self.key)
        self._check(source)
        return {"json": _encode(source, self._content(), self.SCHEMA), "safetensors": _encode_tensors(self.tensors)}

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes], source: str) -> RewardRecord:
        """Inverse of `to_members`, everything checked."""
        where = _Source(source, key)
        content = _decode(where, members, cls)
        where.check(content["key"] == key, f"belongs to sample {content['key']!r}")
        record = cls(**content, tensors=_decode_tensors(where, members["safetensors"]))
        record._check(where)
        return record
