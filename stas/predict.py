"""The one forward pass from an image's pixels to logits at its own size; validation and inference both use it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stas.config import Data, Recipe
from stas.inputs import as_input
from stas.store import Store, area_resize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Picture:
    """One image as the store holds it, whether it comes from there or from a file.

    Attributes:
        pixels: RGB at the size of the network's input, (H, W, 3), uint8.
        low: smallest value of the image at its own size, 0 to 255.
        high: the largest value, likewise.
        size: the image's own (height, width) in pixels.
    """

    pixels: NDArray[np.uint8]
    low: float
    high: float
    size: tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """How a network wants its images, and how it is run on them.

    Attributes:
        data: how images are scaled and normalised.
        precision: the precision that the network was trained in, which is also the one it predicts in.
        channels_last: the memory format that it was trained in.
        tta: average the logits over the square's 8 symmetries.
    """

    data: Data
    precision: Literal["fp32", "bf16", "fp16"]
    channels_last: bool
    tta: bool

    @classmethod
    def of(cls, recipe: Recipe, tta: bool) -> "Settings":
        """The settings of a recipe."""
        return cls(recipe.data, recipe.train.precision, recipe.train.channels_last, tta)


def shrink(image: NDArray[np.uint8], data: Data) -> Picture:
    """Make of an image at its own size, RGB (height, width, 3), uint8, exactly what the store would hold of it."""
    small = area_resize(image, data.size, scale=1)
    return Picture(small, float(image.min()), float(image.max()), (image.shape[0], image.shape[1]))


def stored_picture(store: Store, index: int) -> Picture:
    """Sample `index` of a store."""
    sample = store.samples[index]
    return Picture(store.image(index), sample["min"], sample["max"], (sample["height"], sample["width"]))


@torch.inference_mode()
def predict_logits(network: nn.Module, picture: Picture, settings: Settings) -> Tensor:
    """Foreground logits of one image at its own size.

    Images are never batched: the last bits of a logit depend on the size of the batch, and a mask must not depend on
    which other images were predicted beside it.

    Args:
        network: what `build_network` returns, in evaluation mode; its device is used.
        picture: the image.
        settings: how the network is run.

    Returns:
        (height, width), float32, on the network's device. The original resized logits by area; bilinear is smoother.
    """
    device = next(network.parameters()).device
    pixels = torch.from_numpy(picture.pixels)[None].to(device)
    low, high = (torch.tensor([value], device=device) for value in (picture.low, picture.high))
    inputs = as_input(pixels, low, high, settings.data, settings.channels_last)
    with autocast(device, settings.precision):
        logits = mean_over_symmetries(network, inputs) if settings.tta else network(inputs).float()
    return interpolate(logits, picture.size, mode="bilinear")[0, 0]


def mean_over_symmetries(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 1, H, W), float32, averaged over the square's 8 symmetries of images (N, 3, H, W)."""
    total = torch.zeros_like(images[:, :1])
    for turns in range(4):
        for flip in (False, True):
            turned = torch.rot90(images.flip(-1) if flip else images, turns, (-2, -1))
            logits = torch.rot90(network(turned).float(), -turns, (-2, -1))
            total += logits.flip(-1) if flip else logits
    return total / 8


def autocast(device: torch.device, precision: Literal["fp32", "bf16", "fp16"]) -> torch.autocast:
    """Run a block's forward passes in a recipe's precision."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
