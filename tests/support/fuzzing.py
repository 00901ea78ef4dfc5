"""Hostile files: small real files, ways to corrupt them, and a referee that judges what a reader does with them."""

import io
import json
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from stas.errors import InputDataError, UsageError

# If unset, each reader takes seconds and always gets the same inputs; `make fuzz` sets it to get new inputs each time.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SLOWEST = 20.0  # seconds of processor time, which other work hardly affects, for one small input; most take 0.001
LONGEST_MESSAGE = 20_000  # characters

PROFILE = settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,  # the referee has its own limit
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@dataclass
class Referee:
    """Counts a reader's results and refusals; anything but a result or a refusal with a message is a bug."""

    reader: str
    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    messages: set[str] = field(default_factory=set)

    def judge(self, read: Callable[[], Any]) -> None:
        began = time.process_time()
        try:
            read()
        except (UsageError, InputDataError) as error:
            assert 10 < len(str(error)) < LONGEST_MESSAGE
            str(error).encode(errors="backslashreplace")
            self.refused += 1
        took = time.process_time() - began
        assert took < SLOWEST, f"{self.reader}: {took:.1f} s for one input"
        self.inputs += 1
        self.slowest = max(self.slowest, took)

    def report(self) -> str:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return (
            f"FUZZ {self.reader}: {self.inputs} inputs, {self.refused} refused, slowest {self.slowest:.2f} s, "
            f"process {memory:.0f} MiB"
        )


NUMBERS = [0, 1, 2, 3, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 10**9, 2**63 - 1, 2**64 - 1]


@st.composite
def spoilt(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A real file with up to six changes: bits, bytes, numbers, pieces removed, doubled, moved, or of another file."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 16, 64, 300, 4096]))
        kind = draw(st.integers(0, 8))
        if kind == 0 and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1 and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == 2:
            form = draw(st.sampled_from(["<H", ">H", "<I", ">I", "<Q", ">Q"]))
            number = draw(st.sampled_from(NUMBERS)) & ((1 << 8 * struct.calcsize(form)) - 1)
            data[place : place + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            del data[place : place + length]
        elif kind == 5:
            data[place:place] = data[place : place + length] * draw(st.sampled_from([1, 2, 50]))
        elif kind == 6:
            data[place:place] = draw(st.binary(max_size=32))
        elif kind == 7:
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, max(0, len(other) - 1)))
            data[place : place + length] = other[start : start + length]
        else:
            start = draw(st.integers(0, max(0, len(data) - 1)))
            data[place : place + length], data[start : start + length] = (
                data[start : start + length],
                data[place : place + length],
            )
    return bytes(data)


TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "..", "../../x", "/etc/passwd", "a\0b", "C:\\x.png", "\ud800", "é", "e\u0301", "NaN"]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([*NUMBERS, -1, 10**400, 1e308, -0.0]),
    st.floats(),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)


@st.composite
def altered(draw: st.DrawFn, seeds: list[Any]) -> Any:
    """A valid JSON value with up to four parts replaced, removed or added, at any depth."""
    value = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.integers(0, 4))):
        part: Any = value
        parent: Any = None
        key: Any = None
        while isinstance(part, (dict, list)) and part and (parent is None or draw(st.integers(0, 4))):
            parent, key = part, draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            part = part[key]
        if parent is None:
            value = draw(VALUES)
        elif draw(st.integers(0, 3)) == 0:
            del parent[key]
        elif isinstance(parent, dict) and draw(st.integers(0, 3)) == 0:
            parent[draw(TEXTS)] = draw(VALUES)
        else:
            parent[key] = draw(VALUES)
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_files(seeds: list[Any]) -> st.SearchStrategy[bytes]:
    """JSON files: with altered values, with corrupted bytes, or arbitrary."""
    written = [as_json(seed) for seed in seeds]
    return st.one_of(altered(seeds).map(as_json), spoilt(written), VALUES.map(as_json), st.binary(max_size=40))


def repair_png(data: bytes) -> bytes:
    """The same chunks with correct checksums, so that a corrupted chunk is decoded and not just refused."""
    result, place = bytearray(data[:8]), 8
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        body = data[place + 4 : place + 8 + min(length, len(data))]
        result += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return bytes(result)


def pictures() -> dict[str, list[bytes]]:
    """Small images of every mode, by format."""
    random = np.random.default_rng(0)
    rgb = Image.fromarray(random.integers(0, 256, (21, 33, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    deep = Image.fromarray(random.integers(0, 65536, (21, 33), np.uint16))
    jpeg = [saved(rgb, "JPEG"), saved(rgb, "JPEG", progressive=True, exif=exif), saved(rgb.convert("CMYK"), "JPEG")]
    jpeg += [saved(rgb.convert("L"), "JPEG", exif=exif), saved(rgb, "JPEG", subsampling=0, restart_marker_blocks=1)]
    png = [saved(rgb.convert(mode), "PNG", exif=exif) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")]
    png += [
        saved(deep, "PNG"),
        saved(rgb.convert("P"), "PNG", transparency=3),
        saved(rgb, "PNG", icc_profile=b"x" * 99),
    ]
    other = [saved(rgb.convert(mode), "TIFF") for mode in ("RGB", "CMYK", "YCbCr", "1", "LA", "P")] + [
        saved(deep, "TIFF")
    ]
    other += [saved(rgb, "TIFF", compression=kind) for kind in ("tiff_lzw", "jpeg", "tiff_deflate")]
    other += [saved(rgb, "TIFF", exif=exif), saved(rgb.convert("F"), "TIFF")]
    other += [saved(rgb.convert(mode), "BMP") for mode in ("RGB", "L", "1", "P")]
    other += [saved(rgb, "WEBP"), saved(rgb.convert("RGBA"), "WEBP", lossless=True)]
    return {"jpeg": jpeg, "png": png, "other": other}
