"""PNG images of records: exactly what was written is read back, and damage, bombs and other formats are refused."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from unified_rl import record_parts
from unified_rl.record_parts import RecordError, decode_png


def image_of(height=4, width=5):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width, height, depth=8, colour=2, interlace=0):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pixels(height, width):
    return chunk(b"IDAT", zlib.compress((b"\0" + bytes(3 * width)) * height))


END = chunk(b"IEND", b"")


def test_own_builder_makes_a_readable_png():
    assert decode_png(png(header(5, 4), pixels(4, 5), END), "here").shape == (4, 5, 3)


@pytest.mark.parametrize("size", [(4097, 1), (1, 4097), (0, 4), (60000, 60000), (2**31 - 1, 2**31 - 1)])
def test_large_images_are_refused_before_decoding(monkeypatch, size):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoding started"))
    with pytest.raises(RecordError, match="here: image of .* sides must lie in 1..4096"):
        decode_png(png(header(*size), pixels(4, 4), END), "here")


def test_second_header_cannot_enlarge_the_image():
    data = png(header(4, 4), header(4096, 4096), pixels(4, 4), END)
    with pytest.raises(RecordError, match="here"):
        decode_png(data, "here")


def test_bomb_behind_a_small_header_stays_small():
    bomb = zlib.compress(bytes(200 << 20), 9)
    text = chunk(b"zTXt", b"k\0\0" + bomb)
    for data in (png(header(4, 4), chunk(b"IDAT", bomb), END), png(header(4, 4), text, pixels(4, 4), END)):
        tracemalloc.start()
        with pytest.raises(RecordError, match="here: .png"):
            decode_png(data, "here")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(60), b"\xff\xd8\xff\xe0" + bytes(60),
        png(header(4, 4, depth=16), pixels(4, 4), END), png(header(4, 4, colour=6), pixels(4, 4), END),
        png(header(4, 4, colour=3), pixels(4, 4), END), png(header(4, 4, interlace=1), pixels(4, 4), END),
        png(header(4, 4), END), png(header(4, 4)), png(header(4, 4), chunk(b"IDAT", b"garbage"), END),
        png(header(4, 4), pixels(2, 4), END), png(header(4, 4), pixels(5, 4), END),
        png(header(4, 4), pixels(4, 4), END) + b"x", png(header(4, 4), pixels(4, 4), END, END),
        png(header(4, 4), pixels(4, 4)), png(header(4, 4), chunk(b"acTL", bytes(8)), pixels(4, 4), END),
    ],
)  # fmt: skip
def test_other_and_damaged_images_are_refused(data):
    with pytest.raises(RecordError, match="here: "):
        decode_png(data, "here")


def test_every_truncation_of_a_png_is_refused():
    image = image_of(6, 6)
    data = record_parts.encode_png(image, "x")
    for length in range(len(data)):
        with pytest.raises(RecordError, match="here"):
            decode_png(data[:length], "here")


def test_every_flipped_bit_of_a_png_is_found():
    data = record_parts.encode_png(image_of(3, 3), "x")
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(RecordError, match="here"):
            decode_png(bytes(damaged), "here")


def test_large_noise_image_in_several_chunks():
    image = image_of(300, 200)
    data = record_parts.encode_png(image, "x")
    assert data.count(b"IDAT") > 1
    assert np.array_equal(decode_png(data, "here"), image)


def test_same_pixels_same_bytes():
    assert record_parts.encode_png(image_of(), "x") == record_parts.encode_png(image_of(), "x")
