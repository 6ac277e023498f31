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

from unified_rl.manifests import SCHEMA_VERSION, is_count, strict_json
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


def _encode(source: _Source, content: dict) -> bytes:
    try:
        text = json.dumps({**content, "schema": SCHEMA_VERSION}, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (ValueError, TypeError) as error:
        raise RecordError(f"{source.label}: cannot be stored as JSON: {error}") from None


def _decode(source: _Source, members: dict[str, bytes], allowed: tuple[str, ...], names: set[str]) -> dict:
    """JSON content with exactly the fields `names`; the members must be exactly `allowed`."""
    wrong = sorted(set(members) ^ set(allowed))
    source.check(not wrong, f"missing or unexpected member .{', .'.join(wrong)}")
    try:
        content = strict_json(members["json"].decode())
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{source.label}: .json is not valid: {error}") from None
    source.check(isinstance(content, dict), ".json is not an object")
    version = content.pop("schema", None)
    source.check(
        version == SCHEMA_VERSION and not isinstance(version, bool),
        f"schema version {version!r}, this program reads version {SCHEMA_VERSION}",
    )
    wrong = sorted(set(content) ^ names)
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


def _check_tensors(source: _Source, tensors: dict[str, torch.Tensor], vectors: dict[str, bool]) -> None:
    """All floating-point tensors finite; `vectors` (name -> is floating point) one-dimensional and of that kind."""
    import torch

    for name, tensor in tensors.items():
        source.check(isinstance(tensor, torch.Tensor), f"tensor {name} is no tensor")
        if tensor.is_floating_point():
            source.check(bool(torch.isfinite(tensor).all()), f"tensor {name} has a non-finite value")
    for name, floating in vectors.items():
        source.check(name in tensors, f"tensor {name} is missing")
        tensor = tensors[name]
        allowed = (torch.float32,) if floating else (torch.int32, torch.int64)
        source.check(tensor.dtype in allowed, f"tensor {name} is {tensor.dtype}, expected {allowed[0]}")
        source.check(tensor.ndim == 1 and tensor.numel() > 0, f"tensor {name} has shape {list(tensor.shape)}, not [S]")


@dataclass
class PromptRecord:
    """One prompt; `metadata` follows GenEval's schema where there is one."""

    MEMBERS: ClassVar[tuple[str, ...]] = ("json",)

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
        source.check(set(content) == {"prompt_id", "text", "metadata"}, "a prompt has prompt_id, text and metadata")
        prompt_id = source.text(content, "prompt_id")
        source.check(bool(PROMPT_ID.fullmatch(prompt_id)), f"prompt_id {prompt_id!r} is not {PROMPT_ID.pattern}")
        return cls(prompt_id, source.text(content, "text"), source.mapping(content, "metadata"))

    def to_members(self) -> dict[str, bytes]:
        """Extension -> bytes."""
        source = _Source("", self.key)
        self.from_json(self.to_json(), source)
        return {"json": _encode(source, self.to_json())}

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes], source: str) -> PromptRecord:
        """Inverse of `to_members`, everything checked."""
        where = _Source(source, key)
        content = _decode(where, members, cls.MEMBERS, {"prompt_id", "text", "metadata"})
        prompt = cls.from_json(content, where)
        where.check(prompt.key == key, f"belongs to prompt {prompt.key}")
        return prompt


@dataclass(eq=False)
class RolloutRecord:
    """One image drawn by a policy, with what is needed to replay it.

    `image` is uint8 [H, W, 3]; `tensors` holds `actions` int [S] and `log_probs` fp32 [S] of the distribution
    that was sampled (after guidance and temperature).
    """

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
        _check_tensors(source, self.tensors, {"actions": False, "log_probs": True})
        lengths = len(self.tensors["actions"]), len(self.tensors["log_probs"])
        source.check(lengths[0] == lengths[1], f"{lengths[0]} actions but {lengths[1]} log_probs")

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
            "json": _encode(source, content),
            "png": encode_png(self.image, source.label),
            "safetensors": _encode_tensors(self.tensors),
        }

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes], source: str) -> RolloutRecord:
        """Inverse of `to_members`, everything checked; the image size before it is decoded."""
        where = _Source(source, key)
        content = _decode(where, members, cls.MEMBERS, set(cls.FIELDS))
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

    `tokens` are the text pieces of the scored prompt. `tensors` holds `token_log_probs` fp32 [L] under the judge
    and `reference_log_probs` fp32 [S] of the image's actions under the base weights; both are required when ok.
    """

    MEMBERS: ClassVar[tuple[str, ...]] = ("json", "safetensors")
    FIELDS: ClassVar[frozenset[str]] = frozenset(
        ("key", "prompt_id", "policy_version", "status", "reward", "components", "reason", "tokens")
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
        if self.status == "ok":
            source.check(_is_finite(self.reward), f"status ok needs a finite reward, not {self.reward!r}")
            _check_tensors(source, self.tensors, {"token_log_probs": True, "reference_log_probs": True})
            length = len(self.tensors["token_log_probs"])
            source.check(length == len(self.tokens), f"{length} token_log_probs but {len(self.tokens)} tokens")
        else:
            source.check(self.reward is None, f"status {self.status} must not carry a reward ({self.reward!r})")
            source.check(bool(self.reason.strip()), f"status {self.status} needs a reason")
            _check_tensors(source, self.tensors, {})

    def to_members(self) -> dict[str, bytes]:
        """Extension -> bytes; RecordError where the record breaks the contract."""
        source = _Source("", self.key)
        self._check(source)
        return {"json": _encode(source, self._content()), "safetensors": _encode_tensors(self.tensors)}

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes], source: str) -> RewardRecord:
        """Inverse of `to_members`, everything checked."""
        where = _Source(source, key)
        content = _decode(where, members, cls.MEMBERS, set(cls.FIELDS))
        where.check(content["key"] == key, f"belongs to sample {content['key']!r}")
        record = cls(**content, tensors=_decode_tensors(where, members["safetensors"]))
        record._check(where)
        return record
