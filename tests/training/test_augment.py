from collections import Counter

import numpy as np
import pytest
import torch
from monai.transforms.spatial.array import Rotate90

from stas.config import Augment
from stas.training.augment import STAINS, Changes, draw_changes, jitter_stains, move, recolour


def pictures(count):
    """The same picture, (count, 8, 8, 3) uint8, whose 8 symmetries all differ."""
    picture = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return picture.expand(count, 8, 8, 3)


def seeds(count):
    return [(0, 0, index) for index in range(count)]


def test_dihedral_draws_each_of_the_eight_symmetries_equally():
    moved = move(pictures(800), draw_changes(Augment(dihedral=True), seeds(800)))
    seen = Counter(picture.numpy().tobytes() for picture in moved)
    assert len(seen) == 8
    assert min(seen.values()) > 60 and max(seen.values()) < 140


def test_rot90_leaves_seven_of_ten_alone_and_turns_as_monai_does():
    changes = draw_changes(Augment(rot90=0.3), seeds(500))
    moved = move(pictures(500), changes)
    turns = Counter(changes.turns.tolist())
    assert 310 < turns[0] < 390 and min(turns[1], turns[2], turns[3]) > 30
    picture = pictures(1)[0].permute(2, 0, 1)
    for turn in range(1, 4):
        monais = Rotate90(k=turn)(picture)
        ours = moved[changes.turns.tolist().index(turn)].permute(2, 0, 1)
        assert np.array_equal(ours.numpy(), np.asarray(monais))


def test_each_axis_is_flipped_as_often_as_asked():
    changes = draw_changes(Augment(flip=0.25), seeds(1000))
    assert not changes.turns.any()
    for axis in (0, 1):
        assert 200 < int(changes.flips[:, axis].sum()) < 300
        first = int(changes.flips[:, axis].logical_and(~changes.flips[:, 1 - axis]).nonzero()[0])
        assert torch.equal(move(pictures(1000), changes)[first], pictures(1)[0].flip(axis))


def test_masks_move_with_their_images():
    changes = draw_changes(Augment(dihedral=True), seeds(50))
    assert torch.equal(move(pictures(50), changes)[..., 0], move(pictures(50)[..., 0], changes))


@pytest.mark.parametrize("augment", [Augment(color=1), Augment(stain=1)])
def test_colour_and_stain_change_every_image_and_stay_in_range(augment):
    changes = draw_changes(augment, seeds(50))
    images = pictures(50).permute(0, 3, 1, 2).float() / 255
    changed = recolour(images, changes, augment)
    assert changed.min() >= 0 and changed.max() <= 1
    assert all(not torch.equal(one, other) for one, other in zip(changed, images, strict=True))
    assert torch.equal(move(pictures(50), changes), pictures(50))


def test_what_is_switched_off_changes_nothing():
    changes = draw_changes(Augment(), seeds(20))
    images = pictures(20).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(recolour(images, changes, Augment()), images)
    assert torch.equal(move(pictures(20), changes), pictures(20))
    assert torch.equal(recolour(images, changes, Augment(color=1)), images)  # factors of 1, shifts of 0
    assert torch.allclose(recolour(images, changes, Augment(stain=1)), images.clamp(min=1 / 255), atol=1e-5)


def test_a_draw_is_a_function_of_its_seed():
    augment = Augment(dihedral=True, color=1, stain=1)
    together, alone = draw_changes(augment, seeds(5)), draw_changes(augment, seeds(5)[3:4])
    for name in ("flips", "turns", "stain_scale", "stain_shift", "gain", "shift", "gamma"):
        assert torch.equal(getattr(together, name)[3:4], getattr(alone, name)), name
    assert not torch.equal(together.gain[0], together.gain[1])


def test_one_change_switched_on_leaves_the_others_as_they_were():
    plain = draw_changes(Augment(color=1), seeds(30))
    more = draw_changes(Augment(color=1, rot90=1, stain=1), seeds(30))
    assert torch.equal(plain.gain, more.gain) and torch.equal(plain.gamma, more.gamma)


def test_half_of_the_gammas_are_one_and_the_others_in_their_range():
    gamma = draw_changes(Augment(color=1), seeds(1000)).gamma
    assert 430 < int((gamma == 1).sum()) < 570
    assert 1 / 1.5 <= gamma.min() < 0.75 and 1.4 < gamma.max() <= 1.5


def test_colour_by_hand():
    one = torch.ones(1, 3)
    changes = Changes(
        torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), one, 0 * one,
        gain=torch.tensor([[1.0, 2.0, 4.0]]), shift=torch.tensor([[0.05]]), gamma=torch.tensor([[2.0]]),
    )  # fmt: skip
    changed = recolour(torch.full((1, 3, 1, 1), 0.25), changes, Augment(color=1))
    assert changed.flatten().tolist() == pytest.approx([0.3**2, 0.55**2, 1])


def test_stain_jitter_by_hand():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
    one, zero = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.allclose(jitter_stains(images, one, zero), images, atol=1e-5)
    # Twice every stain is twice the optical density: the square of the transmitted light.
    assert torch.allclose(jitter_stains(images, 2 * one, zero), images**2, atol=1e-5)
    # Without stain all light passes.
    assert torch.allclose(jitter_stains(images, zero, zero), torch.ones_like(images))
    # More haematoxylin alone, in the second image alone, absorbs by haematoxylin's spectrum.
    shift = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    changed = jitter_stains(images, one, shift)
    assert torch.allclose(changed[0], images[0], atol=1e-5)
    absorbed = (images[1].log() - changed[1].log()).flatten(1).T
    assert torch.allclose(absorbed, (0.1 * STAINS[0] / STAINS[0].norm()).expand_as(absorbed), atol=1e-5)
