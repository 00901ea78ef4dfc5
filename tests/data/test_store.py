import ctypes
import errno
import faulthandler
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import ScaleIntensity
from monai.transforms.spatial.array import Resize

from stas.config import Data
from stas.data import store_file
from stas.data.resize import area_resize
from stas.data.store import Store, open_store, point_to, pointer, record_key, record_sum
from stas.data.store_file import environment
from stas.data.store_writer import build_store, make_record
from stas.data.tiles import Box
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.paths import Workspace, manifest_file, store_data
from tests.support.manifests import change_manifest
from tests.support.stores import SIZE, SPEC, build, build_scaled, of_size, picture, scaled, source


def test_stored_image_is_that_of_the_reference_chain():
    """MONAI's ScaleIntensity, then Resize, against the stored bytes scaled by the manifest's minimum and maximum."""
    image, mask = picture(1, 94, 171)
    record = make_record(source("a"), image, mask, of_size(80))
    chain = Compose([ScaleIntensity(), Resize((80, 80))])
    low, high = record.sample["min"], record.sample["max"]
    stored = np.frombuffer(record.image, np.uint8).reshape(80, 80, 3)
    reference = np.asarray(chain(torch.from_numpy(image).permute(2, 0, 1))).transpose(1, 2, 0)
    assert np.abs((stored - float(low)) / (high - low) - reference).max() <= 0.51 / (high - low)
    stored_mask = np.frombuffer(record.mask, np.uint8).reshape(80, 80)
    reference = np.asarray(Resize((80, 80))(torch.from_numpy(mask[None].astype(np.float32))))[0]
    assert np.abs(stored_mask / 255 - reference).max() <= 0.51 / 255


def test_what_is_stored_is_read(tmp_path):
    store = build(tmp_path / "key")
    assert (len(store), store.key, store.label, store.size, store.skipped) == (3, "key", "STAS", SIZE, [])
    for index in range(3):
        image, mask = picture(index)
        entry = store.samples[index]
        assert entry["stem"] == f"s{index}"
        assert (entry["height"], entry["width"]) == (50, 70)
        assert (entry["min"], entry["max"]) == (image.min(), image.max())
        assert entry["area"] == mask.sum()
        assert np.array_equal(store.full_mask(index), mask)
        assert np.array_equal(store.image(index), np.rint(area_resize(image, SIZE)))
        assert np.array_equal(store.mask(index), np.rint(area_resize(mask, SIZE) * 255))
        assert store.image(index).flags.writeable
        assert store.full_mask(index).dtype == bool
    store.verify()
    with pytest.raises(IndexError):
        store.image(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key"]
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["data.mdb", "manifest.json", "samples.jsonl"]


def test_the_shape_of_a_stored_image():
    assert of_size(80).shape(94, 171) == (80, 80)
    assert scaled(0.5).shape(942, 1716) == (471, 858)
    assert scaled(0.25).shape(1, 1001) == (1, 250)
    assert scaled(1.0).shape(65_535, 1) == (65_535, 1)


def test_samples_of_their_own_shapes_are_read(tmp_path):
    shapes, stored = [(50, 70), (33, 20), (1, 90)], [(25, 35), (16, 10), (1, 45)]
    store = build_scaled(tmp_path / "key", 0.5, shapes)
    assert (store.label, store.size, store.spec.scale) == ("STAS", None, 0.5)
    assert [store.shape(index) for index in range(3)] == stored
    for index, (before, after) in enumerate(zip(shapes, stored, strict=True)):
        image, mask = picture(index, *before)
        assert np.array_equal(store.image(index), np.rint(area_resize(image, after)))
        assert np.array_equal(store.mask(index), np.rint(area_resize(mask, after) * 255))
        assert np.array_equal(store.full_mask(index, "STAS"), mask)
        assert store.samples[index]["areas"] == {"STAS": mask.sum()}
        out = np.empty((*after, 3), np.uint8)
        assert store.image(index, out=out) is out and np.array_equal(out, store.image(index))
    store.verify()
    with pytest.raises(IndexError):
        store.shape(3)


def test_a_window_is_that_part_of_the_sample(tmp_path):
    store = build_scaled(tmp_path / "key", 1.0, [(600, 1100), (9, 1300), (1, 1)])
    random = np.random.default_rng(0)
    for draw in range(200):
        index = draw % 3
        height, width = store.shape(index)
        top, left = int(random.integers(height)), int(random.integers(width))
        box = Box(top, left, int(random.integers(1, height - top + 1)), int(random.integers(1, width - left + 1)))
        rows, columns = slice(top, top + box.height), slice(left, left + box.width)
        image, mask = store.window(index, box)
        assert np.array_equal(image, store.image(index)[rows, columns])
        assert np.array_equal(mask, store.mask(index)[rows, columns])
        assert image.flags.writeable and image.flags.c_contiguous
        out = np.empty_like(image), np.empty_like(mask)
        assert store.window(index, box, out)[0] is out[0]
        assert np.array_equal(out[0], image) and np.array_equal(out[1], mask)


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, -1, 5, 5), (46, 0, 5, 5), (0, 66, 5, 5), (0, 0, 51, 1), (0, 0, 1, 71), (3, 3, 0, 5)]
)
def test_a_window_beyond_the_sample_is_refused(tmp_path, box):
    store = build_scaled(tmp_path / "key", 1.0, [(50, 70)])
    with pytest.raises(IndexError, match=r"which has 70 x 50 pixels \(width x height\)"):
        store.window(0, Box(*box))


def _reads_beside_forbidden_tiles(store: Store, box: Box, allowed: str) -> None:
    """Read `box` of sample 0 when the pages of all tiles but one are out of reach."""
    faulthandler.disable()
    expected = store.window(0, box)
    libc = ctypes.CDLL(None)
    with environment(store_data(store.directory)).begin(buffers=True) as transaction:
        for key, data in transaction.cursor():
            part, tile = bytes(key).decode()[9:].removesuffix("/STAS"), bytes(key).decode()[-3:]
            if part == "full" or tile == allowed:
                continue
            first = np.frombuffer(data, np.uint8).ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
            assert libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(len(data)), 0) == 0
    same = all(np.array_equal(one, other) for one, other in zip(store.window(0, box), expected, strict=True))
    os._exit(0 if same else 1)


@pytest.mark.parametrize(("box", "end"), [(Box(600, 512, 300, 512), 0), (Box(600, 511, 300, 512), -signal.SIGSEGV)])
def test_a_window_touches_no_tile_beside_its_own(tmp_path, box, end):
    """The second window begins one column further left, and so the system ends the process."""
    store = build_scaled(tmp_path / "key", 1.0, [(1100, 1300)])
    child = multiprocessing.get_context("fork").Process(target=_reads_beside_forbidden_tiles, args=(store, box, "1/1"))
    child.start()
    child.join(60)
    assert child.exitcode == end


def test_two_stores_of_one_file_in_one_process(tmp_path):
    first = build(tmp_path / "key")
    first.image(0)  # an open store can be pickled, too
    second = pickle.loads(pickle.dumps(first))
    assert np.array_equal(first.image(0), second.image(0))
    first.close()
    assert np.array_equal(first.image(1), second.image(1))


def test_threads_may_open_at_once(tmp_path):
    store = build(tmp_path / "key")
    expected = np.rint(area_resize(picture(1)[0], SIZE))
    results = []
    barrier = threading.Barrier(8)

    def read():
        barrier.wait()
        results.append(np.array_equal(store.image(1), expected))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def _reads_in_child(store: Store, expected: np.ndarray, parents: object) -> None:
    same = np.array_equal(store.image(2), expected)
    os._exit(0 if same and environment(store_data(store.directory)) is not parents else 1)


def test_a_forked_reader_reads(tmp_path):
    store = build(tmp_path / "key")
    expected = store.image(2)  # open before the child is made
    opened = environment(store_data(store.directory))
    arguments = store, expected, opened  # which LMDB forbids to use after a fork
    child = multiprocessing.get_context("fork").Process(target=_reads_in_child, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert np.array_equal(store.image(2), expected)


def test_verify_finds_a_changed_byte(tmp_path):
    store = build(tmp_path / "key")
    data = bytearray(store_data(store.directory).read_bytes())
    position = data.index(store.image(1).tobytes()[:64])
    store.close()
    data[position] ^= 1
    store_data(store.directory).write_bytes(data)
    with pytest.raises(InputDataError, match="sample s1 is damaged"):
        Store(store.directory, network=False).verify()


def everything(store: Store) -> list[np.ndarray]:
    """All pixels of a store, read by a process that sees it for the first time."""
    opened = Store(store.directory, network=False)
    try:
        read = (opened.image, opened.mask, opened.full_mask)
        return [part(index) for index in range(len(opened)) for part in read]
    finally:
        opened.close()


@pytest.mark.parametrize("form", ["size", "scale"])
def test_a_bit_flipped_in_the_data_is_found_when_it_is_read(tmp_path, form):
    """Or it lies in bytes that are never used."""
    if form == "size":
        store = build(tmp_path / "key", count=9)
    else:
        store = build_scaled(tmp_path / "key", 1.0, [(50, 70), (600, 9), (1, 1)])
    expected = everything(store)
    path = store_data(store.directory)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    found = 0
    for place in random.integers(0, len(whole), 250):
        data = bytearray(whole)
        data[place] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            same = all(np.array_equal(one, other) for one, other in zip(everything(store), expected, strict=True))
            assert same, f"byte {place} changed a sample"
        except InputDataError as error:
            assert str(store.directory) in str(error) and str(error).endswith("run `stas preprocess` again")
            assert "sample s" in str(error) or "not a data file written by LMDB" in str(error)
            found += 1
    assert found > 100


@pytest.mark.parametrize("name", ["manifest.json", "samples.jsonl"])
def test_a_bit_flipped_in_the_manifest_or_index_is_found(tmp_path, name):
    store = build(tmp_path / "key")
    path = store.directory / name
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole), 1500):
        data = bytearray(whole)
        data[place] ^= 1 << random.integers(8)
        path.write_bytes(data)
        with pytest.raises(InputDataError, match=str(store.directory)):
            Store(store.directory)


def test_a_checksum_is_compared_once_per_process(tmp_path, monkeypatch):
    """Training reads a sample in every epoch."""
    store = build(tmp_path / "key")
    compared: list[str] = []
    monkeypatch.setattr("stas.data.store.record_sum", lambda *of: compared.append(of[1]) or record_sum(*of))
    for _ in range(3):
        for index in range(2):
            store.image(index)
            store.mask(index)
    assert sorted(compared) == ["image/0/0"] * 2 + ["mask/STAS/0/0"] * 2


def test_an_intact_record_of_another_sample_is_no_record_of_this(tmp_path):
    """As after a page that the disk wrote to the wrong place."""
    store, other = build(tmp_path / "key"), build(tmp_path / "other")
    store.close()
    data = store_data(store.directory)
    with (
        lmdb.open(str(data), subdir=False, lock=False) as changed,
        changed.begin(write=True) as transaction,
    ):
        record = transaction.get(record_key(1, "image/0/0"))
        assert record and transaction.put(record_key(0, "image/0/0"), record)
    change_manifest(store.directory, lambda content: content["files"].update({data.name: data.stat().st_size}))
    damaged = Store(store.directory, network=False)
    with pytest.raises(InputDataError, match=r"key: sample s0 is damaged \(image/0/0\): delete the store and run"):
        damaged.image(0)
    assert np.array_equal(damaged.image(1), other.image(1))
    assert list(damaged.damaged()) == ["s0"]


def test_damaged_stores_are_refused(tmp_path):
    store = build(tmp_path / "key")
    data = store_data(store.directory)
    os.truncate(data, data.stat().st_size - 4096)
    with pytest.raises(InputDataError, match=r"data.mdb: \d+ bytes, but the manifest says \d+: delete the store"):
        Store(store.directory)
    text = manifest_file(store.directory).read_text()
    manifest_file(store.directory).write_text(text.replace('"format": 3', '"format": 1'))
    with pytest.raises(InputDataError, match="a store of format 1, but this version reads format 3: run `stas prepro"):
        Store(store.directory)
    manifest_file(store.directory).write_text(text.replace('"format": 3', '"form": 3'))
    with pytest.raises(InputDataError, match="a store of format None, but this version reads format 3"):
        Store(store.directory)


def test_network_store_is_built_and_read_through_local_disk(tmp_path, monkeypatch):
    local = tmp_path / "local"
    monkeypatch.setenv("STAS_CACHE_DIR", str(local))
    with build_store(tmp_path / "shared" / "key", SPEC, network=True) as writer:
        assert writer
        writer.add(make_record(source("a"), *picture(0), SPEC))
        assert not list((tmp_path / "shared").glob(".*/data.mdb"))  # LMDB works elsewhere
        assert len(list(local.glob("*/data.mdb"))) == 1
    assert list(local.iterdir()) == []
    store = Store(tmp_path / "shared" / "key", network=True)
    assert np.array_equal(store.full_mask(0), picture(0)[1])
    (copy,) = local.glob("*/key.mdb")
    assert copy.read_bytes() == store_data(store.directory).read_bytes()
    store_data(store.directory).write_bytes(b"\0" * copy.stat().st_size)  # it is not read again
    written = copy.stat().st_mtime_ns
    again = Store(store.directory, network=True)
    assert np.array_equal(again.full_mask(0), picture(0)[1])
    assert copy.stat().st_mtime_ns == written


def test_a_cut_off_local_copy_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("STAS_CACHE_DIR", str(tmp_path / "local"))
    build(tmp_path / "key")
    copy = tmp_path / "local" / f"stas-{os.getuid()}" / "key.mdb"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"half")
    assert np.array_equal(Store(tmp_path / "key", network=True).full_mask(1), picture(1)[1])


def test_a_local_copy_of_other_bytes_is_not_kept(tmp_path, monkeypatch):
    """The file server gave other bytes than were written."""
    monkeypatch.setenv("STAS_CACHE_DIR", str(tmp_path / "local"))
    store = build(tmp_path / "key")
    data = bytearray(store_data(store.directory).read_bytes())
    data[-1] ^= 1
    store_data(store.directory).write_bytes(data)
    with pytest.raises(InputDataError, match=r"data\.mdb: damaged: its content does not match the manifest: del"):
        Store(store.directory, network=True).image(0)
    assert not list((tmp_path / "local").rglob("*.mdb"))


@pytest.mark.parametrize("damage", ["a page number", "a pixel"])
def test_a_damaged_local_copy_is_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("STAS_CACHE_DIR", str(tmp_path / "local"))
    store = Store(build(tmp_path / "key").directory, network=True)
    expected = store.image(1)
    store.close()
    (copy,) = tmp_path.glob("local/*/key.mdb")
    data = bytearray(copy.read_bytes())
    if damage == "a pixel":
        data[data.index(expected.tobytes()[:64])] ^= 1
    else:  # the root of both meta pages
        data[128:136] = data[4096 + 128 : 4096 + 136] = b"\xff" * 8
    copy.write_bytes(data)
    if damage == "a pixel":
        damaged = Store(store.directory, network=True)
        with pytest.raises(InputDataError, match=r"sample s1 is damaged .*key\.mdb, a copy that is now removed: run"):
            damaged.image(1)
        damaged.close()
    assert np.array_equal(Store(store.directory, network=True).image(1), expected)


def foreign(place: Path, how: str) -> None:
    """A directory in the place of the cache that somebody else could have made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if how == "a link":
        (place.parent / "theirs").mkdir(exist_ok=True)
        place.symlink_to(place.parent / "theirs")
    elif how == "a file":
        place.write_text("theirs")
    else:
        place.mkdir()
        place.chmod(0o777)


@pytest.mark.parametrize("how", ["a link", "a file", "open to others"])
def test_a_cache_that_others_can_write_to_is_not_used(tmp_path, monkeypatch, caplog, how):
    monkeypatch.setenv("STAS_CACHE_DIR", str(tmp_path / "local"))
    store = build(tmp_path / "key")
    store.close()
    cache = tmp_path / "local" / f"stas-{os.geteuid()}"
    shutil.rmtree(cache, ignore_errors=True)
    foreign(cache, how)
    planted = b"\0" * store_data(store.directory).stat().st_size
    if cache.is_dir():
        (cache / "key.mdb").write_bytes(planted)
    assert np.array_equal(Store(store.directory, network=True).full_mask(0), picture(0)[1])
    assert f"{cache}: not used, because it is a link, another user's, or others can write to it" in caplog.text
    assert not cache.is_dir() or [path.name for path in cache.iterdir()] == ["key.mdb"]
    for number in range(2, 10):
        place = cache.with_name(f"{cache.name}-{number}")
        shutil.rmtree(place, ignore_errors=True)
        foreign(place, how)
    Store(store.directory, network=False).image(0)  # it needs no cache
    with pytest.raises(UsageError, match="set STAS_CACHE_DIR to a local directory of your own"):
        Store(store.directory, network=True).image(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["the cache", "the copy"])
def test_what_another_user_owns_is_not_trusted(tmp_path, monkeypatch, what):
    monkeypatch.setenv("STAS_CACHE_DIR", str(tmp_path / "local"))
    store = build(tmp_path / "key")
    store.close()
    cache = tmp_path / "local" / f"stas-{os.geteuid()}"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "key.mdb").write_bytes(b"\0" * store_data(store.directory).stat().st_size)
    os.chown(cache if what == "the cache" else cache / "key.mdb", 1234, 1234)
    assert np.array_equal(Store(store.directory, network=True).full_mask(0), picture(0)[1])


def test_a_mark_planted_by_another_does_not_skip_the_check_of_pages(tmp_path, monkeypatch):
    """A mark of the right name that is a link, as somebody could leave in a cache that was once open to others."""
    monkeypatch.setenv("STAS_CACHE_DIR", str(tmp_path / "local"))
    store = build(tmp_path / "key")
    store.image(0)
    store.close()
    (mark,) = tmp_path.glob("local/*/*.checked")
    mark.unlink()
    mark.symlink_to(store_data(store.directory))
    checked: list[Path] = []
    monkeypatch.setattr("stas.data.store_file._first_problem", checked.append)
    Store(store.directory, network=False).image(0)
    assert checked == [store_data(store.directory)]


def test_open_store_follows_the_pointer(tmp_path):
    workspace = Workspace(tmp_path)
    data = Data.model_validate({"size": SIZE})
    with pytest.raises(
        UsageError, match=r"STAS-32x40\.json: no store with label STAS at 40 x 32 pixels: run `stas preproc"
    ):
        open_store(workspace, data)
    for key in ("first", "second"):
        point_to(workspace, build(workspace.store(key)))
        assert open_store(workspace, data).key == key
    before = pointer(workspace, SPEC).stat()
    point_to(workspace, Store(workspace.store("second")))
    assert pointer(workspace, SPEC).stat() == before
    with pytest.raises(UsageError):
        open_store(workspace, Data.model_validate({"size": 64}))


def test_stores_of_one_label_at_sizes_and_scales_have_pointers_of_their_own(tmp_path):
    workspace = Workspace(tmp_path)
    half = Data.model_validate({"size": SIZE, "scale": 0.5})
    point_to(workspace, build(workspace.store("sized")))
    with pytest.raises(UsageError, match=r"scale0\.5\.json: no store with label STAS at scale 0\.5: run `stas pre"):
        open_store(workspace, half)
    point_to(workspace, build_scaled(workspace.store("scaled"), 0.5, [(50, 70)]))
    assert open_store(workspace, half).key == "scaled"
    assert open_store(workspace, half.model_copy(update={"size": (64, 64)})).key == "scaled"  # of a window
    assert open_store(workspace, Data.model_validate({"size": SIZE})).key == "sized"


def test_a_pointer_to_a_store_of_something_else_is_refused(tmp_path):
    workspace = Workspace(tmp_path)
    point_to(workspace, build(workspace.store("sized")))
    pointer(workspace, SPEC).rename(pointer(workspace, scaled(0.5)))
    with pytest.raises(InputDataError, match="names a store with label STAS at 40 x 32 pixels: delete it and run"):
        open_store(workspace, Data.model_validate({"scale": 0.5}))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_data_that_the_machine_could_not_read_are_not_called_damaged(tmp_path, monkeypatch, error):
    (tmp_path / "data.mdb").write_bytes(bytes(8192))

    def failing(*_, **__):
        raise error

    monkeypatch.setenv("STAS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store_file, "verify", failing)
    with pytest.raises(StoppedEarly, match="mdb: this machine could not read it"):
        environment(tmp_path / "data.mdb")


def test_an_error_of_the_system_that_lmdb_quotes_does_not_make_data_damaged(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(bytes(8192))

    def failing(path: str, **_):
        raise lmdb.Error(f"{path}: {os.strerror(errno.ESTALE)}")

    monkeypatch.setattr(store_file, "_check_pages", lambda _: None)
    monkeypatch.setattr(store_file.lmdb, "open", failing)
    with pytest.raises(StoppedEarly, match="mount the volume again"):
        environment(tmp_path / "data.mdb")
