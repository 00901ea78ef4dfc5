"""The README's tree is true, and links and make targets on the pages exist."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def tree() -> dict[str, str]:
    """The README's tree: the description of each path; directories end in a slash."""
    block = README.split("\n## The tree\n")[1].split("```")[1]
    said: dict[str, str] = {}
    parents: list[str] = []
    for line in block.strip().splitlines():
        name, _, words = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        path = "".join(parents[:depth]) + name
        assert path not in said, f"{path} is listed twice"
        said[path] = words.strip()
        if name.endswith("/"):
            parents[depth:] = [name]
    return said


def files() -> list[str]:
    """Every file that git tracks or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def test_the_tree_names_every_entry_of_the_top_and_every_file_of_stas():
    top = {name.split("/")[0] + ("/" if "/" in name else "") for name in files()}
    package = {name for name in files() if name.startswith("stas/") and not name.endswith("__init__.py")}
    rooms = {f"{name.rpartition('/')[0]}/" for name in package} - {"stas/"}
    modules = {name for name in package if not name.endswith(".yaml")}  # one line for all recipes
    missing = sorted((top | rooms | modules) - tree().keys())
    assert not missing, f"README.md, The tree, lacks {missing}"


def test_the_tree_names_nothing_else():
    known = {name for path in files() for name in (path, *(f"{parent}/" for parent in Path(path).parents))}
    gone = sorted(tree().keys() - known)
    assert not gone, f"README.md, The tree, names what is not there: {gone}"


def test_every_line_of_the_tree_says_something():
    said = tree()
    leaves = [name for name in said if not any(other.startswith(name) and other != name for other in said)]
    assert [name for name in leaves if not said[name]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    for target in (first or second for first, second in targets):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: no {target}"
        assert not heading or heading in headings(file), f"{page.name}: no heading {target}"


def headings(page: Path) -> set[str]:
    """GitHub's anchors for a page's headings."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_of_a_page_is_one(page: Path):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = re.findall(r"(?:`|^ *|run: |&& )make ((?:[a-z0-9-]+ ?)+)", page.read_text(), re.MULTILINE)
    named = {word for line in lines for word in line.split()}
    assert named <= targets, f"{page.name}: no target {named - targets}"
