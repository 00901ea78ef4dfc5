"""The loss: a weighted sum of terms, each one number per image."""

from collections.abc import Callable

import torch
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss
from monai.losses.tversky import TverskyLoss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from stas.config import Loss


def build_loss(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """Build the loss of a recipe.

    Returns:
        A function of logits (N, 1, H, W) and targets in [0, 1] of the same shape to losses (N,), float32.
        One number per image, so that a batch split unevenly over the ranks can be averaged over images.
    """
    terms: list[tuple[float, Callable[[Tensor, Tensor], Tensor]]] = []
    if loss.dice:
        terms.append((loss.dice, DiceLoss(sigmoid=True, reduction="none")))
    if loss.bce:
        terms.append((loss.bce, _binary_cross_entropy))
    if loss.focal:
        terms.append((loss.focal, FocalLoss(gamma=loss.focal_gamma, reduction="none")))
    if loss.tversky:
        alpha, beta = loss.tversky_alpha, loss.tversky_beta
        terms.append((loss.tversky, TverskyLoss(sigmoid=True, alpha=alpha, beta=beta, reduction="none")))

    def per_image(logits: Tensor, target: Tensor) -> Tensor:
        logits, target = logits.float(), target.float()  # sums over pixels overflow in half precision
        return torch.stack([weight * term(logits, target).flatten(1).mean(1) for weight, term in terms]).sum(0)

    return per_image


def _binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, target, reduction="none")
