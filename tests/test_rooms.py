"""Rooms import each other in one direction only, and commands exchange data only through files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stas"
COMMANDS = ("preprocess", "train", "infer", "vote", "evaluate", "doctor", "verify", "launch")
# From the ground up: a file may import from its own line and from earlier lines.
FLOORS = (
    ("errors", "paths"),
    ("system",),
    ("config", "recipe", "ensemble"),
    ("data",),
    ("models",),
    ("results",),
    ("training",),
    COMMANDS,
    ("arguments", "cli", "__main__"),
)


def room(module: str) -> str:
    """The room, or top-level file, of a dotted name such as stas.data.store."""
    return module.split(".")[1]


def floor(name: str) -> int:
    found = [number for number, names in enumerate(FLOORS) if name in names]
    assert found, f"stas/{name}: on no floor; add it to FLOORS"
    return found[0]


def imports() -> Iterator[tuple[str, str]]:
    """(importer, imported) for every import within the package, including those inside functions."""
    for path in sorted(PACKAGE.rglob("*.py")):
        importer = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "stas":
                yield from ((importer, f"stas.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stas."):
                yield importer, node.module or ""
            elif isinstance(node, ast.Import):
                yield from ((importer, alias.name) for alias in node.names if alias.name.startswith("stas."))


def test_no_file_imports_upward():
    upward = [(one, other) for one, other in imports() if floor(room(one)) < floor(room(other))]
    assert not upward


def test_commands_never_import_each_other():
    found = [(one, other) for one, other in imports() if room(one) in COMMANDS and room(other) in COMMANDS]
    assert not found


def test_every_file_is_on_a_floor():
    for path in PACKAGE.iterdir():
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists():
            floor(path.stem)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_nothing_happens_at_import(path: Path):
    assert path.read_text() == ""
