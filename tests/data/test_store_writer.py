"""Building stores: all or nothing, and only once."""

import errno
import os
import time

import numpy as np
import pytest

from stas.data.store import Store
from stas.data.store_manifest import MAX_SAMPLES
from stas.data.store_writer import ABANDONED, build_store, check_count, make_record
from stas.errors import InputDataError, UsageError
from stas.paths import store_data
from tests.support.stores import SPEC, build, of_size, picture, source


def test_more_than_the_first_map_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    with build_store(tmp_path / "key", of_size(1500)) as writer:
        assert writer
        for index in range(16):  # 144 MB; the map begins with 64 MiB and grows by little more
            writer.add(make_record(source(f"s{index}"), noise, noise[..., 0] > 9, of_size(1500)))
    store = Store(tmp_path / "key", network=False)
    assert np.array_equal(store.image(0), noise)
    assert np.array_equal(store.image(15), noise)


def test_a_disk_that_fails_beside_the_making_of_samples_fails_the_build(tmp_path, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("stas.data.store_writer.MAP_STEP", 1 << 20)
    monkeypatch.setattr("stas.data.store_writer.sync_path", failing)
    record = make_record(source("a"), *picture(0), of_size(512))
    with (
        pytest.raises(OSError, match="Input/output error"),
        build_store(tmp_path / "key", of_size(512), network=False) as writer,
    ):
        assert writer
        writer.add(record)  # more than a step of the map
    assert not list(tmp_path.iterdir())


def test_a_failed_build_leaves_nothing(tmp_path):
    for error in (KeyboardInterrupt, InputDataError):
        with pytest.raises(error), build_store(tmp_path / "stores" / "key", SPEC) as writer:
            assert writer
            writer.add(make_record(source("a"), *picture(0), SPEC))
            raise error
    assert list((tmp_path / "stores").iterdir()) == []


def test_a_store_that_is_there_is_not_built_again(tmp_path):
    build(tmp_path / "key", count=2)
    before = store_data(tmp_path / "key").stat()
    with build_store(tmp_path / "key", SPEC) as writer:
        assert writer is None
    assert store_data(tmp_path / "key").stat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_store_has_more_samples_than_a_manifest_could_list(tmp_path, monkeypatch):
    """As with a million tiles: nothing but the index grows with their number."""
    for module in ("untrusted", "sealed"):
        monkeypatch.setattr(f"stas.system.{module}.MAX_JSON_VALUES", 200)
        monkeypatch.setattr(f"stas.system.{module}.MAX_JSON_BYTES", 4000)
    store = build(tmp_path / "key", count=100)
    assert [sample["stem"] for sample in store.samples] == [f"s{index}" for index in range(100)]
    store.verify()


def test_more_samples_than_a_store_can_hold_are_refused_before_the_work(tmp_path, monkeypatch):
    check_count(MAX_SAMPLES)
    with pytest.raises(UsageError, match=r"2000001 samples: a store holds at most 2000000, .*: make several stores"):
        check_count(MAX_SAMPLES + 1)
    for bound, value in (("MAX_SAMPLES", 3), ("MAX_INDEX_BYTES", 1000)):
        with monkeypatch.context() as patch:
            patch.setattr(f"stas.data.store_writer.{bound}", value)
            build(tmp_path / f"{bound}-fits", count=3 if bound == "MAX_SAMPLES" else 2)
            with pytest.raises(UsageError, match="samples: a store holds at most"):
                build(tmp_path / f"{bound}-more", count=4)
            assert not (tmp_path / f"{bound}-more").exists()


def test_a_planted_scratch_directory_is_not_built_in(tmp_path, monkeypatch):
    monkeypatch.setenv("STAS_CACHE_DIR", str(tmp_path / "local"))
    place = tmp_path / "local" / f"stas-{os.geteuid()}-key.build"
    place.parent.mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "data.mdb").write_text("precious")
    place.symlink_to(tmp_path / "theirs")
    assert np.array_equal(build(tmp_path / "key", network=True).full_mask(0), picture(0)[1])
    assert (tmp_path / "theirs" / "data.mdb").read_text() == "precious" and place.is_symlink()


def test_what_killed_builders_left_is_removed_later(tmp_path):
    old, new = tmp_path / ".old.0123456789ab.partial", tmp_path / ".new.0123456789ab.partial"
    for directory, age in ((old, ABANDONED + 60), (new, 60)):
        directory.mkdir()
        (directory / "data.mdb").touch()
        for path in (directory / "data.mdb", directory):
            os.utime(path, (time.time() - age, time.time() - age))
    build(tmp_path / "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "key"]
