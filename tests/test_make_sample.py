"""The sample data is reproducible and valid LabelMe, and its outlines enclose what they claim to."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from scripts import make_sample as sample
from stas.errors import UsageError

COUNT = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sample")
    sample.make_sample(directory, COUNT, seed=0, scale=0.5)
    return directory


def annotations(directory):
    return [json.loads(path.read_text()) for path in sorted((directory / "Train_Annotations").glob("*.json"))]


def image(directory, annotation):
    return Image.open(directory / "Train_Annotations" / annotation["imagePath"])


def outline(shape):
    """Points on the edge of the shape."""
    points = np.array(shape["points"])
    if shape["shape_type"] == "polygon":
        return points
    assert shape["shape_type"] == "circle"
    turn = np.linspace(0, 2 * np.pi, 32)[:, None]
    return points[0] + np.hypot(*(points[1] - points[0])) * np.hstack([np.cos(turn), np.sin(turn)])


def mask(shapes, width, height):
    canvas = Image.new("1", (width, height))
    for shape in shapes:
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in outline(shape)], fill=1)
    return np.asarray(canvas)


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_same_seed_same_files_whatever_the_count(made, tmp_path):
    sample.make_sample(tmp_path / "again", 3, seed=0, scale=0.5)
    again, before = contents(tmp_path / "again"), contents(made)
    assert len(again) == 6
    assert all(before[name] == data for name, data in again.items())


def test_other_seed_other_image():
    one, two = (sample.draw_tissue(np.random.default_rng(seed), 100, 120)[0] for seed in (0, 1))
    assert one.shape == two.shape == (100, 120, 3)
    assert one.dtype == np.uint8
    assert (one != two).any()


def test_every_image_has_a_labelme_file_that_fits_it(made):
    assert len(list((made / "Train_Images").glob("*.jpg"))) == len(annotations(made)) == COUNT
    for annotation in annotations(made):
        assert re.fullmatch(r"5\.\d+\.\d+", annotation["version"])
        assert set(annotation) >= {"flags", "shapes", "imageData"}
        with image(made, annotation) as picture:
            assert picture.size == (annotation["imageWidth"], annotation["imageHeight"])
            assert (picture.format, picture.mode) == ("JPEG", "RGB")


def test_outlines_lie_inside_the_image_and_enclose_something(made):
    for annotation in annotations(made):
        width, height = annotation["imageWidth"], annotation["imageHeight"]
        for shape in annotation["shapes"]:
            points = outline(shape)
            assert shape["label"] == "STAS"
            assert (points >= 0).all()
            assert (points <= (width - 1, height - 1)).all()
            assert mask([shape], width, height).sum() >= 12


def test_images_come_in_several_sizes_and_some_hold_nothing(made):
    sizes = [(annotation["imageWidth"], annotation["imageHeight"]) for annotation in annotations(made)]
    assert sizes.count((429, 236)) >= COUNT / 2
    assert len(set(sizes)) >= 4
    empty = sum(not annotation["shapes"] for annotation in annotations(made))
    assert 1 <= empty <= COUNT / 4


def test_outlines_enclose_cells_and_not_air(made):
    """Most pixels in every outline are darker than the air spaces, the brightest tenth of the image."""
    for annotation in annotations(made):
        grey = np.asarray(image(made, annotation).convert("L"), int)
        for shape in annotation["shapes"]:
            inside = grey[mask([shape], annotation["imageWidth"], annotation["imageHeight"])]
            assert (inside < np.percentile(grey, 90) - 30).mean() > 0.7


def test_clusters_float_in_air(made):
    """A ring just outside the outlines is brighter than their inside."""
    for annotation in annotations(made):
        if annotation["shapes"]:
            grey = np.asarray(image(made, annotation).convert("L"), int)
            inside = mask(annotation["shapes"], annotation["imageWidth"], annotation["imageHeight"])
            near = np.zeros_like(inside)
            for dy, dx in np.ndindex(7, 7):
                near |= np.roll(inside, (dy - 3, dx - 3), (0, 1))
            assert np.median(grey[near & ~inside]) > np.median(grey[inside]) + 40


def test_darkness_alone_does_not_find_the_clusters(made):
    """The mass, the lining and the nuclei are just as dark: no threshold comes close to the outlines."""
    best = []
    for annotation in annotations(made):
        grey = np.asarray(image(made, annotation).convert("L"), int)
        truth = mask(annotation["shapes"], annotation["imageWidth"], annotation["imageHeight"])
        if truth.any():
            found = [grey < threshold for threshold in range(60, 220, 10)]
            best.append(max(2 * (truth & each).sum() / (truth.sum() + each.sum()) for each in found))
    assert np.mean(best) < 0.4


def test_clusters_are_tiny_to_large():
    """At scale 1 the smallest outlines measure about 12 pixels, the largest 300."""
    rng = np.random.default_rng(0)
    spans = [np.ptp(sample.tuft(rng, length), axis=0).max() for length in sample.LENGTHS]
    assert 9 < spans[0] < 16
    assert 200 < spans[1] < 320


def test_drawn_sizes_vary(made):
    spans = [np.ptp(outline(shape), axis=0).max() for each in annotations(made) for shape in each["shapes"]]
    assert min(spans) < 12
    assert max(spans) > 60


def test_a_round_outline_becomes_a_circle_and_no_other_does():
    turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ring = np.stack([50 + 10 * np.cos(turn), 40 + 10 * np.sin(turn)], 1)
    circle = sample.shape(ring)
    assert circle["shape_type"] == "circle"
    assert circle["points"] == [[50, 40], [60, 40]]
    oval = sample.shape(ring * (1, 2))
    assert oval["shape_type"] == "polygon"
    assert oval["points"] == (ring * (1, 2)).tolist()


@pytest.mark.parametrize(("images", "seed", "scale"), [(0, 0, 1.0), (1, -1, 1.0), (1, 0, 0.1), (1, 0, 100.0)])
def test_invalid_arguments_are_refused(tmp_path, images, seed, scale):
    with pytest.raises(UsageError, match=re.escape(f"images {images}, seed {seed}, scale {scale}")):
        sample.make_sample(tmp_path, images, seed, scale)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    script = str(Path(sample.__file__))
    command = [sys.executable, script, str(tmp_path), "--images", "2", "--seed", "3", "--size-scale", "0.2"]
    subprocess.run(command, check=True)
    assert [annotation["imageWidth"] for annotation in annotations(tmp_path)] == [172, 172]
    assert subprocess.run([*command[:3], "--images", "0"], capture_output=True).returncode == 2
