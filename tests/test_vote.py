import itertools
import logging

import numpy as np
import pytest
from PIL import Image

from stas.cli import main
from stas.data.images import write_mask, write_probability
from stas.errors import InputDataError, UsageError
from stas.system.files import read_json
from stas.vote import majority, tie_possible, vote


def members(root, patterns, stems=("a",)):
    """One directory per pattern of 0 and 1, with the same one-row mask for every stem."""
    directories = [root / f"member{number}" for number in range(len(patterns))]
    for directory, pattern in zip(directories, patterns, strict=True):
        for stem in stems:
            write_mask(directory / f"{stem}.png", np.array([pattern], bool))
    return directories


def soft_members(root, values):
    directories = members(root, [[0] * len(row) for row in values])
    for directory, row in zip(directories, values, strict=True):
        write_probability(directory / "probabilities" / "a.png", np.array([row], np.float32))
    return directories


def read(path):
    return np.asarray(Image.open(path)).tolist()


@pytest.mark.parametrize("count", [3, 5])
def test_majority_of_an_odd_number_for_every_combination(count):
    combinations = np.array(list(itertools.product([False, True], repeat=count))).T  # (members, combinations)
    expected = [sum(column) > count / 2 for column in combinations.T]
    assert majority([row[None] for row in combinations]).tolist() == [expected]


def test_majority_counts_more_members_than_eight_bits_hold():
    assert majority([np.ones((1, 1), bool)] * 151 + [np.zeros((1, 1), bool)] * 150).tolist() == [[True]]


@pytest.mark.parametrize(
    ("votes", "possible"),
    [([1, 1, 1], False), ([1, 1], True), ([2, 1, 1], True), ([4, 1, 1], False), ([3, 3, 4], False), ([1, 2, 3], True)],
)
def test_tie_possible(votes, possible):
    assert tie_possible(votes) is possible


def test_vote_writes_masks_of_the_same_stem_and_size(tmp_path, capsys):
    out = vote(members(tmp_path, [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], stems=("a", "b c")), tmp_path / "vote")
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b c.png", "manifest.json"]
    with Image.open(out / "b c.png") as picture:
        assert (picture.mode, picture.format) == ("L", "PNG")
    assert read(out / "a.png") == [[255, 0, 0, 0]]
    manifest = read_json(out / "manifest.json")
    assert [member["name"] for member in manifest["key"]["members"]] == ["member0", "member1", "member2"]
    assert manifest["images"] == {"a": {"height": 1, "width": 4}, "b c": {"height": 1, "width": 4}}
    assert "2 masks" in capsys.readouterr().out


@pytest.mark.parametrize(("ties", "expected"), [("foreground", [[255, 255, 0]]), ("background", [[255, 0, 0]])])
def test_an_even_number_needs_ties(tmp_path, ties, expected):
    pair = members(tmp_path, [[1, 1, 0], [1, 0, 0]])
    with pytest.raises(UsageError, match="--ties foreground"):
        vote(pair, tmp_path / "vote")
    assert not (tmp_path / "vote").exists()
    assert read(vote(pair, tmp_path / "vote", ties=ties) / "a.png") == expected


def test_weights_decide(tmp_path):
    trio = members(tmp_path, [[1, 0], [0, 1], [0, 1]])
    assert read(vote(trio, tmp_path / "vote", weights=[3, 1, 1]) / "a.png") == [[255, 0]]
    assert read(vote(trio, tmp_path / "vote", weights=[3, 2, 2]) / "a.png") == [[0, 255]]


def test_weights_that_can_tie_need_ties(tmp_path):
    trio = members(tmp_path, [[1, 0], [1, 0], [0, 1]])
    with pytest.raises(UsageError, match="can tie"):
        vote(trio, tmp_path / "vote", weights=[1, 2, 3])
    out = vote(trio, tmp_path / "vote", weights=[1, 2, 3], ties="background")
    assert read(out / "a.png") == [[0, 0]]


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, 0], [1, 1, -1], [1, 1, 10**6]])
def test_impossible_weights_are_refused(tmp_path, weights):
    with pytest.raises(UsageError, match="weight"):
        vote(members(tmp_path, [[1], [1], [1]]), tmp_path / "vote", weights=weights)


def test_one_member_cannot_vote(tmp_path):
    with pytest.raises(UsageError, match="at least two"):
        vote(members(tmp_path, [[1]]), tmp_path / "vote")


def test_soft_vote_is_the_mean_of_probabilities(tmp_path):
    trio = soft_members(tmp_path, [[1.0, 0.4, 0.6], [0.4, 0.4, 0.6], [0.4, 0.6, 0.0]])
    out = vote(trio, tmp_path / "vote", soft=True)
    assert read(out / "a.png") == [[255, 0, 0]]
    stored = np.asarray(Image.open(out / "probabilities" / "a.png"))
    assert stored.dtype == np.uint16
    np.testing.assert_allclose(stored[0] / 65535, [0.6, 1.4 / 3, 0.4], atol=1 / 65535)


def test_soft_vote_takes_weights(tmp_path):
    pair = soft_members(tmp_path, [[0.9, 0.2], [0.3, 0.6]])
    assert read(vote(pair, tmp_path / "vote", soft=True, weights=[1, 3]) / "a.png") == [[0, 0]]
    assert read(vote(pair, tmp_path / "vote", soft=True, weights=[1, 7]) / "a.png") == [[0, 255]]


def test_soft_vote_mask_and_stored_mean_agree_around_one_half(tmp_path):
    steps = np.arange(32760, 32776)
    pair = members(tmp_path, [[0] * 16, [0] * 16])
    for directory, values in zip(pair, (steps, steps[::-1] + 1), strict=True):
        (directory / "probabilities").mkdir()
        Image.fromarray(values[None].astype(np.uint16)).save(directory / "probabilities" / "a.png")
    out = vote(pair, tmp_path / "vote", soft=True)  # the sum is always 65536, so just above 0.5
    assert read(out / "a.png") == [[255] * 16]
    assert read(out / "probabilities" / "a.png") == [[32768] * 16]


def test_soft_vote_without_probabilities_says_how_to_get_them(tmp_path):
    with pytest.raises(InputDataError, match=r"member0.*\(a\).*stas infer --probabilities"):
        vote(members(tmp_path, [[1], [1], [1]]), tmp_path / "vote", soft=True)


def test_soft_vote_refuses_eight_bit_probabilities(tmp_path):
    pair = soft_members(tmp_path, [[0.9], [0.3]])
    write_mask(pair[1] / "probabilities" / "a.png", np.array([[True]]))
    with pytest.raises(InputDataError, match=r"member1.*16-bit"):
        vote(pair, tmp_path / "vote", soft=True)


@pytest.mark.parametrize("options", [{"ties": "foreground"}, {"threshold": 1}])
def test_soft_vote_refuses_options_it_would_ignore(tmp_path, options):
    with pytest.raises(UsageError, match="soft vote"):
        vote(soft_members(tmp_path, [[0.9], [0.3]]), tmp_path / "vote", soft=True, **options)


def test_members_that_do_not_match_are_refused(tmp_path):
    trio = members(tmp_path, [[1], [1], [1]], stems=("a", "b"))
    (trio[2] / "b.png").unlink()
    with pytest.raises(InputDataError, match=r"member2.*lacks 1 \(b\)"):
        vote(trio, tmp_path / "vote")
    assert not (tmp_path / "vote").exists()


def test_the_vote_cannot_replace_a_member(tmp_path):
    trio = members(tmp_path, [[1], [1], [1]])
    with pytest.raises(UsageError, match="is a member"):
        vote(trio, trio[0])


def test_graded_masks_follow_the_threshold_and_are_logged_once_per_member(tmp_path, caplog):
    trio = members(tmp_path, [[1, 1], [1, 0], [0, 0]], stems=("a", "b"))
    for stem in "ab":
        Image.fromarray(np.array([[0, 90]], np.uint8)).save(trio[2] / f"{stem}.png")
    with caplog.at_level(logging.INFO):
        assert read(vote(trio, tmp_path / "vote") / "a.png") == [[255, 255]]
    assert [record.args[:3] for record in caplog.records if "above 0" in record.message] == [("member2", 2, 2)]
    assert read(vote(trio, tmp_path / "vote", threshold=100) / "a.png") == [[255, 0]]


@pytest.mark.parametrize("threshold", ["nan", "inf", "-1", "-0.001", "65535", "1e9"])
def test_a_threshold_that_no_mask_can_have_is_refused(tmp_path, threshold, capsys):
    sets = [str(path) for path in members(tmp_path, [[1], [1], [1]])]
    assert main(["vote", "--members", *sets, "--out", str(tmp_path / "vote"), f"--threshold={threshold}"]) == 2
    assert "give a number from 0 to 65534" in capsys.readouterr().err
    assert not (tmp_path / "vote").exists()


@pytest.mark.parametrize("weights", [["nan", "1", "1"], ["-1", "1", "1"], ["1.5", "1", "1"], ["inf", "1", "1"]])
def test_weights_that_are_no_votes_are_refused(tmp_path, weights):
    sets = [str(path) for path in members(tmp_path, [[1], [1], [1]])]
    command = ["vote", "--members", *sets, "--out", str(tmp_path / "vote"), "--weights", *weights]
    try:
        code = main(command)
    except SystemExit as error:  # the parser's
        code = error.code
    assert code == 2
    assert not (tmp_path / "vote").exists()


def test_a_threshold_in_other_units_than_the_masks_is_refused_or_told(tmp_path, caplog):
    trio = members(tmp_path, [[1, 1], [1, 1], [1, 1]])
    with pytest.raises(InputDataError, match=r"a\.png: its values go up to 255, so none is above --threshold 300"):
        vote(trio, tmp_path / "vote", threshold=300)
    for directory in trio:
        Image.fromarray(np.array([[90, 200]], np.uint8)).save(directory / "a.png")
    with pytest.raises(InputDataError, match=r"--threshold 0\.5 would take every one above 0.*half of 255 is 127"):
        vote(trio, tmp_path / "vote", threshold=0.5)
    Image.fromarray(np.array([[1, 0]], np.uint8)).save(trio[0] / "a.png")
    assert read(vote(trio, tmp_path / "vote", threshold=127) / "a.png") == [[0, 255]]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and told[0].startswith("member0: no value is above --threshold, so all 1 masks")


def test_photographs_are_no_members(tmp_path):
    trio = members(tmp_path, [[1, 1], [1, 1], [1, 1]])
    Image.fromarray(np.array([[[200, 90, 180], [240, 230, 250]]], np.uint8)).save(trio[1] / "a.png")
    with pytest.raises(InputDataError, match=r"member1/a\.png: a picture in colour, not a mask"):
        vote(trio, tmp_path / "vote")
    Image.fromarray(np.array([[[200, 90, 180], [0, 0, 0]]], np.uint8)).save(trio[1] / "a.png")  # one colour: a mask
    vote(trio, tmp_path / "vote")


def test_a_second_identical_vote_does_nothing_and_a_changed_member_votes_again(tmp_path, caplog):
    trio = members(tmp_path, [[1, 0], [1, 0], [0, 0]])
    out = vote(trio, tmp_path / "vote")
    before = (out / "a.png").stat()
    with caplog.at_level(logging.INFO):
        vote(trio, out)
    assert "nothing to do" in caplog.text
    assert (out / "a.png").stat() == before
    write_mask(trio[2] / "a.png", np.array([[False, True]]))
    write_mask(trio[1] / "a.png", np.array([[False, True]]))
    assert read(vote(trio, out) / "a.png") == [[0, 255]]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_members_packed_again_are_the_same_vote_and_one_pixel_is_not(tmp_path, caplog):
    """Another kind of processor writes the same masks as different files."""
    trio = members(tmp_path, [[1, 0] * 40, [1, 0] * 40, [0, 0] * 40])
    out = vote(trio, tmp_path / "vote")
    path = trio[0] / "a.png"
    before = path.read_bytes()
    Image.open(path).save(path, compress_level=9)
    assert path.read_bytes() != before
    with caplog.at_level(logging.INFO):
        vote(trio, out)
    assert "nothing to do" in caplog.text
    caplog.clear()
    mask = np.asarray(Image.open(path)) > 0
    mask[0, -1] = True
    write_mask(path, mask)
    with caplog.at_level(logging.INFO):
        vote(trio, out)
    assert "nothing to do" not in caplog.text


def test_the_published_vote_is_reproduced_in_every_pixel(tmp_path, real_data):
    published = real_data / "Predictions"
    names = ["tf_efficientnet_b6_ns", "tf_efficientnetv2_m_in21ft1k", "eca_nfnet_l2"]
    out = vote([published / name for name in names], tmp_path / "vote")
    stems = sorted(path.stem for path in (published / "ensemble").glob("*.png"))
    assert len(stems) == 131
    for stem in stems:
        ours = np.asarray(Image.open(out / f"{stem}.png"))
        theirs = np.asarray(Image.open(published / "ensemble" / f"{stem}.png").convert("RGB"))
        assert (ours[..., None] == theirs).all(), stem
