import json

import pytest
import torch
from torch import nn

from stas.checkpoint import load_checkpoint, load_newest, restore_optimizer, save_checkpoint, save_last, take_snapshot
from stas.config import Optimizer
from stas.errors import InputDataError
from stas.optim import build_optimizer
from stas.paths import RunPaths


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
    assert saved.facts == {"epoch": 3, "loss": 0.1}
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
    assert load_checkpoint(run.checkpoint("last")).facts == {"epoch": 2}
    assert load_checkpoint(run.checkpoint("previous")).facts == {"epoch": 1}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "last.safetensors",
        "previous.safetensors",
    ]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_last_falls_back_to_the_one_before(tmp_path, damage, caplog):
    run = RunPaths(tmp_path)
    network, optimizer = trained()
    for epoch in range(2):
        save_last(run, take_snapshot(network, {"epoch": epoch}, optimizer))
    last = run.checkpoint("last")
    last.write_bytes({"truncated": last.read_bytes()[:-9], "empty": b"", "text": b"hello, I am a text"}[damage])
    newest = load_newest(run)
    assert newest is not None and newest.facts == {"epoch": 0}
    assert "last.safetensors" in caplog.text and "previous.safetensors" in caplog.text
    run.checkpoint("previous").write_bytes(b"")
    with pytest.raises(InputDataError, match="not a readable checkpoint"):
        load_newest(run)


def test_cut_off_between_the_renames_goes_on_from_the_newest(tmp_path):
    run = RunPaths(tmp_path)
    network, optimizer = trained()
    save_last(run, take_snapshot(network, {"epoch": 0}, optimizer))
    save_checkpoint(run.checkpoint("next"), take_snapshot(network, {"epoch": 1}, optimizer))
    run.checkpoint("last").rename(run.checkpoint("previous"))
    newest = load_newest(run)
    assert newest is not None and newest.facts == {"epoch": 1}


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
