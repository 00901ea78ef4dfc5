import json
import math
import os
import tracemalloc
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from stas import paths
from stas.config import Optimizer
from stas.errors import InputDataError, StoppedEarly
from stas.models import checkpoint
from stas.models.checkpoint import (
    CheckpointWriter,
    Snapshot,
    load_checkpoint,
    load_newest,
    restore_optimizer,
    save_checkpoint,
    save_last,
    take_snapshot,
)
from stas.paths import RunPaths
from stas.system.files import sha256
from stas.system.locks import lock
from stas.training.optim import build_optimizer


def trained(name="adabelief", seed=0):
    """A small network in channels-last format after two steps."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)).to(
        memory_format=torch.channels_last
    )
    optimizer = build_optimizer(network.parameters(), Optimizer.model_validate({"name": name, "lr": 0.01}))
    for _ in range(2):
        step(network, optimizer)
    return network, optimizer


def step(network, optimizer):
    optimizer.zero_grad()
    network(torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["adabelief", "adam", "adamw", "sgd"])
def test_network_and_optimizer_come_back_to_the_bit(tmp_path, name):
    network, optimizer = trained(name)
    save_checkpoint(tmp_path / "a.safetensors", take_snapshot(network, {"epoch": 3, "loss": 0.1}, optimizer))
    saved = load_checkpoint(tmp_path / "a.safetensors")
    assert saved.metadata == {"epoch": 3, "loss": 0.1}
    other, other_optimizer = trained(name, seed=1)
    other.load_state_dict(saved.network)
    restore_optimizer(other_optimizer, saved.optimizer)
    for _ in range(3):
        step(network, optimizer)
        step(other, other_optimizer)
    for key, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_the_last_and_the_one_before_are_kept(tmp_path):
    run = RunPaths(tmp_path)
    network, optimizer = trained()
    assert load_newest(run) is None
    for epoch in range(3):
        save_last(run, take_snapshot(network, {"epoch": epoch}, optimizer))
    assert load_checkpoint(run.checkpoint("last")).metadata == {"epoch": 2}
    assert load_checkpoint(run.checkpoint("previous")).metadata == {"epoch": 1}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "last.safetensors",
        "previous.safetensors",
    ]


def flipped(content: bytes, position: float) -> bytes:
    """One bit of it the other way, at a share of its length."""
    index = int(position * len(content))
    return content[:index] + bytes([content[index] ^ 0b100]) + content[index + 1 :]


DAMAGES = {
    "truncated": lambda content: content[:-9],
    "empty": lambda _: b"",
    "text": lambda _: b"hello, I am a text",
    "zeros": lambda content: content[:-100] + bytes(100),  # what some file systems leave after a power cut
    **{
        f"bit flipped at {part}": lambda content, part=part: flipped(content, part)
        for part in (0, 0.001, 0.1, 0.5, 0.9, 0.9999)
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_falls_back_to_the_one_before(tmp_path, damage, caplog):
    run = RunPaths(tmp_path)
    network, optimizer = trained()
    for epoch in range(2):
        save_last(run, take_snapshot(network, {"epoch": epoch}, optimizer))
    last = run.checkpoint("last")
    bad = DAMAGES[damage](last.read_bytes())
    last.write_bytes(bad)
    newest = load_newest(run)
    assert newest is not None and newest.metadata == {"epoch": 0}
    (warning,) = caplog.records
    assert all(str(run.checkpoint(which)) in warning.getMessage() for which in ("last", "previous"))
    assert (last.parent / "last.damaged").read_bytes() == bad
    save_last(run, take_snapshot(network, {"epoch": 1}, optimizer))
    assert load_checkpoint(run.checkpoint("previous")).metadata == {"epoch": 0}  # the damaged one did not push it out
    for which in ("last", "previous"):
        run.checkpoint(which).write_bytes(b"")
    with pytest.raises(InputDataError, match=r"last.safetensors: not a readable checkpoint"):
        load_newest(run)


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    network, _ = trained()
    save_checkpoint(path, take_snapshot(network, {"epoch": 1}))
    content = path.read_bytes()
    assert load_checkpoint(path).sha256 == sha256(path)
    for position in range(0, len(content), 7):
        path.write_bytes(flipped(content, position / len(content)))
        with pytest.raises(InputDataError, match="not a readable checkpoint"):
            load_checkpoint(path)


def test_every_type_and_shape_comes_back_from_a_file_that_others_can_read(tmp_path):
    from safetensors.torch import load_file

    path = tmp_path / "a.safetensors"
    shapes = {"one": (3, 1), "number": (), "none": (0, 4)}  # three bytes of a mask would leave floats unaligned
    tensors = {
        f"network.{shape}.{name}": torch.arange(math.prod(shapes[shape])).reshape(shapes[shape]).to(dtype)
        for shape in shapes
        for dtype, name in reversed(checkpoint.DTYPES.items())
    }
    save_checkpoint(path, Snapshot({}, tensors, {}))
    for found in (load_checkpoint(path).network, load_file(path)):
        for name, value in tensors.items():
            same = found.get(name, found.get(name.removeprefix("network.")))
            assert same is not None and (same.dtype, same.shape) == (value.dtype, value.shape), name
            assert torch.equal(same, value), name
    assert list(load_file(path))[-1] == "checksum"


def test_tensors_are_written_without_a_copy(tmp_path):
    """Making the file in memory first would hold the interpreter's lock, and training would wait for it."""
    snapshot = Snapshot({}, {f"network.{index}": torch.zeros(1 << 18) for index in range(8)}, {})
    tracemalloc.start()
    save_checkpoint(tmp_path / "a.safetensors", snapshot)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_checkpoint_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    network, _ = trained()
    for name, epoch in (("b", 2), ("a", 1)):
        save_checkpoint(tmp_path / f"{name}.safetensors", take_snapshot(network, {"epoch": epoch}))
    summed = checkpoint._checked_sum

    def replace(file):
        result = summed(file)
        if (tmp_path / "b.safetensors").exists():
            os.replace(tmp_path / "b.safetensors", path)
        return result

    monkeypatch.setattr(checkpoint, "_checked_sum", replace)
    loaded = load_checkpoint(path)
    assert (loaded.metadata, loaded.sha256) == ({"epoch": 2}, sha256(path))


def test_a_writer_that_lost_the_runs_lock_writes_nothing(tmp_path):
    run = RunPaths(tmp_path / "run")
    network, optimizer = trained()
    with pytest.raises(StoppedEarly, match="lost its lock"), lock(paths.lock_file(run.root)) as held:
        writer = CheckpointWriter(run, held)
        held.path.unlink()
        writer.write(take_snapshot(network, {"epoch": 1}, optimizer), best=True)
        writer.wait()
    assert not run.root.exists()


def test_cut_off_between_the_renames_resumes_from_the_newest(tmp_path):
    run = RunPaths(tmp_path)
    network, optimizer = trained()
    save_last(run, take_snapshot(network, {"epoch": 0}, optimizer))
    save_checkpoint(run.checkpoint("next"), take_snapshot(network, {"epoch": 1}, optimizer))
    run.checkpoint("last").rename(run.checkpoint("previous"))
    newest = load_newest(run)
    assert newest is not None and newest.metadata == {"epoch": 1}


def test_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    foreign = tmp_path / "a.safetensors"
    with pytest.raises(InputDataError, match="no such checkpoint"):
        load_checkpoint(foreign)
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(InputDataError, match="not a readable checkpoint of stas"):
        load_checkpoint(foreign)
    save_file({"x": torch.zeros(1)}, foreign, {"stas": json.dumps({"format": 99})})
    with pytest.raises(InputDataError, match="format 99"):
        load_checkpoint(foreign)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("No such file or directory: last.safetensors"),  # safetensors' words for every failure
        RuntimeError("unable to read: Input/output error (5)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_a_passing_fault_does_not_condemn_a_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "last.safetensors"
    path.write_bytes(b"0" * 100)
    monkeypatch.setattr(checkpoint, "safe_open", Mock(side_effect=error))
    with pytest.raises(StoppedEarly, match="nothing is known about the file"):
        load_checkpoint(path)
