import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stas.png import decode_grey, encode_grey

IMAGE = np.array([[0, 255, 255], [7, 0, 255]], np.uint8)


def as_pillow_writes(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (942, 1716)])
def test_pillow_and_the_own_reader_see_the_same_pixels(shape):
    image = (np.random.default_rng(0).random(shape) < 0.5).astype(np.uint8) * np.uint8(255)
    data = encode_grey(image)
    found = decode_grey(data, image.size, max(shape))
    assert found is not None
    np.testing.assert_array_equal(found, image)
    picture = Image.open(io.BytesIO(data))
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), image)


def test_every_flipped_bit_and_every_cut_is_seen():
    data = encode_grey(IMAGE)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode_grey(bytes(damaged), 100, 100) is None
    assert all(decode_grey(data[:length], 100, 100) is None for length in range(len(data)))


def test_too_many_pixels_and_too_long_sides_are_left_alone():
    data = encode_grey(IMAGE)
    assert decode_grey(data, 6, 3) is not None
    assert decode_grey(data, 5, 3) is None
    assert decode_grey(data, 6, 2) is None


@pytest.mark.parametrize(
    "picture", [Image.fromarray(IMAGE).convert(mode) for mode in ("1", "P", "RGB", "LA")], ids=["1", "P", "RGB", "LA"]
)
def test_other_kinds_are_left_to_pillow(picture):
    assert decode_grey(as_pillow_writes(picture), 100, 100) is None


@pytest.mark.parametrize("rows", [b"\0" * 7, b"\0" * 9, b"\0" * 10_000_000, b"\1" + b"\0" * 7], ids=len)
def test_rows_of_another_length_or_with_a_filter_are_left_to_pillow(rows):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    compressed, header = zlib.compress(rows), struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")
    assert decode_grey(data, 100, 100) is None
    assert decode_grey(data.replace(compressed, compressed[:-1]), 100, 100) is None
