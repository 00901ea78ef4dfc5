"""From a batch of stored bytes to training input: the whole batch together, on its device."""

from torch import Tensor

from stas.config import Augment, Data
from stas.models.inputs import normalise, scale_intensity
from stas.training.augment import move, recolour
from stas.training.loader import Batch


def prepare(batch: Batch, data: Data, augment: Augment, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Augment, scale and normalise a batch on its device.

    Args:
        batch: a rank's share of a global batch.
        data: how images are scaled and normalised.
        augment: which of the batch's random changes are used.
        channels_last: the memory format of the images.

    Returns:
        images: (N, 3, H, W), float32.
        masks: (N, 1, H, W), float32, foreground fraction in [0, 1].
    """
    moved = move(batch.images, batch.changes)
    images = scale_intensity(moved, batch.low, batch.high, data.intensity, channels_last)
    images = normalise(recolour(images, batch.changes, augment), data)
    masks = move(batch.masks, batch.changes)[:, None].float().div_(255)
    return images, masks
