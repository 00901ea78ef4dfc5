import os
from pathlib import Path

import pytest

from stas.errors import InputDataError
from stas.system.untrusted import check_file, parse_json, parse_yaml, read_bounded, shown


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    assert check_file(path, 5) == 5 and read_bounded(tmp_path / "link", 5) == b"12345"
    for read in (check_file, read_bounded):
        with pytest.raises(InputDataError, match="a: 5 bytes, more than 4"):
            read(path, 4)
        for special in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
            with pytest.raises(InputDataError, match="not a regular file"):
                read(special, 5)
        for missing in (tmp_path / "gone", tmp_path / "a\0b", tmp_path / ("x" * 300)):
            with pytest.raises(InputDataError, match="not readable"):
                read(missing, 5)


def test_a_file_that_grows_after_it_was_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stas.system.untrusted.check_file", lambda path, most: 0)
    with pytest.raises(InputDataError, match="more than 100 bytes"):
        read_bounded(Path("/dev/zero"), 100)


def test_json_is_utf8_with_or_without_its_mark():
    assert parse_json('{"é": [1]}'.encode()) == parse_json('\ufeff{"é": [1]}'.encode()) == {"é": [1]}
    for content, said in (("[]".encode("utf-16"), "decode"), (b"[" * 10**5, "deeply"), (b"[," * 4 * 10**6, "values")):
        with pytest.raises(ValueError, match=said):
            parse_json(content)


def test_yaml_is_plain_values():
    assert parse_yaml("a: [1, {b: 2.5}]") == {"a": [1, {"b": 2.5}]}
    for text in (
        "a: &x 1\nb: *x",
        "!!python/name:os.system",
        "!!timestamp x",
        "2001-99-99",
        "9" * 5000,
        "{[]: 1}",
        "a: b: c",
    ):
        with pytest.raises(ValueError, match=r"."):
            parse_yaml(text)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, list(range(10**5)), {"a": ["b" * 1000] * 1000}, 16**10_000, b"\0" * 10**5],
    ids=["text", "list", "mapping", "number", "bytes"],  # pytest cannot write the number down either
)
def test_a_message_shows_little_of_a_value(value: object):
    assert 0 < len(shown(value)) <= 80
    assert shown(["4", 1.5]) == "['4', 1.5]"
