import base64
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from stas.cli import main
from stas.config import Recipe
from stas.data import images
from stas.data.images import read_grey, read_image, write_mask
from stas.data.resize import area_resize
from stas.data.store import Store, open_store, pointer
from stas.errors import InputDataError, StoppedEarly, UnreadableError, UsageError
from stas.paths import Workspace, manifest_file, store_data
from stas.preprocess import preprocess
from stas.recipe import load_recipe
from tests.support.launch import PATIENCE

HEIGHT, WIDTH = 40, 60


def recipe(*changes: str) -> Recipe:
    return load_recipe("lite0", ["data.size=32", "data.split.kind=fraction", *changes])


def rectangle(left, top, right, bottom, label="STAS", kind="rectangle") -> dict:
    return {"label": label, "points": [[left, top], [right, bottom]], "shape_type": kind, "flags": {}}


class Cases:
    """A small data set in the directories `images` and `annotations`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.annotations = root / "images", root / "annotations"
        self.workspace = Workspace(root / "workspace")
        for directory in (self.images, self.annotations):
            directory.mkdir()

    def image(self, stem: str, suffix=".png", **options) -> Path:
        seed = sum(os.fsencode(stem))
        pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(self.images / f"{stem}{suffix}", **options)
        return self.images / f"{stem}{suffix}"

    def json(self, stem: str, *shapes: dict, **values) -> Path:
        content = {
            "version": "5.0.1", "flags": {}, "shapes": shapes or [rectangle(10, 10, 19, 29)],
            "imagePath": f"{stem}.png", "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH,
        }  # fmt: skip
        path = self.annotations / f"{stem}.json"
        path.write_text(json.dumps(content | values))
        return path

    def pair(self, stem: str, *shapes: dict, **values) -> None:
        self.image(stem)
        self.json(stem, *shapes, **values)

    def run(self, *changes: str, workers: int | None = 1, **options) -> Store:
        inputs = [self.images], [self.annotations], self.workspace, recipe(*changes).data
        return Store(preprocess(*inputs, workers=workers, **options))

    def problem(self, **options) -> str:
        """The message of a run on bad pairs, which must leave no store."""
        with pytest.raises(InputDataError) as caught:
            self.run(**options)
        assert not any(self.workspace.stores.iterdir())
        return str(caught.value)


@pytest.fixture
def cases(tmp_path) -> Cases:
    """Two good pairs, `good` and `more`."""
    cases = Cases(tmp_path)
    cases.pair("good", rectangle(10, 10, 19, 29), rectangle(0, 0, 59, 39, label="tissue"))
    cases.pair("more", rectangle(30, 5, 34, 9))
    return cases


def expected_mask(left, top, right, bottom) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


def test_a_store_of_good_pairs(cases, capsys):
    store = cases.run()
    assert [entry["stem"] for entry in store.samples] == ["good", "more"]
    assert [entry["area"] for entry in store.samples] == [200, 25]
    assert (store.label, store.size, store.skipped) == ("STAS", (32, 32), [])
    assert np.array_equal(store.full_mask(0), expected_mask(10, 10, 19, 29))
    image = read_image(cases.images / "good.png")
    assert (store.samples[0]["min"], store.samples[0]["max"]) == (image.min(), image.max())
    assert open_store(cases.workspace, recipe().data).key == store.key
    store.verify()
    printed = capsys.readouterr().out
    assert "2 samples of label STAS" in printed
    assert "1 for training, 1 for validation" in printed


def test_a_second_run_does_nothing(cases, monkeypatch, caplog):
    caplog.set_level("INFO")
    masks = cases.root / "masks"
    store = cases.run(masks=masks)
    files = [
        store_data(store.directory),
        manifest_file(store.directory),
        cases.workspace.dataset("STAS", "32x32"),
        masks / "good.png",
    ]
    before = [path.stat() for path in files]
    real_open = Image.open

    def refuse_sources(source, *arguments, **options):
        assert Path(source).parent == masks, "an image of the data set was opened"
        return real_open(source, *arguments, **options)

    monkeypatch.setattr(Image, "open", refuse_sources)
    assert cases.run(masks=masks).key == store.key
    assert [path.stat().st_mtime_ns for path in files] == [stat.st_mtime_ns for stat in before]
    assert [path.stat().st_ino for path in files] == [stat.st_ino for stat in before]
    assert "already exists" in caplog.text


def test_every_input_changes_the_key(cases):
    keys = [cases.run().key]
    keys.append(cases.run("data.size=64").key)
    keys.append(cases.run("data.label=tissue").key)
    keys.append(cases.run("data.scale=0.5").key)
    keys.append(cases.run("data.scale=0.25").key)
    cases.json("good", rectangle(1, 1, 2, 2))
    keys.append(cases.run().key)
    Image.new("RGB", (WIDTH, HEIGHT)).save(cases.images / "more.png")
    keys.append(cases.run().key)
    cases.pair("third")
    keys.append(cases.run().key)
    assert len(set(keys)) == len(keys)
    assert open_store(cases.workspace, recipe().data).key == keys[-1]


def test_key_does_not_depend_on_place_or_workers(cases, tmp_path):
    (tmp_path / "other").mkdir()
    other = Cases(tmp_path / "other")
    for name in ("images", "annotations"):
        for path in (cases.root / name).iterdir():
            (other.root / name / path.name).write_bytes(path.read_bytes())
    first, second = cases.run(), other.run(workers=2)
    assert first.key == second.key
    assert first.samples == second.samples


def test_masks_are_also_written_from_an_existing_store(cases):
    cases.run()
    masks = cases.root / "masks"
    cases.run(masks=masks)
    assert sorted(path.name for path in masks.glob("*.png")) == ["good.png", "more.png"]
    assert np.array_equal(read_grey(masks / "more.png"), expected_mask(30, 5, 34, 9) * np.uint8(255))
    (masks / "more.png").unlink()
    cases.run(masks=masks)
    assert np.array_equal(read_grey(masks / "more.png"), expected_mask(30, 5, 34, 9) * np.uint8(255))


def test_masks_as_annotations(cases):
    """The masks of a store give the same samples again."""
    masks = cases.root / "masks"
    first = cases.run(masks=masks)
    again = Store(preprocess([cases.images], [masks], cases.workspace, recipe().data, workers=1))
    assert [entry["sha256"] for entry in again.samples] == [entry["sha256"] for entry in first.samples]
    assert again.key != first.key


def test_several_directories(cases, tmp_path):
    (tmp_path / "extra").mkdir()
    extra = Cases(tmp_path / "extra")
    extra.image("pseudo")
    write_mask(extra.annotations / "pseudo.png", expected_mask(3, 3, 8, 8))
    images, annotations = [cases.images, extra.images], [cases.annotations, extra.annotations]
    store = Store(preprocess(images, annotations, cases.workspace, recipe().data, workers=1))
    assert [(entry["stem"], entry["area"]) for entry in store.samples] == [("good", 200), ("more", 25), ("pseudo", 36)]
    (extra.images / "pseudo.png").rename(extra.images / "good.png")
    with pytest.raises(InputDataError, match="share the stem 'good'"):
        preprocess(images, annotations, cases.workspace, recipe().data, workers=1)


def test_json_beside_the_images(cases):
    for path in cases.annotations.iterdir():
        path.rename(cases.images / path.name)
    store = Store(preprocess([cases.images], [cases.images], cases.workspace, recipe().data, workers=1))
    assert [entry["area"] for entry in store.samples] == [200, 25]


def test_exif_orientation(cases):
    """The image is stored on its side; LabelMe shows it upright, and the polygons use upright coordinates."""
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees clockwise
    path = cases.image("turned", ".jpg", exif=exif)
    cases.json("turned", rectangle(0, 0, 9, 19), imageHeight=WIDTH, imageWidth=HEIGHT)
    store = cases.run()
    sample = store.samples[2]
    assert (sample["stem"], sample["height"], sample["width"]) == ("turned", WIDTH, HEIGHT)
    mask = store.full_mask(2)
    assert mask.shape == read_image(path).shape[:2] == (WIDTH, HEIGHT)
    assert mask[:20, :10].all()
    assert mask.sum() == 200


def test_embedded_image_only(cases):
    path = cases.image("inside")
    cases.json("inside", imageData=base64.b64encode(path.read_bytes()).decode(), imagePath="gone.png")
    image = read_image(path)
    path.unlink()
    store = cases.run()
    assert np.array_equal(store.image(1), np.rint(area_resize(image, (32, 32))))
    assert store.samples[1]["image"] == "inside.json"
    path = cases.image("inside")
    assert cases.run().key == store.key  # the same bytes, but from a file
    path.unlink()
    for name in ("good", "more"):
        (cases.images / f"{name}.png").unlink()
        (cases.annotations / f"{name}.json").unlink()
    cases.json("inside2", imageData=json.loads((cases.annotations / "inside.json").read_text())["imageData"])
    assert len(cases.run()) == 2  # the directory of images is empty


@pytest.mark.parametrize("workers", [1, 2])
def test_images_stored_at_a_scale_keep_their_shapes(cases, workers, capsys):
    """One larger than the others, one embedded, one stored on its side, one bad."""
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    Image.fromarray(pixels).save(cases.images / "large.png")
    cases.json("large", imageHeight=61, imageWidth=83)
    path = cases.image("inside")
    cases.json("inside", imageData=base64.b64encode(path.read_bytes()).decode(), imageHeight=None, imageWidth=None)
    path.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    cases.image("turned", ".jpg", exif=exif)
    cases.json("turned", imageHeight=WIDTH, imageWidth=HEIGHT)
    cases.json("bad")
    (cases.images / "bad.png").write_bytes(b"no image")
    store = cases.run("data.scale=0.5", workers=workers, skip_bad=True)
    assert [(entry["stem"], entry["stored"]) for entry in store.samples] == [
        ("good", (20, 30)), ("inside", (20, 30)), ("large", (30, 42)), ("more", (20, 30)), ("turned", (30, 20))
    ]  # fmt: skip
    assert [Path(entry["file"]).name for entry in store.skipped] == ["bad.png"]
    assert np.array_equal(store.image(2), np.rint(area_resize(pixels, (30, 42))))
    store.verify()
    assert open_store(cases.workspace, recipe("data.scale=0.5").data).key == store.key
    assert "5 samples of label STAS at scale 0.5, 1 left out" in capsys.readouterr().out


def test_a_store_of_an_earlier_format_is_made_again(cases):
    old = cases.run()
    path = manifest_file(old.directory)
    path.write_text(path.read_text().replace('"format": 3', '"format": 1'))
    moved = old.directory.rename(cases.workspace.store("earlier"))  # its key included the format
    pointer(cases.workspace, old.spec).write_text(json.dumps({"store": moved.name}))
    with pytest.raises(InputDataError, match=r"earlier: a store of format 1, .*: run `stas preprocess` again"):
        open_store(cases.workspace, recipe().data)
    new = cases.run()
    assert open_store(cases.workspace, recipe().data).key == new.key != "earlier"


def test_image_of_another_stem_by_its_path(cases):
    cases.image("slide 7")
    cases.json("third", imagePath="..\\images\\slide 7.png")
    sample = cases.run().samples[2]
    assert (sample["stem"], sample["image"]) == ("third", "slide 7.png")


def test_no_declared_size(cases):
    cases.pair("old", rectangle(0, 0, 1, 1), version="3.4.1", imageHeight=None, imageWidth=None, lineColor=[0, 255, 0])
    assert cases.run().samples[2]["area"] == 4


def no_annotation(cases: Cases) -> Path:
    return cases.image("bad")


def no_image(cases: Cases) -> Path:
    return cases.json("bad")


def no_image_for_a_mask(cases: Cases) -> Path:
    write_mask(cases.annotations / "bad.png", expected_mask(0, 0, 1, 1))
    return cases.annotations / "bad.png"


def truncated_jpeg(cases: Cases) -> Path:
    cases.json("bad")
    path = cases.image("bad", ".jpg")
    path.write_bytes(path.read_bytes()[:-300])
    return path


def deep_image(cases: Cases) -> Path:
    cases.json("bad")
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(cases.images / "bad.png")
    return cases.images / "bad.png"


def wrong_declared_size(cases: Cases) -> Path:
    cases.pair("bad", imageHeight=WIDTH, imageWidth=HEIGHT)
    return cases.annotations / "bad.json"


def two_points(cases: Cases) -> Path:
    cases.pair("bad", rectangle(0, 0, 5, 5, kind="polygon"))
    return cases.annotations / "bad.json"


def infinite_point(cases: Cases) -> Path:
    cases.pair("bad", rectangle(0, 0, 5, float("inf")))
    return cases.annotations / "bad.json"


def unknown_shape(cases: Cases) -> Path:
    cases.pair("bad", rectangle(0, 0, 5, 5, kind="mask"))
    return cases.annotations / "bad.json"


def not_json(cases: Cases) -> Path:
    cases.image("bad")
    (cases.annotations / "bad.json").write_text("{")
    return cases.annotations / "bad.json"


def damaged_embedded_image(cases: Cases) -> Path:
    return cases.json("bad", imageData=base64.b64encode(b"no image").decode())


def json_and_mask(cases: Cases) -> Path:
    cases.pair("bad")
    write_mask(cases.annotations / "bad.png", expected_mask(0, 0, 1, 1))
    return cases.annotations / "bad.png"


def mask_of_another_size(cases: Cases) -> Path:
    cases.image("bad")
    write_mask(cases.annotations / "bad.png", np.zeros((WIDTH, HEIGHT), bool))
    return cases.annotations / "bad.png"


def graded_mask(cases: Cases) -> Path:
    cases.image("bad")
    Image.linear_gradient("L").resize((WIDTH, HEIGHT)).save(cases.annotations / "bad.png")
    return cases.annotations / "bad.png"


def name_that_is_not_utf8(cases: Cases) -> Path:
    stem = os.fsdecode(b"bad\xe9")
    cases.image(stem)
    return cases.json("bad").rename(cases.annotations / f"{stem}.json")


def second_annotation(cases: Cases) -> Path:
    return cases.json("bad", imagePath="../images/good.png")


def links_in_a_circle(cases: Cases) -> Path:
    (cases.images / "bad.png").symlink_to("bad.png")
    return cases.json("bad")


def pipe(cases: Cases) -> Path:
    cases.image("bad")
    os.mkfifo(cases.annotations / "bad.json")
    return cases.annotations / "bad.json"


def hours_of_drawing(cases: Cases) -> Path:
    cases.pair("bad", *[rectangle(0, 0, 90_000, 0, kind="circle")] * 200)
    return cases.annotations / "bad.json"


BAD = [
    (links_in_a_circle, "not readable ("),
    (pipe, "not a regular file"),
    (hours_of_drawing, "too often to be drawn"),
    (no_annotation, "no annotation with this stem"),
    (no_image, "no image, neither with this stem, nor at imagePath 'bad.png'"),
    (no_image_for_a_mask, "no image with this stem"),
    (truncated_jpeg, "truncated"),
    (deep_image, "image mode I;16 is not 8-bit"),
    (wrong_declared_size, "made for 40 x 60 pixels (width x height), but its image has 60 x 40"),
    (two_points, "has 2 points but needs 3 or more"),
    (infinite_point, "not finite"),
    (unknown_shape, "is of type 'mask', not one of polygon"),
    (not_json, "not readable as JSON"),
    (damaged_embedded_image, "embedded image: not readable as an image"),
    (json_and_mask, "bad.json annotates the same image"),
    (mask_of_another_size, "made for 40 x 60 pixels"),
    (graded_mask, "values are not just 0 and one of 1, 255 and 65535"),
    (name_that_is_not_utf8, "its name is not UTF-8"),
    (second_annotation, "also belongs to"),
]


@pytest.mark.parametrize(("make", "reason"), BAD, ids=[make.__name__ for make, _ in BAD])
def test_a_bad_pair_is_refused_or_skipped(cases, make, reason):
    file = str(make(cases)).encode(errors="backslashreplace").decode()
    message = cases.problem()
    assert "1 files cannot be used" in message
    assert f"  {file}: " in message
    assert reason in message
    store = cases.run(skip_bad=True)
    assert [entry["stem"] for entry in store.samples] == ["good", "more"]
    (entry,) = store.skipped
    assert entry["file"] == file
    assert reason in entry["reason"]
    assert len(entry["remedy"]) > 10
    assert file not in entry["reason"]
    with pytest.raises(InputDataError, match="1 files cannot be used"):  # also if the store exists by now
        cases.run()


def test_an_image_whose_name_is_not_utf8_is_refused(cases):
    cases.image(os.fsdecode(b"\xe9"))
    cases.json("bad", imagePath="../images/" + os.fsdecode(b"\xe9.png"))
    assert "bad.json: the name of its image " in cases.problem()
    (entry, _) = cases.run(skip_bad=True).skipped  # the manifest can be written
    assert "is not UTF-8" in entry["reason"]


def test_annotations_whose_names_are_equal_elsewhere_are_both_refused(cases):
    cases.pair("bad")
    cases.json("Bad", imagePath="../images/bad.png")
    message = cases.problem()
    assert "2 files cannot be used" in message
    assert "Bad.json annotates the same image, with the same stem (ignoring case" in message
    assert "bad.json annotates the same image, with the same stem (ignoring case" in message
    assert [entry["stem"] for entry in cases.run(skip_bad=True).samples] == ["good", "more"]


def test_all_bad_pairs_are_listed(cases):
    cases.image("alone")
    cases.pair("few", rectangle(0, 0, 5, 5, kind="polygon"))
    cases.json("nothing")
    message = cases.problem()
    assert "3 files cannot be used" in message
    positions = [message.index(name) for name in ("few.json", "nothing.json", "alone.png")]
    assert positions == sorted(positions)
    assert "--skip-bad" in message


def test_nothing_usable(tmp_path):
    cases = Cases(tmp_path)
    cases.image("alone")
    with pytest.raises(InputDataError, match="no annotation in it"):
        cases.run()
    cases.pair("bad", imageHeight=1, imageWidth=1)
    assert "no usable pair" in cases.problem(skip_bad=True)
    with pytest.raises(InputDataError, match="not a directory"):
        preprocess([cases.images], [tmp_path / "gone"], cases.workspace, recipe().data)


def test_a_misspelt_label_is_refused_with_those_that_are_there(cases):
    with pytest.raises(UsageError, match=r"data.label 'stas': no shape has this label; found STAS \(2\), tissue \(1\)"):
        cases.run("data.label=stas")
    with pytest.raises(UsageError, match="label 'a/b'"):
        cases.run("data.label=a/b")


def test_an_unsuitable_split_is_refused_but_the_store_stays(cases):
    with pytest.raises(UsageError, match="the first 237 of 2 samples"):
        cases.run("data.split.kind=first")
    assert len(open_store(cases.workspace, recipe().data)) == 2


def test_two_at_once(cases):
    for index in range(12):
        cases.pair(f"p{index}")
    command = (
        "import sys; from pathlib import Path; from stas.recipe import load_recipe; from stas.paths import Workspace\n"
        "from stas.preprocess import preprocess\n"
        "i, a, w = map(Path, sys.argv[1:])\n"
        "preprocess([i], [a], Workspace(w), load_recipe('lite0', ['data.split.kind=fraction']).data, workers=1)"
    )
    arguments = [sys.executable, "-c", command, cases.images, cases.annotations, cases.workspace.root]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    store = open_store(cases.workspace, load_recipe("lite0").data)
    store.verify()
    assert len(store) == 14
    assert sorted(path.name for path in cases.workspace.stores.iterdir()) == sorted([store.key, "STAS-352x640.json"])


class Opening:
    """Let a number of opens of one file succeed, then do something at each further one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, after: int, act: Callable[[Path], object]) -> None:
        self.name, self.left, self.act = name, after, act
        self._open = open
        monkeypatch.setattr("builtins.open", self)

    def __call__(self, file: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, (str, Path)) and Path(file).name == self.name:
            self.left -= 1
            if self.left < 0:
                self.act(Path(file))
        return self._open(file, *arguments, **options)


def failing(number: int) -> Callable[[Path], object]:
    def fail(file: Path) -> None:
        raise OSError(number, os.strerror(number), str(file))

    return fail


READS = 3  # of each file: to hash it, to decode it, to see that it is still the same
PASSING = [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EINTR]


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("file", ["bad.json", "bad.png"])
@pytest.mark.parametrize("number", PASSING, ids=lambda number: errno.errorcode[number])
def test_what_may_pass_makes_no_file_a_bad_one(cases, monkeypatch, number, file, skip_bad):
    cases.pair("bad")
    for after in range(READS):
        with monkeypatch.context() as patch, pytest.raises(StoppedEarly) as caught:
            Opening(patch, file, after, failing(number))
            cases.run(skip_bad=skip_bad)
        assert str(caught.value).startswith(f"{cases.root}")
        assert f"{file}: this machine could not read it ({os.strerror(number)})" in str(caught.value)
        assert "Run the same command again" in str(caught.value)
        assert not [*cases.workspace.stores.glob("*")]
    assert len(cases.run(skip_bad=skip_bad)) == 3


def test_the_command_ends_resumable_when_the_disk_fails_for_a_moment(cases, monkeypatch, capsys):
    command = ["preprocess", "--images", str(cases.images), "--annotations", str(cases.annotations), "--workers", "1"]
    command += ["--workspace", str(cases.workspace.root), "--set", "data.size=32", "--skip-bad"]
    with monkeypatch.context() as patch:
        Opening(patch, "good.png", 1, failing(errno.EIO))
        assert main(command) == 75
    assert "Traceback" not in (said := capsys.readouterr().err) and "good.png: this machine could not read it" in said


def test_a_directory_that_cannot_be_listed_for_a_moment_is_not_empty(cases, monkeypatch):
    listing = Path.iterdir

    def fail(directory):
        yield from list(listing(directory))[:1]
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(directory))

    for place in (cases.images, cases.annotations):
        with monkeypatch.context() as patch, pytest.raises(StoppedEarly, match=f"{place}: this machine could not"):
            patch.setattr(Path, "iterdir", lambda path, bad=place: fail(path) if path == bad else listing(path))
            cases.run(skip_bad=True)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_stop_while_a_file_is_read_makes_it_no_bad_one(cases, monkeypatch, skip_bad):
    def stop(*_, **__):
        raise StoppedEarly("stopped by SIGTERM")

    for place, name in [(Image, "open"), (ImageFile.ImageFile, "load"), (Image.Image, "getexif")]:
        with monkeypatch.context() as patch, pytest.raises(StoppedEarly, match="SIGTERM"):
            patch.setattr(place, name, stop)
            cases.run(skip_bad=skip_bad)
        assert not [*cases.workspace.stores.glob("*")]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_want_of_memory_makes_no_file_a_bad_one(cases, monkeypatch, skip_bad):
    def want(*_, **__):
        raise MemoryError

    for name in ("read_labelme", "rasterise", "make_record"):
        with monkeypatch.context() as patch, pytest.raises(StoppedEarly, match="Cannot allocate memory"):
            patch.setattr(f"stas.preprocess.{name}", want)
            cases.run(skip_bad=skip_bad)
        assert not [*cases.workspace.stores.glob("*")]


@pytest.mark.parametrize("gone", ["bad.json", "bad.png"])
def test_a_file_that_disappears_is_not_left_out(cases, monkeypatch, gone):
    """It may have been moved to a better name, or its volume may not be mounted."""
    for after in range(READS):
        cases.pair("bad")
        with monkeypatch.context() as patch, pytest.raises(StoppedEarly, match=rf"{gone}: disappeared while"):
            Opening(patch, gone, after, Path.unlink)
            cases.run(skip_bad=True)
        assert not [*cases.workspace.stores.glob("*")]


def test_a_file_that_may_not_be_read_is_not_left_out(cases, monkeypatch):
    cases.pair("bad")
    for after in range(READS):
        with monkeypatch.context() as patch, pytest.raises(UnreadableError, match="let this user read it"):
            Opening(patch, "bad.png", after, failing(errno.EACCES))
            cases.run(skip_bad=True)
        assert not [*cases.workspace.stores.glob("*")]


def test_a_store_made_without_bad_files_says_so_each_time(cases, caplog):
    not_json(cases)
    cases.run(skip_bad=True)
    caplog.clear()
    store = cases.run(skip_bad=True)
    assert "1 files are left out" in caplog.text and "bad.json" in caplog.text
    assert f"should any of them be readable by now: delete {store.directory}" in caplog.text


def test_files_passed_over_because_of_their_suffix_are_counted_and_named(cases, caplog):
    caplog.set_level("INFO")
    cases.run()
    assert "passed over" not in caplog.text
    for number in range(30):
        (cases.images / f"slide{number:02}.svs").touch()
    (cases.annotations / "good.xml").touch()
    (cases.annotations / "folder.old").mkdir()
    cases.run()
    lines = [line for line in caplog.messages if "passed over" in line]
    assert lines[0].startswith(
        f"{cases.images}: 30 files passed over because of their suffix: slide00.svs, slide01.svs"
    )
    assert lines[0].endswith("slide09.svs and 20 more")
    assert lines[1:] == [f"{cases.annotations}: 1 files passed over because of their suffix: good.xml"]


def test_annotations_beside_the_images_are_not_passed_over(cases, caplog):
    caplog.set_level("INFO")
    for path in cases.annotations.iterdir():
        path.rename(cases.images / path.name)
    preprocess([cases.images], [cases.images], cases.workspace, recipe().data, workers=1)
    assert "passed over" not in caplog.text


def test_one_image_under_two_names_on_both_sides_of_the_split_is_named(cases, caplog):
    cases.run()
    assert "under two names" not in caplog.text
    for stem in "abcdefgh":  # a fraction of 0.2 holds out two of ten
        cases.json(stem)
        shutil.copy(cases.images / "good.png", cases.images / f"{stem}.png")
    cases.run()
    (line,) = [line for line in caplog.messages if "under two names" in line]
    assert re.search(r"^[12] images are both trained on and held out.*: \w+ and \w+", line)


def test_an_interrupt_leaves_nothing(cases, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cases.run()
    assert list(cases.workspace.stores.iterdir()) == []


def test_workers_do_not_import_torch():
    code = "import sys, stas.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_real_pairs(real_data, tmp_path):
    cases = Cases(tmp_path)
    for path in sorted((real_data / "Train_Annotations").glob("*.json"))[:5]:
        (cases.annotations / path.name).symlink_to(path)
        (cases.images / f"{path.stem}.jpg").symlink_to(real_data / "Train_Images" / f"{path.stem}.jpg")
    store = cases.run("data.size=800")
    store.verify()
    assert {(entry["height"], entry["width"]) for entry in store.samples} == {(942, 1716)}
    for index, entry in enumerate(store.samples):
        mask = store.full_mask(index)
        assert 0.0005 < mask.mean() < 0.4
        assert abs(store.mask(index).mean() / 255 - mask.mean()) < 0.001
        published = real_data / "Predictions" / "ensemble" / f"{entry['stem']}.png"
        if published.is_file():
            truth = read_grey(published) > 0
            assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.97


def test_image_bytes_change_between_hash_and_decode(cases, monkeypatch):
    changed = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(changed, "PNG")

    def change_first(source, *arguments):
        if source.name == "good.png":
            source.write_bytes(changed.getvalue())
        return real_read(source, *arguments)

    real_read = images.read_bounded
    monkeypatch.setattr(images, "read_bounded", change_first)
    for skip_bad in (False, True):
        with pytest.raises(StoppedEarly, match=r"good.json: it .*changed while being read: run the command again"):
            cases.run(skip_bad=skip_bad)
        assert not any(cases.workspace.stores.iterdir())
        changed.write(b"more")


def test_members_that_differ_in_split_share_a_store(cases: Cases, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ensemble = tmp_path / "folds.yaml"
    command = ["preprocess", "--images", str(cases.images), "--annotations", str(cases.annotations), "--workers", "1"]
    command += ["--workspace", str(cases.workspace.root), "--ensemble", str(ensemble), "--set", "data.size=32"]
    ensemble.write_text("members: [lite0, lite0_fpn]\nfolds: 2\n")
    assert main(command) == 0
    lines = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line[0] == "split"] == [["split", "kfold", f"{i}", "of", "2:"] for i in (0, 1)]
    assert sum(line[0] == "store" for line in lines) == 1
    ensemble.write_text("members: [lite0]\nfolds: 3\n")  # of two samples
    assert main(command) == 2
    assert "data.split takes fold 2 of 3 of 2 samples" in capsys.readouterr().err


def test_an_ensemble_gets_a_store_for_each_size(cases: Cases, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ensemble = tmp_path / "sizes.yaml"
    sizes = [f"{{recipe: lite0, run: m{size}, set: {{data.size: {size}}}}}" for size in (32, 64)]
    ensemble.write_text(f"members: [{', '.join(sizes)}]\n")
    command = ["preprocess", "--images", str(cases.images), "--annotations", str(cases.annotations), "--workers", "1"]
    assert main([*command, "--workspace", str(cases.workspace.root), "--ensemble", str(ensemble)]) == 0
    said = capsys.readouterr().out
    assert said.count("label STAS at 32 x 32 pixels") == said.count("label STAS at 64 x 64 pixels") == 1
    assert all(open_store(cases.workspace, load_recipe("lite0", [f"data.size={size}"]).data) for size in (32, 64))
