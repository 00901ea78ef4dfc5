"""Ensembles: the one list of the recipes that are trained together and vote together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from stas.config import Recipe, Section, explain, load_recipe, read_yaml, recipe_names
from stas.errors import UsageError
from stas.untrusted import shown

ENSEMBLES = Path(__file__).parent / "ensembles"


class _File(Section):
    members: list[str] = Field(min_length=2, max_length=100)
    ties: Literal["foreground", "background"] | None = None


@dataclass(frozen=True)
class Ensemble:
    """What an ensemble file says: its recipes in order, and what becomes of a tie of an even number of members."""

    recipes: tuple[Recipe, ...]
    ties: Literal["foreground", "background"] | None

    @property
    def runs(self) -> list[str]:
        """The names of the members' training runs."""
        return [recipe.name for recipe in self.recipes]


def ensemble_names() -> list[str]:
    """The ensembles that come with the package."""
    return sorted(path.stem for path in ENSEMBLES.glob("*.yaml"))


def load_ensemble(name: str, overrides: Sequence[str] = ()) -> Ensemble:
    """Load an ensemble and its recipes.

    Args:
        name: the name of a packaged ensemble, or the path of a YAML file.
        overrides: as `load_recipe` takes them, for every recipe.

    Raises:
        UsageError: no such ensemble or recipe, a wrong key, or two members of one name.
    """
    path = ENSEMBLES / f"{name}.yaml" if name in ensemble_names() else Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UsageError(f"no ensemble {name!r}: give a YAML file, or one of {', '.join(ensemble_names())}")
    values = read_yaml(path)
    try:
        file = _File.model_validate(values)
    except ValidationError as error:
        raise UsageError(
            f"{path}: not an ensemble:\n{explain(error, _File)}\nWrite a list `members` of at least two recipes and, "
            "for an even number of them, `ties: background` or `ties: foreground`"
        ) from None
    recipes = tuple(load_recipe(_recipe(member, path), overrides) for member in file.members)
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{path}: two members are called {', '.join(twice)}: give each recipe a name of its own")
    return Ensemble(recipes, file.ties)


def load_member(name: str, index: int, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of member `index`, from 0, as an array job counts its tasks.

    Raises:
        UsageError: as `load_ensemble`; or no such member.
    """
    recipes = load_ensemble(name, overrides).recipes
    if not 0 <= index < len(recipes):
        raise UsageError(
            f"ensemble {name} has {len(recipes)} members, numbered 0 to {len(recipes) - 1}; there is no member {index}"
        )
    return recipes[index]


def _recipe(member: str, ensemble: Path) -> str:
    """A packaged recipe's name as it is; a path relative to the ensemble's file, and not out of its directory."""
    if member in recipe_names():
        return member
    inside = ensemble.parent.resolve()
    if not Path(os.path.normpath(inside / member)).is_relative_to(inside):
        raise UsageError(
            f"{ensemble}: member {shown(member)} is outside of the ensemble's directory: "
            "put the recipe beside or below it"
        )
    return str(ensemble.parent / member)
