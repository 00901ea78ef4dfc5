from pathlib import Path

import pytest

from stas.cli import main
from stas.ensemble import Member, ensemble_names, load_ensemble, load_member
from stas.errors import UsageError
from stas.recipe import recipe_names


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_reference_ensemble_has_the_three_encoders_in_order():
    assert load_ensemble("reference").runs == ["efficientnet_b6_ns", "efficientnetv2_m", "eca_nfnet_l2"]
    assert load_member("reference", 2).recipe.train.batch == 24


@pytest.mark.parametrize("name", ensemble_names())
def test_packaged_ensembles_list_packaged_recipes(name: str):
    assert set(load_ensemble(name).runs) <= set(recipe_names())


def test_a_fourth_member_is_one_recipe_file_and_one_line(tmp_path: Path):
    write(tmp_path / "mine.yaml", "extends: lite0\nmodel: {encoder: resnet34}\n")
    name = write(tmp_path / "four.yaml", "members: [lite0, lite0_fpn, lite0_pan, mine.yaml]\nties: background\n")
    ensemble = load_ensemble(name, ["train.epochs=3"])
    assert ensemble.runs == ["lite0", "lite0_fpn", "lite0_pan", "mine"] and ensemble.ties == "background"
    assert ensemble.members[3].recipe.model.encoder == "resnet34"
    assert {member.recipe.train.epochs for member in ensemble.members} == {3}


def test_precedence_is_defaults_then_file_then_the_members_set_then_set(tmp_path: Path):
    write(tmp_path / "mine.yaml", "train: {batch: 2, epochs: 2, max_bad_steps: 2}\n")
    entry = "{recipe: mine.yaml, run: changed, set: {train.epochs: 3, train.max_bad_steps: 3}}"
    name = write(tmp_path / "two.yaml", f"members: [mine.yaml, {entry}]\n")
    keys = ("seed", "batch", "epochs", "max_bad_steps")

    def found(member: Member) -> list[int]:
        return [getattr(member.recipe.train, key) for key in keys]

    plain, changed = load_ensemble(name, ["train.max_bad_steps=4"]).members
    assert found(changed) == [0, 2, 3, 4], "the default, the recipe's, the member's, and that of --set"
    assert found(plain) == [0, 2, 2, 4], "a member's `set` is for itself alone"


def test_one_recipe_trains_twice_under_two_names(tmp_path: Path):
    changes = "{optimizer.lr: 2e-4, model.options: {decoder_channels: 9}}"
    text = f"members: [lite0, {{recipe: lite0, run: slow, set: {changes}}}]"
    fast, slow = load_ensemble(write(tmp_path / "two.yaml", text)).members
    assert (fast.run, slow.run) == ("lite0", "slow")
    assert slow.recipe.optimizer.lr == 2e-4 and slow.recipe.model.options == {"decoder_channels": 9}
    same = {"optimizer": fast.recipe.optimizer, "model": fast.recipe.model}
    assert slow.recipe.model_copy(update=same) == fast.recipe


def test_folds_make_a_member_of_each_recipe_for_each_fold(tmp_path: Path):
    text = "members: [lite0, {recipe: lite0, run: slow, set: {optimizer.lr: 2e-4}}]\nfolds: 3"
    ensemble = load_ensemble(write(tmp_path / "folds.yaml", text), ["data.split.seed=7"])
    assert ensemble.runs == ["lite0-fold0", "lite0-fold1", "lite0-fold2", "slow-fold0", "slow-fold1", "slow-fold2"]
    splits = [member.recipe.data.split.settings() for member in ensemble.members]
    assert splits == [{"kind": "kfold", "folds": 3, "fold": fold, "seed": 7} for fold in (0, 1, 2, 0, 1, 2)]
    assert [member.recipe.optimizer.lr for member in ensemble.members] == [1e-3] * 3 + [2e-4] * 3


def test_an_ensemble_may_be_the_folds_of_one_recipe(tmp_path: Path):
    name = write(tmp_path / "folds.yaml", "members: [lite0]\nfolds: 2")
    assert load_ensemble(name).runs == ["lite0-fold0", "lite0-fold1"]
    assert load_member(name, 1).recipe.data.split.fold == 1


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (
            "members: [lite0, efficientnetv2_m]",
            [],
            "cannot be scored together: lite0 has kind 'fraction', fraction 0.2, seed 0; "
            "efficientnetv2_m has kind 'first', count 237: give them all the same data.split, or write `folds: 5`",
        ),
        (
            "members: [lite0, lite0_fpn, {recipe: lite0, run: other, set: {data.split.seed: 1}}]",
            [],
            "seed 0; other has kind 'fraction', fraction 0.2, seed 1: give",
        ),
        (
            "members: [lite0, {recipe: lite0_fpn, set: {data.label: vessel}}]",
            [],
            "cannot vote together: lite0 'STAS', lite0_fpn 'vessel': give them all the same data.label",
        ),
        (
            "members: [lite0, {recipe: lite0_fpn, set: {data.split.seed: 1}}]\nfolds: 2",
            [],
            "but lite0_fpn-fold0 has kind 'kfold', folds 2, fold 0, seed 1; lite0_fpn-fold1",
        ),
        ("members: [lite0]\nfolds: 2", ["data.split.fold=1"], "but lite0-fold0 has kind 'kfold', folds 2, fold 1"),
        ("members: [lite0]\nfolds: 2", ["data.split.kind=first"], "but lite0-fold0 has kind 'first', count 237"),
    ],
)
def test_members_that_cannot_be_scored_together_are_refused_by_name(
    tmp_path: Path, text: str, overrides: list[str], said: str
):
    with pytest.raises(UsageError) as error:
        load_ensemble(write(tmp_path / "list.yaml", text), overrides)
    assert said in str(error.value)


def test_keys_that_a_split_does_not_read_may_differ(tmp_path: Path):
    text = "members: [lite0, {recipe: lite0_fpn, set: {data.split.count: 9}}]"
    assert load_ensemble(write(tmp_path / "two.yaml", text)).runs == ["lite0", "lite0_fpn"]


def test_a_wrong_key_of_a_member_names_it_and_the_valid_ones(tmp_path: Path):
    text = "members: [lite0, {recipe: lite0, run: slow, set: {optimizer.rate: 1}}]"
    with pytest.raises(UsageError) as error:
        load_ensemble(write(tmp_path / "two.yaml", text))
    assert "two.yaml: member 'slow': " in str(error.value)
    assert "optimizer.rate: unknown key; valid here: name, lr, weight_decay" in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("members: [lite0]", "at least two"),
        ("members: [lite0]", "an ensemble has 2 to 100 members, this one 1"),
        (f"members: {['lite0'] * 60}\nfolds: 2", "an ensemble has 2 to 100 members, this one 120"),
        ("members: [lite0]\nfolds: 1", "folds = 1: "),
        ("members: [lite0, {recpe: lite0}]", r"members\.1\.recpe: unknown key; valid here: recipe, run, set"),
        ("members: [lite0, 5]", r"members\.1 = 5: .*\n.*a recipe's name, or \{recipe: NAME"),
        ("members: [lite0, {run: mine}]", r"members\.1\.recipe: Field required"),
        (
            "members: [lite0, {recipe: lite0_fpn, set: {optimizer: {lr: 1}}}]",
            r"optimizer is a section: write dotted keys as in --set, such as optimizer\.lr: 2\.0e-4",
        ),
        ("members: [lite0, {recipe: lite0_fpn, set: {data.split: {seed: 1}}}]", "data.split is a section"),
        ("members: [lite0, {recipe: lite0_fpn, set: {train.batch.size: 1}}]", "'batch' is a value, not a section"),
        ("members: [lite0, {recipe: lite0_fpn, run: lite0}]", "two members are called lite0: give each its own `run`"),
        ("member: [lite0, lite0_fpn]", "member: unknown key; valid here: members, ties, folds"),
        ("members: [lite0, lite0]", "two members are called lite0"),
        ("members: [lite0, {recipe: lite0_fpn, run: ../mine}]", "run '../mine' cannot be a directory name"),
        ("members: [{recipe: lite0, run: " + 95 * "a" + "}]\nfolds: 3", "a-fold0' cannot be a directory name"),
        ("members: [lite0, {recipe: lite0_fpn, run: vote}, lite0_pan]", "a member is called vote"),
        ("members: [lite0, nothing]", "no recipe"),
        ("members: [", "not readable as YAML"),
        ("members: [../mine.yaml, lite0]", "outside the ensemble's directory"),
        ("members: [/mine.yaml, lite0]", "outside the ensemble's directory"),
        ("members: [lite0, lite0_fpn]\nties: maybe", "'foreground' or 'background'"),
    ],
)
def test_a_file_that_is_not_an_ensemble_is_refused(tmp_path: Path, text: str, said: str):
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


def test_folds_have_no_common_held_out_images_to_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = write(tmp_path / "folds.yaml", "members: [lite0]\nfolds: 3")
    shared = ["--ensemble", name, "--held-out", "--workspace", str(tmp_path / "ws")]
    for command in (["vote", *shared], ["evaluate", *shared, "--truth", str(tmp_path), "--out", str(tmp_path / "out")]):
        assert main(command) == 2
        assert "holds out a different one of 3 folds" in capsys.readouterr().err
    assert main(["vote", "--ensemble", name, "--workspace", str(tmp_path / "ws")]) == 3, "new images: masks are missing"
    assert "3 of 3 members are missing" in capsys.readouterr().err


def test_train_and_infer_use_the_members_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = write(tmp_path / "two.yaml", "members: [lite0, {recipe: lite0, run: slow, set: {optimizer.lr: 2e-4}}]")
    member = ["--ensemble", name, "--member", "1", "--workspace", str(tmp_path)]
    called = []
    monkeypatch.setattr("stas.train.train", lambda recipe, _, run, *__: called.append((recipe.optimizer.lr, run)))
    monkeypatch.setattr("stas.infer.infer", lambda run, *_, **options: called.append((run, options["name"])))
    assert main(["train", *member]) == main(["train", *member, "--run", "mine"]) == 0
    assert main(["infer", *member, "--images", "i", "--held-out"]) == 0
    assert called == [(2e-4, "slow"), (2e-4, "mine"), ("slow", "slow-held-out")]


def test_members_are_counted_for_scripts(capsys: pytest.CaptureFixture[str]):
    assert main(["members", "small"]) == 0
    assert capsys.readouterr().out == "0 1 2\n"
