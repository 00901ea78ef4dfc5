"""From stored pixels to what the network sees: a whole batch at once, where it lies."""

import torch
from torch import Tensor

from stas.augment import move, recolour
from stas.config import Data, Recipe
from stas.loader import Batch


def prepare(batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Change, scale and normalise a batch on its device.

    Returns:
        images: (N, 3, H, W), float32, in the memory format of the recipe.
        masks: (N, 1, H, W), float32, foreground fraction in [0, 1].
    """
    images = scale_intensity(move(batch.images, batch.changes), batch.low, batch.high, recipe)
    images = normalise(recolour(images, batch.changes, recipe.augment), recipe.data)
    masks = move(batch.masks, batch.changes)[:, None].float().div_(255)
    return images, masks


def as_input(images: Tensor, low: Tensor, high: Tensor, recipe: Recipe) -> Tensor:
    """What the network sees of images that are not augmented; arguments as of `scale_intensity`."""
    return normalise(scale_intensity(images, low, high, recipe), recipe.data)


def scale_intensity(images: Tensor, low: Tensor, high: Tensor, recipe: Recipe) -> Tensor:
    """Scale images as the recipe says.

    Args:
        images: RGB, (N, H, W, 3), uint8.
        low: (N,), float32: smallest value of each image at its original size, 0 to 255. MONAI's ScaleIntensity takes
            the minimum before the image is made smaller, which averages the extremes away.
        high: the largest value, likewise.
        recipe: says whether images are scaled from these, and in which memory format they go on.

    Returns:
        (N, 3, H, W), float32, in [0, 1].
    """
    format_ = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=format_)
    if recipe.data.intensity == "unit":
        return pixels.div_(255)
    # As MONAI's ScaleIntensity: an image of one value becomes 0.
    span = torch.where(high > low, high - low, torch.inf)
    return pixels.sub_(low.view(-1, 1, 1, 1)).div_(span.view(-1, 1, 1, 1)).clamp_(0, 1)


def normalise(images: Tensor, data: Data) -> Tensor:
    """Subtract the recipe's mean and divide by its standard deviation; images are (..., 3, H, W), float32."""
    if data.mean is None or data.std is None:
        return images
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (data.mean, data.std))
    return (images - mean) / std
