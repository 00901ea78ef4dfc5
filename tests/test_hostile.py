"""Untrusted files: every reader returns a result or refuses with a message, quickly, and within a memory limit.

The short run tries the same 150 inputs for each reader; `make fuzz` tries ten thousand new ones for each. Memory
limits, beyond the process's memory after its imports: 2.6 GiB for an image (1.8 measured), 2.4 GiB for JSON (1.5
measured), 200 MiB for everything else.
"""

import hashlib
import io
import json
import math
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from stas.config import Data, Optimizer, Split
from stas.data.annotations import find_image, rasterise, read_labelme
from stas.data.images import MAX_PIXELS, grey_size, read_grey, read_image
from stas.data.split import split_samples
from stas.data.store import Store, open_store, pointer
from stas.data.tiles import Box
from stas.ensemble import ENSEMBLES, load_ensemble
from stas.errors import InputDataError, UsageError
from stas.infer import _check_same_images
from stas.models import weights
from stas.models.checkpoint import (
    CHECKSUM_BYTES,
    fitting,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
    take_snapshot,
)
from stas.models.pickles import convert_weights
from stas.paths import Workspace, manifest_file, store_data, store_samples
from stas.recipe import RECIPES, load_recipe, parse_recipe, recipe_names
from stas.results.foreground import foreground
from stas.system.distributed import Ranks
from stas.system.publish import Output, check_replaceable, is_finished, write_manifest
from stas.training.optim import build_optimizer
from stas.training.run import TrainState
from tests.support import stores
from tests.support.fuzzing import PROFILE, TEXTS, VALUES, Referee, altered, json_files, pictures, repair_png, spoilt
from tests.support.labelme import TRIANGLE, shape
from tests.support.manifests import change_manifest, change_sample, resealed, write_index

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about tags it ignores
PICTURES = pictures()
LABELME = {
    "version": "5.0.1",
    "flags": {},
    "shapes": [
        shape(TRIANGLE),
        shape([[1, 2], [30, 40]], "rectangle"),
        shape([[20, 20], [25, 20]], "circle"),
        shape([[1, 1], [9, 9], [1, 30]], "linestrip"),
        shape([[5, 5]], "point"),
        shape([[0, 0], [40, 9]], "line"),
    ],
    "imagePath": "..\\images\\photo.jpg",
    "imageData": "aGVsbG8=",
    "imageHeight": 40,
    "imageWidth": 50,
}


@pytest.fixture
def referee(request: pytest.FixtureRequest) -> Iterator[Referee]:
    judge = Referee(request.node.name.removeprefix("test_fuzz_"))
    yield judge
    print(judge.report())


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("STAS_CACHE_DIR", str(place))
    return place


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory for the reader's files, inside another in which nothing may appear."""
    place = tmp_path / "guarded" / "inner"
    place.mkdir(parents=True)
    yield place
    assert list((tmp_path / "guarded").iterdir()) == [place]


def test_fuzz_labelme(referee: Referee, outside: Path):
    path = outside / "a.json"
    (outside / "images").mkdir()
    (outside / "images" / "photo.jpg").touch()

    @PROFILE
    @given(json_files([LABELME]))
    def fuzz(content: bytes) -> None:
        def read() -> None:
            path.write_bytes(content)
            annotation = read_labelme(path)
            assert rasterise(annotation.shapes, (40, 50), "STAS", path).shape == (40, 50)
            found = find_image(path, annotation, [outside / "images"])
            assert not isinstance(found, Path) or found.resolve().is_relative_to(outside)
            assert annotation.labels is not None

        referee.judge(read)

    fuzz()


@pytest.mark.parametrize("kind", PICTURES)
def test_fuzz_image(referee: Referee, outside: Path, kind: str):
    path = outside / "a.png"
    files = spoilt(PICTURES[kind])

    @PROFILE
    @given(files | files.map(repair_png) if kind == "png" else files)
    def fuzz(content: bytes) -> None:
        def read() -> None:
            image = read_image(content)
            assert image.ndim == 3 and image.shape[2] == 3 and image.size

        def read_mask() -> None:
            path.write_bytes(content)
            grey_size(path)
            values = read_grey(path)
            assert values.ndim == 2
            foreground(values, None, path)

        referee.judge(read)
        referee.judge(read_mask)

    fuzz()


@pytest.fixture(params=["size", "scale"])
def store(outside: Path, request: pytest.FixtureRequest) -> Store:
    if request.param == "size":
        return stores.build(outside / "stores" / "key")
    return stores.build_scaled(outside / "stores" / "key", 1.0, [(50, 70), (600, 9), (1, 1)])


@pytest.fixture
def sized(outside: Path) -> Store:
    return stores.build(outside / "stores" / "key")


def read_store(store: Store) -> None:
    opened = Store(store.directory, network=False)
    try:
        for index in range(len(opened)):
            height, width = opened.shape(index)
            image, mask = opened.image(index), opened.mask(index)
            assert image.shape == (height, width, 3) and mask.shape == (height, width)
            assert opened.full_mask(index).size
            corner = Box(height // 2, width // 2, height - height // 2, width - width // 2)
            parts = opened.window(index, corner)
            assert np.array_equal(parts[0], image[height // 2 :, width // 2 :])
            assert np.array_equal(parts[1], mask[height // 2 :, width // 2 :])
        opened.verify()
    finally:
        opened.close()


def test_fuzz_manifest_of_a_store(referee: Referee, store: Store):
    path = manifest_file(store.directory)
    whole = json.loads(path.read_text())
    del whole["checksum"]

    @PROFILE
    @given(json_files([whole]))
    def fuzz(content: bytes) -> None:
        for text in (content, resealed(content)):
            path.write_bytes(text)
            referee.judge(lambda: read_store(store))

    fuzz()


def test_fuzz_index_of_a_store(referee: Referee, store: Store):
    path = store_samples(store.directory)
    first, *others = path.read_bytes().splitlines(keepends=True)

    @PROFILE
    @given(json_files([json.loads(first)]))
    def fuzz(content: bytes) -> None:
        write_index(store.directory, b"".join((content.replace(b"\n", b" "), b"\n", *others)))
        referee.judge(lambda: read_store(store))

    fuzz()


def test_fuzz_data_of_a_store(referee: Referee, store: Store):
    path = store_data(store.directory)
    whole = path.read_bytes()

    @PROFILE
    @given(spoilt([whole]) | pages(whole))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        change_manifest(store.directory, lambda manifest: manifest["files"].update({path.name: len(content)}))
        referee.judge(lambda: read_store(store))

    fuzz()


@st.composite
def pages(draw: st.DrawFn, whole: bytes) -> bytes:
    """An LMDB data file with wrong numbers in its meta pages, page headers and nodes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        page = draw(st.integers(0, len(whole) // 4096 - 1)) * 4096
        place = page + draw(st.integers(0, 159) | st.integers(0, 4088))
        number = draw(
            st.sampled_from([0, 1, 2, 3, 7, 99, 4095, 65535, 2**31, 2**47, 2**64 - 1]) | st.integers(0, 2**64 - 1)
        )
        form = draw(st.sampled_from(["<B", "<H", "<I", "<Q"]))
        struct.pack_into(form, data, min(place, len(data) - 8), number & ((1 << 8 * struct.calcsize(form)) - 1))
    return bytes(data)


def test_fuzz_pointer_to_a_store(referee: Referee, outside: Path, sized: Store):
    workspace = Workspace(outside)
    data = Data.model_validate({"size": stores.SIZE})
    path = pointer(workspace, stores.SPEC)

    @PROFILE
    @given(json_files([{"store": "key"}]) | TEXTS.map(lambda text: json.dumps({"store": text}).encode()))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)

        def read() -> None:
            assert open_store(workspace, data).directory.parent == workspace.stores

        referee.judge(read)

    fuzz()


def network_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    optimizer = build_optimizer(network.parameters(), Optimizer.model_validate({"lr": 0.01}))
    network(torch.rand(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    return network, optimizer


METADATA = {
    "recipe": {"name": "tiny"},
    "run": "tiny",
    "store": "key",
    "validation": ["a", "b"],
    "state": {
        "epoch": 1,
        "step": 2,
        "images": 3,
        "loss_sum": [0.5],
        "elapsed": 1.5,
        "best_loss": 0.1,
        "best_epoch": 1,
    },
    "scaler": {},
}


def load_all(path: Path) -> None:
    """Load a checkpoint as training does."""
    saved = load_checkpoint(path)
    network, optimizer = network_and_optimizer()
    with fitting(path):
        TrainState.from_json(saved.metadata["state"], Ranks(0, 1, torch.device("cpu")))
        parse_recipe(saved.metadata["recipe"], str(path))
        network.load_state_dict(saved.network)
        restore_optimizer(optimizer, saved.optimizer)


def sealed(data: bytes) -> bytes:
    """The data with a correct checksum, as an attacker would write it."""
    return data[:-CHECKSUM_BYTES] + hashlib.sha256(data[:-CHECKSUM_BYTES]).digest()


@st.composite
def checkpoints(draw: st.DrawFn, whole: bytes) -> bytes:
    """Checkpoints with a changed header of correct length."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    if draw(st.booleans()):
        stas = json.loads(header["__metadata__"]["stas"])
        header["__metadata__"]["stas"] = json.dumps(draw(altered([stas])))
    else:
        header = draw(altered([header]))
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def test_fuzz_checkpoint(referee: Referee, outside: Path):
    path = outside / "a.safetensors"
    save_checkpoint(path, take_snapshot(network_and_optimizer()[0], METADATA, network_and_optimizer()[1]))
    whole = path.read_bytes()
    assert sealed(whole) == whole
    load_all(path)

    @PROFILE
    @given(spoilt([whole]) | spoilt([whole]).map(sealed) | checkpoints(whole).map(sealed))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        referee.judge(lambda: load_all(path))

    fuzz()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_fuzz_weights(referee: Referee, outside: Path, suffix: str):
    from safetensors.torch import save_file

    path = outside / f"a{suffix}"
    state = network_and_optimizer()[0].state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()

    @PROFILE
    @given(spoilt([whole]))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        if suffix == ".safetensors":
            referee.judge(lambda: weights._read(path))
        else:
            referee.judge(lambda: convert_weights(path, outside / "b.safetensors", allow_pickle=True))

    fuzz()


YAML_MARKS = ["a: ", "- ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!int ", "!!python/name:os.system ", "? ", "|\n"]
YAML_MARKS += [">\n", "1:2:3", "2001-99-99", "!!timestamp x", "!!binary x", "\n", "  ", "name: ", "9" * 5000, "'", '"']
YAML_MARKS += ["0x" + "f" * 4000, "train: ", "batch: ", "\t", "---\n", "%YAML 9.9\n", "#", ".nan", "~"]


def yaml_files(texts: list[str]) -> st.SearchStrategy[bytes]:
    values = [yaml.safe_load(text) for text in texts]
    marks = st.lists(st.sampled_from(YAML_MARKS)).map(lambda parts: "".join(parts).encode())
    written = altered(values).map(lambda value: json.dumps(value).encode())
    return st.one_of(spoilt([text.encode() for text in texts]), written, marks, VALUES.map(json.dumps).map(str.encode))


def test_fuzz_recipe(referee: Referee, outside: Path):
    path = outside / "a.yaml"

    @PROFILE
    @given(yaml_files([(RECIPES / f"{name}.yaml").read_text() for name in recipe_names()]))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        referee.judge(lambda: load_recipe(str(path)))

    fuzz()


def test_fuzz_setting(referee: Referee):
    @PROFILE
    @given(st.sampled_from(["train.batch", "model.options", "data", "x.y", "", "name"]), yaml_files(["a: 1"]))
    def fuzz(key: str, content: bytes) -> None:
        referee.judge(lambda: load_recipe("lite0", [f"{key}={content.decode(errors='replace')}"]))

    fuzz()


def test_fuzz_ensemble(referee: Referee, outside: Path):
    path = outside / "a.yaml"
    texts = [file.read_text() for file in ENSEMBLES.glob("*.yaml")]
    texts.append("members: [lite0, {recipe: lite0, run: slow, set: {optimizer.lr: 1, data.split.seed: 2}}]\nfolds: 2")

    @PROFILE
    @given(yaml_files(texts) | TEXTS.map(lambda text: json.dumps({"members": ["lite0", text]}).encode()))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        referee.judge(lambda: load_ensemble(str(path)))

    fuzz()


def test_fuzz_manifest_of_predictions(referee: Referee, outside: Path):
    directory = outside / "set"
    directory.mkdir()
    key = {"images": {"a": "0"}, "run": "x"}
    output = Output(directory, "prediction set", key)
    (directory / "a.png").write_bytes(b"mask")
    write_manifest(directory, output, label="STAS", images={"a": {"height": 2, "width": 3}}, probabilities=True)
    whole = json.loads(manifest_file(directory).read_text())
    del whole["checksum"]

    @PROFILE
    @given(json_files([whole]))
    def fuzz(content: bytes) -> None:
        manifest_file(directory).write_bytes(resealed(content))
        referee.judge(lambda: is_finished(output))
        referee.judge(lambda: check_replaceable(directory, "prediction set"))
        referee.judge(lambda: _check_same_images(output))

    fuzz()


def test_fuzz_list_of_a_split(referee: Referee, outside: Path, sized: Store):
    path = outside / "list.txt"
    split = Split.model_validate({"kind": "list", "file": path})

    @PROFILE
    @given(spoilt([b"s0\ns1\n", b"# text\ns2\n"]))
    def fuzz(content: bytes) -> None:
        path.write_bytes(content)
        referee.judge(lambda: split_samples(sized.samples, split))

    fuzz()


# Each bomb is read in a separate process, whose memory is measured: (MiB beyond the imports, processor seconds).
IMAGE, JSON_FILE, SMALL = (2600, 120), (2400, 120), (200, 30)


def measured(reader: str, path: Path, bound: tuple[int, int], refusal: str | None) -> None:
    """Read `path` in a new process, and check the result, the MiB used and the seconds of processor time."""
    program = (
        "import re, sys, time\n"
        "from pathlib import Path\n"
        "from stas.errors import InputDataError, UsageError\n"
        f"{reader}\n"
        # Not ru_maxrss, which starts at the parent's memory at the fork.
        "def used(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024\n"
        "before, began, said = used(), time.process_time(), None\n"
        "try: read(Path(sys.argv[1]))\n"
        "except (InputDataError, UsageError) as error: said = str(error)\n"
        "print(said); print(round(used() - before), round(time.process_time() - began, 1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=600, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *said, figures = done.stdout.splitlines()
    memory, took = map(float, figures.split())
    print(f"BOMB {path.name}: {memory:.0f} MiB, {took} s, {said[0][:100]}")
    assert refusal is None or refusal in done.stdout
    assert refusal is not None or said == ["None"]
    assert memory < bound[0] and took < bound[1]


READ_IMAGE = "from stas.data.images import read_image as read"
READ_LABELME = (
    "from stas.data.annotations import rasterise, read_labelme\n"
    "def read(path): rasterise(read_labelme(path).shapes, (942, 1716), 'STAS', path)"
)
READ_RECIPE = "from stas.recipe import load_recipe\ndef read(path): load_recipe(str(path))"
READ_CHECKPOINT = "from stas.models.checkpoint import load_checkpoint as read"


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["1", "RGBA"])
def test_the_largest_image_stays_within_its_bound(tmp_path: Path, mode: str):
    """128 million pixels in a few kilobytes: the largest image accepted."""
    side = math.isqrt(MAX_PIXELS)
    Image.new(mode, (side, side)).save(tmp_path / f"largest_{mode}.png", compress_level=1)
    measured(READ_IMAGE, tmp_path / f"largest_{mode}.png", IMAGE, None)


def declaring(width: int, height: int) -> bytes:
    """A PNG that declares this size but has one pixel."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    return repair_png(bytes(data))


@pytest.mark.parametrize(
    ("width", "height", "refusal"),
    [
        (10**9, 10**9, "pixels, more than"),
        (10**8, 1, "pixels, more than"),
        (11_000, 11_000, "not readable as an image"),
    ],
)
def test_a_picture_that_declares_a_size_is_not_believed(tmp_path: Path, width: int, height: int, refusal: str):
    path = tmp_path / f"declares_{width}.png"
    path.write_bytes(declaring(width, height))
    measured(READ_IMAGE, path, IMAGE if "readable" in refusal else SMALL, refusal)


def test_a_text_chunk_is_no_bomb(tmp_path: Path):
    chunk = b"zTXtkey\0\0" + zlib.compress(bytes(100_000_000))
    data = declaring(1, 1)
    path = tmp_path / "text_chunk.png"
    path.write_bytes(repair_png(data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + bytes(4) + data[33:]))
    measured(READ_IMAGE, path, SMALL, "not readable as an image")


def test_a_jpeg_of_ten_thousand_scans_is_refused(tmp_path: Path):
    file = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    path = tmp_path / "scans.jpg"
    path.write_bytes(data[:last] + data[last:-2] * 10_000 + data[-2:])
    measured(READ_IMAGE, path, SMALL, "scans, more than 200")


def test_postscript_under_another_name_reaches_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pillow would run Ghostscript, `gs` on the PATH, whatever the suffix."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    measured(READ_IMAGE, path, SMALL, "not readable as an image")
    assert not (tmp_path / "started").exists()


@pytest.mark.slow
def test_a_million_points_are_drawn(tmp_path: Path):
    turn = [number / 10**6 * 2 * math.pi for number in range(10**6)]
    points = [[800 + 400 * math.cos(angle), 471 + 400 * math.sin(angle)] for angle in turn]
    measured(READ_LABELME, write_json(tmp_path / "million_points.json", {"shapes": [shape(points)]}), JSON_FILE, None)


@pytest.mark.slow
def test_a_hundred_thousand_shapes_are_drawn(tmp_path: Path):
    centres = [(number % 1700, number // 110) for number in range(10**5)]
    shapes = [shape([[x, y], [x + 6, y]], "circle") for x, y in centres]
    measured(READ_LABELME, write_json(tmp_path / "shapes.json", {"shapes": shapes}), JSON_FILE, None)


@pytest.mark.parametrize(
    "shapes",
    [
        [shape([[0, 0], [100_000, 0]], "circle")] * 10_000,
        [shape([[number % 1700, number % 2 * 900] for number in range(10**5)])],
        pytest.param([shape([[0, 0], [1716, 942]], "rectangle")] * 10**5, marks=pytest.mark.slow),
    ],
    ids=["circles", "zigzag", "rectangles"],
)
def test_shapes_that_take_hours_are_refused(tmp_path: Path, shapes: list):
    measured(READ_LABELME, write_json(tmp_path / "hours.json", {"shapes": shapes}), JSON_FILE, "too often to be drawn")


@pytest.mark.parametrize(
    ("name", "content", "refusal"),
    [
        ("nested", b"[" * 6 * 10**6, "too deeply nested"),
        ("nested_objects", b'{"a":' * 10**6, "too deeply nested"),
        ("empty_lists", b'{"shapes": [' + b"[]," * 10**7, "more than 7000000 values"),
        ("utf16", json.dumps({"shapes": []}).encode("utf-16"), "not readable as JSON"),
        ("declared", b'{"shapes": [], "imageHeight": 1000000000, "imageWidth": 1000000000}', "up to 65535"),
        ("spaces", b'{"shapes": [], "imageData": "' + b"A " * 2 * 10**7 + b'"}', None),
    ],
)
def test_json_bombs(tmp_path: Path, name: str, content: bytes, refusal: str | None):
    (tmp_path / f"{name}.json").write_bytes(content)
    measured(READ_LABELME, tmp_path / f"{name}.json", JSON_FILE, refusal)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["values", "embedded"])
def test_the_largest_json_stays_within_its_bound(tmp_path: Path, what: str):
    """As many values as are allowed; and the largest file, where one character makes Python use four bytes for each."""
    path = tmp_path / f"largest_{what}.json"
    if what == "values":
        path.write_bytes(b'{"shapes": [], "x": [' + b'{"a":1},' * 2_300_000 + b"0]}")
    else:
        path.write_bytes('{"shapes": [], "x": "\U0001f52c", "imageData": "'.encode() + b"A" * 267_000_000 + b'"}')
    measured(READ_LABELME, path, JSON_FILE, None)


@pytest.mark.parametrize(
    ("name", "text", "refusal"),
    [
        ("aliases", "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)), "an alias"),
        ("deep", "[" * 20_000, "too deeply nested"),
        ("long", "a: 1\n" * 100_000, "more than 65536"),
        ("sexagesimal", "train: {batch: 1" + ":59" * 20_000 + "}", "train.batch"),
        ("python", "name: !!python/object/apply:os.system [touch started]", "not readable as YAML"),
    ],
)
def test_yaml_bombs(tmp_path: Path, name: str, text: str, refusal: str):
    (tmp_path / f"{name}.yaml").write_text(text)
    measured(READ_RECIPE, tmp_path / f"{name}.yaml", SMALL, refusal)
    assert not Path("started").exists()


@pytest.mark.parametrize("declared", [0, 1, 99_999_999, 10**9, 2**40, 2**64 - 1])
def test_a_safetensors_header_that_declares_gigabytes(tmp_path: Path, declared: int):
    path = tmp_path / f"declares_{declared}.safetensors"
    path.write_bytes(declared.to_bytes(8, "little") + b'{"__metadata__": {}}')
    measured(READ_CHECKPOINT, path, SMALL, "not a readable checkpoint")


def test_tensors_that_declare_terabytes(tmp_path: Path):
    header = json.dumps({"network.x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path = tmp_path / "terabytes.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    measured(READ_CHECKPOINT, path, SMALL, "not a readable checkpoint")
    os.truncate(path, 2**42)  # zeros that take no space on disk
    measured(READ_CHECKPOINT, path, SMALL, "bytes, more than")


@pytest.mark.parametrize(
    ("reader", "name"),
    [(READ_IMAGE, "a.png"), (READ_LABELME, "a.json"), (READ_CHECKPOINT, "a.safetensors"), (READ_RECIPE, "a.yaml")],
)
@pytest.mark.parametrize("special", ["pipe", "endless", "circle"])
def test_special_files_are_refused_without_waiting(tmp_path: Path, reader: str, name: str, special: str):
    path = tmp_path / name
    if special == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if special == "endless" else name)
    measured(reader, path, SMALL, name)


def test_a_full_mask_is_no_bomb(sized: Store, monkeypatch: pytest.MonkeyPatch):
    bomb = np.frombuffer(zlib.compress(bytes(10**8)), np.uint8)
    monkeypatch.setattr(sized, "_read", lambda *_: bomb)
    with pytest.raises(InputDataError, match="full mask of sample s0 is damaged"):
        sized.full_mask(0)


@pytest.mark.parametrize("part", ["root", "last page", "lower bound", "first node"])
def test_crazy_page_numbers_do_not_end_the_process(sized: Store, part: str):
    """Without the check LMDB would crash, or look for the page beyond the end of the file."""
    path = store_data(sized.directory)
    data = bytearray(path.read_bytes())
    newer = max((0, 4096), key=lambda meta: struct.unpack_from("<Q", data, meta + 144))
    (root,) = struct.unpack_from("<Q", data, newer + 128)
    page = root * 4096
    place = {"root": newer + 128, "last page": newer + 136, "lower bound": page + 12, "first node": page + 16}
    struct.pack_into("<H" if part[0] in "lf" and part != "last page" else "<Q", data, place[part], 0xFFF0)
    path.write_bytes(data)
    with pytest.raises(InputDataError, match="not a data file written by LMDB"):
        read_store(sized)


@pytest.mark.parametrize("kind", ["stem", "key", "pointer"])
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "", "a/b", "a\0b", "x" * 300])
def test_a_crafted_store_leads_nowhere_else(sized: Store, kind: str, name: str, outside: Path):
    if kind == "stem":
        change_sample(sized.directory, lambda sample: sample.update(stem=name))
    else:
        change_manifest(sized.directory, lambda manifest: manifest.update(key=name))
    workspace = Workspace(outside)
    pointer(workspace, stores.SPEC).write_text(json.dumps({"store": name if kind == "pointer" else "key"}))
    with pytest.raises(InputDataError, match="delete"):
        open_store(workspace, Data.model_validate({"size": stores.SIZE}))


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"size": None}, "size None and scale None, but exactly one of them must be given"),
        ({"scale": 0.5}, r"size \(32, 40\) and scale 0.5, but exactly one"),
        ({"size": None, "scale": 1.5}, "scale is 1.5, Input should be less than or equal to 1"),
        ({"size": None, "scale": 1e-300}, r"sample s0 is stored at 40 x 32 pixels .*, but .* at 1 x 1 pixels"),
        ({"size": [64, 40]}, r"sample s0 is stored at 40 x 32 pixels .*, but .* at 40 x 64 pixels"),
        ({"size": [10**9, 10**9]}, "size.0 is 1000000000, Input should be less than or equal to 8192"),
        ({"labels": []}, "labels is "),
        ({"labels": ["STAS", "tissue"]}, "labels is "),
        ({"labels": ["../x"]}, "labels.0 is "),
        ({"labels": ["tissue"]}, r"sample s0 has areas for .*STAS.*, but the labels are tissue"),
        ({"stored": [65_535, 65_535]}, r"sample s0 is stored at 65535 x 65535 pixels"),
        ({"stored": [0, 40]}, "samples.0.stored.0 is 0"),
        ({"stored": [32]}, "samples.0.stored"),
        ({"areas": {"STAS": -1}}, "samples.0.areas.STAS is -1"),
        ({"areas": {"STAS": 3501}}, r"has 3501 pixels of foreground in 70 x 50 pixels"),
        ({"min": 250, "max": 5}, "sample s0 has values from 250 to 5"),
        ({"samples": 0}, "samples is 0, Input should be greater than or equal to 1"),
        ({"samples": 2}, "more samples than the manifest's 2"),
        ({"samples": 4}, "3 samples, but the manifest says 4"),
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_refused(sized: Store, change: dict, refusal: str):
    change_of_sample = {"stored", "areas", "min", "area"} & change.keys()
    (change_sample if change_of_sample else change_manifest)(sized.directory, lambda content: content.update(change))
    with pytest.raises(InputDataError, match=f"{refusal}.*: delete the store and run"):
        Store(sized.directory)


def test_a_record_of_another_length_is_refused(outside: Path):
    """The manifest's shapes all change, so they agree with each other but not with the data."""
    store = stores.build_scaled(outside / "stores" / "key", 1.0, [(50, 70)])
    change_sample(store.directory, lambda sample: sample.update(height=5000, width=700, stored=[5000, 700]))
    changed = Store(store.directory, network=False)
    for box in (Box(0, 0, 10, 10), Box(4000, 600, 10, 10)):
        with pytest.raises(InputDataError, match=r"sample s0 has (no|10500 instead of 786432 bytes of) image"):
            changed.window(0, box)
    with pytest.raises(InputDataError, match="sample s0 has 10500 instead of 786432 bytes of image"):
        changed.image(0)


def test_a_pickle_runs_nothing(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/started",)

    pickle, target = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save({"weight": Evil()}, pickle)
    with pytest.raises(UsageError, match=r"a\.pth: a pickle may hold code: .*--allow-pickle"):
        convert_weights(pickle, target, allow_pickle=False)
    with pytest.raises(UsageError, match=r"a\.pth: not readable as weights"):
        convert_weights(pickle, target, allow_pickle=True)
    assert not (tmp_path / "started").exists() and not target.exists()


def test_a_pickle_is_no_bomb(tmp_path: Path):
    """Compressed zeros, and one number expanded to terabytes."""
    pickle, packed, target = tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.safetensors"
    torch.save({"weight": torch.zeros(10_000_000)}, pickle)
    with zipfile.ZipFile(pickle) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as smaller:
        for entry in archive.infolist():
            smaller.writestr(entry.filename, archive.read(entry))
    assert packed.stat().st_size < 100_000
    with pytest.raises(UsageError, match=r"b\.pth: not readable as weights \(a compressed archive of 400\d+ bytes"):
        convert_weights(packed, target, allow_pickle=True)
    torch.save({"weight": torch.zeros(1).expand(10**12)}, pickle)
    with pytest.raises(UsageError, match=r"a\.pth: not readable as weights \(tensors of 4000000000000 bytes"):
        convert_weights(pickle, target, allow_pickle=True)
    torch.save({"weight": torch.zeros(2), "step": 3}, pickle)
    with pytest.raises(UsageError, match=r"holds 'step' of type int instead of a named tensor"):
        convert_weights(pickle, target, allow_pickle=True)
    assert not target.exists()
