"""Load recipes: a packaged one or a YAML file, merged over the one it extends, then changed by settings.

Precedence, later wins: the defaults in stas/config.py < the recipe file < the member's `set` in the ensemble <
`--set key=value`. A recipe file that `extends` another starts from that file's values and overrides them
with its own. An unknown key is refused, and the error lists the valid ones.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from stas.config import Recipe, Section
from stas.errors import InputDataError, UsageError
from stas.system.untrusted import MAX_YAML_BYTES, parse_yaml, read_bounded, shown

RECIPES = Path(__file__).parent / "recipes"
PROBLEMS_SHOWN = 20  # per recipe: a file that is something else has thousands


class _RecipeFile(Recipe):
    """A recipe file: a recipe's keys, and `extends`."""

    extends: str | None = None


def recipe_names() -> list[str]:
    """The names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe, apply an ensemble member's settings, and then `--set` overrides.

    Args:
        name: the name of a packaged recipe, or the path of a YAML file.
        overrides: strings such as "train.epochs=20"; the value is read as YAML.
        settings: values by dotted key, such as {"train.epochs": 20}; overrides win over them.

    Raises:
        UsageError: no such recipe, or an invalid key or value.
    """
    path = _recipe_path(name)
    values, source = _read_recipe(path)
    values.setdefault("name", path.stem)
    for key, value in (settings or {}).items():
        _apply(values, key, copy.deepcopy(value), f"set {shown(key)}")
    for override in overrides:
        _apply(values, *_read_override(override), f"--set {shown(override)}")
    return parse_recipe(values, source, _RecipeFile)


def recipe_beside(name: str, file: Path, what: str) -> str:
    """Resolve a recipe's name found in another file, for `load_recipe`.

    Args:
        name: a packaged recipe's name, or a path relative to `file` that stays inside its directory.
        file: the file that contains the name.
        what: what `file` is, for the message.

    Raises:
        UsageError: the path leaves the directory.
    """
    if name in recipe_names():
        return name
    inside = file.parent.resolve()
    if not Path(os.path.normpath(inside / name)).is_relative_to(inside):
        raise UsageError(f"{file}: {shown(name)} is outside the {what}'s directory: put the recipe beside or below it")
    return str(file.parent / name)


def is_section(key: str) -> bool:
    """Whether a dotted key names a section of a recipe, such as data.split, rather than a value."""
    section: Any = Recipe
    for part in key.split("."):
        known = isinstance(section, type) and issubclass(section, Section) and part in section.model_fields
        section = section.model_fields[part].annotation if known else None
    return isinstance(section, type) and issubclass(section, Section)


def _recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UsageError(f"no recipe {name!r}: give a YAML file, or one of {', '.join(recipe_names())}")
    return path


def _read_recipe(path: Path) -> tuple[dict[str, Any], str]:
    """A recipe file's values, merged over those of the recipe it extends, and the file's name for messages."""
    values = _read_mapping(path)
    if "extends" not in values:
        return values, str(path)
    name = values.pop("extends")
    if not isinstance(name, str):
        raise UsageError(f"{path}: extends = {shown(name)}: give the name of one recipe, such as lite0")
    base_path = _recipe_path(recipe_beside(name, path, "recipe"))
    base = _read_mapping(base_path)
    if "extends" in base:  # one level only, so that no reader needs more than two files
        raise UsageError(
            f"{path}: extends {shown(name)}, which itself extends {shown(base['extends'])}: extend a recipe that "
            "extends no other, and write only the differences"
        )
    for own in ("name", "summary"):
        base.pop(own, None)
    return _merged(base, values), f"{path} (extends {name})"


def _read_mapping(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections, found {type(values).__name__}: see stas/recipes")
    return values


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; where both have a value, `values` wins."""
    both = {
        key: _merged(base[key], value)
        for key, value in values.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | values | both


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values (see `parse_yaml`).

    Raises:
        UsageError: not readable, or not plain YAML.
    """
    try:
        return parse_yaml(read_bounded(path, MAX_YAML_BYTES))
    except InputDataError as error:
        raise UsageError(str(error)) from error
    except ValueError as error:
        raise UsageError(
            f"{path}: not readable as YAML ({error}): correct it, or start from a copy of another"
        ) from error


def parse_recipe(values: dict[str, Any], source: str, listed: type[Section] = Recipe) -> Recipe:
    """Validate a recipe read from `source`. Errors name it, and list the keys of `listed` as valid.

    Raises:
        UsageError: lists every wrong key with its value and the requirement, and the valid keys for an unknown one.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(
            f"{source}: not a valid recipe:\n{explain(error, listed)}"
        ) from None  # pydantic's error repeats the input


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included; `parse_recipe` reads it back unchanged."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def recipes() -> str:
    """A table of the packaged recipes: name, network, size (width x height) and batch."""
    rows = [("recipe", "architecture", "encoder", "size", "batch", "summary")]
    for name in recipe_names():
        recipe = load_recipe(name)
        size = " x ".join(map(str, reversed(recipe.data.size)))
        rows.append(
            (
                name,
                recipe.model.architecture,
                recipe.model.encoder or "-",
                size,
                str(recipe.train.batch),
                recipe.summary,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip()
        for row in rows
    )


def _read_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of a `--set`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {shown(override)}: write key=value, such as train.epochs=20")
    try:
        return key, parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"--set {shown(override)}: the value is not readable as YAML ({error})") from error


def _apply(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set one dotted key of the nested mapping `values` in place; `source` says where it was set."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(f"{source}: {section!r} is a value, not a section")
    values[last] = value


def explain(error: ValidationError, model: type[Section]) -> str:
    """The problems that pydantic found in a file, one per line."""
    found = error.errors(include_url=False, include_context=False)
    more = [f"  and {len(found) - PROBLEMS_SHOWN} more"] if len(found) > PROBLEMS_SHOWN else []
    return "\n".join([f"  {_explain(problem, model)}" for problem in found[:PROBLEMS_SHOWN]] + more)


def _explain(problem: Any, model: type[Section]) -> str:
    """One pydantic problem as 'key = value: requirement'."""
    *sections, last = problem["loc"] or ("recipe",)
    key = ".".join([*map(str, sections), last if isinstance(last, str) and len(last) < 60 else shown(last)])
    if problem["type"] == "extra_forbidden":
        section: Any = model
        for part in sections:
            section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
        return f"{key}: unknown key; valid here: {', '.join(section.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):
        return f"{key}: {message}"
    return f"{key} = {shown(problem['input'])}: {message}"
