"""The store: an immutable, content-addressed LMDB file of samples, with a manifest.

Each sample has the stored image (raw uint8 RGB) and, for each label, the mask of the same shape (uint8, the covered
share of each pixel times 255) and the mask at the image's own size (one bit a pixel, packed and compressed).

Each tile of an image or mask is its own record, because py-lmdb touches every page of a record that it returns.
"""

import glob
import hashlib
import math
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from stas import paths
from stas.config import Data
from stas.data.deflate import unpack
from stas.data.images import is_plain_stem
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
        content, self.spec = read_store_manifest(directory)
        self.key, self.samples, self.skipped = content.key, content.samples, content.skipped
        self._bytes = content.files.get(store_data(directory).name, -1)
        self._network = network
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
        """Check every record against its hash in the manifest.

        Raises:
            InputDataError: a sample is damaged; names the first one.
        """
        for index, sample in enumerate(self.samples):
            parts = [self.image(index)]
            for label in self.spec.labels:
                parts += self.mask(index, label=label), self._read(index, full_part(label))
            if digest(*parts) != sample["sha256"]:
                raise InputDataError(f"{self.directory}: sample {sample['stem']} is damaged: {MAKE_AGAIN}")

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
        stem = self._sample(index)["stem"]
        if self._file is None:
            self._file = self._local_file()
        try:
            with environment(self._file).begin(buffers=True) as transaction:
                data = transaction.get(record_key(index, part))
                if data is None or (shape is not None and len(data) != math.prod(shape)):
                    found = "no" if data is None else f"{len(data)} instead of {math.prod(shape or ())} bytes of"
                    raise InputDataError(f"{self.directory}: sample {stem} has {found} {part}: {MAKE_AGAIN}")
                pixels = np.frombuffer(data, np.uint8)  # copied below, because the buffer ends with the transaction
                pixels = pixels.reshape(shape or -1)[slices]
                if out is None:
                    return pixels.copy()
                assert out.shape == pixels.shape
                out[...] = pixels
                return out
        except lmdb.Error as error:
            raise InputDataError(f"{self.directory}: sample {stem} is not readable ({error}): {MAKE_AGAIN}") from error

    def _local_file(self) -> Path:
        """The data file on a disk where LMDB may map it."""
        data = store_data(self.directory)
        if not (on_network(self.directory) if self._network is None else self._network):
            return data.resolve()
        return local_copy(data, self.key, self._bytes)


def pointer(workspace: Workspace, spec: StoreSpec) -> Path:
    """The file that names the newest store for `spec`."""
    return workspace.dataset("+".join(spec.labels), spec.form)


def open_store(workspace: Workspace, data: Data) -> Store:
    """Open the newest store for a recipe.

    Raises:
        UsageError: there is none.
        InputDataError: the pointer or the store is damaged, or the store is of an earlier version.
    """
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


def digest(*parts: bytes | NDArray[np.uint8]) -> str:
    """The SHA-256 of a sample's parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.data)
    return digest.hexdigest()
