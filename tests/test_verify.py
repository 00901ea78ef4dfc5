"""`stas verify`: everything that is made is found whole, and every damage to it is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from stas.cli import main
from stas.config import Recipe
from stas.evaluate import evaluate
from stas.infer import infer
from stas.paths import Workspace, store_data
from stas.train import train
from stas.vote import vote


@pytest.fixture(scope="module")
def finished(sample: Path, tiny: Recipe, new_workspace: Callable[[], Workspace]) -> Workspace:
    """A workspace after all stages."""
    workspace = new_workspace()
    train(tiny, workspace, "member")
    images = sample / "Train_Images"
    sets = [infer("member", images, workspace, name=name, threshold=0.4) for name in ("member", "other", "third")]
    vote(sets, workspace.predictions("vote"))
    evaluate([sets[0]], sample / "Train_Annotations", workspace.root / "evaluation", sheets=1, images=images)
    return workspace


@pytest.fixture
def whole(finished: Workspace, tmp_path: Path) -> Workspace:
    """This test's own copy."""
    shutil.copytree(finished.root, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


def damaged(workspace: Workspace, *paths: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed about damage."""
    assert main(["verify", *map(str, paths), "--workspace", str(workspace.root)]) == 3
    printed = capsys.readouterr()
    assert "outputs are damaged: the lines above say what to do" in printed.err
    return "\n".join(line for line in printed.out.splitlines() if not line.startswith("ok"))


def test_all_that_the_stages_make_is_whole(whole: Workspace, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in whole.root.rglob("*")}
    assert main(["verify", "--workspace", str(whole.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    said = "\n".join(lines)
    for what in ("store, 10 samples", "run, 2 epochs", "prediction set, 10 files", "vote, 10 files", "evaluation, "):
        assert what in said
    assert "readable checkpoints: best, last, previous" in said
    assert {path: path.stat().st_mtime_ns for path in whole.root.rglob("*")} == before
    (store,) = [path for path in whole.stores.iterdir() if path.is_dir()]
    for path in (store, whole.run("member").root, whole.predictions("vote"), whole.stores):
        assert main(["verify", str(path)]) == 0


def test_a_bit_flipped_in_any_file_is_found(whole: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In every file but those that are made from others and never read again."""
    random = Random(0)
    unread = {"curves.png", *(path.name for path in whole.run("member").tensorboard.rglob("*"))}
    files = [path for path in whole.root.rglob("*") if path.is_file() and path.name not in unread]
    assert len(files) > 40
    for path in files:
        content = bytearray(path.read_bytes())
        place = random.randrange(len(content) - 1)
        if path.name in ("recipe.yaml", "metrics.jsonl", "split.json"):  # no checksum of their own
            place = 0
        content[place] ^= 0x80
        path.rename(tmp_path / "kept")  # perhaps a link to data that other tests read
        path.write_bytes(content)
        said = damaged(whole, capsys=capsys)
        assert path.name in said and said.count("damaged ") == 1 + said.count("samples are damaged"), said
        (tmp_path / "kept").replace(path)
    assert main(["verify", str(whole.root)]) == 0


def test_a_damaged_store_names_its_samples(whole: Workspace, capsys: pytest.CaptureFixture[str]):
    (store,) = [path for path in whole.stores.iterdir() if path.is_dir()]
    data = bytearray(store_data(store).read_bytes())
    data[len(data) // 2] ^= 1
    store_data(store).unlink()  # a link to the data of other tests
    store_data(store).write_bytes(data)
    said = damaged(whole, store, capsys=capsys)
    assert "data.mdb: damaged: move it away and run the stage" in said
    assert "data.mdb: 1 samples are damaged (" in said


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda run: run.checkpoint("best").unlink(), "best.safetensors: missing, though epoch"),
        (lambda run: shutil.rmtree(run.checkpoint("last").parent), "missing, and so are the others"),
        (lambda run: run.metrics.write_text("{\n" + run.metrics.read_text()), "line 1 is not a record"),
        (lambda run: run.metrics.write_text(""), r"lacks 1 epochs (1)"),
        (lambda run: run.recipe.unlink(), "the checkpoint has the recipe: restore the file"),
        (lambda run: run.recipe.write_text(run.recipe.read_text().replace("0.01", "0.02")), "not the recipe in the ch"),
        (lambda run: run.split.write_text(json.dumps({"store": "x"})), "not the store and the held-out images in"),
    ],
)
def test_what_is_wrong_with_a_run_is_named(
    whole: Workspace, change: Callable[..., object], problem: str, capsys: pytest.CaptureFixture[str]
):
    change(whole.run("member"))
    assert problem in damaged(whole, whole.run("member").root, capsys=capsys)


def test_a_missing_an_added_and_a_changed_file_of_a_set_are_named(whole: Workspace, capsys: pytest.CaptureFixture[str]):
    place = whole.predictions("vote")
    first, second, *_ = sorted(place.glob("*.png"))
    first.unlink()
    second.write_bytes(second.read_bytes()[::-1])
    (place / "mine.png").write_bytes(b"mine")
    said = damaged(whole, capsys=capsys)
    for problem in (f"{first.name}: missing", f"{second.name}: damaged", "mine.png: added since it was made"):
        assert problem in said


def test_a_directory_that_lost_its_manifest_is_not_passed_over(whole: Workspace, capsys: pytest.CaptureFixture[str]):
    (whole.predictions("vote") / "manifest.json").unlink()
    (store,) = [path for path in whole.stores.iterdir() if path.is_dir()]
    store.rename(store.with_name("elsewhere"))
    said = damaged(whole, capsys=capsys)
    assert f"damaged {whole.predictions('vote')}: not readable" in said
    assert "the store that it names is not there" in said


@pytest.mark.parametrize(("name", "said"), [(b"\xff.png", r"\udcff.png"), (b"\x1b[2J\nok", r"\x1b[2J\nok")])
def test_names_cannot_act_on_the_terminal(whole: Workspace, name: bytes, said: str, capsys: pytest.CaptureFixture[str]):
    (whole.predictions("vote") / os.fsdecode(name)).touch()
    assert f"{said}: added since it was made" in damaged(whole, whole.predictions("vote"), capsys=capsys)


def test_a_store_that_is_gone_is_no_damage_to_its_run(whole: Workspace, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(whole.stores)
    assert main(["verify", str(whole.root / "runs")]) == 0
    assert "is no longer there, so it cannot be resumed" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_a_place_without_outputs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    assert main(["verify", str(tmp_path / place)]) == 2
    assert "give a workspace, or a directory that stas made" in capsys.readouterr().err
