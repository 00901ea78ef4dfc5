"""Recipes: every hyperparameter of a member of the ensemble, in one YAML file.

Precedence, later wins: the defaults in this file < the recipe file < the member's `set` in the ensemble <
`--set key=value`. A recipe file that `extends` another is that file's values with its own laid over them.
An unknown or wrong key is refused with the valid ones listed.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stas.errors import InputDataError, UsageError
from stas.untrusted import MAX_YAML_BYTES, parse_yaml, read_bounded, shown

MANY = 10**9  # of anything that is counted; Python cannot even write some larger numbers down
RECIPES = Path(__file__).parent / "recipes"
PROBLEMS_SHOWN = 20  # of a recipe; a file that is something else has thousands
# Arguments of timm's create_model and smp's encoders that say where weights come from: model.weights alone does.
_WEIGHT_SOURCES = {
    "encoder_weights",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
}


# The keys of data.split that each kind reads.
_SPLIT_KEYS = {
    "first": {"kind", "count"},
    "fraction": {"kind", "fraction", "seed"},
    "kfold": {"kind", "folds", "fold", "seed"},
    "list": {"kind", "file"},
}


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Split(Section):
    """Which samples, in sorted order of their stems, are for validation."""

    kind: Literal["first", "fraction", "list", "kfold"] = "first"
    count: int = Field(default=237, ge=1, le=MANY, description="first: this many samples from the start")
    fraction: float = Field(default=0.2, gt=0, lt=1, description="fraction: this share, drawn with `seed`")
    folds: int = Field(default=5, ge=2, le=MANY, description="kfold: number of folds, stratified by foreground area")
    fold: int = Field(default=0, ge=0, description="kfold: the fold for validation, from 0")
    file: Path | None = Field(default=None, description="list: a text file with one stem per line")
    seed: int = Field(default=0, ge=-MANY, le=MANY)

    @model_validator(mode="after")
    def _complete(self) -> "Split":
        if self.kind == "list" and self.file is None:
            raise ValueError("split kind 'list' needs data.split.file, a text file with one stem per line")
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds} folds: the first fold is 0, the last {self.folds - 1}")
        return self

    def settings(self) -> dict[str, Any]:
        """The keys that this kind of split reads: two splits that agree in them hold out the same samples."""
        return self.model_dump(mode="json", include=_SPLIT_KEYS[self.kind])


class Data(Section):
    """What the network sees."""

    label: str = Field(default="STAS", description="LabelMe label that is foreground")
    size: tuple[int, int] = Field(
        default=(800, 800), description="height and width in pixels; one number makes a square"
    )
    scale: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="store each image at this share of its own height and width, and train on random windows of "
        "data.size; null: store and train on whole images at data.size",
    )
    intensity: Literal["minmax", "unit"] = Field(
        default="minmax",
        description="minmax: each image's own minimum and maximum to 0 and 1; unit: 0 to 255 to 0 and 1",
    )
    mean: tuple[float, float, float] | None = Field(default=None, description="RGB mean subtracted afterwards")
    std: tuple[float, float, float] | None = Field(
        default=None, description="RGB standard deviation divided by afterwards"
    )
    split: Split = Split()

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _sensible(self) -> "Data":
        if not all(32 <= side <= 8192 for side in self.size):
            raise ValueError(f"size {self.size} is not usable: each side must be 32 to 8192 pixels")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be above 0")
        return self


class Model(Section):
    """A network with three input channels and one output channel (the foreground's logit)."""

    library: Literal["smp", "monai"] = "smp"
    architecture: str = Field(
        default="DeepLabV3Plus", description="class in segmentation_models_pytorch or monai.networks.nets"
    )
    encoder: str | None = Field(
        default="resnet34", description="smp only: an smp encoder, or a timm model as tu-<name>"
    )
    weights: str | None = Field(default="imagenet", description="smp only: the encoder's pretrained weights, or null")
    options: dict[str, Any] = Field(default={}, description="further arguments of the architecture")

    @model_validator(mode="before")
    @classmethod
    def _monai_has_no_encoder(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("library") == "monai":
            return {"encoder": None, "weights": None} | values
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "Model":
        if self.library == "monai" and (self.encoder or self.weights):
            raise ValueError("MONAI networks have no encoder and no pretrained weights: set both to null")
        if self.library == "smp" and not self.encoder:
            raise ValueError("an smp architecture needs an encoder, such as resnet34 or tu-tf_efficientnet_lite0")
        if set(self.encoder or "") & {":", "/", "\\"}:  # timm takes tu-hf-hub:... and tu-local-dir:... for sources
            raise ValueError(
                f"encoder {self.encoder!r} is a place, not a name: give timm's name of a model, as tu-<name>"
            )
        if self.options.keys() & _WEIGHT_SOURCES:
            named = ", ".join(sorted(self.options.keys() & _WEIGHT_SOURCES))
            raise ValueError(f"options may not say where weights come from ({named}): use model.weights")
        return self


class Loss(Section):
    """Weights of the terms that are added up; each term is one number per image."""

    dice: float = Field(default=0.0, ge=0)
    bce: float = Field(default=0.0, ge=0, description="binary cross entropy, mean over pixels")
    focal: float = Field(default=0.0, ge=0, description="focal loss, mean over pixels")
    tversky: float = Field(default=0.0, ge=0)
    focal_gamma: float = Field(default=2.0, ge=0)
    tversky_alpha: float = Field(default=0.5, ge=0, description="weight of false positives")
    tversky_beta: float = Field(default=0.5, ge=0, description="weight of false negatives")

    @model_validator(mode="before")
    @classmethod
    def _dice_unless_said(cls, values: Any) -> Any:
        terms = ("dice", "bce", "focal", "tversky")
        if isinstance(values, dict) and not any(term in values for term in terms):
            return values | {"dice": 1.0}
        return values

    @model_validator(mode="after")
    def _some_term(self) -> "Loss":
        if self.dice + self.bce + self.focal + self.tversky <= 0:
            raise ValueError("every term of the loss has weight 0: give at least one of dice, bce, focal, tversky")
        return self


class Optimizer(Section):
    name: Literal["adabelief", "adam", "adamw", "sgd"] = "adabelief"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.99), description="all but sgd")
    eps: float = Field(default=1e-16, gt=0, description="all but sgd")
    weight_decouple: bool = Field(default=True, description="adabelief: decay the weights apart from the gradient")
    rectify: bool = Field(default=False, description="adabelief: RAdam's rectification")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd")
    nesterov: bool = Field(default=False, description="sgd")


class Schedule(Section):
    """The learning rate as a function of the share of all steps that is done."""

    name: Literal["constant", "cosine", "onecycle"] = "constant"
    warmup: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of all steps in which the rate rises to lr, on a line (onecycle: a cosine)",
    )
    start: float = Field(
        default=0.04, ge=0, le=1, description="the rate at the first step of the warm-up, relative to lr"
    )
    end: float = Field(
        default=0.0, ge=0, le=1, description="cosine, onecycle: the rate at the last step, relative to lr"
    )

    @model_validator(mode="after")
    def _onecycle_rises(self) -> "Schedule":
        if self.name == "onecycle" and self.warmup == 0:
            raise ValueError("onecycle needs schedule.warmup above 0, such as 0.3; without a warm-up use cosine")
        return self


class Augment(Section):
    """Random changes of a training sample. 0 switches one off."""

    rot90: float = Field(default=0.0, ge=0, le=1, description="probability of a rotation by 90, 180 or 270 degrees")
    flip: float = Field(default=0.0, ge=0, le=1, description="probability of a flip, for each axis")
    dihedral: bool = Field(default=False, description="each of the square's 8 symmetries equally often")
    color: float = Field(default=0.0, ge=0, le=1, description="strength of brightness, contrast and channel jitter")
    stain: float = Field(default=0.0, ge=0, le=1, description="strength of haematoxylin and eosin jitter")


class Train(Section):
    batch: int = Field(default=16, ge=1, le=MANY, description="images a step over all ranks together")
    epochs: int = Field(default=500, ge=1, le=MANY)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = Field(default=False, description="torch.compile; what it fails at runs as it is")
    max_bad_steps: int = Field(
        default=0, ge=0, le=MANY, description="steps with a loss or gradient that is not finite which a run may skip"
    )
    seed: int = Field(default=0, ge=0, le=MANY)


class Infer(Section):
    threshold: float = Field(
        default=0.5, gt=0, lt=1, description="a pixel is foreground when its probability is above this"
    )
    tta: bool = Field(default=False, description="average the logits over the square's 8 symmetries")


class Recipe(Section):
    """One member of the ensemble."""

    name: str
    summary: str = ""
    data: Data = Data()
    model: Model = Model()
    loss: Loss = Loss(dice=1.0)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    augment: Augment = Augment()
    train: Train = Train()
    infer: Infer = Infer()

    @model_validator(mode="after")
    def _square_when_rotated(self) -> "Recipe":
        height, width = self.data.size
        if height != width and (self.augment.rot90 or self.augment.dihedral):
            raise ValueError(
                f"augment.rot90 and augment.dihedral turn {height} x {width} images into {width} x {height}, "
                "which cannot stand in one batch: use a square data.size, or augment.flip"
            )
        return self


class _RecipeFile(Recipe):
    """What a recipe file may say beyond the recipe itself."""

    extends: str | None = None


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe, change it as a member of an ensemble does, and apply `--set` overrides.

    Args:
        name: the name of a packaged recipe, or the path of a YAML file.
        overrides: strings such as "train.epochs=20"; the value is read as YAML.
        settings: values by dotted key, such as {"train.epochs": 20}; overrides win over them.

    Raises:
        UsageError: no such recipe, or a key or value that is not valid.
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
    """Resolve the name of a recipe that stands in another file, for `load_recipe`.

    Args:
        name: a packaged recipe's name, or a path relative to `file` that does not lead out of its directory.
        file: where the name stands.
        what: what `file` is, for the message.

    Raises:
        UsageError: the path leads out of the directory.
    """
    if name in recipe_names():
        return name
    inside = file.parent.resolve()
    if not Path(os.path.normpath(inside / name)).is_relative_to(inside):
        raise UsageError(
            f"{file}: {shown(name)} is outside of the {what}'s directory: put the recipe beside or below it"
        )
    return str(file.parent / name)


def is_section(key: str) -> bool:
    """Whether a dotted key names a section of a recipe, such as data.split, and not a value."""
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
    """A recipe file's values, laid over those of the recipe that it extends; and the file's name for messages."""
    values = _read_mapping(path)
    if "extends" not in values:
        return values, str(path)
    name = values.pop("extends")
    if not isinstance(name, str):
        raise UsageError(f"{path}: extends = {shown(name)}: give the name of one recipe, such as lite0")
    base_path = _recipe_path(recipe_beside(name, path, "recipe"))
    base = _read_mapping(base_path)
    if "extends" in base:  # one level, so that a reader finds every value in two files
        raise UsageError(
            f"{path}: extends {shown(name)}, which itself extends {shown(base['extends'])}: extend a recipe that "
            "extends no other, and write what differs from it"
        )
    for own in ("name", "summary"):
        base.pop(own, None)
    return _laid_over(base, values), f"{path} (extends {name})"


def _read_mapping(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections, found {type(values).__name__}: see stas/recipes")
    return values


def _laid_over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The union of two nested mappings; where both have a value, that of `values`."""
    both = {
        key: _laid_over(base[key], value)
        for key, value in values.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | values | both


def read_yaml(path: Path) -> Any:
    """What a YAML file of plain values holds (see `parse_yaml`).

    Raises:
        UsageError: not readable, or not such a file.
    """
    try:
        return parse_yaml(read_bounded(path, MAX_YAML_BYTES))
    except InputDataError as error:
        raise UsageError(str(error)) from error
    except ValueError as error:
        raise UsageError(
            f"{path}: not readable as YAML ({error}): correct it, or begin with a copy of another"
        ) from error


def parse_recipe(values: dict[str, Any], source: str, listed: type[Section] = Recipe) -> Recipe:
    """Validate a recipe that stands in `source` (named in errors, which list the keys of `listed` as valid).

    Raises:
        UsageError: lists every wrong key with its value, the requirement, and for unknown keys the valid ones.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{source}: not a valid recipe:\n{explain(error, listed)}") from None  # it repeats the input


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included; `parse_recipe` reads it back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def recipes() -> str:
    """A table of the packaged recipes: name, network, size and batch."""
    rows = [("recipe", "architecture", "encoder", "size", "batch", "summary")]
    for name in recipe_names():
        recipe = load_recipe(name)
        size = " x ".join(map(str, recipe.data.size))
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
    """Set one dotted key of the nested mapping `values` in place; `source` is where it was said."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(f"{source}: {section!r} is a value, not a section")
    values[last] = value


def explain(error: ValidationError, model: type[Section]) -> str:
    """The problems that pydantic found in a file, one in a line."""
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
