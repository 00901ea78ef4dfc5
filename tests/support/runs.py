"""The tiny recipe, ways to change it, and the comparison of two runs."""

import torch
import yaml

from stas.config import Recipe
from stas.models.checkpoint import load_checkpoint
from stas.recipe import parse_recipe
from stas.training.metrics_log import read_metrics

FIGURES = ("train_loss", "val_loss", "val_dice", "lr", "best")
TINY = {
    "name": "tiny",
    "data": {"size": 64, "split": {"kind": "fraction", "fraction": 0.3}},
    # No batch normalisation: each rank computes its own statistics, and ranks must agree with a single process.
    "model": {
        "library": "monai",
        "architecture": "UNet",
        "options": {"channels": [4, 8], "strides": [2], "norm": "INSTANCE", "dropout": 0.1},
    },
    "loss": {"dice": 1.0, "bce": 1.0},
    "optimizer": {"name": "adabelief", "lr": 0.01},
    "augment": {"dihedral": True, "color": 0.5},
    "train": {"batch": 4, "epochs": 2},
}


def changed(recipe: Recipe, **sections) -> Recipe:
    values = recipe.model_dump(mode="json")
    for section, keys in sections.items():
        values[section] |= keys
    return parse_recipe(values, "test")


def figures(run):
    return [{key: record[key] for key in FIGURES} for record in read_metrics(run.metrics)]


def weights(run, which="last"):
    return load_checkpoint(run.checkpoint(which)).network


def assert_same_run(one, other):
    """Check that every epoch's figures, the weights and the optimiser state are equal to the bit."""
    assert figures(one) == figures(other)
    first, second = (load_checkpoint(run.checkpoint("last")) for run in (one, other))
    for key, value in (first.network | first.optimizer).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor((second.network | second.optimizer)[key])), key
    for name, value in weights(one, "best").items():
        assert torch.equal(value, weights(other, "best")[name]), name


def recipe_file(recipe, directory):
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path
