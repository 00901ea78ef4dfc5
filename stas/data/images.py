"""Read and write RGB images, masks and probabilities."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stas.data.png import decode_grey, encode_mask
from stas.errors import InputDataError
from stas.system.files import atomic_write
from stas.system.untrusted import check_file, read_bounded, stop_if_passing

# The formats that Pillow may detect, whatever the suffix: of the others, EPS would hand the file to an interpreter.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
# Anything larger is a decompression bomb, not a micrograph. Reading takes up to 20 bytes a pixel: 2.5 GiB.
MAX_PIXELS = 128 * 1024 * 1024
PIXEL_BYTES = 20
MAX_SIDE = 65_535  # pixels, the maximum of JPEG; resizing a strip of a hundred million takes minutes
MAX_IMAGE_BYTES = 512 * 1024 * 1024  # of the file
MAX_SCANS = 200  # a progressive JPEG normally has 10; each empty one takes as long as a whole image
Image.MAX_IMAGE_PIXELS = None  # we check it ourselves, before decoding and with our own message
# The operation that undoes each EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EIGHT_BIT_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBA", "LA")
_BITS, _SAMPLE_FORMAT = 258, 339  # tags of TIFF


def read_image(source: Path | bytes) -> NDArray[np.uint8]:
    """Read an image as LabelMe shows it: with EXIF orientation applied and any 8-bit mode converted to RGB.

    Transparency is dropped, not blended. Images with more than 8 bits a channel, or signed ones, are refused.

    Args:
        source: a file, or its bytes.

    Returns:
        RGB array, (height, width, 3), uint8.

    Raises:
        InputDataError: missing, truncated, too large, or of a mode that is not 8-bit; names the file.
        StoppedEarly: this machine could not read it for now, or has too little memory.
    """
    image = _open(source)
    if image.mode not in _EIGHT_BIT_MODES:
        raise InputDataError(f"{_name(source)}: image mode {image.mode} is not 8-bit: convert it to 8-bit RGB")
    method = _UPRIGHT.get(_orientation(source, image))
    if method is not None:
        image = image.transpose(method)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def stated_size(source: Path | bytes) -> tuple[int, int]:
    """(height, width) in pixels before EXIF orientation, from the file's header alone."""
    image = _open(source, decode=False)
    return image.height, image.width


def grey_size(path: Path) -> tuple[int, int]:
    """(height, width) of the array `read_grey` returns, from the header."""
    image = _open(path, decode=False, formats=("PNG",))
    return image.height, image.width


def read_grey(path: Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read a single-channel PNG from any program, values unchanged: (height, width), uint8 or uint16.

    Modes 1, L, P, RGB, LA and RGBA become 8-bit luminance (transparency ignored); 16-bit grey stays 16-bit, without a
    second channel.

    Raises:
        InputDataError: missing, damaged, too large, not a PNG, or with values that cannot be kept; names the file.
        StoppedEarly: this machine could not read it for now, or has too little memory.
    """
    content = read_bounded(path, MAX_IMAGE_BYTES)
    plain = decode_grey(content, MAX_PIXELS, MAX_SIDE)
    if plain is not None:
        return plain
    image = _open(content, formats=("PNG",), name=str(path))
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise InputDataError(f"{path}: has values outside 0 to 65535: save it as 8-bit or 16-bit grey")
        return values.astype(np.uint16)
    if image.mode not in _EIGHT_BIT_MODES:
        raise InputDataError(f"{path}: image mode {image.mode} cannot be read as a mask: save it as 8-bit grey")
    return np.asarray(image.convert("RGB").convert("L") if image.mode != "L" else image)


def is_graded(values: NDArray[np.uint8] | NDArray[np.uint16]) -> bool:
    """Whether there are values other than 0 and 1, or 0 and the maximum of the type."""
    signed = values.view(np.int8 if values.dtype == np.uint8 else np.int16)  # the maximum becomes -1
    if signed.min(initial=0) >= -1 and signed.max(initial=0) <= 0:
        return False
    return bool(values.max(initial=0) > 1)


def write_mask(path: Path, mask: NDArray[np.bool_], synced: bool = True) -> None:
    """Write a (height, width) mask atomically as 8-bit L PNG with 0 and 255; for `synced` see `atomic_write`."""
    content = encode_mask(mask)
    with atomic_write(path, synced) as file:
        file.write(content)


def write_probability(path: Path, probability: NDArray[np.float32], synced: bool = True) -> None:
    """Write (height, width) probabilities in [0, 1] atomically as 16-bit grey PNG, 65535 for 1.

    Halves are rounded down, so a stored value is above 32767 exactly if the probability is above 0.5.
    """
    scaled = np.ceil(probability.astype(np.float64) * 65535 - 0.5).astype(np.uint16)
    with atomic_write(path, synced) as file:
        Image.fromarray(scaled).save(file, "PNG", compress_level=1)


def _open(
    source: Path | bytes, decode: bool = True, formats: tuple[str, ...] = _FORMATS, name: str | None = None
) -> Image.Image:
    """Open an image, and decode it unless only its header is wanted.

    What fails is tried again, in memory that suffices for an intact image: libraries say "damaged" for want of it.
    """
    name = name or _name(source)
    if isinstance(source, Path) and not decode:
        check_file(source, MAX_IMAGE_BYTES)
    elif isinstance(source, Path):  # libtiff would read the file itself and hide the disk's errors
        source = read_bounded(source, MAX_IMAGE_BYTES)
    for attempt in (1, 2):
        image = None
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
            _check_form(image, name)
            if isinstance(source, bytes) and decode:
                _check_scans(source, image, name)
                image.load()
            return image
        except InputDataError:
            raise
        except Exception as error:  # Pillow has many types for damaged files: OSError, SyntaxError, struct.error, ...
            if isinstance(error, OSError):
                stop_if_passing(name, error)
            if attempt == 2:
                stop_if_passing(name, error)
                raise InputDataError(f"{name}: not readable as an image ({error}): export it again") from error
        pixels = image.width * image.height if image else 0
        del image
        _check_memory(pixels, name)
    raise AssertionError("the second attempt returns or raises")


def _check_form(image: Image.Image, name: str) -> None:
    """Refuse an image by its header: its size, or channels that Pillow would cut to 8 bits."""
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputDataError(
            f"{name}: {width} x {height} pixels, more than {MAX_PIXELS} or than {MAX_SIDE} a side: cut it into tiles"
        )
    if min(width, height) < 1:
        raise InputDataError(f"{name}: {width} x {height} pixels, so it is empty: export it again")
    if image.mode not in _EIGHT_BIT_MODES:
        return  # Pillow keeps these as they are
    bits, signed = _channel(image)
    if bits > 8 or signed:
        kind = "signed" if signed else f"{bits}-bit"
        raise InputDataError(f"{name}: its channels are {kind}, not unsigned 8-bit: convert it to 8-bit RGB or grey")


def _channel(image: Image.Image) -> tuple[int, bool]:
    """The bits of a channel in the file, and whether its values are signed or fractions."""
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        formats = tags.get(_SAMPLE_FORMAT, (1,))
        return max(tags.get(_BITS, (1,))), any(form not in (1, 4) for form in formats)  # 4: undefined
    tile = getattr(image, "tile", None)  # how Pillow will decode the pixels
    return (16 if image.format == "PNG" and tile and str(tile[0][3]).endswith(";16B") else 8), False


def _check_memory(pixels: int, name: str) -> None:
    """Stop unless this process can get the memory that an intact image of this many pixels takes."""
    try:
        np.empty(pixels * PIXEL_BYTES + (64 << 20), np.uint8)
    except MemoryError as error:
        stop_if_passing(name, error)


def _check_scans(content: bytes, image: Image.Image, name: str) -> None:
    """Refuse a JPEG with too many scans. Their markers cannot occur within compressed data, so they can be counted."""
    if image.format not in ("JPEG", "MPO"):
        return
    scans = content.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise InputDataError(f"{name}: a JPEG with {scans} scans, more than {MAX_SCANS}: export it again")


def _orientation(source: Path | bytes, image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception as error:  # as many types as for damaged images
        stop_if_passing(_name(source), error)
        raise InputDataError(
            f"{_name(source)}: its EXIF data are not readable ({error}), so its orientation is unknown: export it again"
        ) from error
    return value if isinstance(value, int) else 1


def _name(source: Path | bytes) -> str:
    return "embedded image" if isinstance(source, bytes) else str(source)
