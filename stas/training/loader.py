"""Training batches. Their samples, order and changes are a function of seed, epoch and index.

A batch holds the store's values, one byte each; the network's input is computed from them on its device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stas.config import Augment, Train
from stas.data.resize import reflect
from stas.data.store import Sample, Store
from stas.data.tiles import Box
from stas.system.threads import PREFETCHED
from stas.training.augment import Changes, draw_changes, draw_window

BUFFERS = PREFETCHED + 2  # the prefetched ones, the batch in the step, and the one being made
WINDOW = 1  # separates the draw of a sample's window from its other draws
RESIDENT_SHARE = 0.1  # of a GPU's memory that the samples may take; the rest is for the network


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


class SampleCache:
    """The pixels of the samples that a rank trains on: on its GPU if they fit, otherwise read from the store each time.

    Every rank needs all of them: the order, and with it each rank's share, changes every epoch.

    On a CPU, batches are read into a ring of BUFFERS buffers: `take` overwrites what it returned BUFFERS calls ago.
    """

    def __init__(
        self,
        store: Store,
        samples: Sequence[int],
        device: torch.device,
        window: tuple[int, int] | None = None,
        resident_share: float = RESIDENT_SHARE,
    ) -> None:
        """Set up the cache; samples that fit are copied to the GPU.

        Args:
            store: the store that holds the samples.
            samples: their positions in it.
            device: the device that batches go to.
            window: (height, width) of the network's input; needed for a store at a scale, whose samples are read as
                random windows.
            resident_share: the share of the GPU's memory that the samples may take.
        """
        size = store.size or window
        assert size, "a store at a scale needs a window"
        self.store = store
        self._size = size
        self._device = device
        self._position = {index: position for position, index in enumerate(samples)}
        self._ring: list[tuple[Tensor, Tensor] | None] = [None] * BUFFERS
        self._taken = 0
        self._resident: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda" and store.size:
            free, total = torch.cuda.mem_get_info(device)  # others may use the GPU too
            if len(samples) * size[0] * size[1] * 4 <= min(free, resident_share * total):
                self._resident = self._copy_to_device()

    def take(self, indices: Sequence[int], seeds: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Images (N, H, W, 3) and masks (N, H, W), uint8, of the samples at these positions in the store.

        The BUFFERS-th call from now may overwrite them: copy them to keep them longer. `seeds` has one per sample; its
        window, if any, is drawn from it.
        """
        if self._resident:
            chosen = torch.tensor([self._position[index] for index in indices]).to(self._device)
            return self._resident[0][chosen], self._resident[1][chosen]
        images, masks = self._buffers(len(indices))
        for index, seed, image, mask in zip(indices, seeds, images.numpy(), masks.numpy(), strict=True):
            if self.store.size:
                self.store.image(index, out=image)
                self.store.mask(index, out=mask)
            else:
                box = draw_window(self.store.shape(index), self._size, (*seed, WINDOW))
                _read_window(self.store, index, box, image, mask)
        return images, masks

    def _buffers(self, count: int) -> tuple[Tensor, Tensor]:
        """Unfilled images and masks for `count` samples."""
        if self._device.type == "cuda":
            # Copying to the GPU would block on memory that is not pinned. Torch caches freed pinned memory, and
            # reuses it once the copies from it have finished.
            return self._empty(count, pinned=True)
        # Reuse batch buffers: allocating costs more than filling.
        slot = self._taken % BUFFERS
        self._taken += 1
        buffers = self._ring[slot]
        if buffers is None or len(buffers[0]) < count:
            buffers = self._ring[slot] = self._empty(count)
        return buffers[0][:count], buffers[1][:count]

    def _empty(self, count: int, pinned: bool = False) -> tuple[Tensor, Tensor]:
        shape = count, *self._size
        images = torch.empty(*shape, 3, dtype=torch.uint8, pin_memory=pinned)
        return images, torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)

    def _copy_to_device(self) -> tuple[Tensor, Tensor]:
        shape = len(self._position), *self._size
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
    cache: SampleCache,
    samples: Sequence[int],
    train: Train,
    augment: Augment,
    epoch: int,
    rank: int,
    ranks: int,
    first: int = 0,
) -> Iterator[Batch]:
    """Yield this rank's share of each global batch of an epoch.

    The caller may hold a batch until BUFFERS - 1 later ones are made; `prefetch` makes at most that many while one is
    in use.

    Args:
        cache: the source of the samples' pixels.
        samples: store positions of the training samples.
        train: the source of the global batch size and the seed.
        augment: how samples are changed.
        epoch: from 0.
        rank: this process, from 0.
        ranks: how many processes share a batch.
        first: the step to start with, to resume within an epoch.
    """
    size = train.batch
    order = np.random.default_rng([train.seed, epoch]).permutation(np.asarray(samples)).tolist()
    for step in range(first, steps_per_epoch(len(order), size)):
        together = order[step * size : (step + 1) * size]
        # A share of one image has no variance if a network pools globally before it normalises (DeepLabV3+).
        share, weights = rank_share(together, rank, ranks, least=min(2, -(-size // ranks)))
        entries = [cache.store.samples[index] for index in share]
        seeds = [(train.seed, epoch, index) for index in share]
        images, masks = cache.take(share, seeds)
        low, high = value_range(entries)
        yield Batch(
            images,
            masks,
            low,
            high,
            changes=draw_changes(augment, seeds),
            weights=torch.tensor(weights),
            total=len(together),
            stems=[entry["stem"] for entry in entries],
        )


def _read_window(store: Store, index: int, box: Box, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
    """Read a window of a sample into `image`, (H, W, 3), and `mask`, (H, W); pad a smaller one by reflection."""
    if mask.shape == (box.height, box.width):
        store.window(index, box, out=(image, mask))
        return
    for pixels, out in zip(store.window(index, box), (image, mask), strict=True):
        out[...] = reflect(pixels, (mask.shape[0], mask.shape[1]))


def value_range(entries: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each original image, (N,), float32, 0 to 255."""
    low, high = zip(*((float(entry["min"]), float(entry["max"])) for entry in entries), strict=True)
    return torch.tensor(low), torch.tensor(high)


def rank_share(together: Sequence[int], rank: int, ranks: int, least: int = 1) -> tuple[list[int], list[float]]:
    """Cut a global batch into equal shares of at least `least`, padded with its first sample at weight 0."""
    each = max(least, -(-len(together) // ranks))
    mine = list(together[rank * each : (rank + 1) * each])
    missing = each - len(mine)
    return mine + [together[0]] * missing, [1.0] * len(mine) + [0.0] * missing
