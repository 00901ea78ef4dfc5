"""All stages in sequence, as a user would type them, on a tiny generated set."""

import csv
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stas.results.metrics import confusion, dice
from tests.support.launch import stas
from tests.support.runs import TINY

MEMBERS = ("one", "two", "three")


@pytest.mark.slow
def test_from_annotations_to_a_scored_vote(sample: Path, tmp_path: Path):
    workspace, images, annotations = tmp_path / "ws", sample / "Train_Images", sample / "Train_Annotations"
    for seed, member in enumerate(MEMBERS):
        recipe = TINY | {"name": member, "train": TINY["train"] | {"seed": seed}}
        (tmp_path / f"{member}.yaml").write_text(yaml.safe_dump(recipe))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        result = stas(*arguments, STAS_WORKSPACE=str(workspace))
        assert result.returncode == 0, result.stderr
        return result

    source = ("--images", images, "--annotations", annotations)
    run("preprocess", *source, "--recipe", tmp_path / "one.yaml", "--masks", tmp_path / "truth")
    for member in MEMBERS:
        run("train", "--recipe", tmp_path / f"{member}.yaml")
        run("infer", "--run", member, "--images", images, "--probabilities")
    run("vote", *MEMBERS)
    sets = [workspace / "predictions" / name for name in (*MEMBERS, "vote")]
    run("evaluate", "--predictions", *sets, "--truth", annotations, "--out", tmp_path / "scores", "--images", images)

    stems = sorted(path.stem for path in images.iterdir())
    with (tmp_path / "scores" / "scores.csv").open() as file:
        rows = {(row["member"], row["image"]): float(row["dice"]) for row in csv.DictReader(file)}
    for stem in stems:
        size = Image.open(images / f"{stem}.jpg").size
        masks = [np.asarray(Image.open(directory / f"{stem}.png")) for directory in sets]
        assert all(mask.shape == size[::-1] and set(np.unique(mask)) <= {0, 255} for mask in masks)
        assert np.array_equal(masks[3] > 0, sum(mask > 0 for mask in masks[:3]) >= 2), "the vote is the majority"
        truth = np.asarray(Image.open(tmp_path / "truth" / f"{stem}.png")) > 0
        assert abs(rows["vote", stem] - float(dice(confusion(masks[3] > 0, truth)))) < 1e-6

    before = {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.is_file()}
    assert "nothing to do" in run("train", "--recipe", tmp_path / "one.yaml").stderr
    assert "nothing to do" in run("infer", "--run", "one", "--images", images, "--probabilities").stderr
    run("vote", *MEMBERS)
    run("preprocess", *source, "--recipe", tmp_path / "one.yaml")
    assert before == {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.is_file()}
