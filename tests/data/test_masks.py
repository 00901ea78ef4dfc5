import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stas.cli import main
from stas.config import Recipe
from stas.data.images import read_grey
from stas.data.masks import is_within
from stas.data.store import Store
from stas.errors import InputDataError, UsageError
from stas.paths import Workspace
from stas.preprocess import preprocess


class Data:
    """A small data set whose images are PNG, as its masks are."""

    def __init__(self, root: Path, sample: Path, recipe: Recipe) -> None:
        self.root, self.recipe = root, recipe
        self.images, self.annotations, self.masks = root / "images", root / "annotations", root / "masks"
        self.workspace = Workspace(root / "workspace")
        shutil.copytree(sample / "Train_Annotations", self.annotations)
        self.images.mkdir()
        for path in (sample / "Train_Images").iterdir():
            shutil.copy(path, self.images / f"{path.stem}.png")  # what is in it decides, not its name

    def run(self, masks: Path, annotations: Path | None = None, recipe: Recipe | None = None) -> Store:
        data = (recipe or self.recipe).data
        return Store(
            preprocess([self.images], [annotations or self.annotations], self.workspace, data, masks=masks, workers=1)
        )

    def content(self) -> dict[str, bytes]:
        places = (self.images, self.annotations, self.masks)
        return {str(path): path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}

    def refused(self, masks: Path, annotations: Path | None = None) -> str:
        """The message of a run that must change nothing."""
        before = self.content()
        with pytest.raises(UsageError) as caught:
            self.run(masks, annotations)
        assert self.content() == before
        assert not self.workspace.stores.exists(), "the work was done before it was refused"
        return str(caught.value)


@pytest.fixture
def data(tmp_path: Path, sample: Path, tiny: Recipe) -> Data:
    return Data(tmp_path, sample, tiny)


def link(target: str) -> Callable[[Data], Path]:
    def make(data: Data) -> Path:
        (data.root / "link").symlink_to(data.root / target)
        return data.root / "link"

    return make


def emptied(data: Data) -> Path:
    """Images may all be embedded; the directory named for them is still not one for masks."""
    for path in data.images.iterdir():
        path.unlink()
    return data.images


PLACES: dict[str, Callable[[Data], Path]] = {
    "images": lambda data: data.images,
    "annotations": lambda data: data.annotations,
    "inside the images": lambda data: data.images / "masks",
    "deep inside the annotations": lambda data: data.annotations / "a" / "b" / "masks",
    "above both": lambda data: data.root,
    "by dots": lambda data: data.annotations / ".." / "images",
    "by dots at the end": lambda data: data.images / "sub" / "..",
    "by a link": link("images"),
    "inside by a link": lambda data: link("images")(data) / "masks",
    "no images in it": emptied,
    "among the stores": lambda data: data.workspace.stores / "masks",
    "the stores": lambda data: data.workspace.stores,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_masks_go_to_a_directory_of_their_own(data: Data, place: Callable[[Data], Path]):
    assert "name a directory of its own" in data.refused(place(data))


def test_the_command_leaves_the_images_alone(data: Data, capsys: pytest.CaptureFixture[str]):
    before = data.content()
    command = ["preprocess", "--images", str(data.images), "--annotations", str(data.annotations), "--workers", "1"]
    assert main([*command, "--workspace", str(data.workspace.root), "--masks", str(data.images)]) == 2
    assert f"--masks {data.images}: is, contains or lies inside {data.images}" in capsys.readouterr().err
    assert data.content() == before


def test_mask_annotations_are_not_replaced(data: Data):
    data.run(data.masks)
    shutil.rmtree(data.workspace.root)
    assert "name a directory of its own" in data.refused(data.masks, annotations=data.masks)


def test_inputs_are_not_read_from_where_stores_are_written(data: Data):
    data.workspace.root.mkdir()
    data.annotations.rename(data.workspace.stores)
    with pytest.raises(UsageError, match="is where stores are written: use another --workspace"):
        data.run(data.masks, annotations=data.workspace.stores)


def a_file(data: Data) -> None:
    data.masks.write_text("mine")


def masks_of_somebody(data: Data) -> None:
    data.masks.mkdir()
    shutil.copy(next(data.images.iterdir()), data.masks / "mine.png")


def a_manifest_of_somebody(data: Data) -> None:
    data.masks.mkdir()
    (data.masks / "manifest.json").write_text('{"version": 1}')


def one_more_file(data: Data) -> None:
    data.run(data.masks)
    (data.masks / "notes.txt").write_text("mine")
    shutil.rmtree(data.workspace.root)


def a_corrected_mask(data: Data) -> None:
    data.run(data.masks)
    with next(data.masks.glob("*.png")).open("ab") as file:
        file.write(b"corrected")
    shutil.rmtree(data.workspace.root)


@pytest.mark.parametrize("before", [a_file, masks_of_somebody, a_manifest_of_somebody, one_more_file, a_corrected_mask])
def test_what_was_not_written_as_masks_is_not_replaced(data: Data, before: Callable[[Data], None]):
    before(data)
    assert "it will not be replaced" in data.refused(data.masks)


def test_masks_that_are_there_are_left_alone(data: Data, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    data.run(data.masks)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in data.masks.iterdir()}
    data.run(data.masks, recipe=data.recipe.model_copy(update={"data": data.recipe.data.model_copy(
        update={"size": (64, 64)})}))  # fmt: skip
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in data.masks.iterdir()} == before
    assert f"{data.masks}: all 10 masks are there" in caplog.text


def test_masks_of_more_images_replace_older_ones_but_never_those_of_others(data: Data):
    kept = sorted(data.annotations.iterdir())
    for path in kept[5:]:
        path.rename(data.root / path.name)
        (data.images / f"{path.stem}.png").rename(data.root / f"{path.stem}.png")
    data.run(data.masks)
    for path in kept[5:]:
        (data.root / path.name).rename(path)
        (data.root / f"{path.stem}.png").rename(data.images / f"{path.stem}.png")
    store = data.run(data.masks)
    assert len([*data.masks.glob("*.png")]) == 10
    for index, sample in enumerate(store.samples):
        assert np.array_equal(read_grey(data.masks / f"{sample['stem']}.png") > 0, store.full_mask(index))
    kept[0].unlink()
    (data.images / f"{kept[0].stem}.png").unlink()
    with pytest.raises(UsageError, match=rf"masks of 1 images that are not among these \({kept[0].stem}\)"):
        data.run(data.masks)
    assert len([*data.masks.glob("*.png")]) == 10


def test_masks_of_one_label_are_not_replaced_by_those_of_another(data: Data, tiny: Recipe):
    for path in data.annotations.iterdir():
        content = json.loads(path.read_text())
        content["shapes"].append({"label": "vessel", "points": [[1, 1]], "shape_type": "point"})
        path.write_text(json.dumps(content))
    data.run(data.masks)
    vessels = tiny.model_copy(update={"data": tiny.data.model_copy(update={"label": "vessel"})})
    with pytest.raises(UsageError, match=r"holds masks of label 'STAS', not 'vessel': name another directory"):
        data.run(data.masks, recipe=vessels)


def test_an_annotation_named_manifest_is_one(data: Data):
    image, annotation = next(data.images.iterdir()), next(data.annotations.iterdir())
    shutil.copy(image, data.images / "manifest.png")
    shutil.copy(data.annotations / f"{image.stem}.json", data.annotations / "manifest.json")
    assert annotation.is_file()
    assert "manifest" in {sample["stem"] for sample in data.run(data.masks).samples}
    with pytest.raises(InputDataError, match="no annotation in it"):
        (data.root / "none").mkdir()
        data.run(data.root / "others", annotations=data.root / "none")


def test_within_does_not_depend_on_how_a_place_is_written(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to("loop")
    assert is_within(tmp_path / "link" / "b", tmp_path / "a")
    assert is_within(tmp_path / "link" / "new" / "deep", tmp_path / "a")
    assert is_within(tmp_path / "new" / "deep", tmp_path / "new")
    assert is_within(Path(os.path.relpath(tmp_path / "a" / "b")), tmp_path / "a" / ".." / "a")
    assert not is_within(tmp_path / "a", tmp_path / "a" / "b")
    assert not is_within(tmp_path / "ab", tmp_path / "a")
    assert not is_within(tmp_path / "loop", tmp_path / "a")
