"""How members of records are written and checked when read: JSON content, PNG images, tensors.

numpy, torch, PIL and safetensors are imported where they are used, so that ledger commands start fast.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zlib
from typing import TYPE_CHECKING, Any, ClassVar

from unified_rl.manifests import is_count, strict_json
from unified_rl.runtime import StageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from typing_extensions import Self  # in `typing` from Python 3.11 on

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


class Source:
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
        self.check(is_unicode(value), f"{name} is not valid Unicode text")
        return value

    def mapping(self, content: dict, name: str) -> dict:
        value = content.get(name)
        self.check(isinstance(value, dict), f"{name} must be an object, not {value!r}")
        return value


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def encode_content(source: Source, content: dict, schema: int) -> bytes:
    try:
        text = json.dumps({**content, "schema": schema}, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (ValueError, TypeError) as error:
        raise RecordError(f"{source.label}: cannot be stored as JSON: {error}") from None


def decode_content(source: Source, members: dict[str, bytes], kind: Any) -> dict:
    """JSON content with exactly the fields, members and schema of `kind`, a class of records."""
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


def encode_tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def decode_tensors(source: Source, data: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise RecordError(f"{source.label}: .safetensors cannot be read: {error}") from None


def check_tensors(source: Source, tensors: dict[str, torch.Tensor], known: dict[str, str]) -> None:
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


def check_image_id(source: Source, content: dict) -> None:
    """An image's id is good for keys, also for those of the images that are drawn after it."""
    image_id = source.text(content, "image_id")
    source.check(bool(PROMPT_ID.fullmatch(image_id)), f"image_id {image_id!r} is not {PROMPT_ID.pattern}")


class Record:
    """Base of dataclasses whose FIELDS are stored as JSON, `image` as PNG and `tensors` as safetensors (MEMBERS)."""

    SCHEMA: ClassVar[int]
    MEMBERS: ClassVar[tuple[str, ...]]
    FIELDS: ClassVar[frozenset[str]]
    key: str  # in its shard

    def content(self) -> dict:
        """For JSON."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def check(self, source: Source) -> None:
        """Raise RecordError where the record breaks the contract."""
        raise NotImplementedError

    @staticmethod
    def restore(content: dict, source: Source) -> dict:
        """Fields from their JSON form."""
        return content

    def to_members(self) -> dict[str, bytes]:
        """Extension -> bytes; RecordError where the record breaks the contract."""
        source = Source("", self.key)
        self.check(source)
        members = {"json": encode_content(source, self.content(), self.SCHEMA)}
        if "png" in self.MEMBERS:
            members["png"] = encode_png(self.image, source.label)
        if "safetensors" in self.MEMBERS:
            members["safetensors"] = encode_tensors(self.tensors)
        return members

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes], source: str) -> Self:
        """Inverse of `to_members`, everything checked; the size of an image before it is decoded."""
        where = Source(source, key)
        fields = cls.restore(decode_content(where, members, cls), where)
        if "png" in cls.MEMBERS:
            fields["image"] = decode_png(members["png"], where.label)
        if "safetensors" in cls.MEMBERS:
            fields["tensors"] = decode_tensors(where, members["safetensors"])
        record = cls(**fields)
        record.check(where)
        where.check(record.key == key, f"belongs to {record.key}")
        return record
