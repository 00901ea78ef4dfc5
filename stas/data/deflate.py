"""Pack and unpack streams in zlib's format with ISA-L, which is several times as fast as zlib.

Another kind of processor may pack the same bytes differently, so masks with the same pixels may differ as files:
`vote` compares pixels. zlib would not settle this, because distributions ship different ones (zlib-ng), and it took
1.4 times as long to write masks and 1.6 times for a vote. Repacking a mask changes its hash, so scores or a store made
from it are made again.
"""

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray


def pack(data: NDArray[np.uint8]) -> bytes:
    """Pack the bytes of an array into a stream."""
    return isal_zlib.compress(data.data, 1)


def unpack(stream: bytes | NDArray[np.uint8], length: int) -> NDArray[np.uint8] | None:
    """The `length` bytes of a stream, (length,), read-only; None if it is damaged or of another length.

    Uses no more memory than that: a kilobyte can unpack to a megabyte of zeros.
    """
    inflate = isal_zlib.decompressobj()
    try:
        content = inflate.decompress(stream, length + 1)
    except isal_zlib.error:  # pyright: ignore[reportGeneralTypeIssues] (its stubs declare the class as an instance)
        return None
    whole = len(content) == length and inflate.eof and not inflate.unused_data
    return np.frombuffer(content, np.uint8) if whole else None
