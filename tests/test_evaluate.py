import csv
import json
import logging

import numpy as np
import pytest
from PIL import Image

from stas.data.images import write_mask
from stas.errors import InputDataError, UsageError
from stas.evaluate import evaluate
from stas.system.files import read_json

# Truth and predictions of four images, 8 pixels wide and 1 high; comments give the prediction's (TP, FP, FN) counts.
TRUTH = {"a": "11110000", "b": "11000000", "c": "00000000", "d": "00000000"}
GOOD = {"a": "11110000", "b": "10000000", "c": "00000000", "d": "00000000"}  # (4,0,0) (1,0,1) (0,0,0) (0,0,0)
BAD = {"a": "00001111", "b": "11110000", "c": "10000000", "d": "00000000"}  # (0,4,4) (2,2,0) (0,1,0) (0,0,0)


def masks(directory, rows):
    for stem, row in rows.items():
        write_mask(directory / f"{stem}.png", np.array([[pixel == "1" for pixel in row]]))
    return directory


@pytest.fixture
def sets(tmp_path):
    """Directories with the truth and two members."""
    return masks(tmp_path / "truth", TRUTH), masks(tmp_path / "bad", BAD), masks(tmp_path / "good", GOOD)


def labelme(path, shape=(20, 30), image=None):
    """A rectangle from (4, 5) to (13, 14), corners included: 10 x 10 pixels."""
    shapes = [{"label": "STAS", "shape_type": "rectangle", "points": [[4, 5], [13, 14]], "flags": {}}]
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "version": "5.0.1",
                "flags": {},
                "shapes": shapes,
                "imagePath": image or "none.png",
                "imageData": None,
                "imageHeight": shape[0],
                "imageWidth": shape[1],
            }
        )
    )


def square_mask(directory, stem="a", shape=(20, 30), rows=slice(5, 15)):
    mask = np.zeros(shape, bool)
    mask[rows, 4:14] = True
    write_mask(directory / f"{stem}.png", mask)
    return directory


def test_scores_of_hand_counted_images(sets, tmp_path):
    truth, bad, good = sets
    summary = evaluate([bad, good], truth, tmp_path / "out", sheets=0)
    scores = summary["members"]["good"]
    assert scores["mean_dice"] == pytest.approx((1 + 2 / 3 + 1 + 1) / 4)
    assert scores["pooled_dice"] == pytest.approx(2 * 5 / (2 * 5 + 1))
    assert scores["median_dice"] == 1
    assert (scores["worst_dice"], scores["worst_image"]) == (pytest.approx(2 / 3), "b")
    assert scores["mean_iou"] == pytest.approx((1 + 1 / 2 + 1 + 1) / 4)
    assert scores["mean_precision"] == 1
    assert scores["mean_recall"] == pytest.approx((1 + 1 / 2 + 1 + 1) / 4)
    assert scores["both_empty"] == 2
    assert scores["mean_dice_interval"][0] < scores["mean_dice"] < scores["mean_dice_interval"][1]
    bad_scores = summary["members"]["bad"]
    assert bad_scores["mean_dice"] == pytest.approx((0 + 2 / 3 + 0 + 1) / 4)
    assert bad_scores["pooled_precision"] == pytest.approx(2 / 9)
    assert bad_scores["pooled_recall"] == pytest.approx(2 / 6)
    assert bad_scores["both_empty"] == 1
    assert read_json(tmp_path / "out" / "summary.json") == json.loads(json.dumps(summary))


def test_every_image_and_member_has_a_row(sets, tmp_path):
    truth, bad, good = sets
    evaluate([bad, good], truth, tmp_path / "out", sheets=0)
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = {(row["image"], row["member"]): row for row in csv.DictReader(file)}
    assert len(rows) == 8
    row = rows["b", "bad"]
    assert [row[f"{kind}"] for kind in ("true_positives", "false_positives", "false_negatives")] == ["2", "2", "0"]
    assert [float(row[score]) for score in ("dice", "iou", "precision", "recall")] == [0.666667, 0.5, 0.5, 1]
    assert (row["height"], row["width"]) == ("1", "8")


def test_a_name_that_is_a_formula_stays_text_in_the_csv(tmp_path):
    for directory in ("truth", "=member"):
        for stem in ("=HYPERLINK(1)", "'quoted", "plain"):
            write_mask(tmp_path / directory / f"{stem}.png", np.eye(8, dtype=bool))
    evaluate([tmp_path / "=member"], tmp_path / "truth", tmp_path / "out")
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["image"] for row in rows} == {"'=HYPERLINK(1)", "''quoted", "plain"}
    assert {row["member"] for row in rows} == {"'=member"}


def test_the_table_names_its_numbers(sets, tmp_path, capsys):
    truth, bad, good = sets
    evaluate([bad, good], truth, tmp_path / "out", sheets=0)
    text = capsys.readouterr().out
    for name in ("mean per-image", "pooled", "Dice [95 % CI]", "IoU", "precision", "recall", "median", "worst"):
        assert name in text
    assert "0.917 [" in text  # mean per-image Dice
    assert "0.909 [" in text  # pooled Dice
    assert "0.667 (b)" in text
    assert "both empty: bad 1, good 2." in text


def test_labelme_truth(tmp_path):
    labelme(tmp_path / "truth" / "a.json")
    predictions = square_mask(tmp_path / "half", rows=slice(5, 10))
    summary = evaluate([predictions], tmp_path / "truth", tmp_path / "out", sheets=0)
    assert summary["members"]["half"]["mean_recall"] == pytest.approx(0.5)
    assert summary["members"]["half"]["mean_precision"] == 1


def test_labelme_truth_of_another_label_is_empty(tmp_path):
    labelme(tmp_path / "truth" / "a.json")
    summary = evaluate([square_mask(tmp_path / "one")], tmp_path / "truth", tmp_path / "out", label="gland", sheets=0)
    assert summary["members"]["one"]["mean_dice"] == 0


def test_a_png_beside_labelme_json_is_an_image_not_a_truth(tmp_path):
    labelme(tmp_path / "truth" / "a.json", image="a.png")
    Image.new("RGB", (30, 20), "white").save(tmp_path / "truth" / "a.png")
    summary = evaluate([square_mask(tmp_path / "one")], tmp_path / "truth", tmp_path / "out", sheets=0)
    assert summary["members"]["one"]["mean_dice"] == 1


def test_predictions_without_truth_are_refused_by_name(sets, tmp_path):
    truth, _, good = sets
    (truth / "b.png").unlink()
    with pytest.raises(InputDataError, match=r"no truth for 1 of 4 predictions \(b\)"):
        evaluate([good], truth, tmp_path / "out")


def test_truths_without_predictions_are_counted(sets, tmp_path, caplog):
    truth, _, good = sets
    (good / "d.png").unlink()
    with caplog.at_level(logging.INFO):
        assert evaluate([good], truth, tmp_path / "out", sheets=0)["images"] == 3
    assert "3 of 4 truths have predictions; only these are scored" in caplog.text


@pytest.mark.parametrize("kind", ["json", "png"])
def test_sizes_that_differ_are_refused_by_case(tmp_path, kind):
    if kind == "json":
        labelme(tmp_path / "truth" / "a.json", shape=(30, 20))
    else:
        square_mask(tmp_path / "truth", shape=(30, 20))
    with pytest.raises(InputDataError, match=rf"a\.{kind}.*20 x 30.*30 x 20"):
        evaluate([square_mask(tmp_path / "one")], tmp_path / "truth", tmp_path / "out")


def test_no_predictions_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no predictions"):
        evaluate([], tmp_path, tmp_path / "out")


def test_the_threshold_is_for_predictions(tmp_path):
    masks(tmp_path / "truth", {"a": "1100"})
    (tmp_path / "one").mkdir()
    Image.fromarray(np.array([[200, 100, 50, 0]], np.uint8)).save(tmp_path / "one" / "a.png")
    above_zero = evaluate([tmp_path / "one"], tmp_path / "truth", tmp_path / "out", sheets=0)
    assert above_zero["members"]["one"]["mean_precision"] == pytest.approx(2 / 3)
    cut = evaluate([tmp_path / "one"], tmp_path / "truth", tmp_path / "out", threshold=99, sheets=0)
    assert cut["members"]["one"]["mean_precision"] == 1


def test_sheets_are_of_the_last_member_and_leave_out_empty_images(sets, tmp_path):
    truth, bad, good = sets
    evaluate([good, bad], truth, tmp_path / "out", sheets=9)
    out = tmp_path / "out"
    # d is empty in the truth and in the last member; the Dice of the others is a 0, b 2/3, c 0
    assert sorted(path.name for path in (out / "sheets").iterdir()) == [
        "best_1_b.png",
        "middle_1_c.png",
        "worst_1_a.png",
    ]
    assert (out / "sheets.png").is_file()


def shows_orange(path):
    with Image.open(path) as sheet:
        return bool((np.asarray(sheet) == (250, 120, 10)).all(axis=-1).any())


def test_sheets_show_the_image_of_the_truth_or_of_images(sets, tmp_path, caplog):
    labelme(tmp_path / "labels" / "a.json", image="a.png")
    Image.new("RGB", (30, 20), (250, 120, 10)).save(tmp_path / "labels" / "a.png")
    evaluate([square_mask(tmp_path / "one")], tmp_path / "labels", tmp_path / "out")
    assert shows_orange(tmp_path / "out" / "sheets" / "worst_1_a.png")
    truth, _, good = sets
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 1), (250, 120, 10)).save(tmp_path / "images" / "b.png")
    evaluate([good], truth, tmp_path / "other", images=tmp_path / "images", sheets=1)
    assert shows_orange(tmp_path / "other" / "sheets" / "worst_1_b.png")
    assert "no image" not in caplog.text


def test_a_sheet_without_its_image_is_grey_and_made_again_with_it(tmp_path, caplog):
    labelme(tmp_path / "truth" / "a.json", image="a.png")
    arguments = [square_mask(tmp_path / "one")], tmp_path / "truth", tmp_path / "out"
    evaluate(*arguments)
    sheet = tmp_path / "out" / "sheets" / "worst_1_a.png"
    assert "a: no image for its sheet" in caplog.text
    assert not shows_orange(sheet)
    Image.new("RGB", (30, 20), (250, 120, 10)).save(tmp_path / "truth" / "a.png")
    evaluate(*arguments)
    assert shows_orange(sheet)


def test_an_image_of_another_size_is_not_drawn_under_the_masks(sets, tmp_path, caplog):
    truth, _, good = sets
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 2), (250, 120, 10)).save(tmp_path / "images" / "b.png")
    evaluate([good], truth, tmp_path / "out", images=tmp_path / "images", sheets=1)
    assert "not the size of its masks" in caplog.text
    assert not shows_orange(tmp_path / "out" / "sheets" / "worst_1_b.png")


def test_an_identical_evaluation_is_kept_and_printed_again(sets, tmp_path, caplog, capsys):
    truth, _, good = sets
    first = evaluate([good], truth, tmp_path / "out", sheets=0)
    told = capsys.readouterr().out
    before = (tmp_path / "out" / "scores.csv").stat()
    with caplog.at_level(logging.INFO):
        assert evaluate([good], truth, tmp_path / "out", sheets=0) == json.loads(json.dumps(first))
    assert "nothing to do" in caplog.text
    assert (tmp_path / "out" / "scores.csv").stat() == before
    assert capsys.readouterr().out == told
    write_mask(truth / "a.png", np.zeros((1, 8), bool))
    changed = evaluate([good], truth, tmp_path / "out", sheets=0)
    assert changed["members"]["good"]["mean_dice"] < first["members"]["good"]["mean_dice"]


def test_a_directory_that_stas_did_not_make_is_not_replaced(sets, tmp_path):
    truth, _, good = sets
    with pytest.raises(UsageError, match="will not be replaced"):
        evaluate([good], truth, truth)


def test_published_masks_against_the_real_annotations(real_data, tmp_path):
    # The annotations were traced from the ensemble's masks.
    some = [f"Public_{number:08}" for number in (0, 17, 50)]
    for name in ("eca_nfnet_l2", "ensemble"):
        (tmp_path / name).mkdir()
        for stem in some:
            (tmp_path / name / f"{stem}.png").symlink_to(real_data / "Predictions" / name / f"{stem}.png")
    members = [tmp_path / "eca_nfnet_l2", tmp_path / "ensemble"]
    summary = evaluate(members, real_data / "Train_Annotations", tmp_path / "out", real_data / "Train_Images", sheets=1)
    assert summary["members"]["ensemble"]["mean_dice"] > 0.99
    assert summary["members"]["ensemble"]["mean_dice"] > summary["members"]["eca_nfnet_l2"]["mean_dice"]
