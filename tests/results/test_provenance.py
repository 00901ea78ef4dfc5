"""A vote and an evaluation take only the masks that their members' manifests speak for."""

import hashlib
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stas.cli import main
from stas.data.images import write_mask
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.evaluate import evaluate
from stas.models.checksum import written_checksum
from stas.paths import Workspace, manifest_file
from stas.results import provenance
from stas.results.predictions import list_members, write_set_manifest
from stas.system.files import read_json
from stas.system.publish import Output, building
from stas.vote import vote
from tests.support.manifests import change_manifest

RUNS = ("one", "two", "three")


def save_checkpoint(workspace: Workspace, run: str, content: bytes, which: str = "best") -> None:
    path = workspace.run(run).checkpoint(which)
    path.parent.mkdir(parents=True, exist_ok=True)
    content *= 20
    path.write_bytes(content + hashlib.sha256(content).digest())


def predict(
    workspace: Workspace, run: str, pattern: tuple[int, ...] = (1, 0), images: str = "images", which: str = "best"
) -> Path:
    """A prediction set of two one-row masks, made with the run's present checkpoint."""
    made: dict = {"run": run, "which": which, "pattern": pattern, "images": {stem: f"{images} {stem}" for stem in "ab"}}
    made["checksum"] = written_checksum(workspace.run(run).checkpoint(which))
    output = Output(workspace.predictions(run), "prediction set", made)
    with building(output) as partial:
        assert partial
        for stem in "ab":
            write_mask(partial / f"{stem}.png", np.array([pattern], bool))
        write_set_manifest(partial, output, "STAS", {stem: (1, len(pattern)) for stem in "ab"}, False)
    return output.directory


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Three runs and their prediction sets, and an ensemble of them."""
    workspace = Workspace(tmp_path / "workspace")
    for run in RUNS:
        save_checkpoint(workspace, run, run.encode())
        predict(workspace, run)
    members = [{"recipe": "lite0", "run": run} for run in RUNS]
    (tmp_path / "ensemble.yaml").write_text(yaml.safe_dump({"members": members}))
    return workspace


@pytest.fixture
def ensemble(workspace: Workspace) -> list[str]:
    """The command that votes by the ensemble."""
    file = workspace.root.parent / "ensemble.yaml"
    return ["vote", "--ensemble", str(file), "--workspace", str(workspace.root)]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 3) -> str:
    """What a command says that must not end well."""
    capsys.readouterr()
    assert main(arguments) == code
    return capsys.readouterr().err


def test_an_ensemble_votes_on_the_masks_of_its_present_checkpoints(workspace, ensemble):
    assert main(ensemble) == 0
    recorded = read_json(workspace.predictions("vote") / "manifest.json")["key"]
    assert [member["run"] for member in recorded["members"]] == list(RUNS)
    assert recorded["members"][0]["checksum"] == hashlib.sha256(b"one" * 20).hexdigest()
    assert recorded["images"] == {"a": "images a", "b": "images b"}


def test_masks_of_an_older_checkpoint_are_not_voted_on(workspace, ensemble, capsys):
    """The member was trained on or anew, and its inference failed or has not run yet."""
    save_checkpoint(workspace, "two", b"improved")
    said = refused(ensemble, capsys)
    assert "1 of 3 members" in said and "two: predicted with another checkpoint than the present" in said
    assert "Run `stas infer` again" in said and "--members" in said
    assert not workspace.predictions("vote").exists()
    by_name = ["vote", *RUNS, "--workspace", str(workspace.root)]
    assert "two: predicted with another checkpoint" in refused(by_name, capsys)
    predict(workspace, "two")
    assert main(ensemble) == 0


def test_the_last_checkpoint_is_compared_with_the_last(workspace, ensemble, capsys):
    for run in RUNS:
        save_checkpoint(workspace, run, b"last of " + run.encode(), which="last")
        predict(workspace, run, which="last")
    assert main(ensemble) == 0
    save_checkpoint(workspace, "three", b"another epoch", which="last")
    assert "three: predicted with another checkpoint" in refused(ensemble, capsys)


def test_a_run_that_is_gone_proves_nothing(workspace, ensemble, capsys):
    shutil.rmtree(workspace.run("one").root)
    said = refused(ensemble, capsys)
    assert "one: " in said and "best.safetensors is not there to compare them with" in said
    sets = [str(workspace.predictions(run)) for run in RUNS]
    assert main(["vote", "--members", *sets, "--out", str(workspace.root / "knowingly")]) == 0


def test_masks_of_another_run_are_no_member_of_the_ensemble(workspace, ensemble, capsys):
    shutil.rmtree(workspace.predictions("two"))
    shutil.copytree(workspace.predictions("one"), workspace.predictions("two"))
    assert "holds masks of run one, not of two" in refused(ensemble, capsys)


def test_masks_without_a_manifest_are_no_member_of_an_ensemble_but_vote_by_name(workspace, ensemble, capsys):
    (workspace.predictions("two") / "manifest.json").unlink()
    assert "two: no manifest in" in refused(ensemble, capsys)
    assert main(["vote", *RUNS, "--workspace", str(workspace.root)]) == 0


def test_a_set_that_does_not_record_its_checkpoint_is_made_again(workspace, ensemble, capsys):
    change_manifest(workspace.predictions("two"), lambda content: content["key"].pop("which"))
    assert "is not a set of masks of run two" in refused(ensemble, capsys)


def test_a_checkpoint_that_is_cut_off_is_another(workspace, ensemble, capsys):
    path = workspace.run("one").checkpoint("best")
    path.write_bytes(path.read_bytes()[:-5])
    assert "one: predicted with another checkpoint" in refused(ensemble, capsys)
    path.write_bytes(b"")
    assert "too small for a checkpoint" in refused(ensemble, capsys)


def test_members_of_different_images_of_the_same_names_are_refused(workspace, ensemble, capsys):
    predict(workspace, "three", images="others")
    said = refused(ensemble, capsys)
    assert "different images of the same names" in said
    assert "three, compared with one: 2 of 2 (a, b)" in said
    sets = [workspace.predictions(run) for run in RUNS]
    with pytest.raises(InputDataError, match="different images of the same names"):
        vote(sets, workspace.root / "voted")
    with pytest.raises(InputDataError, match="different images of the same names"):
        evaluate(sets, sets[0], workspace.root / "scores")


def test_a_vote_is_of_the_images_of_its_members(workspace, ensemble):
    """Masks that are equal by chance do not make two images one."""
    assert main(ensemble) == 0
    for run in RUNS:
        predict(workspace, run, images="others")
    out = workspace.predictions("vote")
    assert main(ensemble) == 0
    assert read_json(out / "manifest.json")["key"]["images"] == {"a": "others a", "b": "others b"}


def correct(directory: Path) -> Path:
    """Change a mask by hand, but not the size of its file."""
    path = directory / "a.png"
    before = path.stat().st_size
    values = np.asarray(Image.open(path))
    for level in range(10):
        Image.fromarray(255 - values).save(path, compress_level=level)
        if path.stat().st_size == before:
            return path
    write_mask(path, values == 0)
    assert path.stat().st_size == before
    return path


def test_a_corrected_mask_is_not_voted_on_as_the_members_own(workspace, ensemble, capsys):
    directory = workspace.predictions("two")
    correct(directory)
    said = refused(ensemble, capsys)
    assert f"{directory}: 1 of 2 files are not as stas wrote them" in said and "(a.png)" in said
    assert "copy the PNG files without manifest.json" in said
    own = workspace.root / "corrected"
    own.mkdir()
    for path in directory.glob("*.png"):
        shutil.copy(path, own)
    members = [str(path) for path in (workspace.predictions("one"), own, workspace.predictions("three"))]
    assert main(["vote", "--members", *members, "--out", str(workspace.root / "voted")]) == 0


def test_a_corrected_mask_is_not_scored_as_the_members_own(workspace):
    correct(workspace.predictions("one"))
    with pytest.raises(InputDataError, match=r"not as stas wrote them.*a\.png"):
        evaluate([workspace.predictions("one")], workspace.predictions("two"), workspace.root / "scores")


def test_a_mask_that_was_added_is_not_voted_on(workspace, ensemble, capsys):
    for run in RUNS:
        write_mask(workspace.predictions(run) / "c.png", np.ones((1, 2), bool))
    assert "(c.png)" in refused(ensemble, capsys)


def test_a_corrected_vote_is_never_replaced(workspace, ensemble, capsys):
    assert main(ensemble) == 0
    path = correct(workspace.predictions("vote"))
    corrected = path.read_bytes()
    for run in RUNS:
        predict(workspace, run, (1, 1))
    said = refused(ensemble, capsys, code=2)
    assert "were added or changed since it was made (a.png)" in said and "move it away" in said
    assert path.read_bytes() == corrected


def test_a_correction_during_the_work_is_never_replaced(workspace):
    """A prediction takes hours: the mask may be corrected after its check at the start."""
    out = workspace.predictions("one")
    output = Output(out, "prediction set", {"run": "one", "images": {}})
    before = (out / "a.png").read_bytes()
    with pytest.raises(UsageError, match=r"added or changed since it was made \(a\.png\)"), building(output) as partial:
        assert partial
        write_mask(partial / "a.png", np.ones((1, 2), bool))
        correct(out)
        write_set_manifest(partial, output, "STAS", {"a": (1, 2)}, False)
    assert (out / "a.png").read_bytes() != before
    assert np.asarray(Image.open(out / "a.png")).tolist() == [[0, 255]]


def test_a_set_that_is_replaced_while_it_is_read_is_not_called_damaged(workspace):
    (member,) = list_members([workspace.predictions("one")]).members
    save_checkpoint(workspace, "one", b"newer")
    predict(workspace, "one", (1, 1))
    with pytest.raises(StoppedEarly, match="was replaced while it was read"):
        provenance.check_unchanged(member, {"a.png": "0"})


def test_a_mask_that_changes_while_the_vote_reads_it_stops_the_vote(tmp_path, monkeypatch):
    """The vote reads each mask twice: for the key, and for the vote."""
    sets = [tmp_path / name for name in RUNS]
    for directory in sets:
        write_mask(directory / "a.png", np.array([[True, False]]))
    hashed = itertools.count()

    def edited(*arguments):
        if next(hashed) == 2:  # all members have been hashed
            write_mask(sets[0] / "a.png", np.array([[False, True]]))
        return original(*arguments)

    original = provenance.check_unchanged
    monkeypatch.setattr("stas.vote.check_unchanged", edited)
    with pytest.raises(StoppedEarly, match=r"one/a\.png was changed while it was read: run the same command again"):
        vote(sets, tmp_path / "vote")
    assert not (tmp_path / "vote").exists()


@pytest.mark.parametrize("what", ["prediction", "truth"])
def test_a_file_that_changes_while_it_is_scored_stops_the_evaluation(tmp_path, monkeypatch, what):
    for name in ("prediction", "truth"):
        write_mask(tmp_path / name / "a.png", np.array([[True, False]]))

    def edited(*arguments, **options):
        write_mask(tmp_path / what / "a.png", np.array([[False, True]]))
        return building(*arguments, **options)

    monkeypatch.setattr("stas.evaluate.building", edited)
    with pytest.raises(StoppedEarly, match=rf"{what}/a\.png was changed while it was read"):
        evaluate([tmp_path / "prediction"], tmp_path / "truth", tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_stale_masks_of_an_ensemble_are_not_scored(workspace, ensemble, capsys):
    assert main(ensemble) == 0
    truth = workspace.root / "truth"
    shutil.copytree(workspace.predictions("one"), truth)
    scores = [
        "evaluate",
        *ensemble[1:],
        "--truth",
        str(truth),
        "--out",
        str(workspace.root / "scores"),
        "--sheets",
        "0",
    ]
    assert main(scores) == 0
    save_checkpoint(workspace, "two", b"improved")
    assert "two: predicted with another checkpoint than the present" in refused(scores, capsys)


def test_an_older_vote_is_not_scored_beside_newer_members(workspace, ensemble, capsys):
    assert main(ensemble) == 0
    sets = [workspace.predictions(name) for name in (*RUNS, "vote")]
    evaluate(sets, sets[0], workspace.root / "scores", sheets=0)
    save_checkpoint(workspace, "two", b"improved")
    predict(workspace, "two")
    with pytest.raises(InputDataError, match="a vote on other masks than the present ones of two: run `stas vote`"):
        evaluate(sets, sets[0], workspace.root / "scores", sheets=0)
    assert main(ensemble) == 0
    evaluate(sets, sets[0], workspace.root / "scores", sheets=0)


@pytest.mark.parametrize(
    "change",
    [
        {"key": None},
        {"key": {"run": "../../elsewhere"}},
        {"key": {"run": "one", "which": "../best"}},
        {"key": {"run": 1}},
        {"key": {"images": ["a"]}},
        {"key": {"images": {"a": 1}}},
        {"key": {"members": [1]}},
        {"sha256": {"a.png": 0}},
    ],
)
def test_a_manifest_that_is_not_one_is_refused(workspace, ensemble, capsys, change):
    directory = workspace.predictions("two")
    change_manifest(directory, lambda content: content.update(change))
    assert "not the manifest of a prediction set" in refused(ensemble, capsys)
    manifest_file(directory).write_text("{")
    assert "not readable as JSON" in refused(ensemble, capsys)


def test_a_linked_set_is_read_but_never_replaced(workspace, ensemble, capsys):
    """The user keeps the set on another volume."""
    there = workspace.predictions("vote")
    assert main(ensemble) == 0
    there.rename(workspace.root / "elsewhere")
    there.symlink_to(workspace.root / "elsewhere")
    evaluate([there], workspace.predictions("one"), workspace.root / "scores", sheets=0)
    assert "not a directory made by stas" in refused(ensemble, capsys, code=2)
    assert there.is_symlink()
    for target in ("nowhere", there):  # the latter is a loop
        there.unlink()
        there.symlink_to(target)
        assert "not a directory made by stas" in refused(ensemble, capsys, code=2)
    shutil.rmtree(workspace.predictions("one"))
    for target in ("nowhere", workspace.predictions("one")):
        workspace.predictions("one").symlink_to(target)
        assert "1 of 3 members are missing" in refused([*ensemble, "--name", "other"], capsys)
        workspace.predictions("one").unlink()
