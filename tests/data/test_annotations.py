import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stas.data.annotations import SHAPE_TYPES, Annotation, Shape, find_image, rasterise, read_labelme
from stas.data.images import read_grey, read_image
from stas.errors import InputDataError
from tests.support.labelme import TRIANGLE, shape


def write(path: Path, shapes: object = (), **values) -> Path:
    content = {"version": "5.0.1", "flags": {}, "shapes": shapes, "imagePath": "a.jpg", "imageData": None}
    path.write_text(json.dumps(content | values))
    return path


def drawn(kind: str, points, size: tuple[int, int], label="STAS") -> np.ndarray:
    return rasterise([Shape(label, kind, np.array(points, np.float64))], size, "STAS")


def pixels(text: str) -> np.ndarray:
    return np.array([[character == "#" for character in line] for line in text.split()])


@pytest.mark.parametrize(
    "points", [[[1, 1], [4, 3]], [[4, 3], [1, 1]], [[1, 3], [4, 1]], [[4, 1], [1, 3]]], ids=["nw", "se", "sw", "ne"]
)
def test_rectangle_includes_both_corners_in_any_order(points):
    expected = pixels("...... .####. .####. .####. ......")
    assert np.array_equal(drawn("rectangle", points, (5, 6)), expected)


def test_polygon_is_filled_with_its_outline():
    expected = pixels("...... .####. .####. .####. ......")
    assert np.array_equal(drawn("polygon", [[1, 1], [4, 1], [4, 3], [1, 3]], (5, 6)), expected)
    diagonal = pixels("#..... ##.... ###... ####.. ......")
    assert np.array_equal(drawn("polygon", [[0, 0], [0, 3], [3, 3]], (5, 6)), diagonal)


def test_circle_has_centre_and_edge_point():
    expected = pixels("....... ..###.. .#####. .#####. .#####. ..###.. .......")
    assert np.array_equal(drawn("circle", [[3, 3], [3, 5]], (7, 7)), expected)
    assert np.array_equal(drawn("circle", [[3, 3], [1, 3]], (7, 7)), expected)


def test_point_is_a_disc_of_radius_5():
    mask = drawn("point", [[8, 8]], (17, 17))
    assert mask.sum(axis=1).tolist() == [0, 0, 0, 5, 7, 9, 11, 11, 11, 11, 11, 9, 7, 5, 0, 0, 0]
    assert np.array_equal(mask, mask.T)


def test_line_is_10_wide():
    expected = np.zeros((20, 30), bool)
    expected[1:11, 5:25] = True
    assert np.array_equal(drawn("line", [[5, 5], [24, 5]], (20, 30)), expected)


def test_linestrip_is_all_of_its_lines():
    strip = drawn("linestrip", [[5, 5], [24, 5], [24, 30]], (40, 40))
    first, second = drawn("line", [[5, 5], [24, 5]], (40, 40)), drawn("line", [[24, 5], [24, 30]], (40, 40))
    assert np.array_equal(strip, first | second)
    assert second.any()


def test_other_labels_are_not_drawn_but_counted(tmp_path):
    path = write(tmp_path / "a.json", [shape(TRIANGLE), shape(TRIANGLE, label="tumour"), shape(TRIANGLE)])
    annotation = read_labelme(path)
    assert annotation.labels == {"STAS": 2, "tumour": 1}
    assert not rasterise(annotation.shapes, (5, 6), "necrosis").any()
    assert np.array_equal(rasterise(annotation.shapes, (5, 6), "tumour"), drawn("polygon", TRIANGLE, (5, 6)))


def test_shapes_outside_are_cut_off():
    assert drawn("rectangle", [[-5, -5], [1, 1]], (4, 4)).sum() == 4
    assert not drawn("polygon", [[10, 10], [20, 10], [20, 20]], (4, 4)).any()


def one_by_one(shapes: list[Shape], size: tuple[int, int]) -> np.ndarray:
    """Each shape on a canvas of its own, as LabelMe does it."""
    mask = np.zeros(size, bool)
    for item in shapes:
        canvas = Image.fromarray(np.zeros(size, np.uint8))
        draw = ImageDraw.Draw(canvas)
        xy = [tuple(point) for point in item.points.tolist()]
        if item.kind in ("circle", "point"):
            radius = 5 if item.kind == "point" else np.sqrt(((item.points[0] - item.points[1]) ** 2).sum())
            x, y = xy[0]
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)
        elif item.kind == "rectangle":
            draw.rectangle([tuple(item.points.min(0)), tuple(item.points.max(0))], outline=1, fill=1)
        elif item.kind == "polygon":
            draw.polygon(xy=xy, outline=1, fill=1)
        else:
            draw.line(xy=xy, fill=1, width=10)
        mask |= np.array(canvas, bool)
    return mask


def test_one_canvas_has_the_pixels_of_many():
    random = np.random.default_rng(0)
    for _ in range(20):
        shapes = []
        for kind, (fewest, most) in SHAPE_TYPES.items():
            count = int(fewest if most == fewest else random.integers(fewest, 12))
            shapes.append(Shape("STAS", kind, random.uniform(-20, 120, (count, 2))))
        mask = rasterise(shapes, (90, 110), "STAS")
        assert np.array_equal(mask, one_by_one(shapes, (90, 110)))
        assert 0 < mask.sum() < mask.size


def test_version_3_without_size_and_shape_type(tmp_path):
    old = {"label": "STAS", "points": TRIANGLE, "line_color": None, "fill_color": None}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({
        "version": "3.4.1", "flags": {}, "shapes": [old], "lineColor": [0, 255, 0, 128],
        "fillColor": [255, 0, 0, 128], "imagePath": "a.jpg", "imageData": None,
    }))  # fmt: skip
    annotation = read_labelme(path)
    assert annotation.size is None
    assert annotation.shapes[0].kind == "polygon"
    assert annotation.shapes[0].points.tolist() == TRIANGLE


def test_size_path_and_embedded_image_are_read(tmp_path):
    path = write(tmp_path / "a.json", imageHeight=4, imageWidth=6, imageData=base64.b64encode(b"bytes").decode())
    annotation = read_labelme(path)
    assert (annotation.size, annotation.image_path, annotation.image_data) == ((4, 6), "a.jpg", b"bytes")
    assert annotation.shapes == ()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([shape(TRIANGLE[:2])], "polygon, has 2 points but needs 3 or more"),
        ([shape(TRIANGLE, "rectangle")], "rectangle, has 3 points but needs exactly 2"),
        ([shape(TRIANGLE[:1], "circle")], "circle, has 1 points but needs exactly 2"),
        ([shape(TRIANGLE, "line")], "line, has 3 points but needs exactly 2"),
        ([shape(TRIANGLE[:1], "linestrip")], "linestrip, has 1 points but needs 2 or more"),
        ([shape(TRIANGLE, "point")], "point, has 3 points but needs exactly 1"),
        ([shape([])], "has 0 points"),
        ([shape(TRIANGLE, "mask")], "'mask', not one of polygon, rectangle, circle, line, linestrip, point"),
        ([shape([[1, 1], [float("nan"), 1], [4, 3]])], "nan, 1], not finite"),
        ([shape([[1, 1], [float("inf"), 1], [4, 3]])], "inf, 1], not finite"),
        ([shape([[1, 1], [10**400, 1], [4, 3]])], "not finite and within 100000 pixels"),
        ([shape([[1, 1], [1e6, 1], [4, 3]])], "not finite and within 100000 pixels"),
        ([shape([[1, 1], ["4", 1], [4, 3]])], "['4', 1], not a pair of numbers"),
        ([shape([[1, 1], [True, 1], [4, 3]])], "not a pair of numbers"),
        ([shape([[1, 1], [4, 1, 2], [4, 3]])], "not a pair of numbers"),
        ([shape("1 1 4 1 4 3")], "no list of points"),
        ([{"points": TRIANGLE, "shape_type": "polygon"}], "no label"),
        (["polygon"], "no label"),
    ],
)
def test_bad_shapes_are_refused(tmp_path, shapes, message):
    path = write(tmp_path / "a.json", [shape(TRIANGLE), *shapes])
    with pytest.raises(InputDataError) as caught:
        read_labelme(path)
    assert str(caught.value).startswith(f"{path}: shape 2")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"imageData": "not base64!"}, "imageData is not base64"),
        ({"imageData": 5}, "imageData is not base64"),
        ({"imageHeight": 10}, "imageHeight 10 and imageWidth None are not two whole numbers"),
        ({"imageHeight": 0, "imageWidth": 5}, "imageHeight 0"),
        ({"imageHeight": "10", "imageWidth": 5}, "imageHeight '10'"),
        ({"imagePath": 3}, "imagePath 3 is not text"),
        ({"shapes": {}}, "no list of 'shapes'"),
    ],
)
def test_bad_files_are_refused(tmp_path, values, message):
    path = write(tmp_path / "a.json", **values)
    with pytest.raises(InputDataError, match=r"a\.json: ") as caught:
        read_labelme(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_not_labelme_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputDataError, match="LabelMe"):
        read_labelme(path)
    with pytest.raises(InputDataError, match=r"missing\.json"):
        read_labelme(tmp_path / "missing.json")


@pytest.fixture
def places(tmp_path) -> dict[str, Path]:
    """images/photo.jpg, annotations/a.json, and secret.jpg outside of both."""
    images, annotations = tmp_path / "images", tmp_path / "annotations"
    for directory in (images, annotations):
        directory.mkdir()
    for path in (images / "photo.jpg", tmp_path / "secret.jpg"):
        path.touch()
    return {"images": images, "annotation": annotations / "a.json", "photo": images / "photo.jpg"}


def look_up(places, image_path, image_data=None) -> Any:
    return find_image(places["annotation"], Annotation((), None, image_path, image_data), [places["images"]])


@pytest.mark.parametrize(
    "image_path",
    [
        "../images/photo.jpg",
        "..\\images\\photo.jpg",
        "photo.jpg",
        "C:\\Users\\Somebody\\slides\\photo.jpg",
        "/home/somebody/slides/photo.jpg",
        "../elsewhere/photo.jpg",
    ],
)
def test_image_path_leads_to_the_image(places, image_path):
    assert look_up(places, image_path).resolve() == places["photo"].resolve()


def test_absolute_image_path_within_the_directories(places):
    assert look_up(places, str(places["photo"])) == places["photo"]


@pytest.mark.parametrize(
    "image_path", ["../secret.jpg", "..\\secret.jpg", "../images/../secret.jpg", "ABSOLUTE", "LINK"]
)
def test_image_path_does_not_lead_out(places, image_path):
    secret = places["images"].parent / "secret.jpg"
    if image_path == "LINK":
        image_path = "link.jpg"
        (places["annotation"].parent / image_path).symlink_to(secret)
    assert look_up(places, str(secret) if image_path == "ABSOLUTE" else image_path) is None


@pytest.mark.parametrize("image_path", [None, "", "..", "/", "a\0b.jpg", "x" * 5000, "\ud800.jpg", "gone.jpg"])
def test_no_image(places, image_path):
    assert look_up(places, image_path) is None
    assert look_up(places, image_path, b"embedded") == b"embedded"


def test_an_image_of_the_same_stem_comes_first(places):
    own = places["images"] / "a.PNG"
    own.touch()
    assert look_up(places, "photo.jpg", b"embedded") == own


def test_real_annotations_give_the_published_masks(real_data):
    for path in sorted((real_data / "Train_Annotations").glob("Public_*.json"))[:3]:
        annotation = read_labelme(path)
        height, width, _ = read_image(real_data / "Train_Images" / f"{path.stem}.jpg").shape
        size = height, width
        assert annotation.size == size
        mask = rasterise(annotation.shapes, size, "STAS")
        published = read_grey(real_data / "Predictions" / "ensemble" / f"{path.stem}.png") > 0
        assert 2 * (mask & published).sum() / (mask.sum() + published.sum()) > 0.97
        assert np.array_equal(mask, one_by_one(list(annotation.shapes), size))
