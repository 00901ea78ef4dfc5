"""The batch scripts in a real Slurm: all stages, a failing member, two nodes, and jobs that reach their walltime."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from stas.config import Recipe
from stas.models.checkpoint import load_checkpoint
from stas.paths import RunPaths, Workspace
from stas.preprocess import preprocess
from stas.training.metrics_log import read_metrics
from tests.support.launch import PATIENCE, stas, wait_until
from tests.support.runs import TINY, assert_same_run
from tests.support.slurm import Slurm, start_slurm, why_not

pytestmark = pytest.mark.cluster
REPOSITORY = Path(__file__).parents[1]
MEMBERS = ("one", "two", "three")
ENDLESS = 1_000_000  # epochs


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with start_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(sample: Path, tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A workspace with a store, tiny recipes, and an environment that overrides slurm/site.sh."""
    root = tmp_path_factory.mktemp("site")
    for seed, name in enumerate(MEMBERS):
        write_recipe(root / f"{name}.yaml", seed=seed)
    write_ensemble(root / "ensemble.yaml", *MEMBERS)
    environment = {
        "DATA": str(sample),
        "PREDICT_IMAGES": str(sample / "Train_Images"),
        "WORKSPACE": str(root / "workspace"),
        "ENSEMBLE": str(root / "ensemble.yaml"),
        "OMP_NUM_THREADS": "1",
        "GPUS": "0",  # they only look like GPUs
    }
    workspace = Workspace(root / "workspace")
    preprocess([sample / "Train_Images"], [sample / "Train_Annotations"], workspace, tiny.data, workers=1)
    return SimpleNamespace(root=root, workspace=workspace, environment=environment, sample=sample)


def write_recipe(path: Path, **changes: int) -> None:
    train: dict[str, Any] = TINY["train"] | changes
    path.write_text(yaml.safe_dump(TINY | {"name": path.stem, "train": train}))


def write_ensemble(path: Path, *members: str) -> Path:
    path.write_text(yaml.safe_dump({"members": [f"{member}.yaml" for member in members], "ties": "background"}))
    return path


def submit_chain(slurm: Slurm, site: SimpleNamespace, **environment: str) -> dict[str, str]:
    """Submit all stages; return the job number of each, as scripts/submit_slurm prints it."""
    said = slurm.run(REPOSITORY / "scripts" / "submit_slurm", **(site.environment | environment))
    return dict(re.findall(r"(\w+) (\d+)[,;]", said))


def submit(slurm: Slurm, site: SimpleNamespace, script: str, *options: str, **environment: str) -> str:
    """Submit one batch script by hand from the root of the repository."""
    log = f"--output={site.root}/{script}-%j.log"
    done = subprocess.run(
        ["sbatch", "--parsable", log, *options, f"slurm/{script}.sbatch"],
        cwd=REPOSITORY,
        env=slurm.environment | site.environment | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def train_endless(
    slurm: Slurm, site: SimpleNamespace, name: str, *options: str, **environment: str
) -> tuple[str, RunPaths]:
    """Submit a separate run that ends only at its time limit or by a signal."""
    write_recipe(site.root / f"{name}.yaml", epochs=ENDLESS)
    ensemble = write_ensemble(site.root / f"{name}-alone.yaml", name, "one")
    environment = {"ENSEMBLE": str(ensemble)} | environment
    # One GPU: these tests are not about ranks.
    job = submit(slurm, site, "train", "--array=0", "--gpus-per-node=1", *options, **environment)
    return job, site.workspace.run(name)


def epochs(run: RunPaths) -> int:
    return len(read_metrics(run.metrics)) if run.metrics.exists() else 0


def log_of(site: SimpleNamespace, job: str, script: str = "train") -> str:
    """The log so far of a job submitted by hand; an array's only task has the job's number too."""
    path = site.root / f"{script}-{job}.log"
    return path.read_text() if path.exists() else ""


def masks(directory: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(directory.glob("*.png"))}


def test_the_chain_goes_from_annotations_to_voted_masks(slurm: Slurm, site: SimpleNamespace):
    workspace = Workspace(site.root / "chain")
    jobs = submit_chain(slurm, site, WORKSPACE=str(workspace.root))
    assert slurm.wait(jobs["vote"], 3 * PATIENCE) == ["COMPLETED"]
    assert slurm.states(jobs["train"]) == slurm.states(jobs["infer"]) == ["COMPLETED"] * 3
    sets = [masks(workspace.predictions(name)) for name in (*MEMBERS, "vote")]
    images = {path.stem: Image.open(path).size for path in (site.sample / "Train_Images").iterdir()}
    assert sets[3].keys() == images.keys()
    for stem, (width, height) in images.items():
        one, two, three, vote = (one_set[stem] > 0 for one_set in sets)
        assert vote.shape == (height, width)
        assert np.array_equal(vote, (one & two) | (three & (one | two)))
    held_out = load_checkpoint(workspace.run("one").checkpoint("best")).metadata["validation"]
    assert sorted(masks(workspace.predictions("vote-held-out"))) == sorted(held_out)
    assert (workspace.root / "evaluation" / "sheets.png").exists()
    # 4 GPUs per node: four ranks took part, and one logged.
    log = (workspace.root / "logs" / f"train-{jobs['train']}_0.log").read_text()
    assert "4 ranks" in log and log.count("epoch 2/2") == 1


def test_a_member_that_fails_leaves_the_others_and_the_vote_says_who_is_missing(slurm: Slurm, site: SimpleNamespace):
    broken = TINY | {"name": "broken", "data": TINY["data"] | {"size": 96}}
    (site.root / "broken.yaml").write_text(yaml.safe_dump(broken))
    ensemble = write_ensemble(site.root / "with-broken.yaml", "one", "broken", "three")
    # There is no store of 96 pixels, because preprocess ran for another ensemble.
    train = submit(slurm, site, "train", ENSEMBLE=str(ensemble))
    infer = submit(
        slurm, site, "infer", f"--dependency=aftercorr:{train}", "--kill-on-invalid-dep=yes", ENSEMBLE=str(ensemble)
    )
    vote = submit(slurm, site, "vote", f"--dependency=afterany:{infer}", ENSEMBLE=str(ensemble), INFER_JOB=infer)
    assert slurm.wait(vote, 3 * PATIENCE) == ["FAILED"]
    assert slurm.states(train) == ["COMPLETED", "FAILED", "COMPLETED"]
    assert slurm.states(infer) == ["COMPLETED", "CANCELLED", "COMPLETED"]
    assert slurm.details(vote)[0]["ExitCode"] == "3:0"
    assert "members are missing: number ArrayTaskId=1 of" in log_of(site, vote, "vote")
    by_hand = submit(slurm, site, "vote", ENSEMBLE=str(ensemble))
    assert slurm.wait(by_hand) == ["FAILED"]
    assert slurm.details(by_hand)[0]["ExitCode"] == "3:0"
    said = log_of(site, by_hand, "vote")
    assert "1 of 3 members are missing" in said and "broken: no" in said


def test_a_vote_never_takes_masks_of_an_older_run(slurm: Slurm, site: SimpleNamespace):
    """A member of this round failed, its masks of the last round are there, and Slurm has forgotten how it ended."""
    workspace = site.workspace
    for member in MEMBERS:  # the last round
        recipe = site.root / f"{member}.yaml"
        assert stas("train", "--recipe", recipe, "--run", member, "--workspace", workspace.root).returncode == 0
    ensemble = {"ENSEMBLE": str(site.root / "ensemble.yaml")}
    last = submit(slurm, site, "infer", **ensemble)
    assert slurm.wait(last, 2 * PATIENCE) == ["COMPLETED"] * 3
    again = submit(slurm, site, "infer", **ensemble, PREDICT_IMAGES="/nonexistent")
    assert slurm.wait(again) == ["FAILED"] * 3
    gone = {**slurm.environment, "LANG": "C"}
    wait_until(
        lambda: subprocess.run(["scontrol", "show", "job", again], env=gone, capture_output=True).returncode != 0,
        "Slurm to forget the job",
    )
    vote = submit(slurm, site, "vote", **ensemble, INFER_JOB=again)
    assert slurm.wait(vote) == ["FAILED"]
    assert "members are missing: number ArrayTaskId=0 and all others of" in log_of(site, vote, "vote")
    vote = submit(slurm, site, "vote", **ensemble, INFER_JOB=last)
    slurm.wait(vote)
    assert "vote of one, two, three: 10 masks" in log_of(site, vote, "vote")


def test_two_nodes_train_one_run(slurm: Slurm, site: SimpleNamespace):
    options = ("--array=1", "--nodes=2", "--gpus-per-node=1")
    recipe = site.root / "pair.yaml"
    write_recipe(recipe, epochs=3)
    ensemble = write_ensemble(site.root / "pairs.yaml", "one", "pair")
    job = submit(slurm, site, "train", *options, ENSEMBLE=str(ensemble))
    assert slurm.wait(job) == ["COMPLETED"], log_of(site, job)
    assert slurm.details(job)[0]["NumNodes"] == "2"
    assert epochs(site.workspace.run("pair")) == 3
    assert "2 ranks" in log_of(site, job)


def test_a_job_cut_off_by_its_walltime_is_requeued_and_resumes(slurm: Slurm, site: SimpleNamespace):
    """Slurm itself sends the warning, sometime in the first of two minutes."""
    job, run = train_endless(slurm, site, "walltime", "--time=2", "--signal=B:USR1@60")
    wait_until(lambda: slurm.details(job)[0]["Restarts"] == "1", "the warning and the queue")
    wait_until(lambda: "resuming after epoch" in log_of(site, job), "the restart")
    (stopped,) = re.findall(r"stopped in epoch (\d+)", log_of(site, job))
    (resumed,) = re.findall(r"resuming after epoch (\d+)", log_of(site, job))
    assert int(resumed) == int(stopped) - 1 > 0
    wait_until(lambda: epochs(run) > int(resumed) + 5, "epochs after the restart")
    slurm.run("scancel", job)
    assert slurm.wait(job) == ["CANCELLED"]
    assert "goes back into the queue, restart 1" in log_of(site, job)
    steps = [record["epoch"] for record in read_metrics(run.metrics)]
    assert steps == list(range(1, len(steps) + 1)), "no epoch twice, none left out"


def test_three_interruptions_in_a_row_change_nothing(slurm: Slurm, site: SimpleNamespace):
    """Send Slurm's warning by hand: each time the job writes a checkpoint, exits with 75, is requeued and resumes."""
    write_recipe(site.root / "thrice.yaml", epochs=400)
    ensemble = write_ensemble(site.root / "thrice-alone.yaml", "thrice", "one")
    job = submit(slurm, site, "train", "--array=0", "--gpus-per-node=1", ENSEMBLE=str(ensemble))
    run = site.workspace.run("thrice")
    for restarts in range(3):
        before = epochs(run)
        wait_until(lambda before=before: epochs(run) > before + 10, "epochs")
        slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_0")
        wait_until(lambda after=restarts + 1: slurm.details(job)[0]["Restarts"] == str(after), "the queue")
    assert slurm.wait(job) == ["COMPLETED"], log_of(site, job)
    whole = stas(
        "train", "--recipe", site.root / "thrice.yaml", "--workspace", site.workspace.root, "--run", "thrice-whole"
    )
    assert whole.returncode == 0, whole.stderr
    assert_same_run(site.workspace.run("thrice-whole"), run)


def test_a_cancelled_job_leaves_a_checkpoint_and_stays_cancelled(slurm: Slurm, site: SimpleNamespace):
    job, run = train_endless(slurm, site, "cancelled")
    wait_until(lambda: epochs(run) > 3, "epochs")
    slurm.run("scancel", job)
    assert slurm.wait(job) == ["CANCELLED"]
    wait_until(lambda: "run the same command again to resume" in log_of(site, job), "the checkpoint")
    done = epochs(run)
    assert load_checkpoint(run.checkpoint("last")).metadata["state"]["epoch"] == done
    again = submit(
        slurm,
        site,
        "train",
        "--array=0",
        "--gpus-per-node=1",
        ENSEMBLE=str(site.root / "cancelled-alone.yaml"),
        TIME_LIMIT="0.1s",
    )
    assert slurm.wait(again) == ["COMPLETED"]
    assert epochs(run) == done, "the time is spent, so nothing was trained again"


def test_a_requeued_job_resumes(slurm: Slurm, site: SimpleNamespace):
    """Slurm requeues jobs when a node fails or another job preempts them."""
    job, run = train_endless(slurm, site, "requeued", TIME_LIMIT="30s")
    wait_until(lambda: epochs(run) > 3, "epochs")
    slurm.run("scontrol", "requeue", f"{job}_0")
    assert slurm.wait(job) == ["COMPLETED"], log_of(site, job)
    assert slurm.details(job)[0]["Restarts"] == "1"
    steps = [record["epoch"] for record in read_metrics(run.metrics)]
    assert steps == list(range(1, len(steps) + 1)), "no epoch twice, none left out"


def test_a_dry_run_submits_nothing_and_shows_the_chain(slurm: Slurm, site: SimpleNamespace):
    before = slurm.jobs()
    done = subprocess.run(
        [REPOSITORY / "scripts" / "submit_slurm", "--dry-run"],
        env=os.environ | slurm.environment | site.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert slurm.jobs() == before
    lines = done.stderr.splitlines()
    assert [line.split()[-1] for line in lines] == [
        f"slurm/{name}.sbatch" for name in ("preprocess", "train", "infer", "vote")
    ]
    assert all("--kill-on-invalid-dep=yes" in line for line in lines)
    for line, dependency in zip(
        lines[1:], ("afterok:<preprocess>", "aftercorr:<train>", "afterany:<infer>"), strict=True
    ):
        assert f"--dependency={dependency}" in line
