"""Ensembles: lists of members that are trained together and vote together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from stas.config import Recipe, Section, Split
from stas.errors import UsageError
from stas.paths import VOTE, check_name
from stas.recipe import explain, is_section, load_recipe, read_yaml, recipe_beside
from stas.system.untrusted import shown

ENSEMBLES = Path(__file__).parent / "ensembles"
MAX_MEMBERS = 100
_HOW_TO_WRITE = (
    "Write a list `members` of at least two entries, or of one and `folds: 5`. An entry is a recipe's name, or "
    "{recipe: NAME, run: NAME, set: {optimizer.lr: 2.0e-4}}. For an even number of members, add `ties: background` or "
    "`ties: foreground`"
)

Ties = Literal["foreground", "background"]


class _Member(Section):
    recipe: str
    run: str | None = None
    set: dict[str, Any] = Field(default={}, description="values by dotted key, which override the recipe's")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"recipe": value} if isinstance(value, str) else value

    @field_validator("set")
    @classmethod
    def _dotted(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for key, value in settings.items():
            if isinstance(value, dict) and is_section(key):
                raise ValueError(f"{key} is a section: write dotted keys as in --set, such as optimizer.lr: 2.0e-4")
        return settings


class _File(Section):
    members: list[_Member] = Field(min_length=1, max_length=MAX_MEMBERS)
    ties: Ties | None = None
    folds: int | None = Field(default=None, ge=2, le=MAX_MEMBERS, description="members of each recipe, one per fold")


@dataclass(frozen=True)
class Member:
    """A member's recipe, with its settings applied, and the name of its training run."""

    recipe: Recipe
    run: str


@dataclass(frozen=True)
class Ensemble:
    """A loaded ensemble file.

    Attributes:
        members: in the order of the file; with folds, all folds of the first recipe, then those of the next.
        ties: what a tied pixel becomes, for an even number of members.
        folds: the number of folds, if each member holds out one; None if all hold out the same images.
    """

    members: tuple[Member, ...]
    ties: Ties | None
    folds: int | None = None

    @property
    def runs(self) -> list[str]:
        """The names of the members' training runs."""
        return [member.run for member in self.members]


def ensemble_names() -> list[str]:
    """The names of the packaged ensembles."""
    return sorted(path.stem for path in ENSEMBLES.glob("*.yaml"))


def load_ensemble(name: str, overrides: Sequence[str] = ()) -> Ensemble:
    """Load an ensemble and its members' recipes.

    Args:
        name: the name of a packaged ensemble, or the path of a YAML file.
        overrides: as for `load_recipe`, applied to every member; they win over a member's `set`.

    Raises:
        UsageError: no such ensemble or recipe, a wrong key, two runs with the same name, or members that cannot vote or
            be scored together.
    """
    path = ENSEMBLES / f"{name}.yaml" if name in ensemble_names() else Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UsageError(f"no ensemble {name!r}: give a YAML file, or one of {', '.join(ensemble_names())}")
    file = _read(path)
    members = tuple(member for entry in file.members for member in _members(entry, file.folds, path, overrides))
    _check_runs(members, path)
    _check_labels(members, path)
    _check_splits(members, file.folds, path)
    return Ensemble(members, file.ties, file.folds)


def load_member(name: str, index: int, overrides: Sequence[str] = ()) -> Member:
    """Load member `index` of an ensemble, from 0, as an array job numbers its tasks.

    Raises:
        UsageError: as for `load_ensemble`, or no such member.
    """
    members = load_ensemble(name, overrides).members
    if not 0 <= index < len(members):
        raise UsageError(
            f"ensemble {name} has {len(members)} members, numbered 0 to {len(members) - 1}; there is no member {index}"
        )
    return members[index]


def _read(path: Path) -> _File:
    values = read_yaml(path)
    try:
        file = _File.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{path}: not an ensemble:\n{explain(error, _File)}\n{_HOW_TO_WRITE}") from None
    count = len(file.members) * (file.folds or 1)
    if not 2 <= count <= MAX_MEMBERS:
        raise UsageError(f"{path}: an ensemble has 2 to {MAX_MEMBERS} members, this one {count}. {_HOW_TO_WRITE}")
    return file


def _members(entry: _Member, folds: int | None, path: Path, overrides: Sequence[str]) -> list[Member]:
    """Expand one entry of the list into its members: a single one, or one per fold."""
    if folds is None:
        return [_member(entry, {}, path, overrides)]
    made = []
    for fold in range(folds):
        split = {"data.split.kind": "kfold", "data.split.folds": folds, "data.split.fold": fold}
        member = _member(entry, split, path, overrides)
        made.append(Member(member.recipe, f"{member.run}-fold{fold}"))
    return made


def _member(entry: _Member, split: dict[str, Any], path: Path, overrides: Sequence[str]) -> Member:
    recipe = recipe_beside(entry.recipe, path, "ensemble")
    try:
        loaded = load_recipe(recipe, overrides, split | entry.set)
    except UsageError as error:
        raise UsageError(f"{path}: member {shown(entry.run or entry.recipe)}: {error}") from None
    return Member(loaded, entry.run or loaded.name)


def _check_runs(members: Sequence[Member], path: Path) -> None:
    runs = [member.run for member in members]
    for run in runs:
        try:
            check_name("run", run)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    if VOTE in runs:  # as the name of a prediction set it belongs to the ensemble's own vote
        raise UsageError(f"{path}: a member is called {VOTE}, as the ensemble's vote is: give it another `run`")
    twice = sorted({run for run in runs if runs.count(run) > 1})
    if twice:
        raise UsageError(f"{path}: two members are called {', '.join(twice)}: give each its own `run`")


def _check_labels(members: Sequence[Member], path: Path) -> None:
    if len({member.recipe.data.label for member in members}) > 1:
        found = ", ".join(f"{member.run} {shown(member.recipe.data.label)}" for member in members)
        raise UsageError(
            f"{path}: members with different labels cannot vote together: {found}: give them all the same data.label"
        )


def _check_splits(members: Sequence[Member], folds: int | None, path: Path) -> None:
    """Refuse members whose held-out images differ, unless they are the folds of one split."""
    first = members[0].recipe.data.split
    differing = []
    for index, member in enumerate(members):
        fold = {} if folds is None else {"kind": "kfold", "folds": folds, "fold": index % folds}
        if member.recipe.data.split.settings() != first.model_copy(update=fold).settings():
            differing.append(_shown_split(member))
    if differing and folds is None:
        raise UsageError(
            f"{path}: members that hold out different images cannot be scored together: "
            f"{'; '.join([_shown_split(members[0]), *differing])}: give them all the same data.split, or write "
            "`folds: 5` for members that hold out one fold each"
        )
    if differing:
        raise UsageError(
            f"{path}: with `folds: {folds}` each member must hold out one fold of the same split, but "
            f"{'; '.join(differing)}: change only the seed of data.split, and to the same value for all members"
        )


def _shown_split(member: Member) -> str:
    split: Split = member.recipe.data.split
    return f"{member.run} has {', '.join(f'{key} {shown(value)}' for key, value in split.settings().items())}"
