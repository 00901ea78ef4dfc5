"""The one forward pass from an image's pixels to logits at its own size, shared by validation and inference."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stas.config import Data, Recipe
from stas.data.resize import area_resize, reflect
from stas.data.store import Store
from stas.data.store_spec import store_spec
from stas.models.inputs import as_input

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Picture:
    """One image as the store holds it, whether read from the store or from a file.

    Attributes:
        pixels: RGB as stored, (H, W, 3), uint8: at the size of the network's input, or at the recipe's scale.
        low: smallest value of the image at its own size, 0 to 255.
        high: largest value of the image at its own size, 0 to 255.
        size: the image's own (height, width) in pixels.
    """

    pixels: NDArray[np.uint8]
    low: float
    high: float
    size: tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """How images are prepared for a network, and how it is run on them.

    Attributes:
        data: how images are scaled and normalised.
        precision: the precision that the network was trained in; it predicts in the same one.
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
    """Shrink an image at its own size, RGB (height, width, 3), uint8, exactly as the store would hold it."""
    size = image.shape[0], image.shape[1]
    small = area_resize(image, store_spec(data).shape(*size), scale=1)
    return Picture(small, float(image.min()), float(image.max()), size)


def stored_picture(store: Store, index: int) -> Picture:
    """Sample `index` of a store."""
    sample = store.samples[index]
    return Picture(store.image(index), sample["min"], sample["max"], (sample["height"], sample["width"]))


@torch.inference_mode()
def predict_logits(network: nn.Module, picture: Picture, settings: Settings) -> Tensor:
    """Foreground logits of one image at its own size.

    Images are never batched: the last bits of a logit depend on the batch size, and a mask must not depend on which
    other images are predicted with it.

    Args:
        network: from `build_network`, in evaluation mode; its device is used.
        picture: the image.
        settings: how the network is run.

    Returns:
        (height, width), float32, on the network's device. The original resized logits by area; bilinear is smoother.
    """
    device = next(network.parameters()).device
    shape = picture.pixels.shape[:2]
    padded = reflect(picture.pixels, settings.data.size)
    pixels = torch.from_numpy(padded)[None].to(device)
    low, high = (torch.tensor([value], device=device) for value in (picture.low, picture.high))
    inputs = as_input(pixels, low, high, settings.data, settings.channels_last)
    forward = partial(_in_windows, network, settings.data.size)
    with autocast(device, settings.precision):
        logits = mean_over_symmetries(forward, inputs) if settings.tta else forward(inputs)
    top, left = (padded.shape[0] - shape[0]) // 2, (padded.shape[1] - shape[1]) // 2
    own = logits[..., top : top + shape[0], left : left + shape[1]]
    return interpolate(own, picture.size, mode="bilinear")[0, 0]


def _in_windows(network: nn.Module, size: tuple[int, int], images: Tensor) -> Tensor:
    """Logits (1, 1, H, W), float32, of an image (1, 3, H, W) in one pass, or in overlapping windows if it is larger."""
    if tuple(images.shape[-2:]) in (size, size[::-1]):  # may be rotated, if symmetries are averaged
        return network(images).float()
    if images.shape[-2] < size[0] or images.shape[-1] < size[1]:  # rotated here, too
        size = size[1], size[0]
    # Gaussian weights, because a window's logits are better in the middle than at the edges.
    logits = sliding_window_inference(
        images, size, sw_batch_size=1, predictor=lambda window: network(window).float(), overlap=0.25, mode="gaussian"
    )
    assert isinstance(logits, Tensor)
    return logits


def mean_over_symmetries(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
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
