"""The commands on the pages work as written, on a small generated sample and with less training."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scripts.make_sample import make_sample
from stas.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Make training take a second. A page's own settings come first, so a page must not set these.
SMALL = ("--set", "data.size=[128, 128]", "--set", "train.epochs=1", "--set", "train.batch=4")
# In the page's shell `stas` only records its arguments, and the commands run later in this process, so that torch is
# loaded once. Commands whose output the shell uses run immediately.
SHELL = """
set -euo pipefail
stas() {
    case $1 in
    members | recipes) "$PYTHON" -m stas "$@" ;;
    *) { printf '%s\\0' "$STAS_WORKSPACE" "$@"; printf '\\n\\0'; } >> "$NOTED" ;;
    esac
}
"""
PLACES = {"stores": "<key>", "runs": "<run>", "predictions": "<set>"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten annotated images and three new ones."""
    root = tmp_path_factory.mktemp("data")
    make_sample(root, images=10, seed=1, scale=0.3)
    make_sample(root / "new", images=3, seed=2, scale=0.3)
    (root / "New_Images").mkdir()
    for image in (root / "new" / "Train_Images").iterdir():
        shutil.move(image, root / "New_Images" / f"new_{image.name}")
    return root


@pytest.fixture(scope="module")
def own_data(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the commands of docs/how-to/own-data.md have been run."""
    place = tmp_path_factory.mktemp("own-data")
    follow(DOCS / "how-to" / "own-data.md", place, data)
    return place


@pytest.fixture
def followed(own_data: Path, tmp_path: Path) -> Path:
    """A copy of `own_data`, for pages that start where it ends."""
    shutil.copytree(own_data, tmp_path / "place")
    return tmp_path / "place"


def blocks(page: Path) -> str:
    """A page's `sh` blocks, joined."""
    return "\n".join(re.findall(r"^ *```sh\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL))


def follow(page: Path, place: Path, data: Path) -> None:
    """Run the commands of a page in `place`."""
    noted = place / ".noted"
    environment = os.environ | {
        "DATA": str(data),
        "STAS_WORKSPACE": str(place / "workspace"),
        "NOTED": str(noted),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    script = SHELL + blocks(page)
    done = subprocess.run(["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{page.name}: {done.stderr}"
    commands = [entry.split("\0")[:-1] for entry in noted.read_text().split("\n\0")[:-1]]
    noted.unlink()
    assert commands, f"{page.name}: no commands"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for workspace, *command in commands:
            patch.setenv("STAS_WORKSPACE", workspace)
            trains = {"preprocess", "train"} & set(command[:2])
            code = main([*command, *SMALL] if trains else command)
            assert code == 0, f"{page.name}: stas {' '.join(command)}"


def masks(directory: Path) -> list[str]:
    """The names of a set's masks; checks that all are 0/255."""
    found = sorted(directory.glob("*.png"))
    for mask in found:
        with Image.open(mask) as image:
            assert image.mode == "L" and set(image.get_flattened_data()) <= {0, 255}
    return [mask.stem for mask in found]


def new(data: Path) -> list[str]:
    return sorted(path.stem for path in (data / "New_Images").iterdir())


@pytest.mark.slow
def test_the_readme_outlines_new_images(data: Path, tmp_path: Path):
    follow(ROOT / "README.md", tmp_path, data)
    assert masks(tmp_path / "workspace" / "predictions" / "vote") == new(data)


@pytest.mark.slow
def test_own_data_outlines_new_images_and_scores_held_out_ones(data: Path, own_data: Path):
    assert masks(own_data / "workspace" / "predictions" / "vote") == new(data)
    assert len(masks(own_data / "workspace" / "predictions" / "vote-held-out")) == 2
    assert {"scores.csv", "sheets.png"} <= {path.name for path in (own_data / "evaluation").iterdir()}


@pytest.mark.slow
def test_every_file_is_in_the_reference(own_data: Path):
    page = (DOCS / "reference" / "files.md").read_text()
    patterns = [
        re.compile(re.sub(r"<\w+>", "[^/]+", re.escape(name))) for name in re.findall(r"^\| `(.*?)`", page, re.M)
    ]
    places = (own_data / "workspace", own_data)
    found = [path.relative_to(place) for place in places for path in place.rglob("*") if path.is_file()]
    names = [str(path) for path in found if not any(part.startswith(".") for part in path.parts)]
    unknown = [
        name for name in names if name.split("/")[0] != "workspace" and not any(p.fullmatch(name) for p in patterns)
    ]
    assert names and not unknown, f"docs/reference/files.md lacks {unknown}"


@pytest.mark.slow
def test_soft_vote(data: Path, followed: Path):
    follow(DOCS / "how-to" / "soft-vote.md", followed, data)
    for name in ("vote-soft", "vote-weighted", "vote-soft-weighted"):
        assert masks(followed / "workspace" / "predictions" / name) == new(data)
    assert masks(followed / "voted") == new(data)


@pytest.mark.slow
def test_check(data: Path, followed: Path, capsys: pytest.CaptureFixture[str]):
    follow(DOCS / "how-to" / "check.md", followed, data)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and {line.split()[0] for line in lines} == {"ok"}


@pytest.mark.slow
def test_pseudo_labels(data: Path, followed: Path):
    follow(DOCS / "how-to" / "pseudo-labels.md", followed, data)
    assert len(masks(followed / "student" / "predictions" / "student-held-out")) == 2
    assert (followed / "student" / "evaluation" / "scores.csv").is_file()


@pytest.mark.slow
def test_folds(data: Path, tmp_path: Path):
    follow(DOCS / "how-to" / "folds.md", tmp_path, data)
    runs = sorted(path.name for path in (tmp_path / "workspace" / "runs").iterdir() if path.is_dir())
    assert runs == [f"lite0-fold{fold}" for fold in range(5)]
    assert masks(tmp_path / "workspace" / "predictions" / "vote") == new(data)
    assert len(masks(tmp_path / "workspace" / "predictions" / "lite0-fold0-held-out")) == 2


@pytest.mark.slow
def test_a_fourth_member(data: Path, followed: Path):
    before = (followed / "workspace" / "runs" / "lite0" / "metrics.jsonl").stat().st_mtime_ns
    follow(DOCS / "how-to" / "fourth-member.md", followed, data)
    assert masks(followed / "workspace" / "predictions" / "vote-of-four") == new(data)
    assert (followed / "workspace" / "runs" / "lite0_unet").is_dir()
    assert (followed / "workspace" / "runs" / "lite0" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_weights_of_the_small_members_need_no_network(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    follow(DOCS / "how-to" / "offline-cluster.md", tmp_path, data)


@pytest.mark.parametrize(("page", "tool", "words"), [("slurm", None, "sbatch"), ("kubernetes", "kubectl", "kubectl")])
def test_dry_runs(page: str, tool: str | None, words: str):
    if tool and not shutil.which(tool):
        pytest.skip(f"no {tool}: install the development requirements, which have it")
    script = f"set -euo pipefail\n{blocks(DOCS / 'how-to' / f'{page}.md')}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout + done.stderr


def test_every_command_of_the_pages_is_run_or_cannot_run_in_a_test():
    fences = {line.strip() for page in DOCS.rglob("*.md") for line in page.read_text().splitlines() if "```" in line}
    assert fences <= {"```", "```sh", "```console", "```yaml"}
    run = {page.stem for page in (DOCS / "how-to").iterdir() if blocks(page)}
    named = set(re.findall(r"\"([a-z-]+)(?:\.md)?\"", Path(__file__).read_text()))
    assert run <= named | {"slurm", "kubernetes"}, "a page with `sh` blocks needs a test here"
