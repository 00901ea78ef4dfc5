import hashlib

import numpy as np
import pytest

from stas.config import Split
from stas.data.split import split_samples, warn_of_shared_images
from stas.data.store import Sample
from stas.errors import UsageError


def chosen(**values) -> Split:
    return Split.model_validate(values)


def samples(count: int, areas=None) -> list[Sample]:
    return [
        Sample(
            stem=f"s{index:04d}", sha256="", height=9, width=9, min=0, max=255,
            stored=(9, 9), area=index if areas is None else int(areas[index]), areas={},
            image="", image_sha256="", annotation="", annotation_sha256="",
        )
        for index in range(count)
    ]  # fmt: skip


def test_first_in_sorted_order_whatever_the_order_given():
    given = samples(5)[::-1]  # s0004 ... s0000
    training, validation = split_samples(given, chosen(kind="first", count=2))
    assert validation == [4, 3]  # s0000, s0001
    assert training == [2, 1, 0]


def test_reference_takes_237():
    training, validation = split_samples(samples(1053), chosen())
    assert (training, validation) == (list(range(237, 1053)), list(range(237)))


def test_fraction_is_seeded_and_independent_of_order():
    given = samples(50)
    training, validation = split_samples(given, chosen(kind="fraction", fraction=0.2, seed=3))
    assert len(validation) == 10
    assert sorted(training + validation) == list(range(50))
    assert training == sorted(training)
    backwards = given[::-1]
    _, again = split_samples(backwards, chosen(kind="fraction", fraction=0.2, seed=3))
    assert [backwards[index]["stem"] for index in again] == [given[index]["stem"] for index in validation]
    _, other = split_samples(given, chosen(kind="fraction", fraction=0.2, seed=4))
    assert other != validation


def test_fraction_is_the_same_on_every_machine():
    order = sorted(range(6), key=lambda index: hashlib.sha256(f"0 s{index:04d}".encode()).digest())
    _, validation = split_samples(samples(6), chosen(kind="fraction", fraction=0.34))
    assert validation == sorted(order[:2])


def test_list_file(tmp_path):
    file = tmp_path / "validation.txt"
    file.write_text("# held out\ns0003\n\n  s0001 \n")
    training, validation = split_samples(samples(4), chosen(kind="list", file=file))
    assert (training, validation) == ([0, 2], [1, 3])


def test_list_file_with_unknown_stems_is_refused(tmp_path):
    file = tmp_path / "validation.txt"
    file.write_text("s0001\ns0002.jpg\nnobody\n")
    with pytest.raises(UsageError, match=r"2 of 3 stems are not in the store \('nobody', 's0002.jpg'\)"):
        split_samples(samples(4), chosen(kind="list", file=file))
    with pytest.raises(UsageError, match=r"gone\.txt: not readable"):
        split_samples(samples(4), chosen(kind="list", file=tmp_path / "gone.txt"))


def test_a_file_that_is_no_list_is_not_quoted(tmp_path):
    """A recipe from a stranger may name any file of the user's."""
    file = tmp_path / "secrets"
    file.write_text("root:x:0:0\npassword=hunter2\n")
    with pytest.raises(UsageError, match="2 of 2 stems are not in the store") as refused:
        split_samples(samples(4), chosen(kind="list", file=file))
    assert "x:0:0" not in str(refused.value) and "hunter2" not in str(refused.value)


@pytest.mark.parametrize("count", [20, 23])
def test_folds_take_every_sample_once(count):
    given = samples(count)
    folds = [split_samples(given, chosen(kind="kfold", folds=5, fold=fold))[1] for fold in range(5)]
    assert sorted(index for fold in folds for index in fold) == list(range(count))
    assert {len(fold) for fold in folds} <= {count // 5, -(-count // 5)}


def test_folds_have_the_same_areas():
    areas = np.random.default_rng(0).permutation(np.repeat([0, 100, 5000, 90000], 5))
    given = samples(20, areas)
    for fold in range(5):
        _, validation = split_samples(given, chosen(kind="kfold", folds=5, fold=fold))
        assert sorted(given[index]["area"] for index in validation) == [0, 100, 5000, 90000]


def test_folds_are_seeded():
    given = samples(40)
    folds = [split_samples(given, chosen(kind="kfold", seed=seed))[1] for seed in (0, 0, 1)]
    assert folds[0] == folds[1] != folds[2]


@pytest.mark.parametrize(
    ("count", "split", "words"),
    [
        (131, chosen(), "the first 237 of 131 samples"),
        (1, chosen(kind="fraction"), "a fraction of 0.2 of 1 samples"),
        (2, chosen(kind="kfold", folds=5, fold=4), "fold 4 of 5 of 2 samples"),
    ],
)
def test_an_empty_side_is_refused_with_numbers_and_remedy(count, split, words):
    with pytest.raises(UsageError) as caught:
        split_samples(samples(count), split)
    assert words in str(caught.value)
    assert "--set data.split.kind=fraction" in str(caught.value)


def test_one_image_on_both_sides_is_named_and_others_are_not(caplog):
    given = samples(40)
    for index, sample in enumerate(given):
        sample["image_sha256"] = f"{index % 25}"  # 25 to 39 are 0 to 14 again
    warn_of_shared_images(given, [*range(25)], [*range(25, 40)])
    assert "15 images are both trained on and held out" in caplog.text
    assert "s0000 and s0025, s0001 and s0026" in caplog.text
    assert "s0009 and s0034 and 5 more" in caplog.text
    caplog.clear()
    warn_of_shared_images(given, [0, 25, 1, 26], [2, 27, 3])  # twice, but on one side
    assert not caplog.text
