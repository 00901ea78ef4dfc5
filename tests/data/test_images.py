import errno
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from stas.data.images import grey_size, read_grey, read_image, stated_size, write_mask, write_probability
from stas.errors import InputDataError, StoppedEarly
from tests.support.launch import PATIENCE

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
RED = (200, 10, 30)


def save(path, image: Image.Image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """A picture that is red at its top left as one looks at it, stored in each of the eight ways."""
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15] = 255
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](upright))
    path = save(tmp_path / "a.jpg", Image.fromarray(stored), exif=exif, quality=95)
    image = read_image(path)
    assert image.shape == (20, 30, 3)
    assert np.abs(image.astype(int) - upright).max() < 60  # JPEG
    assert np.array_equal(read_image(path.read_bytes()), image)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGB", "RGBA", "LA", "YCbCr"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    source = Image.new("RGB", (4, 3), RED)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    image = read_image(save(path, source.convert(mode)))
    assert (image.shape, image.dtype) == ((3, 4, 3), np.uint8)
    if mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
        assert np.abs(image.astype(int) - RED).max() <= (60 if mode == "P" else 3)
    else:
        assert (image[..., :1] == image).all()


def test_transparency_is_dropped(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGBA", (4, 3), (*RED, 0)))
    assert (read_image(path) == RED).all()


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.float32, "F"), (np.int32, "I")])
def test_deeper_images_are_refused_by_mode(tmp_path, dtype, mode):
    path = save(tmp_path / "a.tif", Image.fromarray(np.ones((3, 4), dtype)))
    with pytest.raises(InputDataError, match=rf"a.tif: image mode {mode} is not 8-bit"):
        read_image(path)


def png(kind: int, channels: int, bits: int) -> bytes:
    """A PNG of 3 x 2 pixels, each byte of which is 1: in 16 bits a channel's value is 257."""
    rows = (b"\0" + b"\1" * (3 * channels * bits // 8)) * 2
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 3, 2, bits, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


CHANNELS = {"RGB": (2, 3), "LA": (4, 2), "RGBA": (6, 4)}


@pytest.mark.parametrize(("kind", "channels"), CHANNELS.values(), ids=CHANNELS)
def test_png_of_16_bits_a_channel_is_refused_not_cut_to_8(tmp_path, kind, channels):
    path = tmp_path / "a.png"
    path.write_bytes(png(kind, channels, 8))
    assert (read_image(path) == 1).all() and (read_grey(path) == 1).all()
    path.write_bytes(png(kind, channels, 16))
    for read in (read_image, read_grey, stated_size, grey_size):
        with pytest.raises(InputDataError, match=r"a.png: its channels are 16-bit, not unsigned 8-bit: convert it"):
            read(path)
    with pytest.raises(InputDataError, match="embedded image: its channels are 16-bit"):
        read_image(path.read_bytes())


def test_a_chunk_before_the_header_does_not_hide_16_bits(tmp_path):
    content = png(2, 3, 16)
    text = b"tEXta\0b"
    chunk = struct.pack(">I", 3) + text + struct.pack(">I", zlib.crc32(text))
    with pytest.raises(InputDataError, match=r"its channels are 16-bit|not readable"):
        read_image(content[:8] + chunk + content[8:])


def tiff(photometric: int, channels: int, bits: int, form: int = 1, planes: int = 1, order: str = "<") -> bytes:
    """A TIFF of 3 x 2 pixels without compression."""
    pixels = b"\1" * (3 * 2 * channels * bits // 8)
    strips = channels if planes == 2 else 1
    tags = [(256, [3]), (257, [2]), (258, [bits] * channels), (259, [1]), (262, [photometric]), (277, [channels]),
            (278, [2]), (284, [planes]), (339, [form] * channels)]  # fmt: skip
    tags += [(338, [2])] if channels == 4 and photometric == 2 else []
    tags += [(273, [1000 + len(pixels) // strips * strip for strip in range(strips)])]
    tags += [(279, [len(pixels) // strips] * strips)]
    entries, extra = b"", b""
    start = 8 + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            place = struct.pack(f"{order}I", start + len(extra))
            extra += packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + place
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    head = magic + struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4 + extra
    return head.ljust(1000, b"\0") + pixels


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("photometric", "channels"), [(2, 3), (2, 4), (5, 4)], ids=["RGB", "RGBA", "CMYK"])
def test_tiff_of_16_bits_a_channel_is_refused_not_cut_to_8(tmp_path, photometric, channels, planes, order):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(photometric, channels, 8, planes=planes, order=order))
    assert read_image(path).shape == (2, 3, 3)
    path.write_bytes(tiff(photometric, channels, 16, planes=planes, order=order))
    with pytest.raises(InputDataError, match=r"a.tif: (its channels are 16-bit, not unsigned 8-bit|not readable)"):
        read_image(path)


def test_signed_pixels_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(1, 1, 8, form=2))
    with pytest.raises(InputDataError, match=r"a.tif: its channels are signed, not unsigned 8-bit"):
        read_image(path)


def test_bitmaps_of_16_bits_a_pixel_have_fewer_a_channel(tmp_path):
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 0, 4, 0, 0, 0, 0)
    content = b"BM" + struct.pack("<IHHI", 14 + 40 + 4, 0, 0, 54) + header + struct.pack("<HH", 0x7FFF, 0)
    assert read_image(content).tolist() == [[[255, 255, 255], [0, 0, 0]]]


def test_a_tiff_on_a_failing_disk_is_no_damaged_one(tmp_path, monkeypatch):
    """libtiff would read the file itself, and say only that it cannot be decoded."""
    path = save(tmp_path / "a.tif", Image.new("RGB", (300, 200)), compression="tiff_lzw")

    class Failing(io.FileIO):
        def read(self, *_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("builtins.open", lambda name, *_, **__: Failing(name))
    with pytest.raises(StoppedEarly, match=r"a.tif: this machine could not read it \(Input/output error\)"):
        read_image(path)


def test_an_error_that_passes_at_the_second_attempt_is_none(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("RGB", (4, 3), RED))
    left: list[Exception] = [MemoryError()]
    load = ImageFile.ImageFile.load

    def fail_once(image):
        if left:
            raise left.pop()
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail_once)
    assert (read_image(path) == RED).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jpg", "png", "tif", "webp", "bmp"])
def test_an_image_that_memory_does_not_suffice_for_is_no_damaged_one(tmp_path, form):
    """Libraries that cannot allocate say that the file is damaged."""
    pixels = np.random.default_rng(0).integers(0, 256, (800, 1000, 3), np.uint8)
    options = {"jpg": {"progressive": True}, "tif": {"compression": "tiff_lzw"}}.get(form, {})
    path = save(tmp_path / f"a.{form}", Image.fromarray(pixels), **options)
    code = """
import resource, sys
from pathlib import Path
from stas.data.images import read_image
from stas.errors import StoppedEarly
path, ended = Path(sys.argv[1]), []
read_image(path)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for spare in range(0, 100, 10):
    resource.setrlimit(resource.RLIMIT_AS, (size + (spare << 20), resource.RLIM_INFINITY))
    try:
        read_image(path)
        ended.append("read")
    except StoppedEarly as error:
        assert "Cannot allocate memory" in str(error), error
        ended.append("stopped")
    except MemoryError:
        ended.append("stopped")
    except Exception as error:
        ended.append(repr(error))
print(sorted(set(ended)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() in ("['read', 'stopped']", "['stopped']"), (done.stdout, done.stderr)


def test_damaged_images_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / "a.jpg", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputDataError, match=r"a.jpg: not readable as an image .*truncated"):
        read_image(path)
    with pytest.raises(InputDataError, match="embedded image: not readable"):
        read_image(b"no image")
    with pytest.raises(InputDataError, match=r"gone.jpg: not readable"):
        read_image(tmp_path / "gone.jpg")


def test_a_bomb_is_refused_before_it_is_decoded():
    header = io.BytesIO()
    Image.new("1", (1, 1)).save(header, "PNG")
    data = bytearray(header.getvalue())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(InputDataError, match="40000 x 40000 pixels, more than"):
        read_image(bytes(data))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_grey_is_read_from_any_mode(tmp_path, mode):
    values = read_grey(save(tmp_path / "a.png", Image.fromarray(GREY).convert(mode)))
    assert np.array_equal(values, GREY)


def test_grey_of_1_and_16_bits(tmp_path):
    bits = read_grey(save(tmp_path / "a.png", Image.fromarray(GREY > 100)))
    assert np.array_equal(bits, (GREY > 100) * 255)
    deep = GREY.astype(np.uint16) * 257
    values = read_grey(save(tmp_path / "b.png", Image.fromarray(deep)))
    assert np.array_equal(values, deep)
    assert values.dtype == np.uint16


def test_mask_is_written_as_8_bit_grey_with_0_and_255(tmp_path):
    write_mask(tmp_path / "out" / "a.png", GREY > 100)
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert (image.mode, image.format) == ("L", "PNG")
        assert np.array_equal(np.asarray(image), (GREY > 100) * 255)


def test_probability_keeps_its_side_of_one_half(tmp_path):
    half = np.float32(0.5)
    values = np.array([[0, 1, half, np.nextafter(half, half + 1), np.nextafter(half, half - 1), 0.25]], np.float32)
    write_probability(tmp_path / "a.png", values)
    stored = read_grey(tmp_path / "a.png")
    assert stored[0, :2].tolist() == [0, 65535]
    assert np.array_equal(stored > 32767, values > 0.5)
    assert np.abs(stored / 65535 - values).max() < 1e-5


def test_a_tiff_that_lies_on_its_side_is_turned_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.tif", Image.new("RGB", (30, 20)), exif=exif)
    assert read_image(path).shape == (30, 20, 3)


def test_a_mask_is_a_png_whatever_its_name(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png", "TIFF")
    for read in (read_grey, grey_size):
        with pytest.raises(InputDataError, match="not readable as an image"):
            read(tmp_path / "a.png")
