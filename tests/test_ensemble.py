from pathlib import Path

import pytest

from stas.cli import main
from stas.config import recipe_names
from stas.ensemble import ensemble_names, load_ensemble, load_member
from stas.errors import UsageError


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_reference_ensemble_has_the_three_encoders_in_order():
    assert load_ensemble("reference").runs == ["efficientnet_b6_ns", "efficientnetv2_m", "eca_nfnet_l2"]
    assert load_member("reference", 2).train.batch == 24


@pytest.mark.parametrize("name", ensemble_names())
def test_packaged_ensembles_list_packaged_recipes(name: str):
    assert set(load_ensemble(name).runs) <= set(recipe_names())


def test_a_fourth_member_is_one_recipe_file_and_one_line(tmp_path: Path):
    write(tmp_path / "mine.yaml", "model: {encoder: resnet34}\n")
    name = write(tmp_path / "four.yaml", "members: [lite0, lite0_fpn, lite0_pan, mine.yaml]\nties: background\n")
    ensemble = load_ensemble(name, ["train.epochs=3"])
    assert ensemble.runs == ["lite0", "lite0_fpn", "lite0_pan", "mine"] and ensemble.ties == "background"
    assert ensemble.recipes[3].model.encoder == "resnet34"
    assert {recipe.train.epochs for recipe in ensemble.recipes} == {3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("members: [lite0]", "at least two"),
        ("member: [lite0, lite0_fpn]", "member: unknown key; valid here: members, ties"),
        ("members: [lite0, lite0]", "two members are called lite0"),
        ("members: [lite0, nothing]", "no recipe"),
        ("members: [", "not readable as YAML"),
        ("members: [../mine.yaml, lite0]", "outside of the ensemble's directory"),
        ("members: [/mine.yaml, lite0]", "outside of the ensemble's directory"),
        ("members: [lite0, lite0_fpn]\nties: maybe", "'foreground' or 'background'"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(UsageError, match=said):
        load_ensemble(write(tmp_path / "list.yaml", text))


def test_names_and_numbers_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match="one of reference, small"):
        load_ensemble("large")
    with pytest.raises(UsageError, match="numbered 0 to 2; there is no member 3"):
        load_member("small", 3)


def test_an_ensemble_without_a_member_number_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--ensemble", "small", "--workspace", str(tmp_path)]) == 2
    assert "--member INDEX" in capsys.readouterr().err


def test_the_vote_of_an_ensemble_says_who_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "predictions" / "lite0").mkdir(parents=True)
    assert main(["vote", "--ensemble", "small", "--workspace", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert "2 of 3 members are missing" in said
    assert "lite0_fpn: no" in said and "lite0_pan: no" in said and "lite0: no" not in said
