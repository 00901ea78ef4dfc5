import ctypes
import faulthandler
import mmap
import multiprocessing
import os
import pickle
import signal
import threading

import numpy as np
import pytest
import torch
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import ScaleIntensity
from monai.transforms.spatial.array import Resize

from stas.config import Data
from stas.data.resize import area_resize
from stas.data.store import Store, open_store, point_to, pointer
from stas.data.store_file import environment
from stas.data.store_writer import build_store, make_record
from stas.data.tiles import Box
from stas.errors import InputDataError, UsageError
from stas.paths import Workspace, manifest_file, store_data
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
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["data.mdb", "manifest.json"]


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


def test_damaged_stores_are_refused(tmp_path):
    store = build(tmp_path / "key")
    data = store_data(store.directory)
    os.truncate(data, data.stat().st_size - 4096)
    with pytest.raises(InputDataError, match=r"data.mdb: \d+ bytes, but the manifest says \d+: delete the store"):
        Store(store.directory)
    text = manifest_file(store.directory).read_text()
    manifest_file(store.directory).write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(InputDataError, match="a store of format 1, but this version reads format 2: run `stas prepro"):
        Store(store.directory)
    manifest_file(store.directory).write_text(text.replace('"format": 2', '"form": 2'))
    with pytest.raises(InputDataError, match="a store of format None, but this version reads format 2"):
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
