"""Reading and writing pictures: RGB images, masks and probabilities."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from stas.errors import InputDataError
from stas.files import atomic_write

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
MAX_PIXELS = 256 * 1024 * 1024  # a decompression bomb's size, not a micrograph's
Image.MAX_IMAGE_PIXELS = None  # checked here instead, before decoding and with our own message
_EIGHT_BIT_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBA", "LA")


def list_images(directory: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """The images of a directory by stem, in sorted order of the stems.

    Raises:
        InputDataError: no such directory, no image in it, or two images with one stem.
    """
    if not directory.is_dir():
        raise InputDataError(f"{directory}: not a directory; give the directory that holds the images")
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            raise InputDataError(
                f"{directory}: {found[path.stem].name} and {path.name} share the stem {path.stem!r}, "
                "which names their masks: rename one"
            )
        found[path.stem] = path
    if not found:
        raise InputDataError(f"{directory}: no image in it (looked for {' '.join(suffixes)})")
    return dict(sorted(found.items()))


def read_image(source: Path | bytes) -> NDArray[np.uint8]:
    """Read an image as LabelMe shows it: EXIF orientation applied, any 8-bit mode turned into RGB.

    Transparency is dropped, not blended. 16-bit and floating-point images are refused by mode.

    Args:
        source: a file, or the bytes of one.

    Returns:
        RGB array, (height, width, 3), uint8.

    Raises:
        InputDataError: missing, truncated, too large, or of a mode that is not 8-bit; names the file.
    """
    image = _open(source)
    if image.mode not in _EIGHT_BIT_MODES:
        raise InputDataError(f"{_name(source)}: image mode {image.mode} is not 8-bit: convert it to 8-bit RGB")
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def image_size(source: Path | bytes) -> tuple[int, int]:
    """(height, width) in pixels after EXIF orientation, without decoding the pixels."""
    image = _open(source, decode=False)
    width, height = image.size
    turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def grey_size(path: Path) -> tuple[int, int]:
    """(height, width) of what `read_grey` returns, from the file's head; `image_size` decodes a PNG to find EXIF."""
    image = _open(path, decode=False)
    return image.height, image.width


def read_grey(path: Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read a single-channel picture of another maker as it stands: (height, width), uint8 or uint16.

    Modes 1, L, P, RGB, LA and RGBA become 8-bit luminance (transparency ignored); 16-bit grey stays 16-bit.
    """
    image = _open(path)
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise InputDataError(f"{path}: values outside 0 to 65535: save it as 8-bit or 16-bit grey")
        return values.astype(np.uint16)
    if image.mode not in _EIGHT_BIT_MODES:
        raise InputDataError(f"{path}: image mode {image.mode} cannot be read as a mask: save it as 8-bit grey")
    return np.asarray(image.convert("RGB").convert("L") if image.mode != "L" else image)


def write_mask(path: Path, mask: NDArray[np.bool_]) -> None:
    """Write a (height, width) mask atomically as 8-bit L PNG with 0 and 255."""
    with atomic_write(path) as file:  # level 1: 3 to 40 times as fast as the default, a few KB more
        Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG", compress_level=1)


def write_probability(path: Path, probability: NDArray[np.float32]) -> None:
    """Write (height, width) probabilities in [0, 1] atomically as 16-bit grey PNG, 65535 for 1.

    Halves are rounded down, so that a stored value is above 32767 exactly where the probability is above 0.5.
    """
    scaled = np.ceil(probability.astype(np.float64) * 65535 - 0.5).astype(np.uint16)
    with atomic_write(path) as file:
        Image.fromarray(scaled).save(file, "PNG", compress_level=1)


def _open(source: Path | bytes, decode: bool = True) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > MAX_PIXELS:
            raise InputDataError(
                f"{_name(source)}: {image.width} x {image.height} pixels, more than {MAX_PIXELS}: cut it into tiles"
            )
        if decode:
            image.load()
    except InputDataError:
        raise
    except Exception as error:  # Pillow raises many kinds from damaged files: OSError, SyntaxError, struct.error, ...
        raise InputDataError(f"{_name(source)}: not readable as an image ({error}): export it again") from error
    return image


def _name(source: Path | bytes) -> str:
    return "embedded image" if isinstance(source, bytes) else str(source)
