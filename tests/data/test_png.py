import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stas.data.png import decode_grey, encode_mask

MASK = np.array([[0, 1, 1], [1, 0, 1]], np.bool_)
IMAGE = np.array([[0, 255, 255], [7, 0, 255]], np.uint8)


def as_pillow_writes(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def plain_png(compressed: bytes) -> bytes:
    """A file as `encode_mask` makes it of 2 x 3 pixels, whatever its compressed rows are."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (942, 1716)])
def test_pillow_and_the_own_reader_see_the_same_pixels(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    data = encode_mask(mask)
    image = mask * np.uint8(255)
    np.testing.assert_array_equal(decode_grey(data, image.size, max(shape)), image)
    picture = Image.open(io.BytesIO(data))
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), image)


def test_every_flipped_bit_and_every_cut_is_seen():
    data = encode_mask(MASK)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_grey(bytes(damaged), 100, 100) is None
    assert all(decode_grey(data[:length], 100, 100) is None for length in range(len(data)))


def test_too_many_pixels_and_too_long_sides_are_left_alone():
    data = encode_mask(MASK)
    assert decode_grey(data, 6, 3) is not None
    assert decode_grey(data, 5, 3) is None
    assert decode_grey(data, 6, 2) is None


@pytest.mark.parametrize(
    "picture", [Image.fromarray(IMAGE).convert(mode) for mode in ("1", "P", "RGB", "LA")], ids=["1", "P", "RGB", "LA"]
)
def test_other_kinds_are_left_to_pillow(picture):
    assert decode_grey(as_pillow_writes(picture), 100, 100) is None


def test_grey_values_come_as_they_are():
    rows = np.hstack([np.zeros((2, 1), np.uint8), IMAGE])
    np.testing.assert_array_equal(decode_grey(plain_png(zlib.compress(rows.data)), 6, 3), IMAGE)


@pytest.mark.parametrize("rows", [b"\0" * 7, b"\0" * 9, b"\0" * 10_000_000, b"\1" + b"\0" * 7], ids=len)
def test_rows_of_another_length_or_with_a_filter_are_left_to_pillow(rows):
    compressed = zlib.compress(rows)
    assert decode_grey(plain_png(compressed), 100, 100) is None
    assert decode_grey(plain_png(compressed[:-1]), 100, 100) is None
