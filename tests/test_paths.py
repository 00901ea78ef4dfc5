from pathlib import Path

import pytest

from stas.errors import UsageError
from stas.paths import Workspace, weights_directory


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\n", "x" * 101])
def test_names_cannot_lead_out_of_the_workspace(name):
    workspace = Workspace(Path("ws"))
    for make in (workspace.run, workspace.predictions, lambda label: workspace.dataset(label, "1x1")):
        with pytest.raises(UsageError, match="cannot be a directory name"):
            make(name)


def test_layout():
    workspace = Workspace(Path("ws"))
    assert workspace.run("a").checkpoint("best") == Path("ws/runs/a/checkpoints/best.safetensors")
    assert workspace.dataset("STAS", "352x640") == Path("ws/stores/STAS-352x640.json")


def test_locations_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("STAS_WEIGHTS_DIR", "/w")
    assert weights_directory() == Path("/w")
    monkeypatch.setenv("STAS_WEIGHTS_DIR", "")
    assert weights_directory() is None
