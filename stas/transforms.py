"""From stored pixels to what the network sees. Augmentations are MONAI's."""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data.meta_obj import set_track_meta
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    ThresholdIntensityd,
)
from monai.transforms.spatial.dictionary import RandFlipd, RandRotate90d
from monai.transforms.transform import MapTransform, RandomizableTransform
from numpy.typing import NDArray
from torch import Tensor

from stas.config import Augment, Data

# Optical density of haematoxylin, eosin and the residual, one a row, as RGB.
# Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution, 2001.
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def scale_intensity(image: NDArray[np.uint8], low: float, high: float, data: Data) -> Tensor:
    """Scale one image as the recipe says; `normalise` follows after augmentation.

    Args:
        image: RGB, (H, W, 3), uint8.
        low: smallest value of the image at its original size, 0 to 255. MONAI's ScaleIntensity takes the minimum
            before the image is made smaller, which averages the extremes away.
        high: the largest value, likewise.
        data: the recipe's section.

    Returns:
        (3, H, W), float32, in [0, 1].
    """
    tensor = torch.from_numpy(image).permute(2, 0, 1).float()
    if data.intensity == "unit":
        return tensor / 255
    if high <= low:  # as MONAI's ScaleIntensity: an image of one value becomes 0
        return torch.zeros_like(tensor)
    return (tensor - low).div_(high - low).clamp_(0, 1)


def normalise(images: Tensor, data: Data) -> Tensor:
    """Subtract the recipe's mean and divide by its standard deviation; images are (..., 3, H, W), float32."""
    if data.mean is None or data.std is None:
        return images
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (data.mean, data.std))
    return (images - mean) / std


def build_augmentation(augment: Augment) -> Compose:
    """MONAI transforms of a mapping with "image" (3, H, W) in [0, 1] and "mask" (1, H, W), both float32.

    `set_random_state(seed)` on the result makes the next call a function of the seed alone.
    """
    set_track_meta(False)  # no affine matrices: these are plain pictures
    both = ["image", "mask"]
    steps: list[Any] = []
    if augment.rot90:
        steps.append(RandRotate90d(both, prob=augment.rot90))
    if augment.flip:
        steps += [RandFlipd(both, prob=augment.flip, spatial_axis=axis) for axis in (0, 1)]
    if augment.dihedral:  # 3 of 4 draws rotate, evenly by 90, 180 and 270 degrees: each of the 8 symmetries 1 in 8
        steps += [RandFlipd(both, prob=0.5, spatial_axis=0), RandRotate90d(both, prob=0.75, max_k=3)]
    if augment.stain:
        steps.append(RandStainJitterd(["image"], strength=augment.stain))
    if augment.color:
        gamma = 1 + 0.5 * augment.color
        steps += [
            RandScaleIntensityd(["image"], factors=0.2 * augment.color, prob=1, channel_wise=True),
            RandShiftIntensityd(["image"], offsets=0.1 * augment.color, prob=1),
            ThresholdIntensityd(["image"], threshold=0, above=True, cval=0),
            ThresholdIntensityd(["image"], threshold=1, above=False, cval=1),
            RandAdjustContrastd(["image"], gamma=(1 / gamma, gamma), prob=0.5),
        ]
    return Compose(steps)


class RandStainJitterd(RandomizableTransform, MapTransform):
    """Scale and shift the amounts of haematoxylin, eosin and the residual of an RGB image in [0, 1].

    At strength 1 each amount is multiplied by 0.75 to 1.25 and shifted by up to 0.05 of optical density.
    """

    def __init__(self, keys: list[str], strength: float) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.strength = strength

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        result = dict(data)
        scale = torch.as_tensor(self.R.uniform(-0.25, 0.25, 3), dtype=torch.float32) * self.strength + 1
        shift = torch.as_tensor(self.R.uniform(-0.05, 0.05, 3), dtype=torch.float32) * self.strength
        for key in self.key_iterator(result):
            result[key] = jitter_stains(result[key], scale, shift)
        return result


def jitter_stains(image: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Multiply and shift the amount of each of STAINS in `image`, (3, H, W) in [0, 1]; scale and shift are (3,)."""
    stains = STAINS / STAINS.norm(dim=1, keepdim=True)
    density = -torch.log(image.clamp(min=1 / 255)).flatten(1)  # (3, pixels)
    amounts = torch.linalg.solve(stains.T, density)
    density = stains.T @ (amounts * scale[:, None] + shift[:, None])
    return torch.exp(-density).clamp_(0, 1).view_as(image)
