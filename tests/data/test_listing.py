import pytest

from stas.data.listing import list_images
from stas.errors import InputDataError


def test_images_are_listed_by_stem(tmp_path):
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert {stem: path.name for stem, path in list_images(tmp_path).items()} == {"a": "a.png", "b": "b.JPG"}
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputDataError, match=r"a.jpg and a.png share the stem 'a'"):
        list_images(tmp_path)


def test_no_images_is_an_error(tmp_path):
    with pytest.raises(InputDataError, match="no image in it"):
        list_images(tmp_path)
    with pytest.raises(InputDataError, match="not a directory"):
        list_images(tmp_path / "gone")


@pytest.mark.parametrize(
    ("one", "other"), [("a.jpg", "A.png"), ("e\u0301.png", "\u00e9.png"), ("stra\u00dfe.png", "STRASSE.png")]
)
def test_stems_that_are_one_name_elsewhere_are_refused(tmp_path, one, other):
    for name in (one, other):
        (tmp_path / name).touch()
    with pytest.raises(
        InputDataError, match=r"\(ignoring case and how accents are encoded\), which names their masks: rename one"
    ):
        list_images(tmp_path)


def test_a_stem_too_long_for_its_mask_is_refused(tmp_path):
    (tmp_path / ("\u00e9" * 76 + ".png")).touch()
    with pytest.raises(InputDataError, match="the stem has 152 bytes, more than 150: rename it"):
        list_images(tmp_path)
