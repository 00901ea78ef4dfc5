"""Build a store: it appears only when complete, and is built only once."""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import lmdb
import numpy as np
from numpy.typing import NDArray

from stas.data.deflate import pack
from stas.data.resize import area_resize
from stas.data.store import digest, full_part, mask_part, record_key, record_sum
from stas.data.store_file import copy_file, own_directory
from stas.data.store_manifest import MAX_INDEX_BYTES, MAX_SAMPLES, Sample, Skipped, sample_line
from stas.data.store_spec import StoreSpec
from stas.data.tiles import tiles, whole
from stas.errors import UsageError
from stas.paths import store_data, store_samples
from stas.system.files import named_errors, sync_path
from stas.system.filesystems import on_network
from stas.system.publish import Output, building, remove_abandoned, write_manifest

log = logging.getLogger(__name__)

MAP_STEP = 64 << 20  # growth of the map; a new map releases the old one's pages, which count as memory in use
ABANDONED = 24 * 3600  # seconds after which we assume that the process building a partial store was killed


class Source(TypedDict):
    """The files that a sample came from."""

    stem: str
    image: str
    image_sha256: str
    annotation: str
    annotation_sha256: str


@dataclass(frozen=True)
class Record:
    """A sample ready to be stored."""

    sample: Sample
    image: NDArray[np.uint8]  # RGB, (H, W, 3)
    mask: NDArray[np.uint8]  # (H, W), the covered share of each pixel times 255
    full_mask: bytes  # one bit a pixel of the original, packed and compressed


def make_record(source: Source, image: NDArray[np.uint8], mask: NDArray[np.bool_], spec: StoreSpec) -> Record:
    """Make the stored form of a sample.

    Args:
        source: the files it came from.
        image: RGB at its own size, (h, w, 3), uint8.
        mask: foreground at the same size, (h, w).
        spec: the store's spec, with one label.
    """
    assert image.shape[:2] == mask.shape
    (label,) = spec.labels
    stored = spec.shape(*mask.shape)
    area = int(np.count_nonzero(mask))
    # MONAI scales to [0, 1] before resizing; both are affine in the pixels, so raw bytes can be stored.
    small = area_resize(image, stored, scale=1)
    small_mask = area_resize(mask, stored, scale=255)
    full = pack(np.packbits(mask))
    sample = Sample(
        stem=source["stem"],
        sha256=digest(small, small_mask, full),
        height=mask.shape[0],
        width=mask.shape[1],
        stored=stored,
        min=int(image.min()),
        max=int(image.max()),
        area=area,
        areas={label: area},
        image=source["image"],
        image_sha256=source["image_sha256"],
        annotation=source["annotation"],
        annotation_sha256=source["annotation_sha256"],
    )
    return Record(sample, small, small_mask, full)


class StoreWriter:
    """Write the records of a store that is being built, from one process at a time."""

    def __init__(self, file: Path, index: Path, spec: StoreSpec) -> None:
        """Open the files.

        Args:
            file: the data, on local disk.
            index: the entries of the samples.
            spec: the store's spec.
        """
        self.samples: list[Sample] = []
        self.skipped: list[Skipped] = []
        self._file = file
        self._index_file = index
        self._spec = spec
        (self._label,) = spec.labels
        with _disk_errors(file):
            # No other process knows the file yet, so it needs neither locks nor a sync for each record.
            self._env = lmdb.open(str(file), map_size=MAP_STEP, subdir=False, lock=False, sync=False, mode=0o644)
        with named_errors(index):
            self._index = index.open("wb")
        self._thread = ThreadPoolExecutor(1, "sync")
        self._syncing: Future[None] | None = None

    def add(self, record: Record) -> None:
        """Store one sample after those already stored.

        Raises:
            UsageError: there would be more than a store can hold.
        """
        line = sample_line(record.sample)
        if len(self.samples) == MAX_SAMPLES or self._index.tell() + len(line) > MAX_INDEX_BYTES:
            raise too_many(len(self.samples) + 1)
        parts = {
            **self._tiles("image", record.image),
            **self._tiles(mask_part(self._label), record.mask),
            full_part(self._label): record.full_mask,
        }
        while True:
            try:
                with _disk_errors(self._file), self._env.begin(write=True) as transaction:
                    for part, data in parts.items():
                        end = record_sum(record.sample["sha256"], part, data)
                        transaction.put(record_key(len(self.samples), part), b"".join((data, end)))
                break
            except lmdb.MapFullError:
                self._start_sync()
                self._env.set_mapsize(self._env.info()["map_size"] + MAP_STEP + sum(map(len, parts.values())))
        with named_errors(self._index_file):
            self._index.write(line)
        self.samples.append(record.sample)

    def _tiles(self, part: str, pixels: NDArray[np.uint8]) -> dict[str, memoryview]:
        shape = pixels.shape[0], pixels.shape[1]
        return {
            f"{part}/{name}": np.ascontiguousarray(pixels[tile.slices(whole(shape))]).data.cast("B")
            for name, tile in tiles(shape, self._spec.tile, whole(shape))
        }

    def sync(self) -> None:
        """Sync everything to disk."""
        self._wait_for_disk()
        with _disk_errors(self._file):
            self._env.sync(True)
        with named_errors(self._index_file):
            self._index.flush()

    def close(self) -> None:
        self._thread.shutdown()
        self._env.close()
        with named_errors(self._index_file), suppress(OSError):  # `sync` has written everything, or has failed
            self._index.close()

    def _start_sync(self) -> None:
        """Sync in the background; wait if the disk is behind."""
        self._wait_for_disk()
        self._syncing = self._thread.submit(sync_path, self._file)

    def _wait_for_disk(self) -> None:
        if self._syncing:
            self._syncing.result()


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    """Turn LMDB's errors into OSError; LMDB gives the errno only in its text."""
    try:
        yield
    except lmdb.Error as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(file)) from error
        raise


@contextmanager
def build_store(directory: Path, spec: StoreSpec, network: bool | None = None) -> Iterator[StoreWriter | None]:
    """Build a store that appears at `directory` only if the block succeeds.

    Args:
        directory: the store, whose name is its content key.
        spec: the store's spec, with one label.
        network: whether `directory` is on a network file system; detected if None.

    Yields:
        The writer for its samples; None if the store already exists.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    output = Output(directory, "store", directory.name)
    with building(output) as partial:
        if partial is None:
            yield None
            return
        remove_abandoned(directory.parent, ABANDONED)
        remote = on_network(directory.parent) if network is None else network
        with _scratch(directory.name) if remote else nullcontext(partial) as local:
            writer = StoreWriter(store_data(local), store_samples(partial), spec)
            try:
                yield writer
                writer.sync()
            finally:
                writer.close()
            known = {store_data(partial).name: copy_file(store_data(local), store_data(partial))} if remote else {}
        write_manifest(
            partial,
            output,
            known=known,
            labels=spec.labels,
            size=spec.size,
            scale=spec.scale,
            samples=len(writer.samples),
            skipped=writer.skipped,
        )


def check_count(samples: int) -> None:
    """Refuse, before a build, more samples than a store can hold.

    Raises:
        UsageError: there are more.
    """
    if samples > MAX_SAMPLES:
        raise too_many(samples)


def too_many(samples: int) -> UsageError:
    """The error for more samples than a store can hold."""
    return UsageError(
        f"{samples} samples: a store holds at most {MAX_SAMPLES}, and {MAX_INDEX_BYTES >> 30} GiB of their names and "
        "hashes: make several stores, in workspaces of their own"
    )


@contextmanager
def _scratch(key: str) -> Iterator[Path]:
    """A private directory on local disk, for building a store that belongs on a network file system."""
    local = own_directory(f"stas-{os.geteuid()}-{key}.build")
    store_data(local).unlink(missing_ok=True)  # left by a killed process
    try:
        yield local
    finally:
        shutil.rmtree(local, ignore_errors=True)
