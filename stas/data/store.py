"""The store: an immutable, content-addressed LMDB file of samples, with their index and a manifest.

Each sample has the stored image (raw uint8 RGB) and, for each label, the mask of the same shape (uint8, the covered
share of each pixel times 255) and the mask at the image's own size (one bit a pixel, packed and compressed).

Each tile of an image or mask is its own record, because py-lmdb touches every page of a record that it returns.

A record ends with a checksum, which is compared when a process reads it for the first time. It is a CRC-32, as file
systems use for their blocks: with ISA-L it takes half a millisecond for 800 x 800 pixels, most of it for memory, where
SHA-256 takes two. It finds every flipped bit, and all but one in 4 billion of other changes. The SHA-256 of the whole
file is in the manifest.
"""

import glob
import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import lmdb
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from stas import paths
from stas.config import Data
from stas.data.deflate import unpack
from stas.data.listing import is_plain_stem
from stas.data.store_file import MAKE_AGAIN, close, environment, local_copy
from stas.data.store_manifest import Sample, read_store_manifest
from stas.data.store_spec import StoreSpec, store_spec
from stas.data.tiles import Box, tiles, whole
from stas.errors import InputDataError, UsageError
from stas.paths import Workspace, store_data
from stas.system.files import read_json, remove_leftovers, write_json
from stas.system.filesystems import on_network
from stas.system.locks import lock
from stas.system.untrusted import shown

log = logging.getLogger(__name__)
SUM = 4  # bytes of a record's checksum


class Store:
    """A finished store. Each process opens it on first read, so it can be forked and pickled.

    Attributes:
        directory: its location.
        key: its content key.
        spec: its labels, and the size or scale of its images and masks.
        samples: one entry per sample, sorted by stem.
        skipped: the files that could not be used when it was built.
    """

    def __init__(self, directory: Path, network: bool | None = None) -> None:
        """Read the manifest.

        Args:
            directory: the store.
            network: whether it is on a network file system; detected if None.

        Raises:
            InputDataError: the manifest is missing, of another version or not a store's, or the data file does not
                have the size it records.
        """
        self.directory = directory
        content, self.spec, self.samples = read_store_manifest(directory)
        self.key, self.skipped = content.key, content.skipped
        self._bytes = content.files.get(store_data(directory).name, -1)
        self._sha256 = content.sha256.get(store_data(directory).name, "")
        self._network = network
        self._checked: dict[str, bytearray] = {}  # by part: 1 for each sample whose checksum was right
        data = store_data(directory)
        found = data.stat().st_size if data.is_file() else 0
        if found != self._bytes:
            raise InputDataError(f"{data}: {found} bytes, but the manifest says {self._bytes}: {MAKE_AGAIN}")
        self._file: Path | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def label(self) -> str:
        """The store's only label."""
        (label,) = self.spec.labels
        return label

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of every image and mask; None if each sample has its own shape."""
        return self.spec.size

    def shape(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels of a sample's image and mask."""
        return self._sample(index)["stored"]

    def image(self, index: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """The stored image: RGB, (H, W, 3), uint8, writable; copied to `out` if given.

        Raises:
            IndexError: no such sample.
            InputDataError: its records are missing or damaged. The other readers raise the same.
        """
        return self._pixels(index, "image", (3,), None, out)

    def mask(self, index: int, out: NDArray[np.uint8] | None = None, label: str | None = None) -> NDArray[np.uint8]:
        """The stored mask: (H, W), uint8, the covered share of each pixel times 255, writable.

        Args:
            index: the sample.
            out: (H, W), uint8; if given, the mask is copied there.
            label: by default the store's only label.
        """
        return self._pixels(index, mask_part(label or self.label), (), None, out)

    def window(
        self,
        index: int,
        box: Box,
        out: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None,
        label: str | None = None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Read a rectangle of the stored image and mask, touching only the tiles it overlaps.

        Args:
            index: the sample.
            box: the rectangle, which must lie within the stored image.
            out: (h, w, 3) and (h, w) of the box, uint8; if given, the pixels are copied there.
            label: of the mask, by default the store's only label.

        Returns:
            The image, (h, w, 3), and the mask, (h, w), in the form of `image` and `mask`.

        Raises:
            IndexError: the box is not within the stored image.
        """
        shape = self.shape(index)
        if not box.within(whole(shape)):
            raise IndexError(f"{box} of sample {index}, which has {shape[1]} x {shape[0]} pixels (width x height)")
        image, mask = out or (None, None)
        image = self._pixels(index, "image", (3,), box, image)
        return image, self._pixels(index, mask_part(label or self.label), (), box, mask)

    def full_mask(self, index: int, label: str | None = None) -> NDArray[np.bool_]:
        """The mask at the image's own size: (height, width), bool, writable; by default of the store's only label."""
        sample = self._sample(index)
        shape = sample["height"], sample["width"]
        packed = unpack(self._read(index, full_part(label or self.label)), -(-shape[0] * shape[1] // 8))
        if packed is None:
            raise InputDataError(f"{self.directory}: the full mask of sample {sample['stem']} is damaged: {MAKE_AGAIN}")
        return np.unpackbits(packed, count=shape[0] * shape[1]).view(np.bool_).reshape(shape)

    def verify(self) -> None:
        """Check every sample against its hash in the index.

        Raises:
            InputDataError: a sample is damaged; names the first one.
        """
        for index in range(len(self)):
            self._verify(index)

    def damaged(self) -> Iterator[str]:
        """The stems of the samples that do not match their hashes in the index.

        Raises:
            InputDataError: LMDB must not map the data file.
        """
        self._environment()
        for index, sample in enumerate(self.samples):
            try:
                self._verify(index)
            except InputDataError:
                yield sample["stem"]

    def _verify(self, index: int) -> None:
        parts = [self.image(index)]
        for label in self.spec.labels:
            parts += self.mask(index, label=label), self._read(index, full_part(label))
        if digest(*parts) != self._sample(index)["sha256"]:
            raise self._damaged(index, "image or masks")

    def close(self) -> None:
        """Close the data file; the next read opens it again."""
        if self._file is not None:
            close(self._file)

    def _sample(self, index: int) -> Sample:
        if not 0 <= index < len(self.samples):
            raise IndexError(f"sample {index} of a store of {len(self.samples)}")
        return self.samples[index]

    def _pixels(
        self, index: int, part: str, channels: tuple[int, ...], box: Box | None, out: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """Copy an image or a mask, or a rectangle of one, without touching the pages of tiles outside it."""
        shape = self.shape(index)
        if box is None and self.spec.size:  # training on whole images always comes here: one tile
            return self._read(index, f"{part}/0/0", (*shape, *channels), out=out)
        box = box or whole(shape)
        if out is None:
            out = np.empty((box.height, box.width, *channels), np.uint8)
        assert out.shape == (box.height, box.width, *channels)
        for name, tile in tiles(shape, self.spec.tile, box):
            common, stored = tile.common(box), (tile.height, tile.width, *channels)
            self._read(index, f"{part}/{name}", stored, common.slices(tile), out[common.slices(box)])
        return out

    def _read(
        self,
        index: int,
        part: str,
        shape: tuple[int, ...] | None = None,
        slices: tuple[slice, ...] = (),
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """Copy a record, or `slices` of it when viewed in `shape`."""
        sample = self._sample(index)
        stem = sample["stem"]
        try:
            with self._environment().begin(buffers=True) as transaction:
                record = transaction.get(record_key(index, part))
                found = -1 if record is None else len(record) - SUM
                if record is None or found < 0 or (shape is not None and found != math.prod(shape)):
                    has = "no" if found < 0 else f"{found} instead of {math.prod(shape or ())} bytes of"
                    raise InputDataError(f"{self.directory}: sample {stem} has {has} {part}: {self._remedy()}")
                data = record[:found]
                checked = self._checked.get(part)
                if checked is None:
                    checked = self._checked[part] = bytearray(len(self))
                if not checked[index]:
                    if record_sum(sample["sha256"], part, data) != record[found:]:
                        raise self._damaged(index, part)
                    checked[index] = 1
                pixels = np.frombuffer(data, np.uint8)  # copied below, because the buffer ends with the transaction
                pixels = pixels.reshape(shape or -1)[slices]
                if out is None:
                    return pixels.copy()
                assert out.shape == pixels.shape
                out[...] = pixels
                return out
        except lmdb.Error as error:
            raise InputDataError(f"{self.directory}: sample {stem} is not readable ({error}): {MAKE_AGAIN}") from error

    def _damaged(self, index: int, part: str) -> InputDataError:
        stem = self._sample(index)["stem"]
        return InputDataError(f"{self.directory}: sample {stem} is damaged ({part}): {self._remedy()}")

    def _remedy(self) -> str:
        """What to do about damage. If it is in a node-local copy, the copy is removed."""
        if self._file is None or not self._on_network():
            return MAKE_AGAIN
        with suppress(OSError):
            self._file.unlink()
        return f"this was read from {self._file}, a copy that is now removed: run the same command again"

    def _environment(self) -> lmdb.Environment:
        if self._file is None:
            self._file = self._local_file()
        try:
            return environment(self._file)
        except InputDataError as error:
            if not self._on_network():
                raise
            log.warning("%s; it is a copy, and is made again", str(error).removesuffix(f": {MAKE_AGAIN}"))
            self._file.unlink(missing_ok=True)
            self._file = self._local_file()
            return environment(self._file)

    def _on_network(self) -> bool:
        return on_network(self.directory) if self._network is None else self._network

    def _local_file(self) -> Path:
        """The data file on a disk where LMDB may map it."""
        data = store_data(self.directory)
        return local_copy(data, self.key, self._bytes, self._sha256) if self._on_network() else data.resolve()


def pointer(workspace: Workspace, spec: StoreSpec) -> Path:
    """The file that names the newest store for `spec`."""
    return workspace.dataset("+".join(spec.labels), spec.form)


def open_store(workspace: Workspace, data: Data, key: str | None = None) -> Store:
    """Open the newest store for a recipe, or the one that a run recorded.

    Args:
        workspace: where the stores are.
        data: the recipe's section.
        key: of the store that the run began with. Newer ones are passed over.

    Raises:
        UsageError: there is none, or it was deleted.
        InputDataError: the pointer or the store is damaged, or the store is of an earlier version.
    """
    if key is not None:
        return _open_recorded(workspace, store_spec(data), key)
    spec = store_spec(data)
    path = pointer(workspace, spec)
    if not path.is_file():
        raise UsageError(
            f"{path}: no store with {spec}: run `stas preprocess` with the same --workspace, --recipe and --set"
        )
    content = read_json(path)
    key = content.get("store") if isinstance(content, dict) else None
    if not is_plain_stem(key):  # a path could lead out of the workspace
        raise InputDataError(f"{path}: names no store ({shown(key)}): delete it and run `stas preprocess` again")
    store = Store(workspace.store(str(key)))
    if store.spec != spec:
        raise InputDataError(f"{path}: names a store with {store.spec}: delete it and run `stas preprocess` again")
    if store.key != key:
        raise InputDataError(f"{store.directory}: holds the store {store.key}: {MAKE_AGAIN}")
    return store


def _open_recorded(workspace: Workspace, spec: StoreSpec, key: str) -> Store:
    """Open the store of a key, and say so if it is not the newest."""
    again = "make it again by running `stas preprocess` with the images and annotations of that time"
    if not is_plain_stem(key):
        raise InputDataError(f"{workspace.stores}: the run names no store ({shown(key)}): start a new run with --run")
    directory = workspace.store(key)
    if not directory.is_dir():
        raise UsageError(
            f"{directory}: no longer there, but the run was trained on this store: {again}, or start a new run with "
            "--run"
        )
    store = Store(directory)
    if store.key != key or store.spec != spec:
        raise InputDataError(
            f"{directory}: the run was trained on store {key} with {spec}, but this is {store.key} with {store.spec}: "
            f"move it away and {again}"
        )
    if not points_to(newest := pointer(workspace, spec), key):
        log.warning(
            "%s: the run goes on with the store that it began with; %s names another one, which only new runs read",
            directory,
            newest,
        )
    return store


def point_to(workspace: Workspace, store: Store) -> None:
    """Make `store` the one that `open_store` opens for its spec."""
    path = pointer(workspace, store.spec)
    if points_to(path, store.key) and not list(path.parent.glob(f".{glob.escape(path.name)}.*")):
        return
    with lock(paths.lock_file(path)):
        remove_leftovers(path.parent, f".{glob.escape(path.name)}.*.tmp")
        if not points_to(path, store.key):
            write_json(path, {"store": store.key})


def points_to(pointer: Path, key: str) -> bool:
    """Whether a pointer names this store; a missing or damaged one names none."""
    try:
        return read_json(pointer) == {"store": key}
    except InputDataError:
        return False


def mask_part(label: str) -> str:
    """The part of a sample that holds a label's stored mask."""
    return f"mask/{label}"


def full_part(label: str) -> str:
    """The part of a sample that holds a label's mask at the image's own size."""
    return f"full/{label}"


def record_key(index: int, part: str) -> bytes:
    """The LMDB key of one part of a sample, or of one tile of it."""
    return f"{index:08d}/{part}".encode()


def record_sum(sample: str, part: str, data: bytes | memoryview) -> bytes:
    """The checksum at a record's end: CRC-32, 4 bytes.

    It begins with the sample's SHA-256 and the part, so that an intact record of another one does not pass for this.
    """
    begin = isal_zlib.crc32(f"{sample} {part}".encode())
    return isal_zlib.crc32(data, begin).to_bytes(SUM, "little")


def digest(*parts: bytes | NDArray[np.uint8]) -> str:
    """The SHA-256 of a sample's parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.data)
    return digest.hexdigest()
