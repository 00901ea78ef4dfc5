"""The fastest reasonable ways to read and write masks: the limit that stages on masks are compared with.

Pillow at its best settings or, if installed, OpenCV, which `stas` does not need.
"""

import importlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from stas.data.resize import area_resize

Mask = NDArray[np.uint8]  # (height, width), 0 and 255
T = TypeVar("T")


def fastest_decoder(file: Path) -> tuple[str, Callable[[bytes], Mask]]:
    """The faster library on this file, and its function that decodes a PNG's bytes."""
    ways: dict[str, Callable[[bytes], Mask]] = {"Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)))}
    if cv2 := _opencv():
        ways["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return _fastest(ways, file.read_bytes())


def fastest_encoder(mask: Mask) -> tuple[str, Callable[[Mask], bytes]]:
    """The fastest library and setting on this mask, and its function that encodes an 8-bit grey PNG."""

    def pillow(**options: int) -> Callable[[Mask], bytes]:
        def encode(mask: Mask) -> bytes:
            file = io.BytesIO()
            Image.fromarray(mask).save(file, "PNG", **options)
            return file.getvalue()

        return encode

    ways = {
        "Pillow, level 1": pillow(compress_level=1),
        "Pillow, level 1, run lengths": pillow(compress_level=1, compress_type=3),
    }
    if cv2 := _opencv():
        ways["OpenCV"] = lambda mask: cv2.imencode(".png", mask)[1].tobytes()
        ways["OpenCV, level 1"] = lambda mask: cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
        if hasattr(cv2, "IMWRITE_PNG_FILTER"):
            options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
            ways["OpenCV, level 1, no filter"] = lambda mask: cv2.imencode(".png", mask, options)[1].tobytes()
    return _fastest(ways, mask)


def fastest_resize(image: NDArray[np.uint8], size: tuple[int, int]) -> tuple[str, Callable[[NDArray[np.uint8]], Any]]:
    """The fastest way to average areas to (height, width) `size`: libraries' own, and MONAI's as the store does."""
    ways: dict[str, Callable[[NDArray[np.uint8]], Any]] = {
        "Pillow's box filter": lambda image: Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX),
        "torch's average pooling": lambda image: adaptive_avg_pool2d(torch.tensor(image).permute(2, 0, 1) / 1, size),
        "stas.data.resize.area_resize": lambda image: area_resize(image, size),
    }
    if cv2 := _opencv():
        ways["OpenCV's INTER_AREA"] = lambda image: cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return _fastest(ways, image)


def _opencv() -> Any:
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError:
        return None
    cv2.setNumThreads(1)
    return cv2


def _fastest(ways: dict[str, Callable[[Any], T]], value: Any) -> tuple[str, Callable[[Any], T]]:
    def seconds(way: Callable[[Any], T]) -> float:
        began = time.perf_counter()
        way(value)
        return time.perf_counter() - began

    name = min(ways, key=lambda name: min(seconds(ways[name]) for _ in range(5)))
    return name, ways[name]
