"""Batches for training: which samples, in which order, changed how: all a function of seed, epoch and index.

A batch holds what the store holds, a byte for each value; what the network sees is made of it on its device.
"""

import queue
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stas.augment import Changes, draw_changes, draw_window
from stas.config import Recipe
from stas.store import Sample, Store
from stas.tiles import Box

T = TypeVar("T")
RESIDENT_SHARE = 0.1  # of a GPU's memory that the samples may take; the rest is the network's


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    images: Tensor  # (N, H, W, 3), uint8, RGB
    masks: Tensor  # (N, H, W), uint8, foreground fraction times 255
    low: Tensor  # (N,), float32, smallest value of the original image, 0 to 255
    high: Tensor  # (N,), float32, the largest
    changes: Changes
    weights: Tensor  # (N,), float32: 1, or 0 for a repeated sample that evens out the ranks
    total: int  # images in the global batch
    stems: list[str]

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        names = ("images", "masks", "low", "high", "weights")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, changes=self.changes.to(device), **moved)


class Pixels:
    """The pixels of the samples that a rank trains on: on its GPU where they fit, else read from the store each time.

    Every rank needs all of them: the order, and so the share of each, is another in every epoch.
    """

    def __init__(
        self, store: Store, samples: Sequence[int], device: torch.device, resident_share: float = RESIDENT_SHARE
    ) -> None:
        """Take `samples`, by position in the store; `resident_share` of the GPU's memory is theirs if it suffices."""
        self.store = store
        self._device = device
        self._position = {index: position for position, index in enumerate(samples)}
        self._kept: list[NDArray[np.uint8]] = []
        self._resident: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda" and store.size:
            size = len(samples) * store.size[0] * store.size[1] * 4
            free, total = torch.cuda.mem_get_info(device)  # others may use the GPU too
            if size <= min(free, resident_share * total):
                self._resident = self._copied()

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (N, H, W, 3) and masks (N, H, W), uint8, of samples by their position in the store."""
        if self._resident:
            chosen = torch.tensor([self._position[index] for index in indices]).to(self._device)
            return self._resident[0][chosen], self._resident[1][chosen]
        assert self.store.size
        images, masks = (self._empty(len(indices), *self.store.size, *last) for last in ((3,), ()))
        for position, index in enumerate(indices):
            self.store.image(index, out=images[position].numpy())
            self.store.mask(index, out=masks[position].numpy())
        return images, masks

    def windows(
        self, indices: Sequence[int], size: tuple[int, int], seeds: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, Tensor]:
        """A random window of each sample, drawn with its seed: images (N, *size, 3) and masks (N, *size), uint8."""
        images, masks = (self._empty(len(indices), *size, *last) for last in ((3,), ()))
        for index, seed, image, mask in zip(indices, seeds, images.numpy(), masks.numpy(), strict=True):
            read_window(self.store, index, draw_window(self.store.shape(index), size, seed), image, mask)
        return images, masks

    def _empty(self, *shape: int) -> Tensor:
        if self._device.type == "cuda":  # or copying to the GPU would wait for it
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        # New memory takes longer to get from the system than to fill: that of batches which nobody holds is used again.
        for kept in self._kept:
            if kept.shape == shape and sys.getrefcount(kept) <= 3:  # the list's reference, the loop's and the call's
                return torch.from_numpy(kept)
        self._kept.append(np.empty(shape, np.uint8))
        return torch.from_numpy(self._kept[-1])

    def _copied(self) -> tuple[Tensor, Tensor]:
        assert self.store.size
        shape = len(self._position), *self.store.size
        images = torch.empty(*shape, 3, dtype=torch.uint8, device=self._device)
        masks = torch.empty(shape, dtype=torch.uint8, device=self._device)
        for index, position in self._position.items():
            images[position] = torch.from_numpy(self.store.image(index))
            masks[position] = torch.from_numpy(self.store.mask(index))
        return images, masks


def steps_per_epoch(samples: int, batch: int) -> int:
    """Global batches in an epoch; the last may be smaller."""
    return -(-samples // batch)


def epoch_batches(
    pixels: Pixels, samples: Sequence[int], recipe: Recipe, epoch: int, rank: int, ranks: int, first: int = 0
) -> Iterator[Batch]:
    """Yield this rank's share of each global batch of an epoch.

    Args:
        pixels: gives the samples' pixels.
        samples: positions in the store that are for training.
        recipe: gives the global batch, the seed and the augmentation.
        epoch: from 0.
        rank: this process, from 0.
        ranks: how many processes share a batch.
        first: the step to begin with, to go on within an epoch.
    """
    seed, size = recipe.train.seed, recipe.train.batch
    order = np.random.default_rng([seed, epoch]).permutation(np.asarray(samples)).tolist()
    for step in range(first, steps_per_epoch(len(order), size)):
        together = order[step * size : (step + 1) * size]
        # A share of one image has no variance where a network pools globally before it normalises (DeepLabV3+).
        share, weights = rank_share(together, rank, ranks, least=min(2, -(-size // ranks)))
        entries = [pixels.store.samples[index] for index in share]
        if pixels.store.size:
            images, masks = pixels.take(share)
        else:
            images, masks = pixels.windows(share, recipe.data.size, [(seed, epoch, index, 1) for index in share])
        low, high = value_range(entries)
        yield Batch(
            images,
            masks,
            low,
            high,
            changes=draw_changes(recipe.augment, [(seed, epoch, index) for index in share]),
            weights=torch.tensor(weights),
            total=len(together),
            stems=[entry["stem"] for entry in entries],
        )


def read_window(store: Store, index: int, box: Box, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
    """Read a window of a sample into `image`, (H, W, 3), and `mask`, (H, W).

    A smaller box goes to their middle, and its reflection to the margins.
    """
    if mask.shape == (box.height, box.width):
        store.window(index, box, out=(image, mask))
        return
    down, across = mask.shape[0] - box.height, mask.shape[1] - box.width
    margins = (down // 2, down - down // 2), (across // 2, across - across // 2)
    for pixels, out in zip(store.window(index, box), (image, mask), strict=True):
        # Not "reflect", which leaves out the edge and so has nothing to reflect in a single row.
        out[...] = np.pad(pixels, [*margins, (0, 0)][: pixels.ndim], mode="symmetric")


def value_range(entries: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each of the original images, (N,), float32, 0 to 255."""
    low, high = zip(*((float(entry["min"]), float(entry["max"])) for entry in entries), strict=True)
    return torch.tensor(low), torch.tensor(high)


def rank_share(together: Sequence[int], rank: int, ranks: int, least: int = 1) -> tuple[list[int], list[float]]:
    """Cut a global batch into equal shares of at least `least`; what lacks is its first sample with weight 0."""
    each = max(least, -(-len(together) // ranks))
    mine = list(together[rank * each : (rank + 1) * each])
    missing = each - len(mine)
    return mine + [together[0]] * missing, [1.0] * len(mine) + [0.0] * missing


def prefetch(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield from `items`, made up to `depth` ahead in a thread, which torch and Pillow let run beside the step."""
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    closed = threading.Event()

    def put(value: tuple[T | None, BaseException | None, bool]) -> bool:
        while not closed.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:
            put((None, error, True))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error, end = ready.get()
            if error is not None:
                raise error
            if end:
                return
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
