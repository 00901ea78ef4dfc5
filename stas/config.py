"""Every key of a recipe, with its default and range; stas/recipe.py reads the files."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_INPUT_SIDE = 8192  # pixels, of the network's input
MANY = 10**9  # upper limit of every count: Python refuses to print some larger numbers
# Arguments of timm's create_model and smp's encoders that choose where weights come from: only model.weights may.
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
    """A section of a recipe: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Split(Section):
    """Which samples are held out for validation; they are sorted by stem first."""

    kind: Literal["first", "fraction", "list", "kfold"] = Field(
        default="first", description="how the held-out samples are chosen; each key below names the kind that reads it"
    )
    count: int = Field(default=237, ge=1, le=MANY, description="first: number of samples to hold out, from the start")
    fraction: float = Field(
        default=0.2, gt=0, lt=1, description="fraction: share of the samples to hold out, drawn with `seed`"
    )
    folds: int = Field(default=5, ge=2, le=MANY, description="kfold: number of folds, stratified by foreground area")
    fold: int = Field(default=0, ge=0, description="kfold: the fold to hold out, from 0")
    file: Path | None = Field(default=None, description="list: a text file of the stems to hold out, one per line")
    seed: int = Field(default=0, ge=-MANY, le=MANY, description="fraction, kfold: seed of the random choice")

    @model_validator(mode="after")
    def _complete(self) -> "Split":
        if self.kind == "list" and self.file is None:
            raise ValueError("split kind 'list' needs data.split.file, a text file with one stem per line")
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds} folds: the first fold is 0, the last {self.folds - 1}")
        return self

    def settings(self) -> dict[str, Any]:
        """The values that this kind of split reads; splits with equal values hold out the same samples."""
        return self.model_dump(mode="json", include=_SPLIT_KEYS[self.kind])


class Data(Section):
    """The network's input."""

    label: str = Field(default="STAS", description="LabelMe label of the foreground")
    size: tuple[int, int] = Field(
        default=(800, 800), description="height and width in pixels; a single number means a square"
    )
    scale: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="store each image at this fraction of its own height and width, and train on random windows of "
        "data.size; null: store and train on whole images at data.size",
    )
    intensity: Literal["minmax", "unit"] = Field(
        default="minmax",
        description="minmax: map each image's own minimum and maximum to 0 and 1; unit: map 0 and 255 to 0 and 1",
    )
    mean: tuple[float, float, float] | None = Field(
        default=None, description="RGB mean to subtract once `intensity` has scaled pixels to 0 to 1; null: none"
    )
    std: tuple[float, float, float] | None = Field(
        default=None, description="RGB standard deviation to divide by after subtracting the mean; null: none"
    )
    split: Split = Split()

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _sensible(self) -> "Data":
        if not all(32 <= side <= MAX_INPUT_SIDE for side in self.size):
            raise ValueError(
                f"size {self.size} is not usable: height and width must each be 32 to {MAX_INPUT_SIDE} pixels"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be above 0")
        return self


class Model(Section):
    """A network with three input channels and one output channel (the foreground's logit)."""

    library: Literal["smp", "monai"] = Field(
        default="smp", description="where the architecture comes from: segmentation_models_pytorch or MONAI"
    )
    architecture: str = Field(
        default="DeepLabV3Plus", description="name of a class in segmentation_models_pytorch or monai.networks.nets"
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
        if set(self.encoder or "") & {":", "/", "\\"}:  # timm reads tu-hf-hub:... and tu-local-dir:... as sources
            raise ValueError(
                f"encoder {self.encoder!r} is a location, not a name: give the name of a timm model as tu-<name>"
            )
        if self.options.keys() & _WEIGHT_SOURCES:
            named = ", ".join(sorted(self.options.keys() & _WEIGHT_SOURCES))
            raise ValueError(f"options must not choose where weights come from ({named}): use model.weights")
        return self


class Loss(Section):
    """Weights of the terms of the loss, which are summed; each term is one number per image."""

    dice: float = Field(default=0.0, ge=0, description="weight of 1 - soft Dice, computed per image")
    bce: float = Field(default=0.0, ge=0, description="weight of binary cross entropy, averaged over pixels")
    focal: float = Field(default=0.0, ge=0, description="weight of the focal loss, averaged over pixels")
    tversky: float = Field(default=0.0, ge=0, description="weight of 1 - Tversky index, computed per image")
    focal_gamma: float = Field(
        default=2.0,
        ge=0,
        description="focal: exponent; the larger, the less easy pixels count; at 0 all count the same",
    )
    tversky_alpha: float = Field(default=0.5, ge=0, description="tversky: weight of false positives")
    tversky_beta: float = Field(default=0.5, ge=0, description="tversky: weight of false negatives")

    @model_validator(mode="before")
    @classmethod
    def _dice_by_default(cls, values: Any) -> Any:
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
    """The optimiser and its settings."""

    name: Literal["adabelief", "adam", "adamw", "sgd"] = Field(
        default="adabelief", description="the optimiser; a key below that not all of them read names those that do"
    )
    lr: float = Field(
        default=1e-4, gt=0, description="the highest learning rate, from which `schedule` sets each step's"
    )
    weight_decay: float = Field(
        default=1e-4,
        ge=0,
        description="adamw, and adabelief with weight_decouple: each step shrinks the weights by the current learning "
        "rate times this; otherwise this times the weights is added to the gradient",
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.99), description="all but sgd: decay rates of the running averages of first and second moment"
    )
    eps: float = Field(default=1e-16, gt=0, description="all but sgd: keeps the update's denominator above 0")
    weight_decouple: bool = Field(
        default=True, description="adabelief: apply weight decay to the weights, not to the gradient"
    )
    rectify: bool = Field(default=False, description="adabelief: use RAdam's rectification")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd: momentum factor; 0 is plain SGD")
    nesterov: bool = Field(default=False, description="sgd: use Nesterov momentum, which needs momentum above 0")

    @model_validator(mode="after")
    def _accepted_by_torch(self) -> "Optimizer":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: each must be at least 0 and below 1, as in (0.9, 0.99)")
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs optimizer.momentum above 0, such as 0.9; without momentum leave it out")
        return self


class Schedule(Section):
    """The learning rate as a function of the fraction of all steps done."""

    name: Literal["constant", "cosine", "onecycle"] = Field(
        default="constant",
        description="after the warm-up, constant stays at lr; cosine and onecycle fall to `end` on a cosine",
    )
    warmup: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="fraction of all steps over which the rate rises to lr, linearly (onecycle: on a cosine)",
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
    """Random changes to a training sample. 0 turns a change off."""

    rot90: float = Field(default=0.0, ge=0, le=1, description="probability of a rotation by 90, 180 or 270 degrees")
    flip: float = Field(default=0.0, ge=0, le=1, description="probability of a flip, for each axis")
    dihedral: bool = Field(default=False, description="apply one of the square's 8 symmetries, each equally likely")
    color: float = Field(default=0.0, ge=0, le=1, description="strength of brightness, contrast and channel jitter")
    stain: float = Field(default=0.0, ge=0, le=1, description="strength of haematoxylin and eosin jitter")


class Train(Section):
    """Batch, length, speed and seed of a training run."""

    batch: int = Field(default=16, ge=1, le=MANY, description="images per step, over all ranks together")
    epochs: int = Field(default=500, ge=1, le=MANY, description="passes over the training samples")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="floating-point format of the forward pass, in training and inference; weights stay in fp32",
    )
    channels_last: bool = Field(
        default=False, description="keep images and weights in memory with the channels last, which is often faster"
    )
    compile: bool = Field(default=False, description="use torch.compile; where it fails, run in eager mode")
    max_bad_steps: int = Field(
        default=0,
        ge=0,
        le=MANY,
        description="steps with a non-finite loss or gradient that a run may skip before it fails",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=MANY,
        description="seed of the initial weights, the sample order and the augmentation",
    )


class Infer(Section):
    """How masks are predicted, unless an option of `stas infer` overrides it."""

    threshold: float = Field(
        default=0.5, gt=0, lt=1, description="a pixel is foreground when its probability is above this"
    )
    tta: bool = Field(default=False, description="average the logits over the square's 8 symmetries")


class Recipe(Section):
    """One member of the ensemble."""

    name: str = Field(description="also the run's name, unless the command gives another")
    summary: str = Field(default="", description="one line, shown by `stas recipes`")
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
                f"augment.rot90 and augment.dihedral turn {width} x {height} images (width x height) into "
                f"{height} x {width}, which cannot share a batch: use a square data.size, or augment.flip"
            )
        return self
