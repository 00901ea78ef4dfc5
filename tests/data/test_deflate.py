import zlib

import numpy as np
import pytest

from stas.data.deflate import pack, unpack

CONTENT = np.repeat(np.random.default_rng(0).integers(0, 256, 50, np.uint8), 40)


@pytest.mark.parametrize("content", [CONTENT, CONTENT[:0], np.zeros(100_000, np.uint8)], ids=["mixed", "none", "zeros"])
def test_streams_are_zlibs(content):
    assert zlib.decompress(pack(content)) == content.tobytes()
    for stream in (pack(content), zlib.compress(content.tobytes(), 0), zlib.compress(content.tobytes(), 9)):
        np.testing.assert_array_equal(unpack(stream, len(content)), content)


def test_streams_of_another_length_are_refused():
    stream = pack(CONTENT)
    assert unpack(stream, len(CONTENT) - 1) is None
    assert unpack(stream, len(CONTENT) + 1) is None
    assert unpack(stream + b"0", len(CONTENT)) is None
    assert all(unpack(stream[:length], len(CONTENT)) is None for length in range(len(stream)))


def test_a_wrong_checksum_is_seen():
    stream = pack(CONTENT)
    for bit in range(32):
        damaged = bytearray(stream)
        damaged[-1 - bit // 8] ^= 1 << bit % 8
        assert unpack(bytes(damaged), len(CONTENT)) is None
