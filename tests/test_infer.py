import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stas import infer as infer_module
from stas.cli import main
from stas.config import Recipe
from stas.data.images import read_image, write_mask
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.evaluate import evaluate
from stas.infer import infer
from stas.models.checkpoint import load_checkpoint
from stas.models.checksum import written_checksum
from stas.paths import Workspace
from stas.preprocess import preprocess
from stas.train import train
from stas.training.metrics_log import read_metrics
from tests.support.launch import stas
from tests.support.runs import changed


@pytest.fixture(scope="module")
def with_member(new_workspace: Callable[[], Workspace], tiny: Recipe) -> Workspace:
    workspace = new_workspace()
    train(tiny, workspace, "member")
    return workspace


@pytest.fixture
def trained(with_member: Workspace, store_workspace: Workspace) -> str:
    """A trained run in this test's own workspace."""
    shutil.copytree(with_member.run("member").root, store_workspace.run("member").root)
    return "member"


def masks(directory):
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(directory.glob("*.png"))}


def test_one_mask_per_image_at_its_own_size(store_workspace, trained, sample):
    out = infer(trained, sample / "Train_Images", store_workspace, probabilities=True)
    images = {path.stem: read_image(path) for path in (sample / "Train_Images").iterdir()}
    found = masks(out)
    assert found.keys() == images.keys()
    assert len({mask.shape for mask in found.values()}) > 1  # the sample's images differ in size
    for stem, mask in found.items():
        assert Image.open(out / f"{stem}.png").mode == "L"
        assert mask.shape == images[stem].shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        probability = np.asarray(Image.open(out / "probabilities" / f"{stem}.png"))
        assert probability.dtype == np.uint16
        assert np.array_equal(probability > 32767, mask == 255)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["key"]["run"] == trained and len(manifest["key"]["checkpoint"]) == 64
    assert manifest["images"].keys() == images.keys()


def test_the_same_again_does_nothing_and_other_settings_do(store_workspace, trained, sample, caplog):
    out = infer(trained, sample / "Train_Images", store_workspace, name="again")
    before = (out / "manifest.json").stat().st_mtime_ns
    foreground = sum(mask.sum() for mask in masks(out).values())
    with caplog.at_level("INFO", "stas"):
        infer(trained, sample / "Train_Images", store_workspace, name="again")
    assert "nothing to do" in caplog.text and (out / "manifest.json").stat().st_mtime_ns == before
    infer(trained, sample / "Train_Images", store_workspace, name="again", threshold=0.01)
    assert sum(mask.sum() for mask in masks(out).values()) > foreground


def cut_off(run, images, workspace, name, monkeypatch) -> Path:
    """The partial directory of an inference that was killed just before it could publish."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(infer_module, "write_set_manifest", killed)
        infer(run, images, workspace, name=name)
    (partial,) = workspace.predictions(name).parent.glob(f".{name}.*.partial")
    assert len(masks(partial)) == 10
    return partial


def killed(*_):
    raise KeyboardInterrupt


def test_a_cut_off_run_makes_only_what_is_missing(store_workspace, trained, sample, monkeypatch):
    partial = cut_off(trained, sample / "Train_Images", store_workspace, "cut", monkeypatch)
    first, second = sorted(partial.glob("*.png"))[:2]
    first.unlink()
    kept = second.stat()
    out = infer(trained, sample / "Train_Images", store_workspace, name="cut")
    assert masks(out).keys() == {path.stem for path in (sample / "Train_Images").iterdir()}
    after = (out / second.name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns), "an existing mask was made again"
    assert not list(out.parent.glob(".cut.*"))


def test_a_damaged_image_stops_the_run_and_publishes_nothing(store_workspace, trained, sample, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(sample / "Train_Images", images)
    last = sorted(images.iterdir())[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:500])
    with pytest.raises(InputDataError, match=last.name):
        infer(trained, images, store_workspace, name="damaged")
    assert not store_workspace.predictions("damaged").exists()
    last.write_bytes(whole)
    out = infer(trained, images, store_workspace, name="damaged")
    assert masks(out).keys() == {path.stem for path in images.iterdir()}
    assert not list(out.parent.glob(".damaged.*"))


def test_a_mask_does_not_depend_on_which_images_are_predicted_beside_it(store_workspace, trained, sample, tmp_path):
    together = infer(trained, sample / "Train_Images", store_workspace, name="together", probabilities=True)
    for path in sorted((sample / "Train_Images").iterdir())[:3]:
        (tmp_path / path.stem).mkdir()
        (tmp_path / path.stem / path.name).write_bytes(path.read_bytes())
        alone = infer(trained, tmp_path / path.stem, store_workspace, name=f"alone-{path.stem}", probabilities=True)
        for name in (f"{path.stem}.png", f"probabilities/{path.stem}.png"):
            assert np.array_equal(np.asarray(Image.open(alone / name)), np.asarray(Image.open(together / name))), name


@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_mask_of_a_cut_off_run_is_made_again(store_workspace, trained, sample, monkeypatch, damage):
    """After a power cut a file may be empty or truncated."""
    partial = cut_off(trained, sample / "Train_Images", store_workspace, "power", monkeypatch)
    first = sorted(partial.glob("*.png"))[0]
    expected = first.read_bytes()
    first.write_bytes(damage)
    out = infer(trained, sample / "Train_Images", store_workspace, name="power")
    assert (out / first.name).read_bytes() == expected
    assert len(masks(out)) == 10


@pytest.mark.parametrize("end", [12, 20], ids=["its last chunk", "its checksum too"])
def test_a_mask_that_lacks_its_end_is_made_again(store_workspace, trained, sample, monkeypatch, end):
    """Other readers accept it, and it would be published."""
    partial = cut_off(trained, sample / "Train_Images", store_workspace, "end", monkeypatch)
    first = sorted(partial.glob("*.png"))[0]
    expected = first.read_bytes()
    first.write_bytes(expected[:-end])
    Image.open(first).load()
    out = infer(trained, sample / "Train_Images", store_workspace, name="end")
    assert (out / first.name).read_bytes() == expected


def test_a_mask_of_another_size_in_a_cut_off_run_is_made_again(store_workspace, trained, sample, monkeypatch):
    partial = cut_off(trained, sample / "Train_Images", store_workspace, "size", monkeypatch)
    first = sorted(partial.glob("*.png"))[0]
    expected = first.read_bytes()
    write_mask(first, np.ones((3, 5), bool))
    out = infer(trained, sample / "Train_Images", store_workspace, name="size")
    assert (out / first.name).read_bytes() == expected


def test_an_image_that_changes_before_it_is_read_stops_the_run(store_workspace, trained, sample, tmp_path, monkeypatch):
    """The manifest holds the image's hash, and its mask must be of that image."""
    images = tmp_path / "images"
    shutil.copytree(sample / "Train_Images", images)
    one, other = sorted(images.iterdir())[:2]

    def replaced(*arguments):
        one.write_bytes(other.read_bytes())
        return build(*arguments)

    build = infer_module._network  # built after the images were hashed, and before they are read
    monkeypatch.setattr(infer_module, "_network", replaced)
    with pytest.raises(StoppedEarly, match=f"{one.name} was changed while it was read: run the same command again"):
        infer(trained, images, store_workspace, name="moving")
    assert not store_workspace.predictions("moving").exists()


def test_a_corrected_mask_is_never_replaced(store_workspace, trained, sample):
    out = infer(trained, sample / "Train_Images", store_workspace, name="corrected")
    path = sorted(out.glob("*.png"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-13] + bytes([content[-13] ^ 1]) + content[-12:])  # of the same size
    corrected = path.read_bytes()
    with pytest.raises(UsageError, match=rf"added or changed since it was made \({path.name}\)"):
        infer(trained, sample / "Train_Images", store_workspace, name="corrected", threshold=0.4)
    assert path.read_bytes() == corrected


def test_masks_of_other_images_of_the_same_names_are_not_replaced(store_workspace, trained, sample, tmp_path):
    out = infer(trained, sample / "Train_Images", store_workspace, name="names")
    images = tmp_path / "images"
    shutil.copytree(sample / "Train_Images", images)
    one, other = sorted(images.iterdir())[:2]
    one.write_bytes(other.read_bytes())
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    with pytest.raises(UsageError, match=f"masks of 1 other images of the same names \\({one.stem}\\)"):
        infer(trained, images, store_workspace, name="names")
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == before


@pytest.mark.parametrize("threshold", ["nan", "inf", "-inf", "-1", "0", "1", "5", "1e-60", "0.99999999999"])
def test_a_threshold_that_makes_all_masks_alike_is_refused(store_workspace, trained, sample, threshold, capsys):
    command = ["infer", "--run", trained, "--images", str(sample / "Train_Images"), f"--threshold={threshold}"]
    assert main([*command, "--workspace", str(store_workspace.root), "--name", "t"]) == 2
    assert "give a probability above 0 and below 1" in capsys.readouterr().err
    assert not store_workspace.predictions("t").exists()


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_manifest_names_the_checkpoint_that_a_vote_compares(store_workspace, trained, sample, which):
    out = infer(trained, sample / "Train_Images", store_workspace, name="named", checkpoint=which)
    key = json.loads((out / "manifest.json").read_text())["key"]
    path = store_workspace.run(trained).checkpoint(which)
    assert (key["run"], key["which"]) == (trained, which)
    assert key["checksum"] == written_checksum(path) == load_checkpoint(path).checksum


def test_masks_of_another_run_are_not_replaced(store_workspace, trained, sample, tiny):
    out = infer(trained, sample / "Train_Images", store_workspace, name="mine")
    train(tiny, store_workspace, "other-member")
    before = masks(out)
    with pytest.raises(UsageError, match=f"holds masks of run {trained}"):
        infer("other-member", sample / "Train_Images", store_workspace, name="mine")
    assert all(np.array_equal(mask, before[stem]) for stem, mask in masks(out).items())


def test_masks_of_other_images_are_not_replaced(store_workspace, trained, sample, tmp_path):
    infer(trained, sample / "Train_Images", store_workspace, name="kept")
    one = next((sample / "Train_Images").iterdir())
    (tmp_path / one.name).write_bytes(one.read_bytes())
    with pytest.raises(UsageError, match="9 images that are not among these"):
        infer(trained, tmp_path, store_workspace, name="kept")
    assert len(masks(store_workspace.predictions("kept"))) == 10


def test_held_out_scores_are_those_of_training(store_workspace, trained, sample, tmp_path):
    """Validation reads the store, inference the JPEGs, evaluation the PNGs; all must agree."""
    out = infer(trained, sample / "Train_Images", store_workspace, name="held", checkpoint="last", held_out=True)
    assert len(masks(out)) == 3
    summary = evaluate([out], sample / "Train_Annotations", tmp_path / "scores", sheets=0)
    validation = read_metrics(store_workspace.run(trained).metrics)[-1]["val_dice"]
    assert summary["members"]["held"]["mean_dice"] == pytest.approx(validation, abs=2e-3)


@pytest.mark.slow
def test_two_ranks_share_the_images(store_workspace, trained, sample):
    one = infer(trained, sample / "Train_Images", store_workspace, name="alone")
    done = stas(
        *("infer", "--run", trained, "--images", sample / "Train_Images"),
        *("--workspace", store_workspace.root, "--name", "shared"),
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    shared = masks(store_workspace.predictions("shared"))
    for stem, mask in masks(one).items():
        assert np.array_equal(shared[stem], mask), stem


def test_no_run_and_no_images(store_workspace, trained, tmp_path):
    with pytest.raises(InputDataError, match="no such checkpoint"):
        infer("nobody", tmp_path, store_workspace)
    with pytest.raises(InputDataError, match="no image in it"):
        infer(trained, tmp_path, store_workspace)


@pytest.mark.parametrize("asked", ["--tta", "infer.tta"])
def test_turned_images_that_the_network_cannot_take_are_refused(sample, tmp_path, tiny, asked):
    """A UNETR takes one size: a rectangle cannot be turned. Found out before the work, also before training."""
    workspace = Workspace(tmp_path)
    options = {"hidden_size": 16, "mlp_dim": 16, "num_heads": 2, "feature_size": 2}
    recipe = changed(
        tiny,
        data={"size": [32, 64]},
        model={"architecture": "UNETR", "options": options},
        augment={"dihedral": False},
        infer={"tta": asked == "infer.tta"},
        train={"epochs": 1},
    )
    preprocess([sample / "Train_Images"], [sample / "Train_Annotations"], workspace, recipe.data, workers=1)
    message = r"UNETR takes 64 x 32 pixels .* not 32 x 64, .*square data\.size"
    if asked == "infer.tta":
        with pytest.raises(UsageError, match=message):
            train(recipe, workspace, "unetr")
        return
    train(recipe, workspace, "unetr")
    with pytest.raises(UsageError, match=message):
        infer("unetr", sample / "Train_Images", workspace, tta=True)
    infer("unetr", sample / "Train_Images", workspace, tta=False)
