import math

import pytest
import torch

from stas.config import Loss
from stas.training.losses import build_loss

# Two images of four pixels: logits +-20 are probabilities 1 and 0.
LOGITS = torch.tensor([[20.0, 20, -20, -20], [20, -20, -20, -20]]).view(2, 1, 2, 2)
TARGET = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0]]).view(2, 1, 2, 2)


def test_dice_is_one_number_per_image():
    # 1 - 2 TP / (2 TP + FP + FN): one true and one false positive; all right.
    assert build_loss(Loss(dice=1))(LOGITS, TARGET).tolist() == pytest.approx([1 - 2 / 3, 0], abs=1e-4)


def test_cross_entropy_and_weights_add_up():
    logits = torch.zeros(2, 1, 2, 2)
    bce = build_loss(Loss(bce=1))(logits, TARGET)
    assert bce.tolist() == pytest.approx([math.log(2)] * 2)
    dice = build_loss(Loss(dice=1))(logits, TARGET)
    both = build_loss(Loss(dice=0.6, bce=0.4))(logits, TARGET)
    assert both.tolist() == pytest.approx((0.6 * dice + 0.4 * bce).tolist())


def test_focal_weighs_by_gamma():
    # At probability 1/2 every pixel: (1 - 1/2) ** gamma * log 2.
    assert build_loss(Loss(focal=1, focal_gamma=3))(torch.zeros(1, 1, 2, 2), TARGET[:1]).item() == pytest.approx(
        0.5**3 * math.log(2)
    )


def test_tversky_weighs_false_positives_by_alpha():
    # TP / (TP + alpha FP + beta FN) with TP = FP = 1, FN = 0.
    loss = build_loss(Loss(tversky=1, tversky_alpha=0.25, tversky_beta=0.75))(LOGITS, TARGET)
    assert loss.tolist() == pytest.approx([1 - 1 / 1.25, 0], abs=1e-4)


def test_half_precision_sums_do_not_overflow():
    logits = torch.full((1, 1, 400, 400), 20.0, dtype=torch.float16)  # 160,000 ones are above fp16's 65,504
    assert build_loss(Loss(dice=1))(logits, torch.ones(1, 1, 400, 400)).item() == pytest.approx(0, abs=1e-4)
