"""Streams in zlib's format, packed and unpacked by ISA-L, which is several times as fast as zlib.

Another kind of processor may pack the same bytes differently, so masks with the same pixels may differ as files: `vote`
compares pixels. zlib would not settle this, because distributions ship different ones (zlib-ng), and it made writing
masks 1.4 times and a vote 1.6 times as slow. Scores, or a store, of masks that were packed again are made again.
"""

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray


def pack(data: NDArray[np.uint8]) -> bytes:
    """The bytes of an array as a stream."""
    return isal_zlib.compress(data.data, 1)


def unpack(stream: bytes | NDArray[np.uint8], length: int) -> NDArray[np.uint8] | None:
    """The `length` bytes of a stream, (length,), not writable; None where it is damaged or of another length.

    Takes no more memory than that: a kilobyte can stand for a megabyte of zeros.
    """
    inflate = isal_zlib.decompressobj()
    try:
        content = inflate.decompress(stream, length + 1)
    except isal_zlib.error:  # pyright: ignore[reportGeneralTypeIssues] (its stubs take the class for an instance)
        return None
    whole = len(content) == length and inflate.eof and not inflate.unused_data
    return np.frombuffer(content, np.uint8) if whole else None
