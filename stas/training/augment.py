"""Random changes of training samples. Each is drawn on the CPU as a function of seed, epoch and index alone, and
applied to a whole batch on its device; on a GPU that costs next to nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stas.config import Augment
from stas.data.tiles import Box

# Optical density of haematoxylin, eosin and the residual, one per row, as RGB.
# Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution, 2001.
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_UNIT_STAINS = STAINS / STAINS.norm(dim=1, keepdim=True)
_TO_AMOUNTS = torch.linalg.inv(_UNIT_STAINS.T)  # stain amounts from the density of R, G and B


@dataclass(frozen=True)
class Changes:
    """How each of N samples is changed.

    Attributes:
        flips: (N, 2), bool: rows upside down; columns left to right. Kept on the host, which branches on them.
        turns: (N,), int64, 0 to 3: quarter turns to the left, after the flips. Also kept on the host.
        stain_scale: (N, 3), float32: factor for the amounts of STAINS; stain_shift, (N, 3): added to them.
        gain: (N, 3), float32: factor for each channel; shift, (N, 1): added to all three; gamma, (N, 1): exponent of
            the result after clipping to 0 to 1.
    """

    flips: Tensor
    turns: Tensor
    stain_scale: Tensor
    stain_shift: Tensor
    gain: Tensor
    shift: Tensor
    gamma: Tensor

    def to(self, device: torch.device) -> "Changes":
        names = ("stain_scale", "stain_shift", "gain", "shift", "gamma")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def draw_changes(augment: Augment, seeds: Iterable[tuple[int, ...]]) -> Changes:
    """Draw the changes of samples, one for each of `seeds`. All values are drawn, even those that `augment` does not
    use, so that switching one change on leaves the others as they were.
    """
    drawn = [_draw(augment, np.random.default_rng(seed)) for seed in seeds]
    return Changes(*(torch.from_numpy(np.stack(values)) for values in zip(*drawn, strict=True)))


def draw_window(shape: tuple[int, int], size: tuple[int, int], seed: tuple[int, ...]) -> Box:
    """Draw a window of `size`, every position equally likely, in an image of `shape`, both (height, width) in pixels.

    Along a side where the image is smaller than the window, the box spans the whole side.
    """
    random = np.random.default_rng(seed)
    height, width = min(shape[0], size[0]), min(shape[1], size[1])
    top, left = random.integers((shape[0] - height + 1, shape[1] - width + 1)).tolist()
    return Box(top, left, height, width)


def move(pixels: Tensor, changes: Changes) -> Tensor:
    """Flip and turn each picture of a batch, (N, H, W) or (N, H, W, channels), of any dtype."""
    if not changes.flips.any() and not changes.turns.any():
        return pixels
    moved = []
    for picture, flips, turns in zip(pixels, changes.flips.tolist(), changes.turns.tolist(), strict=True):
        flipped = picture.flip([axis for axis, flip in enumerate(flips) if flip]) if any(flips) else picture
        moved.append(torch.rot90(flipped, turns, (0, 1)) if turns else flipped)
    return torch.stack(moved)


def recolour(images: Tensor, changes: Changes, augment: Augment) -> Tensor:
    """Change stain and colour of images (N, 3, H, W), float32, in [0, 1]; they stay in that range."""
    if augment.stain:
        images = jitter_stains(images, changes.stain_scale, changes.stain_shift)
    if augment.color:
        gain, shift, gamma = (value[..., None, None] for value in (changes.gain, changes.shift, changes.gamma))
        images = (images * gain).add_(shift).clamp_(0, 1).pow_(gamma)
    return images


def jitter_stains(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Multiply the amount of each of STAINS in images (N, 3, H, W) in [0, 1] by scale, and add shift, both (N, 3)."""
    stains, to_amounts = _UNIT_STAINS.to(images.device), _TO_AMOUNTS.to(images.device)
    density = -torch.log(images.clamp(min=1 / 255)).flatten(2)  # (N, 3, pixels)
    # Changing the amounts changes the density by one 3 x 3 matrix per image.
    change = stains.T @ (scale[:, :, None] * to_amounts)
    density = torch.baddbmm((shift @ stains)[:, :, None], change, density)
    changed = torch.exp(-density).clamp_(0, 1).view(images.shape)
    return torch.empty_like(images).copy_(changed)  # keeps the memory format of the input


def _draw(augment: Augment, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """One sample's values, in the order of the fields of `Changes`."""
    flips = random.random(2) < augment.flip
    turns = random.integers(1, 4) if random.random() < augment.rot90 else 0
    upside_down, quarter_turns = random.random() < 0.5, random.integers(4)
    if augment.dihedral:  # each of the square's 8 symmetries is equally likely
        flips[0] ^= upside_down
        turns += quarter_turns
    stain_scale = 1 + augment.stain * random.uniform(-0.25, 0.25, 3)
    stain_shift = augment.stain * random.uniform(-0.05, 0.05, 3)
    gain = 1 + augment.color * random.uniform(-0.2, 0.2, 3)
    shift = augment.color * random.uniform(-0.1, 0.1, 1)
    strongest = 1 + 0.5 * augment.color
    gamma = random.uniform(1 / strongest, strongest, 1) ** (random.random() < 0.5)
    colours = (value.astype(np.float32) for value in (stain_scale, stain_shift, gain, shift, gamma))
    return flips, np.asarray(turns % 4), *colours
