"""The command line: its start-up time, error messages and exit codes."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from stas.arguments import seconds
from stas.cli import main
from stas.errors import StoppedEarly
from stas.recipe import recipe_names

STAGES = ("preprocess", "train", "infer", "vote", "evaluate", "recipes", "doctor", "verify")


def test_help_names_every_command_and_loads_no_heavy_package():
    code = (
        "import sys; from stas.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('LOADED', sorted({'torch', 'monai', 'numpy', 'PIL', 'pydantic'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("LOADED []\n")
    words = output.split()
    assert all(stage in words for stage in STAGES)
    assert "75 stopped early" in " ".join(words)


@pytest.mark.parametrize("installed", [True, False])
def test_the_version_is_that_of_pyproject(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    written = re.search(r'^version = "(.*)"', (Path(__file__).parents[1] / "pyproject.toml").read_text(), re.MULTILINE)
    assert written

    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", (lambda _: written[1]) if installed else missing)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"stas {written[1]}\n"


def test_the_shell_completes_commands_and_options(tmp_path: Path):
    def completions(line: str) -> list[str]:
        out = tmp_path / "completions"
        asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        environment = os.environ | asked | {"_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
        subprocess.run([sys.executable, "-m", "stas"], env=environment, check=True, timeout=60)
        return [word.strip() for word in out.read_text().splitlines()]

    assert completions("stas pre") == ["preprocess"]
    assert set(completions("stas vote --wei")) == {"--weights"}


@pytest.mark.parametrize(
    ("text", "expected"), [("3600", 3600), ("90s", 90), ("90m", 5400), ("7.5h", 27000), ("8:00:00", 28800)]
)
def test_times_are_read(text: str, expected: float):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "h", "-3", "0", "inf", "nan", "8:00", "soon"])
def test_a_bad_time_is_refused_with_the_ways_to_write_one(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--recipe", "lite0", "--workspace", "w", f"--time-limit={text}"])
    assert "7.5h" in capsys.readouterr().err


def test_recipes_are_listed_with_network_size_and_batch(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == recipe_names()
    assert lines[-2:] == [
        "ensemble reference: 3 members: efficientnet_b6_ns, efficientnetv2_m, eca_nfnet_l2",
        "ensemble small: 3 members: lite0, lite0_fpn, lite0_pan",
    ]
    b6 = next(line for line in lines if line.startswith("efficientnet_b6_ns"))
    assert "DeepLabV3Plus" in b6 and "800 x 800" in b6 and " 16 " in b6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--recipe", "lite9", "--workspace", "w"], "no recipe 'lite9'"),
        (["train", "--recipe", "lite0", "--workspace", "w", "--set", "train.epoch=3"], "train.epoch: unknown key"),
        (["train", "--recipe", "lite0"], "STAS_WORKSPACE"),
        (["train", "--recipe", "lite0", "--workspace", "w", "--run", "../up"], "'../up' cannot be a directory name"),
        (["vote", "--members", "a", "b", "c"], "--out DIR"),
    ],
)
def test_wrong_use_is_exit_code_2_and_names_value_and_remedy(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STAS_WORKSPACE", raising=False)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_input_is_exit_code_3(tmp_path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "a.json").write_text("{")
    (tmp_path / "member").mkdir()
    member, truth, out = (str(tmp_path / name) for name in ("member", "truth", "out"))
    assert main(["evaluate", "--predictions", member, "--truth", truth, "--out", out]) == 3
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(StoppedEarly("cut off"), 75), (KeyboardInterrupt(), 130)])
def test_a_stopped_stage_has_its_own_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("stas.vote.vote", stopped)
    assert main(["vote", "--members", "a", "b", "c", "--out", "o"]) == code
    assert capsys.readouterr().err.startswith("stas: ")
