"""The protocol by which directories are published, and whom it refuses to overwrite."""

import errno
import hashlib
import json
from pathlib import Path
from random import Random
from unittest.mock import Mock

import pytest

from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.system import publish
from stas.system.publish import (
    Output,
    building,
    check_replaceable,
    damage,
    is_finished,
    read_manifest,
    write_manifest,
)


def made(directory: Path, key: str = "old", files: str = "a", kind: publish.Kind = "vote") -> Output:
    """A small finished directory."""
    output = Output(directory, kind, {"from": key})
    with building(output) as partial:
        assert partial
        for name in files:
            (partial / f"{name}.png").write_text(key)
        write_manifest(partial, output)
    return output


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_finished_needs_the_same_key_and_every_file_in_its_size(tmp_path: Path):
    output = made(tmp_path / "set", files="ab")
    assert is_finished(output)
    assert not is_finished(Output(output.directory, "vote", {"from": "new"}))
    assert not is_finished(Output(output.directory, "evaluation", output.key))
    (output.directory / "b.png").write_text("longer")
    assert not is_finished(output)
    (output.directory / "b.png").unlink()
    assert not is_finished(output)


def test_finished_compares_keys_as_json_keeps_them(tmp_path: Path):
    output = Output(tmp_path, "vote", {"size": (2, 3)})
    write_manifest(tmp_path, output)
    assert is_finished(output)


def test_a_result_to_be_made_again_is_not_finished(tmp_path: Path):
    output = Output(tmp_path, "vote", {"size": 1})
    write_manifest(tmp_path, output, finished=False, note="an image was missing")
    assert not is_finished(output)
    assert read_manifest(tmp_path, "vote")["note"] == "an image was missing"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', "null", '{"format": 2, "files": [], "key": {}}'])
def test_a_damaged_manifest_is_not_finished(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_text(text)
    assert not is_finished(Output(tmp_path, "vote", {}))
    with pytest.raises(InputDataError):
        read_manifest(tmp_path, "vote")


def test_a_newer_result_replaces_the_older_and_leaves_nothing_else(tmp_path: Path):
    made(tmp_path / "set", "old", "ab")
    output = made(tmp_path / "set", "new", "c")
    assert is_finished(output)
    assert names(tmp_path / "set") == ["c.png", "manifest.json"] and names(tmp_path) == ["set"]


def test_the_same_again_is_not_built(tmp_path: Path):
    output = made(tmp_path / "set")
    with building(output) as partial:
        assert partial is None


def refused(directory: Path, kind: publish.Kind, why: str) -> None:
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=why), building(Output(directory, kind, {"from": "new"})):
        pytest.fail("the block must not run")
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_what_is_not_ours_is_never_replaced(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    refused(precious, "vote", "not known to be stas's own vote")
    (precious / "manifest.json").write_text('{"name": "a web extension", "key": {}, "images": {}}')
    refused(precious, "vote", "not known to be stas's own vote")


@pytest.mark.parametrize("kind", ["prediction set", "store", "evaluation"])
def test_a_directory_of_another_kind_is_never_replaced(tmp_path: Path, kind: publish.Kind):
    made(tmp_path / "set", kind=kind)
    refused(tmp_path / "set", "vote", f"its kind is '{kind}', not vote")


def test_files_added_or_changed_since_keep_a_directory_from_being_replaced(tmp_path: Path):
    output = made(tmp_path / "set", files="ab")
    (output.directory / "notes").mkdir()
    (output.directory / "notes" / "mine.txt").write_text("mine")
    refused(output.directory, "vote", r"added or changed since it was made \(notes/mine\.txt\)")
    (output.directory / "notes" / "mine.txt").unlink()
    (output.directory / "b.png").write_text("corrected by hand")
    refused(output.directory, "vote", r"added or changed since it was made \(b\.png\)")


def test_a_missing_file_and_a_file_browsers_droppings_do_not_matter(tmp_path: Path):
    output = made(tmp_path / "set", files="ab")
    (output.directory / "b.png").unlink()
    (output.directory / ".DS_Store").write_text("")
    assert is_finished(made(tmp_path / "set", "new"))


def test_a_file_or_a_link_in_its_place_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="not a directory made by stas"):
            check_replaceable(tmp_path / name, "vote")


def test_a_failed_build_leaves_the_older_result(tmp_path: Path):
    old = made(tmp_path / "set")
    with pytest.raises(ZeroDivisionError), building(Output(tmp_path / "set", "vote", {"from": "new"})) as partial:
        assert partial
        (partial / "a.png").write_text("half")
        raise ZeroDivisionError
    assert is_finished(old) and names(tmp_path) == ["set"]


def test_a_kept_partial_is_resumed_by_the_same_key_only(tmp_path: Path):
    one, other = (Output(tmp_path / "set", "vote", {"from": key}) for key in ("one", "other"))
    with pytest.raises(ZeroDivisionError), building(one, keep=True) as partial:
        assert partial
        (partial / "a.png").write_text("one")
        (partial / ".b.png.0123456789ab.tmp").write_text("half written")
        raise ZeroDivisionError
    with building(one, keep=True) as partial:
        assert partial and names(partial) == ["a.png"]
        write_manifest(partial, one)
    assert names(tmp_path) == ["set"]
    with pytest.raises(ZeroDivisionError), building(one := Output(one.directory, "vote", "again"), keep=True):
        raise ZeroDivisionError
    with building(other, keep=True) as partial:
        assert partial and names(partial) == []
        write_manifest(partial, other)
    assert names(tmp_path) == ["set"], "what the other key left is removed"


def test_a_directory_lost_between_two_renames_is_brought_back(tmp_path: Path):
    """As on NFS, where two names cannot be swapped at once, and the process was killed between the renames."""
    output = made(tmp_path / "set")
    output.directory.rename(tmp_path / ".set.0123456789ab.old")
    with building(output) as partial:
        assert partial is None
    assert is_finished(output) and names(tmp_path) == ["set"]


def test_the_manifest_lists_every_file_with_its_size(tmp_path: Path):
    output = made(tmp_path / "set", files="ab")
    content = json.loads((output.directory / "manifest.json").read_text())
    hashed = hashlib.sha256(b"old").hexdigest()
    assert len(content.pop("checksum")) == 64
    assert content.pop("sha256") == {"a.png": hashed, "b.png": hashed}
    assert content == {"format": 3, "kind": "vote", "key": {"from": "old"}, "files": {"a.png": 3, "b.png": 3}}


@pytest.mark.parametrize("kind", ["prediction set", "vote", "evaluation"])
def test_every_bit_flipped_in_a_manifest_is_found(tmp_path: Path, kind: publish.Kind):
    output = made(tmp_path / "set", kind=kind, files="abcdef")
    path = output.directory / "manifest.json"
    whole = path.read_bytes()
    random = Random(0)
    for _ in range(1500):
        data = bytearray(whole)
        data[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        assert not is_finished(output)
        with pytest.raises(InputDataError, match=str(output.directory)):
            read_manifest(output.directory, kind)
        with pytest.raises(UsageError, match="not known to be stas's own"):
            check_replaceable(output.directory, kind)


def test_a_manifest_changed_by_hand_says_so(tmp_path: Path):
    path = made(tmp_path / "set").directory / "manifest.json"
    path.write_text(path.read_text().replace('"old"', '"new"'))
    with pytest.raises(InputDataError, match=r"damaged, or changed by hand: .*: restore it, or move .*set away"):
        read_manifest(tmp_path / "set", "vote")


def test_damage_is_found_in_what_the_files_hold(tmp_path: Path):
    output = made(tmp_path / "set", files="abcd")
    assert damage(output.directory, "vote") == []
    (output.directory / "a.png").write_text("odl")  # of the same size
    (output.directory / "b.png").write_text("longer")
    (output.directory / "c.png").unlink()
    (output.directory / "mine.txt").write_text("mine")
    found = ["c.png: missing", "mine.txt: added since it was made", "b.png: 6 bytes instead of 3", "a.png: damaged"]
    assert damage(output.directory, "vote") == found


def test_a_file_that_the_disk_does_not_give_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = made(tmp_path / "set")

    def failing(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(publish, "sha256", failing)
    (problem,) = damage(output.directory, "vote")
    assert problem.startswith("a.png: ") and "Input/output error" in problem


def test_a_disk_that_fails_for_now_does_not_make_a_file_a_changed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = made(tmp_path / "set")
    monkeypatch.setattr(publish, "sha256", Mock(side_effect=StoppedEarly("not now")))
    with pytest.raises(StoppedEarly, match="not now"):
        check_replaceable(output.directory, "vote")


def test_a_manifest_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stas.system.sealed.MAX_JSON_VALUES", 100)
    few, many = ({"images": {str(number): "hash" for number in range(count)}} for count in (5, 20))
    with pytest.raises(UsageError, match=r"manifest\.json: would have .*: divide the images among several directories"):
        write_manifest(tmp_path, Output(tmp_path / "set", "vote", few), images=[{"a": 1}] * 99)
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(UsageError, match="divide the images among several directories"),
        building(Output(tmp_path / "set", "vote", many)),
    ):
        pytest.fail("the block must not run")
    assert not list(tmp_path.iterdir())


def test_links_added_by_a_user_keep_a_directory_from_being_replaced(tmp_path: Path):
    (tmp_path / "data").mkdir()
    places = {"links": tmp_path / "data", "made": tmp_path / "data", "dangling": tmp_path / "gone", "loop": "link"}
    for name, target in places.items():
        if name == "links":  # a directory of nothing but links to directories
            (tmp_path / name).mkdir()
        else:
            made(tmp_path / name)
        (tmp_path / name / "link").symlink_to(target)
        with pytest.raises(UsageError, match=r"not known to be stas's own|added or changed"):
            made(tmp_path / name, "new")
        assert (tmp_path / name / "link").is_symlink()


def test_a_directory_that_cannot_be_listed_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made(tmp_path / "set")
    (tmp_path / "set" / "locked").mkdir()
    listed = publish.os.scandir

    def refused_listing(path: str):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(publish.os, "scandir", refused_listing)
    with pytest.raises(PermissionError):
        made(tmp_path / "set", "new")
    assert (tmp_path / "set" / "a.png").read_text() == "old"


@pytest.mark.parametrize("suffix", ["old", "partial"])
def test_links_in_the_places_of_leftovers_lead_nowhere(tmp_path: Path, suffix: str):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / ".draft.tmp").write_text("precious")
    output = Output(tmp_path / "set", "vote", {"from": "new"})
    with pytest.raises(ZeroDivisionError), building(output, keep=True):
        raise ZeroDivisionError
    (partial,) = tmp_path.glob(".set.*.partial")
    partial.rmdir()
    link = partial if suffix == "partial" else tmp_path / ".set.0123456789ab.old"
    link.symlink_to(victim)
    (tmp_path / ".set.ba9876543210.old").write_text("not a directory")
    with building(output, keep=True) as partial:
        assert partial
        write_manifest(partial, output)
    assert names(tmp_path) == ["set", "victim"] and not output.directory.is_symlink()
    assert names(victim) == [".draft.tmp"]


def test_a_half_removed_directory_is_not_restored(tmp_path: Path):
    """The process was killed while removing the older result, and then the newer one was deleted by hand."""
    (tmp_path / ".set.0123456789ab.old").mkdir()
    (tmp_path / ".set.0123456789ab.old" / "b.png").write_text("old")
    assert is_finished(made(tmp_path / "set"))
    assert names(tmp_path) == ["set"]


@pytest.mark.parametrize("name", [".", ".."])
def test_a_directory_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="has no name of its own"):
        check_replaceable(Path(name), "vote")


@pytest.mark.parametrize("when", ["before the listing", "after the listing"])
def test_a_result_replaced_during_the_check_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    made(tmp_path / "set", "old", "ab")
    listed = publish._files

    def replaced(directory: Path) -> list[Path]:
        monkeypatch.setattr(publish, "_files", listed)
        found = listed(directory)
        made(tmp_path / "set", "new", "c")
        return listed(directory) if when == "before the listing" else found

    monkeypatch.setattr(publish, "_files", replaced)
    check_replaceable(tmp_path / "set", "vote")
    assert names(tmp_path / "set") == ["c.png", "manifest.json"]
