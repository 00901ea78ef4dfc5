"""Batches for training: which samples, in which order, changed how: all a function of seed, epoch and index."""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from stas.config import Recipe
from stas.store import Store
from stas.transforms import build_augmentation, normalise, scale_intensity

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    images: Tensor  # (N, 3, H, W), float32
    masks: Tensor  # (N, 1, H, W), float32, foreground fraction in [0, 1]
    weights: Tensor  # (N,), float32: 1, or 0 for a repeated sample that evens out the ranks
    total: int  # images in the global batch
    stems: list[str]

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        images, masks, weights = (
            tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.images, self.masks, self.weights)
        )
        return Batch(images, masks, weights, self.total, self.stems)


def steps_per_epoch(samples: int, batch: int) -> int:
    """Global batches in an epoch; the last may be smaller."""
    return -(-samples // batch)


def epoch_batches(
    store: Store, samples: Sequence[int], recipe: Recipe, epoch: int, rank: int, ranks: int, first: int = 0
) -> Iterator[Batch]:
    """Yield this rank's share of each global batch of an epoch.

    Args:
        store: the samples.
        samples: positions in the store that are for training.
        recipe: gives the global batch, the seed and the augmentation.
        epoch: from 0.
        rank: this process, from 0.
        ranks: how many processes share a batch.
        first: the step to begin with, to go on within an epoch.
    """
    augmentation = build_augmentation(recipe.augment)
    order = np.random.default_rng([recipe.train.seed, epoch]).permutation(np.asarray(samples)).tolist()
    size = recipe.train.batch
    for step in range(first, steps_per_epoch(len(order), size)):
        together = order[step * size : (step + 1) * size]
        share, weights = rank_share(together, rank, ranks)
        images, masks = [], []
        for index in share:
            entry = store.samples[index]
            image = scale_intensity(store.image(index), entry["min"], entry["max"], recipe.data)
            mask = torch.from_numpy(store.mask(index)).float()[None] / 255
            seed = np.random.SeedSequence([recipe.train.seed, epoch, index]).generate_state(1)[0]
            augmentation.set_random_state(seed=int(seed))
            changed: Any = augmentation({"image": image, "mask": mask})
            images.append(normalise(changed["image"], recipe.data))
            masks.append(changed["mask"])
        stems = [store.samples[index]["stem"] for index in share]
        yield Batch(torch.stack(images), torch.stack(masks), torch.tensor(weights), len(together), stems)


def rank_share(together: Sequence[int], rank: int, ranks: int) -> tuple[list[int], list[float]]:
    """Cut a global batch into equal shares; where it does not come out even, repeat its first sample with weight 0."""
    each = -(-len(together) // ranks)
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
