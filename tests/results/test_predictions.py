import logging

import numpy as np
import pytest
from PIL import Image

from stas.data.images import read_grey, write_mask
from stas.errors import InputDataError, UsageError
from stas.results.foreground import foreground
from stas.results.predictions import digest, list_members, log_graded, pixel_hashes
from stas.system.publish import Output, building, write_manifest

MASK = np.array([[0, 1, 1], [0, 0, 1]], bool)


def member(directory, stems="ab", shape=(2, 3)):
    for stem in stems:
        write_mask(directory / f"{stem}.png", np.zeros(shape, bool))
    return directory


def read_mask(path, threshold=None):
    return foreground(read_grey(path), threshold, path)


def test_list_members_lists_stems_and_sizes(tmp_path):
    listed = list_members([member(tmp_path / "one", "ba"), member(tmp_path / "two")])
    assert listed.names == ["one", "two"]
    assert listed.stems == ["a", "b"]
    assert listed.sizes == {"a": (2, 3), "b": (2, 3)}


def test_members_with_other_cases_are_refused_by_name(tmp_path):
    with pytest.raises(InputDataError, match=r"two, compared with one, lacks 1 \(b\) and has 1 extra \(c\)"):
        list_members([member(tmp_path / "one", "ab"), member(tmp_path / "two", "ac"), member(tmp_path / "three", "ab")])


def test_only_ten_cases_are_named(tmp_path):
    with pytest.raises(InputDataError, match=r"lacks 12 \(b, c, d, e, f, g, h, i, j, k and 2 more\)"):
        list_members([member(tmp_path / "one", "abcdefghijklm"), member(tmp_path / "two", "a")])


def test_members_of_other_sizes_are_refused_by_case(tmp_path):
    other = member(tmp_path / "two", "a")
    member(other, "b", (5, 4))
    with pytest.raises(InputDataError, match="b: 3 x 2 in one, 4 x 5 in two"):
        list_members([member(tmp_path / "one"), other])


def test_members_of_one_name_are_told_apart_by_their_parents(tmp_path):
    listed = list_members([member(tmp_path / "x" / "masks"), member(tmp_path / "y" / "masks")])
    assert listed.names == ["x/masks", "y/masks"]


def test_a_member_given_twice_is_refused(tmp_path):
    one = member(tmp_path / "one")
    with pytest.raises(UsageError, match="more than once"):
        list_members([one, tmp_path / "." / "one"])


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint8) * 255),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGB"),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGBA"),
        Image.fromarray(MASK.astype(np.uint16) * 65535),
    ],
    ids=["1", "L 0/1", "L 0/255", "RGB", "RGBA", "16-bit"],
)
def test_masks_of_other_makers_are_read(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    mask, seen = read_mask(tmp_path / "a.png")
    np.testing.assert_array_equal(mask, MASK)
    assert not seen.graded


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_graded_masks_are_cut_above_zero_or_at_the_threshold(tmp_path, dtype, top):
    Image.fromarray(np.array([[0, 1, 100, 101, top]], dtype)).save(tmp_path / "a.png")
    mask, seen = read_mask(tmp_path / "a.png")
    assert (mask.tolist(), seen.graded) == ([[False, True, True, True, True]], True)
    mask, seen = read_mask(tmp_path / "a.png", threshold=100)
    assert (mask.tolist(), seen.graded) == ([[False, False, False, True, True]], False)


@pytest.mark.parametrize(
    ("values", "graded"), [([0, 0], False), ([255, 255], False), ([0, 128], True), ([1, 255], True)]
)
def test_graded_means_that_above_zero_was_a_choice(tmp_path, values, graded):
    Image.fromarray(np.array([values], np.uint8)).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png")[1].graded is graded


def test_graded_masks_are_told_once(caplog):
    with caplog.at_level(logging.INFO):
        log_graded("one", 3, 4)
        log_graded("two", 0, 4)
    assert [record.getMessage()[:16] for record in caplog.records] == ["one: 3 of 4 mask"]


def test_digest_changes_with_content_and_name(tmp_path):
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, text in zip(files, ("1", "1", "2"), strict=True):
        file.write_text(text)
    assert len({digest([file]) for file in files}) == 3
    assert digest(files) == digest(files)


def test_a_digest_of_pixels_changes_with_everything_but_the_packing(tmp_path):
    """Of 0 and 1, or of 8 and 16 bit, the same pattern is another mask: a threshold sees the values."""
    pattern = np.random.default_rng(0).random((5, 16)) < 0.5
    grey = pattern * np.uint8(200)
    other = [pattern * np.uint8(1), pattern * np.uint16(65535), pattern[:, :-1] * np.uint8(255), pattern.T.copy()]
    one_pixel = pattern.copy()
    one_pixel[4, 15] ^= True
    higher = grey.copy()
    higher[pattern] += 1
    other += [one_pixel * np.uint8(255), ~pattern * np.uint8(255), grey, higher]

    def of(pixels, name="a.png", **options):
        file = tmp_path / name
        Image.fromarray(pixels.astype(np.uint8) if pixels.dtype == bool else pixels).save(file, **options)
        return digest([file], [pixel_hashes([file])[0][0]])

    mask = pattern * np.uint8(255)
    assert of(mask, compress_level=0) == of(mask, compress_level=9)
    assert len({of(pixels) for pixels in [mask, *other]} | {of(mask, "b.png")}) == len(other) + 2


def published(directory, label):
    output = Output(directory, "prediction set", {})
    with building(output) as partial:
        assert partial
        write_manifest(member(partial), output, label=label)
    return directory


def test_the_label_is_that_of_the_manifests(tmp_path):
    sets = [published(tmp_path / name, "STAS") for name in ("one", "two")]
    assert list_members([*sets, member(tmp_path / "foreign")]).label == "STAS"
    assert list_members([tmp_path / "foreign"]).label is None
    with pytest.raises(InputDataError, match="different labels: STAS in one, tumour in three"):
        list_members([sets[0], published(tmp_path / "three", "tumour")])
