import numpy as np
import pytest
import torch
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import ScaleIntensity
from monai.transforms.spatial.array import Resize
from monai.transforms.utility.array import EnsureChannelFirst

from stas.config import Augment, Data
from stas.store import area_resize
from stas.transforms import build_augmentation, jitter_stains, normalise, scale_intensity


def test_scaling_is_each_images_own_minimum_and_maximum():
    image = np.array([[[10, 20, 30]], [[50, 60, 110]]], np.uint8)  # (2, 1, 3)
    scaled = scale_intensity(image, 10, 110, Data())
    assert scaled.shape == (3, 2, 1)
    assert scaled[:, :, 0].T.tolist() == pytest.approx(np.array([[0, 0.1, 0.2], [0.4, 0.5, 1]]))
    assert scale_intensity(image, 7, 7, Data()).abs().sum() == 0
    assert scale_intensity(image, 10, 110, Data(intensity="unit"))[2, 1, 0].item() == pytest.approx(110 / 255)


def test_the_stored_way_is_monais_way_within_rounding():
    """MONAI scales at full size, then averages; the store averages, rounds to 8 bit, then scales."""
    image = np.random.default_rng(0).integers(30, 220, (94, 171, 3)).astype(np.uint8)
    steps = [EnsureChannelFirst(channel_dim=-1), ScaleIntensity(), Resize((80, 80), mode="area")]
    monais = Compose(steps)(image.astype(np.float32))
    small = area_resize(image, (80, 80)).round().astype(np.uint8)
    ours = scale_intensity(small, float(image.min()), float(image.max()), Data())
    assert np.abs(np.asarray(monais) - ours.numpy()).max() <= 0.5 / (219 - 30) + 1e-5


def test_normalise_by_hand():
    data = Data(mean=(0.5, 0.25, 0), std=(0.5, 1, 2))
    assert normalise(torch.ones(1, 3, 1, 1), data).flatten().tolist() == [1, 0.75, 0.5]
    assert normalise(torch.ones(3, 1, 1), Data()).sum() == 3


def draws(augment, count, size=8):
    """Augmented copies of one picture whose 8 symmetries all differ, with the mask moved alike."""
    augmentation = build_augmentation(augment)
    image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    results = []
    for seed in range(count):
        augmentation.set_random_state(seed=seed)
        results.append(augmentation({"image": image.clone(), "mask": image[:1].clone()}))
    return image, results


def test_dihedral_draws_each_of_the_eight_symmetries_equally():
    _, results = draws(Augment(dihedral=True), 800)
    seen = {}
    for result in results:
        assert torch.equal(result["image"][:1], result["mask"])  # image and mask move together
        key = result["image"].numpy().tobytes()
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 8
    assert min(seen.values()) > 60 and max(seen.values()) < 140


def test_rot90_leaves_seven_of_ten_alone():
    image, results = draws(Augment(rot90=0.3), 500)
    same = sum(torch.equal(result["image"], image) for result in results)
    assert 310 < same < 390
    rotations = [torch.rot90(image, turns, (1, 2)) for turns in range(4)]
    assert all(any(torch.equal(result["image"], turned) for turned in rotations) for result in results)


def test_colour_and_stain_change_the_image_only_and_stay_in_range():
    for augment in (Augment(color=1), Augment(stain=1)):
        image, results = draws(augment, 50)
        for result in results:
            assert torch.equal(result["mask"], image[:1])
            assert result["image"].min() >= 0 and result["image"].max() <= 1
        assert sum(not torch.equal(result["image"], image) for result in results) == 50


def test_a_draw_is_a_function_of_the_seed():
    augment = Augment(dihedral=True, color=1, stain=1)
    first, second = draws(augment, 5)[1], draws(augment, 5)[1]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0]["image"], first[1]["image"])


def test_stain_jitter_by_hand():
    image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
    one, zero = torch.ones(3), torch.zeros(3)
    assert torch.allclose(jitter_stains(image, one, zero), image, atol=1e-5)
    # Twice every stain is twice the optical density: the square of the transmitted light.
    assert torch.allclose(jitter_stains(image, 2 * one, zero), image**2, atol=1e-5)
    # Without stain all light passes.
    assert torch.allclose(jitter_stains(image, zero, zero), torch.ones_like(image))
