import errno
import multiprocessing
import os
import pickle
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import ScaleIntensity
from monai.transforms.spatial.array import Resize

from stas.config import Data
from stas.errors import InputDataError, UsageError
from stas.paths import Workspace, manifest, store_data
from stas.store import Store, _environment, area_resize, open_store, point_to
from stas.store_writer import ABANDONED, Source, build_store, make_record

SIZE = (32, 40)


def source(stem: str) -> Source:
    return Source(stem=stem, image=f"{stem}.jpg", image_sha256="0", annotation=f"{stem}.json", annotation_sha256="1")


def picture(seed: int, height=50, width=70) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(5, 250, (height, width, 3), np.uint8), random.random((height, width)) < 0.3


def build(directory: Path, count=3, **options) -> Store:
    with build_store(directory, "STAS", SIZE, **options) as writer:
        for seed in range(count):
            writer.add(make_record(source(f"s{seed}"), *picture(seed), SIZE))
    return Store(directory, network=False)


def area(array: np.ndarray, size) -> np.ndarray:
    """The resize of torch, of an array (h, w, c)."""
    tensor = torch.from_numpy(array.astype(np.float64)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(tensor, size=size, mode="area")[0].permute(1, 2, 0).numpy()


def test_area_resize_by_hand():
    halves = area_resize(np.array([[0, 4, 10, 20], [8, 0, 30, 40]], np.uint8), (1, 2))
    assert halves.tolist() == [[3, 25]]
    thirds = area_resize(np.array([[6, 30, 90]], np.uint8), (1, 2))  # the middle pixel counts fully on both sides
    assert thirds.tolist() == [[18, 60]]
    larger = area_resize(np.array([[0, 10]], np.uint8), (1, 3))
    assert larger.tolist() == [[0, 5, 10]]
    assert area_resize(np.array([[True, False]]), (1, 1)).tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((94, 171), (80, 80)),
        ((50, 70), (64, 200)),
        ((33, 65), (32, 32)),
        ((800, 900), (32, 33)),
        ((7, 5), (7, 5)),
        ((2, 3000), (32, 9)),
    ],
)
def test_area_resize_is_that_of_torch(before, after):
    image, mask = picture(0, *before)
    assert np.abs(area_resize(image, after) - area(image, after)).max() < 1e-4
    assert np.abs(area_resize(mask, after) - area(mask[..., None], after)[..., 0]).max() < 1e-6
    values = (image / 255).astype(np.float32)
    assert np.abs(area_resize(values, after) - area(values, after)).max() < 1e-6
    assert area_resize(image, after).dtype == np.float32


@pytest.mark.parametrize("after", [100, 150])
def test_area_resize_finds_a_single_row_of_a_mask_wherever_it_is(after):
    for row in range(130):
        mask = np.zeros((130, 3), bool)
        mask[row, 1] = True
        expected = area(mask[..., None], (after, 2))[..., 0]
        assert np.abs(area_resize(mask, (after, 2)) - expected).max() < 1e-6


@pytest.mark.parametrize("before", [(65_535, 1), (1, 65_535), (3000, 1000)])
def test_area_resize_works_in_blocks(before):
    image = np.zeros((*before, 3), np.uint8)
    tracemalloc.start()
    try:
        area_resize(image, (800, 800), scale=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_stored_image_is_that_of_the_reference_chain():
    """MONAI's ScaleIntensity, then Resize, against the stored bytes scaled by the manifest's minimum and maximum."""
    image, mask = picture(1, 94, 171)
    record = make_record(source("a"), image, mask, (80, 80))
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
    os._exit(0 if same and _environment(store_data(store.directory)) is not parents else 1)


def test_a_forked_reader_reads(tmp_path):
    store = build(tmp_path / "key")
    expected = store.image(2)  # open before the child is made
    environment = _environment(store_data(store.directory))
    arguments = store, expected, environment  # which LMDB forbids to use after a fork
    child = multiprocessing.get_context("fork").Process(target=_reads_in_child, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert np.array_equal(store.image(2), expected)


def test_more_than_the_first_map_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    with build_store(tmp_path / "key", "STAS", (1500, 1500)) as writer:
        for index in range(16):  # 144 MB; the map begins with 64 MiB and grows by little more
            writer.add(make_record(source(f"s{index}"), noise, noise[..., 0] > 9, (1500, 1500)))
    store = Store(tmp_path / "key", network=False)
    assert np.array_equal(store.image(0), noise)
    assert np.array_equal(store.image(15), noise)


def test_a_disk_that_fails_beside_the_making_of_samples_fails_the_build(tmp_path, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("stas.store_writer.MAP_STEP", 1 << 20)
    monkeypatch.setattr("stas.store_writer.sync_path", failing)
    record = make_record(source("a"), *picture(0), (512, 512))
    with (
        pytest.raises(OSError, match="Input/output error"),
        build_store(tmp_path / "key", "STAS", (512, 512), network=False) as writer,
    ):
        writer.add(record)  # more than a step of the map
    assert not list(tmp_path.iterdir())


def test_a_failed_build_leaves_nothing(tmp_path):
    for error in (KeyboardInterrupt, InputDataError):
        with pytest.raises(error), build_store(tmp_path / "stores" / "key", "STAS", SIZE) as writer:
            writer.add(make_record(source("a"), *picture(0), SIZE))
            raise error
    assert list((tmp_path / "stores").iterdir()) == []


def test_the_second_of_two_builders_discards_its_own(tmp_path):
    with build_store(tmp_path / "key", "STAS", SIZE) as slow:
        slow.add(make_record(source("slow"), *picture(0), SIZE))
        build(tmp_path / "key", count=2)
        before = store_data(tmp_path / "key").stat()
    assert [entry["stem"] for entry in Store(tmp_path / "key").samples] == ["s0", "s1"]
    assert store_data(tmp_path / "key").stat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_what_killed_builders_left_is_removed_later(tmp_path):
    old, new = tmp_path / ".old.1.tmp", tmp_path / ".new.2.tmp"
    for directory, age in ((old, ABANDONED + 60), (new, 60)):
        directory.mkdir()
        (directory / "data.mdb").touch()
        for path in (directory / "data.mdb", directory):
            os.utime(path, (time.time() - age, time.time() - age))
    build(tmp_path / "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "key"]


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
    with pytest.raises(InputDataError, match=r"data.mdb: \d+ bytes, the manifest says \d+: delete the store"):
        Store(store.directory)
    text = manifest(store.directory).read_text()
    manifest(store.directory).write_text(text.replace('"format": 1', '"format": 0'))
    with pytest.raises(InputDataError, match="not a store of format 1"):
        Store(store.directory)


def test_network_store_is_built_and_read_through_local_disk(tmp_path, monkeypatch):
    local = tmp_path / "local"
    monkeypatch.setenv("STAS_CACHE_DIR", str(local))
    with build_store(tmp_path / "shared" / "key", "STAS", SIZE, network=True) as writer:
        writer.add(make_record(source("a"), *picture(0), SIZE))
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
        UsageError, match=r"STAS-32x40\.json: no store of label STAS at 32 x 40 pixels: run `stas preproc"
    ):
        open_store(workspace, data)
    for key in ("first", "second"):
        point_to(workspace, build(workspace.store(key)))
        assert open_store(workspace, data).key == key
    before = workspace.dataset("STAS", SIZE).stat()
    point_to(workspace, Store(workspace.store("second")))
    assert workspace.dataset("STAS", SIZE).stat() == before
    with pytest.raises(UsageError):
        open_store(workspace, Data.model_validate({"size": 64}))
