"""The generated pages in docs/reference match the current code."""

import argparse
from typing import Any

import pytest
from pydantic import BaseModel

from scripts.reference import DIRECTORY, command_page, recipe_page
from stas.arguments import build_parser
from stas.config import Recipe
from stas.recipe import parse_recipe

AGAIN = "make it again with `python -m scripts.reference`"


def test_the_pages_match_the_code():
    assert (DIRECTORY / "recipe.md").read_text() == recipe_page(), AGAIN
    assert (DIRECTORY / "command-line.md").read_text() == command_page(), AGAIN


def test_every_key_is_listed_with_its_default():
    rows = {line.split("`")[1]: line.split(" | ")[1] for line in recipe_page().splitlines() if line.startswith("| `")}
    defaults = dict(leaves(parse_recipe({"name": "the file's name"}, "test")))
    assert rows.keys() == defaults.keys()
    assert rows["loss.dice"] == "`1.0`", "a recipe without a loss has Dice, though the key's own default is 0"
    assert rows["optimizer.eps"] == "`1.0e-16`" and rows["data.size"] == "`[800, 800]`"
    assert Recipe.model_validate({"name": "a"}).optimizer.eps == 1e-16


def leaves(section: BaseModel, prefix: str = "") -> list[tuple[str, Any]]:
    """Every key of a recipe, such as optimizer.lr, with its value."""
    found: list[tuple[str, Any]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [(prefix + name, value)]
    return found


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    direct = [command for action in inner for command in action.choices.values()]
    return direct + [below for command in direct for below in commands(command)]


@pytest.mark.parametrize("command", commands(build_parser()), ids=lambda command: command.prog)
def test_every_option_of_a_command_is_in_its_section(command: argparse.ArgumentParser):
    section = command_page().split(f"\n## {command.prog}\n")[1].split("\n## ")[0]
    told = [flag for action in command._actions for flag in action.option_strings if flag not in ("-h", "--help")]
    assert [flag for flag in told if f"`{flag}" not in section] == []


def test_every_option_and_key_has_a_meaning():
    rows = [line for page in (command_page(), recipe_page()) for line in page.splitlines() if line.startswith("| `")]
    meanings = [row.rsplit(" | ", 1)[1].removesuffix(" |").removesuffix("required").strip("; ") for row in rows]
    assert [row for row, meaning in zip(rows, meanings, strict=True) if not meaning or meaning.startswith("(")] == []
