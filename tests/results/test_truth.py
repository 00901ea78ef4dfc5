"""What an evaluation takes for the truth, and what it refuses."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stas.cli import main
from stas.data.images import write_mask
from stas.errors import InputDataError, UsageError
from stas.evaluate import evaluate

SIZE = (6, 8)
SQUARE = np.zeros(SIZE, bool)
SQUARE[1:4, 2:5] = True


@pytest.fixture
def predicted(tmp_path: Path) -> Path:
    write_mask(tmp_path / "predicted" / "a.png", SQUARE)
    (tmp_path / "truth").mkdir()
    return tmp_path / "predicted"


def draw(path: Path, label: str = "STAS") -> None:
    """An annotation of the square."""
    shape = {"label": label, "shape_type": "rectangle", "points": [[2, 1], [4, 3]]}
    path.write_text(json.dumps({"shapes": [shape], "imageHeight": SIZE[0], "imageWidth": SIZE[1]}))


def score(predicted: Path, **options) -> float:
    summary = evaluate([predicted], predicted.parent / "truth", predicted.parent / "scores", sheets=0, **options)
    return summary["members"]["predicted"]["mean_dice"]


def save(path: Path, values) -> None:
    Image.fromarray(np.asarray(values).astype(np.uint8)).save(path)


def test_photographs_are_not_taken_for_masks(predicted):
    random = np.random.default_rng(0)
    truth = predicted.parent / "truth" / "a.png"
    save(truth, random.integers(0, 256, (*SIZE, 3)))
    with pytest.raises(InputDataError, match=r"a\.png: a picture in colour, not a mask"):
        score(predicted)
    with pytest.raises(InputDataError, match=r"a\.png: a picture in colour, not a mask"):
        score(predicted, threshold=127)
    save(truth, random.integers(0, 256, SIZE))
    with pytest.raises(InputDataError, match=r"a\.png: has values other than 0 and one other.*--threshold"):
        score(predicted)


def test_a_grey_truth_is_taken_with_a_threshold(predicted):
    save(predicted.parent / "truth" / "a.png", np.where(SQUARE, 200, 90))
    with pytest.raises(InputDataError, match="--threshold"):
        score(predicted)
    assert score(predicted, threshold=127) == 1


@pytest.mark.parametrize("value", [1, 76, 128, 255])
def test_a_truth_of_0_and_any_other_value_is_a_mask(predicted, value):
    save(predicted.parent / "truth" / "a.png", SQUARE * value)
    assert score(predicted) == 1
    assert score(predicted, threshold=200) == 1, "a threshold is for values that need one"


def test_a_suffix_in_capitals_is_an_annotation(predicted):
    """The picture beside it would be taken for the truth."""
    draw(predicted.parent / "truth" / "a.JSON")
    save(predicted.parent / "truth" / "a.png", np.full((*SIZE, 3), 255))
    assert score(predicted) == 1


def test_two_annotations_of_one_name_are_refused(predicted):
    draw(predicted.parent / "truth" / "a.JSON")
    draw(predicted.parent / "truth" / "a.json", "other")
    with pytest.raises(InputDataError, match=r"a\.JSON and a\.json both annotate 'a': keep one"):
        score(predicted)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_mask_beside_an_annotation_of_one_name_is_refused(predicted, mode):
    """A corrected mask beside the older annotation, or the other way round."""
    truth = predicted.parent / "truth"
    draw(truth / "a.json")
    Image.fromarray(~SQUARE * np.uint8(255)).convert(mode).save(truth / "a.png")
    with pytest.raises(InputDataError, match=r"1 annotations have a mask of the same name.*\(a\.png\).*either could"):
        score(predicted)


@pytest.mark.parametrize("label", ["STASS", "stas", "\x1b[31mred"])
def test_a_label_that_no_shape_has_is_told_with_those_that_are_there(predicted, caplog, label):
    draw(predicted.parent / "truth" / "a.json", "STAS")
    for _ in ("scored", "nothing to do"):
        caplog.clear()
        assert score(predicted, label=label) == 0
        (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert f"no shape has the label {label!r}" in told and "'STAS' (1)" in told


def test_many_labels_are_not_all_told(predicted, caplog):
    shapes = [{"label": f"{n}" * 1000, "shape_type": "point", "points": [[1, 1]]} for n in range(30)]
    (predicted.parent / "truth" / "a.json").write_text(json.dumps({"shapes": shapes}))
    score(predicted)
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "and 20 more" in told and len(told) < 2000


def test_an_annotation_without_shapes_is_no_misspelt_label(predicted, caplog):
    (predicted.parent / "truth" / "a.json").write_text('{"shapes": []}')
    score(predicted)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("threshold", ["nan", "inf", "-1", "65535"])
def test_a_threshold_that_no_mask_can_have_is_refused(predicted, threshold, capsys):
    draw(predicted.parent / "truth" / "a.json")
    arguments = [
        "--predictions",
        predicted,
        "--truth",
        predicted.parent / "truth",
        "--out",
        predicted.parent / "scores",
    ]
    assert main(["evaluate", *map(str, arguments), f"--threshold={threshold}"]) == 2
    assert "give a number from 0 to 65534" in capsys.readouterr().err


def test_fewer_than_no_pictures_are_refused(predicted):
    with pytest.raises(UsageError, match="--sheets -1"):
        evaluate([predicted], predicted, predicted.parent / "scores", sheets=-1)


@pytest.mark.parametrize("name", ["scores.csv", "summary.json", "sheets.png"])
def test_a_deleted_result_is_made_again(predicted, name, caplog):
    draw(predicted.parent / "truth" / "a.json")
    (predicted.parent / "images").mkdir()
    save(predicted.parent / "images" / "a.png", np.full((*SIZE, 3), 200))
    arguments = [predicted], predicted.parent / "truth", predicted.parent / "scores", predicted.parent / "images"
    evaluate(*arguments)
    path = predicted.parent / "scores" / name
    content = path.read_bytes()
    path.unlink()
    evaluate(*arguments)
    assert path.read_bytes() == content
