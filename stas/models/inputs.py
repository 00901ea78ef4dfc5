"""From stored bytes to network input, for both training and prediction."""

from typing import Literal

import torch
from torch import Tensor

from stas.config import Data


def as_input(images: Tensor, low: Tensor, high: Tensor, data: Data, channels_last: bool) -> Tensor:
    """Network input from images that are not augmented: scaled, then normalised.

    Arguments and result are those of `scale_intensity`.
    """
    return normalise(scale_intensity(images, low, high, data.intensity, channels_last), data)


def scale_intensity(
    images: Tensor, low: Tensor, high: Tensor, intensity: Literal["minmax", "unit"], channels_last: bool
) -> Tensor:
    """Scale images to [0, 1].

    Args:
        images: RGB, (N, H, W, 3), uint8.
        low: (N,), float32: smallest value of each image at its original size, 0 to 255. MONAI's ScaleIntensity takes
            the minimum before the image is resized, and resizing averages the extremes away.
        high: (N,), float32: largest value of each image at its original size, 0 to 255.
        intensity: minmax scales by `low` and `high`; unit divides by 255.
        channels_last: the memory format of the result.

    Returns:
        (N, 3, H, W), float32, in [0, 1].
    """
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=format_)
    if intensity == "unit":
        return pixels.div_(255)
    # As in MONAI's ScaleIntensity, an image with a single value becomes 0.
    span = torch.where(high > low, high - low, torch.inf)
    return pixels.sub_(low.view(-1, 1, 1, 1)).div_(span.view(-1, 1, 1, 1)).clamp_(0, 1)


def normalise(images: Tensor, data: Data) -> Tensor:
    """Subtract the recipe's mean and divide by its standard deviation; images are (..., 3, H, W), float32."""
    if data.mean is None or data.std is None:
        return images
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (data.mean, data.std))
    return (images - mean) / std
