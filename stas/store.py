"""The store: an immutable, content-addressed LMDB file of samples, with a manifest.

For each sample: the image at the recipe's size (raw uint8 RGB), the mask at the same size (uint8, the covered share of
each pixel times 255), and the mask at the image's own size (one bit a pixel, packed and compressed).

LMDB maps its file into memory, which its documentation forbids on remote file systems: there the file is written on
local disk and copied, and copied to local disk before it is read.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import lmdb
import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from typing_extensions import TypedDict  # which pydantic can validate before Python 3.12

from stas.config import Data
from stas.deflate import unpack
from stas.errors import InputDataError, UsageError
from stas.files import atomic_write, read_json, remove_leftovers, write_json
from stas.filesystems import on_network
from stas.images import MAX_PIXELS, MAX_SIDE, is_plain_stem
from stas.paths import Workspace, cache_directory, manifest, store_data
from stas.store_check import check_data_file
from stas.untrusted import shown

log = logging.getLogger(__name__)

FORMAT = 1
MAX_STORED_SIDE = 8192  # pixels, the largest that a recipe may ask for
COPY_BLOCK = 16 << 20
ROWS_AT_ONCE = 32  # of a resized image, so that the sums stay in the processor's cache
_MAKE_AGAIN = "delete the store and run `stas preprocess` again"


def _plain_stem(stem: str) -> str:
    """A stem that names a file in a directory, and none outside of it."""
    if not is_plain_stem(stem):
        raise ValueError("not the stem of a file in one directory")
    return stem


Stem = Annotated[str, AfterValidator(_plain_stem)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Byte = Annotated[int, Field(ge=0, le=255)]


class Sample(TypedDict):
    """A manifest's entry for one sample."""

    stem: Stem
    sha256: str  # of the three records, in the order image, mask, full mask
    height: Side  # of the original, pixels
    width: Side
    min: Byte  # smallest and largest value of the original image over all channels, 0 to 255
    max: Byte
    area: Annotated[int, Field(ge=0, le=MAX_PIXELS)]  # foreground pixels of the original mask
    image: str  # names and SHA-256 of the sources
    image_sha256: str
    annotation: str
    annotation_sha256: str


class Skipped(TypedDict):
    """A manifest's entry for a file that could not be used."""

    file: str
    reason: str
    remedy: str


class _Manifest(BaseModel):
    """A store's manifest, which may be a stranger's."""

    format: int
    # Names the copy on local disk, so it must not lead out of there.
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}$")]
    label: str
    size: tuple[Annotated[int, Field(ge=1, le=MAX_STORED_SIDE)], Annotated[int, Field(ge=1, le=MAX_STORED_SIDE)]]
    bytes: int
    samples: list[Sample]
    skipped: list[Skipped]


def area_resize(
    array: NDArray[np.uint8] | NDArray[np.bool_] | NDArray[np.float32], size: tuple[int, int], scale: int | None = None
) -> NDArray:
    """Resize as MONAI's Resize does in its default mode 'area', which is torch's adaptive_avg_pool2d.

    Output pixel i is the plain mean of the input pixels floor(i * in / out) up to ceil((i + 1) * in / out), so a pixel
    on a border counts fully on both sides. OpenCV's INTER_AREA weighs it by overlap: up to 17 grey levels off.

    Args:
        array: (height, width) or (height, width, channels); smaller or larger than `size`.
        size: (height, width) of the result.
        scale: multiply the result by this and round it to uint8, as it is stored.

    Returns:
        The same number of dimensions; float32 in the units of `array` (bool as 0 and 1), or uint8 where `scale`.
    """
    channels = array.shape[2] if array.ndim == 3 else 1
    top, tall = _bins(array.shape[0], size[0])
    left, wide = _bins(array.shape[1], size[1])
    kind = _sum_type(array.dtype, int(tall.max()) * int(wide.max()))
    starts = (left[:, None] * channels + np.arange(channels)).ravel()
    counts = np.repeat(wide, channels)
    flat = array.reshape(array.shape[0], -1)
    result = np.empty((size[0], len(starts)), np.float32 if scale is None else np.uint8)
    for count in np.unique(tall):
        areas = (count * counts).astype(np.float32)
        rows = np.flatnonzero(tall == count)
        for block in np.split(rows, range(ROWS_AT_ONCE, len(rows), ROWS_AT_ONCE)):
            if array.dtype == np.bool_ and not array[top[block[0]] : top[block[-1]] + count].any():
                result[block] = 0  # as most blocks of a mask are
                continue
            sums: NDArray = flat.take(top[block], 0).astype(kind)
            for further in range(1, count):
                sums += flat.take(top[block] + further, 0)
            sums = _sum_columns(sums, starts, counts, channels)
            means = np.divide(sums, areas, dtype=np.float32)
            if scale is not None:
                means *= np.float32(scale)
                np.rint(means, out=means)
            result[block] = means
    return result.reshape(*size, *array.shape[2:])


class Store:
    """A finished store, opened in each process when it is first read, so that it may be forked and pickled.

    Attributes:
        directory: where it is.
        key: its content key.
        label: the label that is foreground.
        size: (height, width) of its images and masks in pixels.
        samples: one entry for each sample, in sorted order of the stems.
        skipped: the files that could not be used when it was built.
    """

    def __init__(self, directory: Path, network: bool | None = None) -> None:
        """Read the manifest.

        Args:
            directory: the store.
            network: whether it is on a network file system; found out if None.

        Raises:
            InputDataError: no manifest, one of another version or not of a store, or a data file of another size than
                it says.
        """
        self.directory = directory
        content = _read_manifest(directory)
        self.key, self.label, self.size = content.key, content.label, content.size
        self.samples, self.skipped = content.samples, content.skipped
        self._bytes = content.bytes
        self._network = network
        data = store_data(directory)
        found = data.stat().st_size if data.is_file() else 0
        if found != self._bytes:
            raise InputDataError(f"{data}: {found} bytes, the manifest says {self._bytes}: {_MAKE_AGAIN}")
        self._file: Path | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """The image at the store's size: RGB, (H, W, 3), uint8, writable; copied to `out` where it is given."""
        return self._read(index, "image", out).reshape(*self.size, 3)

    def mask(self, index: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """The mask at the store's size: (H, W), uint8, the covered share of each pixel times 255, writable."""
        return self._read(index, "mask", out).reshape(self.size)

    def full_mask(self, index: int) -> NDArray[np.bool_]:
        """The mask at the image's own size: (height, width), bool, writable."""
        sample = self.samples[index]
        shape = sample["height"], sample["width"]
        packed = unpack(self._read(index, "full"), -(-shape[0] * shape[1] // 8))
        if packed is None:
            raise InputDataError(
                f"{self.directory}: the full mask of sample {sample['stem']} is damaged: {_MAKE_AGAIN}"
            )
        return np.unpackbits(packed, count=shape[0] * shape[1]).view(np.bool_).reshape(shape)

    def verify(self) -> None:
        """Compare every record with its hash in the manifest.

        Raises:
            InputDataError: names the first damaged sample.
        """
        for index, sample in enumerate(self.samples):
            parts = [self._read(index, part) for part in ("image", "mask", "full")]
            if digest(*parts) != sample["sha256"]:
                raise InputDataError(f"{self.directory}: sample {sample['stem']} is damaged: {_MAKE_AGAIN}")

    def close(self) -> None:
        """Let go of the data file; it is opened again when it is read."""
        if self._file is not None:
            _close(self._file)

    def _read(self, index: int, part: str, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        if not 0 <= index < len(self.samples):
            raise IndexError(f"sample {index} of a store of {len(self.samples)}")
        if self._file is None:
            self._file = self._local_file()
        stem = self.samples[index]["stem"]
        length = {"image": self.size[0] * self.size[1] * 3, "mask": self.size[0] * self.size[1]}.get(part)
        try:
            with _environment(self._file).begin(buffers=True) as transaction:
                data = transaction.get(record_key(index, part))
                if data is None or (length is not None and len(data) != length):
                    found = "no" if data is None else f"{len(data)} instead of {length} bytes of"
                    raise InputDataError(f"{self.directory}: sample {stem} has {found} {part}: {_MAKE_AGAIN}")
                pixels = np.frombuffer(data, np.uint8)  # copied, as the buffer ends with the transaction
                if out is None:
                    return pixels.copy()
                out[...] = pixels.reshape(out.shape)
                return out
        except lmdb.Error as error:
            raise InputDataError(f"{self.directory}: sample {stem} is not readable ({error}): {_MAKE_AGAIN}") from error

    def _local_file(self) -> Path:
        """The data file where LMDB may map it: on a network file system a node-local copy, read once in sequence."""
        data = store_data(self.directory)
        if not (on_network(self.directory) if self._network is None else self._network):
            return data.resolve()
        cache = _cache()
        copy = cache.resolve() / f"{self.key}.mdb"
        with (cache / f"{self.key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # all ranks of a node come at once, and one copy is enough
            if not copy.is_file() or copy.stat().st_size != self._bytes:
                log.info("copying %s to %s, because LMDB must not be read on a network file system", data, copy)
                remove_leftovers(cache, f".{copy.name}.*.tmp")
                try:
                    copy_file(data, copy)
                except OSError as error:
                    raise UsageError(
                        f"{data}: cannot be copied to {copy} ({error}): give a roomy local disk with STAS_CACHE_DIR"
                    ) from error
        return copy


def dataset(workspace: Workspace, data: Data) -> Path:
    """The pointer to the newest store for a recipe; recipes of one pointer share a store, whatever their splits."""
    return workspace.dataset(data.label, data.size)


def open_store(workspace: Workspace, data: Data) -> Store:
    """Open the newest store for a recipe's label and size.

    Raises:
        UsageError: there is none.
        InputDataError: the pointer to it or the store is damaged.
    """
    pointer = dataset(workspace, data)
    if not pointer.is_file():
        raise UsageError(
            f"{pointer}: no store of label {data.label} at {data.size[0]} x {data.size[1]} pixels: "
            "run `stas preprocess` with the same --workspace, --recipe and --set"
        )
    content = read_json(pointer)
    key = content.get("store") if isinstance(content, dict) else None
    if not is_plain_stem(key):  # a path would lead out of the workspace
        raise InputDataError(f"{pointer}: names no store ({shown(key)}): delete it and run `stas preprocess` again")
    return Store(workspace.store(str(key)))


def point_to(workspace: Workspace, store: Store) -> None:
    """Make `store` the one that `open_store` finds for its label and size."""
    pointer = workspace.dataset(store.label, store.size)
    if not points_to(pointer, store.key):
        write_json(pointer, {"store": store.key})


def points_to(pointer: Path, key: str) -> bool:
    """Whether a pointer names this store; a missing or damaged one names none."""
    try:
        return read_json(pointer) == {"store": key}
    except InputDataError:
        return False


def _read_manifest(directory: Path) -> _Manifest:
    content: Any = read_json(manifest(directory))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputDataError(f"{directory}: not a store of format {FORMAT}: {_MAKE_AGAIN}")
    try:
        read = _Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputDataError(
            f"{manifest(directory)}: {where} is {shown(problem['input'])}, {problem['msg']}: {_MAKE_AGAIN}"
        ) from None
    if len({sample["stem"] for sample in read.samples}) != len(read.samples):
        raise InputDataError(f"{manifest(directory)}: two samples of one stem: {_MAKE_AGAIN}")
    too_large = [sample for sample in read.samples if sample["height"] * sample["width"] > MAX_PIXELS]
    if too_large:
        raise InputDataError(
            f"{manifest(directory)}: sample {too_large[0]['stem']} of {too_large[0]['height']} x "
            f"{too_large[0]['width']} pixels, more than {MAX_PIXELS}: {_MAKE_AGAIN}"
        )
    return read


_environments: dict[Path, tuple[int, lmdb.Environment]] = {}
_opening = threading.Lock()


def _environment(file: Path) -> lmdb.Environment:
    """The process's environment for a file: LMDB allows one, and none that was opened before a fork."""
    process, environment = _environments.get(file, (0, None))
    if environment is not None and process == os.getpid():
        return environment
    with _opening:
        process, environment = _environments.get(file, (0, None))
        if environment is not None and process == os.getpid():
            return environment
        if environment is not None:
            environment.close()  # the parent's own stays open
            del _environments[file]
        try:
            cache = _cache()
        except OSError:  # nowhere to write: it is checked each time
            cache = None
        check_data_file(file, cache)
        try:
            # Samples are read in any order, but each is megabytes in one piece: without readahead, a store that is not
            # in memory yet comes page by page, 16 times as slowly.
            environment = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=True)
        except (lmdb.Error, OSError) as error:
            raise InputDataError(f"{file}: not readable as a store's data ({error}): {_MAKE_AGAIN}") from error
        _environments[file] = (os.getpid(), environment)
        return environment


def _close(file: Path) -> None:
    with _opening:
        _, environment = _environments.pop(file, (0, None))
        if environment is not None:
            environment.close()


def record_key(index: int, part: str) -> bytes:
    return f"{index:08d}/{part}".encode()


def digest(*parts: bytes | NDArray[np.uint8]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.data)
    return digest.hexdigest()


def _bins(before: int, after: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First input pixel and number of input pixels of each of `after` output pixels."""
    positions = np.arange(after)
    starts = positions * before // after
    return starts, -(-(positions + 1) * before // after) - starts


def _sum_type(kind: np.dtype, count: int) -> type[np.generic]:
    """The narrowest type in which `count` values of type `kind` are added exactly."""
    if kind not in (np.uint8, np.bool_):
        return np.float64
    most = count * (255 if kind == np.uint8 else 1)
    return next(sums for sums in (np.uint8, np.uint16, np.uint32, np.uint64) if most <= np.iinfo(sums).max)


def _sum_columns(array: NDArray, starts: NDArray[np.intp], counts: NDArray[np.intp], channels: int) -> NDArray:
    """Sum `counts[i]` entries of each row of a 2-D array, from `starts[i]` on in steps of `channels`.

    Single entries are slow to fetch, so runs from every entry on are summed, of both counts that there are, and each of
    the wanted is fetched once.
    """
    shorter = int(counts.min())  # others are longer by one
    length = array.shape[1]
    runs = np.empty((len(array), 2, length), array.dtype)  # an entry without enough neighbours is never fetched
    short, long = runs[:, 0], runs[:, 1]
    short[...] = array
    for step in range(channels, shorter * channels, channels):
        short[:, :-step] += array[:, step:]
    step = shorter * channels
    np.add(short[:, :-step], array[:, step:], out=long[:, :-step])
    places = np.where(counts > shorter, starts + length, starts)
    return runs.reshape(len(array), -1).take(places, 1)


def local_disk() -> Path:
    """A directory on local disk, where LMDB may work."""
    directory = cache_directory() or Path(tempfile.gettempdir())
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _cache() -> Path:
    """This user's own directory on local disk."""
    cache = local_disk() / f"stas-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    return cache


def copy_file(source: Path, target: Path) -> None:
    """Copy a file from end to end, atomically."""
    with source.open("rb") as file, atomic_write(target) as copy:
        shutil.copyfileobj(file, copy, COPY_BLOCK)
