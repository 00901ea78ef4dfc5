"""Stages killed at every file operation, or whose writes, syncs, reads or allocations fail, once or from then on: the
old or the new result is left, a message says what happened, and the next start ends with the same bytes.

By default only a few operations are tried; `make chaos` tries all of them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stas import paths
from stas.config import Recipe
from stas.data.images import write_mask
from stas.evaluate import evaluate
from stas.infer import infer
from stas.models.checkpoint import (
    CheckpointWriter,
    load_checkpoint,
    load_newest,
    remove_leftovers,
    save_checkpoint,
    save_last,
    take_snapshot,
)
from stas.paths import RunPaths, Workspace
from stas.preprocess import preprocess
from stas.recipe import load_recipe
from stas.system import publish
from stas.system.locks import lock
from stas.train import train
from stas.training.metrics_log import MetricsLog, read_metrics
from stas.vote import vote
from tests.support.chaos import Scenario, Walk
from tests.support.faults import CHANGE, MEMORY, READ, SYNC, Fault, Injector, library, why_no_faults

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_faults()), reason=why_no_faults())]
FEW, SOME, MANY, ALL = 5, 12, 60, 10_000  # faults per scenario, evenly spread over its calls


def snapshot(epoch: int):
    torch.manual_seed(epoch)
    network = nn.Linear(3, 2)
    return take_snapshot(network, {"epoch": epoch}, torch.optim.SGD(network.parameters()))


def save_epochs(root: Path, *epochs: int) -> None:
    for epoch in epochs:
        save_checkpoint(RunPaths(root).checkpoint("best"), snapshot(epoch).network_only())
        save_last(RunPaths(root), snapshot(epoch))


def resume_saving(root: Path) -> None:
    """Save as training does, with epoch 2 as the last."""
    run = RunPaths(root / "run")
    with lock(paths.lock_file(run.root)) as held:
        remove_leftovers(run)
        saved = load_newest(run)
        for epoch in range(saved.metadata["epoch"] + 1 if saved else 0, 3):
            writer = CheckpointWriter(run, held)
            writer.write(snapshot(epoch), best=True)
            writer.wait()


def newest_is_not_older_than(epoch: int):
    def check(root: Path) -> None:
        saved = load_newest(RunPaths(root / "run"))
        assert (saved.metadata["epoch"] if saved else -1) >= epoch

    return check


def metrics(root: Path, *epochs: int) -> None:
    with lock(paths.lock_file(root / "run")):
        remove_leftovers(RunPaths(root / "run"))
        with MetricsLog(root / "run" / "metrics.jsonl", root / "events", epochs[0] - 1) as log:
            for epoch in epochs:
                log.append({"epoch": epoch, "val_loss": 1 / epoch})


def metrics_cover_whole_epochs(root: Path) -> None:
    records = read_metrics(root / "run" / "metrics.jsonl")
    assert [record["epoch"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= 2


def members(root: Path, number: int = 3, seed: int = 0) -> list[Path]:
    """Prediction sets of two small masks each."""
    random = np.random.default_rng(seed)
    directories = [root / "members" / f"m{index}" for index in range(number)]
    for directory in directories:
        for stem in "ab":
            write_mask(directory / f"{stem}.png", random.random((8, 9)) < 0.5)
    return directories


def vote_of(root: Path, ties=None, count: int = 3) -> None:
    vote(sorted((root / "members").iterdir())[:count], root / "vote", ties=ties, workers=1)


def evaluate_with(root: Path, sheets: int) -> None:
    evaluate([root / "members" / "m0"], root / "members" / "m1", root / "scores", sheets=sheets)


@pytest.fixture(scope="module")
def two_images(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    for kind in ("Train_Images", "Train_Annotations"):
        (root / kind).mkdir()
        for path in sorted((sample / kind).iterdir())[:2]:
            shutil.copy(path, root / kind)
    return root


@pytest.fixture(scope="module")
def trained(new_workspace: Callable[[], Workspace], tiny: Recipe) -> RunPaths:
    workspace = new_workspace()
    train(tiny, workspace, "chaos")
    return workspace.run("chaos")


@pytest.fixture
def scenarios(two_images: Path, trained: RunPaths, store_workspace: Workspace, tiny: Recipe) -> dict[str, Scenario]:
    images, annotations = two_images / "Train_Images", two_images / "Train_Annotations"
    recipe = load_recipe("lite0", ["data.size=32", "data.split.kind=fraction", "data.split.fraction=0.5"])

    def nothing(root: Path) -> None: ...

    def make_store(root: Path, workers: int = 1) -> None:
        preprocess([images], [annotations], Workspace(root), recipe.data, masks=root / "masks", workers=workers)

    def make_other_store(root: Path) -> None:
        other = root / "other"
        shutil.copytree(annotations, other)
        path = next(other.iterdir())
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shapes": []}))
        preprocess([images], [other], Workspace(root), recipe.data, masks=root / "masks", workers=1)
        shutil.rmtree(other)

    def with_run(root: Path) -> None:
        run = Workspace(root).run("r")
        run.checkpoint("best").parent.mkdir(parents=True)
        shutil.copy(trained.checkpoint("best"), run.checkpoint("best"))

    def predict(root: Path, threshold: float = 0.5) -> None:
        infer("r", images, Workspace(root), threshold=threshold, probabilities=True)

    def with_predictions(root: Path) -> None:
        with_run(root)
        predict(root, 0.01)

    def with_vote(root: Path) -> None:
        members(root)
        vote_of(root, ties="background", count=2)

    def without_exchange(root: Path) -> None:
        publish.exchange = lambda *_: False  # as on NFS
        vote_of(root)

    def with_scores(root: Path) -> None:
        members(root)
        evaluate_with(root, 0)

    def with_store(root: Path) -> None:
        shutil.copytree(store_workspace.stores, root / "stores")

    def train_run(root: Path) -> None:
        train(tiny, Workspace(root), "run")

    def trained_state(root: Path):
        run = Workspace(root).run("run")
        saved = [load_checkpoint(run.checkpoint(which)) for which in ("last", "best")]
        figures = [
            {key: record[key] for key in ("epoch", "train_loss", "val_loss")} for record in read_metrics(run.metrics)
        ]
        return figures, [{name: value.tolist() for name, value in each.network.items()} for each in saved]

    checkpoints, sets = ("run/checkpoints/*.safetensors",), ("predictions/*",)
    stores = ("stores/*", "masks/*.png")
    last = ("run/checkpoints/last.safetensors",)
    return {
        "first checkpoint": Scenario(nothing, resume_saving, checkpoints, newest_is_not_older_than(-1), exact=False),
        "checkpoint": Scenario(
            lambda root: save_epochs(root / "run", 0, 1),
            resume_saving,
            checkpoints,
            newest_is_not_older_than(1),
            last,
        ),
        "metrics": Scenario(
            lambda root: metrics(root, 1, 2, 3),
            lambda root: metrics(root, 3, 4),
            ("run/metrics.jsonl",),
            metrics_cover_whole_epochs,
            exact=False,
        ),
        "store": Scenario(nothing, make_store, stores, inputs=two_images),
        "store by two processes": Scenario(
            nothing, lambda root: make_store(root, 2), stores, inputs=two_images, processes=True, most=20
        ),
        "changed store": Scenario(make_other_store, make_store, stores, inputs=two_images),
        "predictions": Scenario(with_run, predict, sets, inputs=two_images),
        "newer predictions": Scenario(with_predictions, predict, sets, inputs=two_images),
        "vote": Scenario(lambda root: [members(root), None][1], vote_of, ("vote",)),
        "newer vote": Scenario(with_vote, vote_of, ("vote",)),
        "newer vote on NFS": Scenario(with_vote, without_exchange, ("vote",), may_miss=("vote",)),
        "scores": Scenario(lambda root: [members(root), None][1], lambda root: evaluate_with(root, 0), ("scores",)),
        "newer scores": Scenario(with_scores, lambda root: evaluate_with(root, 1), ("scores",), most=80),
        "training": Scenario(
            with_store,
            train_run,
            ("runs/run/*.yaml", "runs/run/*.json", "runs/run/checkpoints/*.safetensors"),
            finished=trained_state,
            exact=False,
            most=80,
        ),
    }


NAMES = (
    "first checkpoint", "checkpoint", "metrics", "store", "store by two processes", "changed store", "predictions",
    "newer predictions", "vote", "newer vote", "newer vote on NFS", "scores", "newer scores", "training",
)  # fmt: skip


@pytest.fixture(params=NAMES)
def walk(request: pytest.FixtureRequest, scenarios: dict[str, Scenario], tmp_path: Path) -> Iterator[Walk]:
    walk = Walk(scenarios[request.param], tmp_path / "root")
    yield walk
    print(f"{request.param}: {walk.outcomes.total()} faults {dict(walk.outcomes)}")


def faults(
    walk: Walk, kinds: int, errors: Sequence[str | None], lasting: bool = False, most: int = ALL, least: int = 0
):
    """A fault at every call of these kinds, or at `most` of them. The errors take turns."""
    for number in walk.some(kinds, most, least):
        yield Fault(kinds, number, errors[(number + lasting) % len(errors)], lasting, least)


LASTING = pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
REFUSALS = {
    "ENOSPC": r"No space left on device \(\d+\.\d of \d+ MiB free\): free some space",
    "EDQUOT": "Disk quota exceeded: delete files you do not need",
    "EROFS": "Read-only file system: mount the volume for writing",
    "EIO": "Input/output error: the disk or its network failed",
}
UNREADABLE = ("EIO", "ESTALE", "EMFILE", "ENOMEM")
LIMITS = {
    "RLIMIT_AS": [0, 1 << 18, 1 << 20, 1 << 22, 1 << 23, 1 << 24, 1 << 25, 1 << 26, 1 << 27, 1 << 28],
    "RLIMIT_FSIZE": [0, 1, 100, 1000, 4096, 10_000, 100_000],
    "RLIMIT_NOFILE": [0, 1, 2, 3, 4, 6, 8, 12],
}


def test_killed_at_a_few_file_operations(walk: Walk):
    walk.survives_all(faults(walk, CHANGE | SYNC, [None], most=FEW))


@pytest.mark.chaos
def test_killed_at_every_file_operation(walk: Walk):
    walk.survives_all(faults(walk, CHANGE | SYNC, [None]))


def test_refused_by_a_full_disk_at_a_few_file_operations(walk: Walk):
    words = rf"^stas: {walk.root}.*{REFUSALS['ENOSPC']}"
    walk.survives_all(faults(walk, CHANGE | SYNC, ["ENOSPC"], most=FEW), words)


@pytest.mark.chaos
@LASTING
def test_refused_at_every_file_operation(walk: Walk, lasting: bool):
    words = rf"^stas: {walk.root}.*({'|'.join(REFUSALS.values())})"
    walk.survives_all(faults(walk, CHANGE | SYNC, list(REFUSALS), lasting), words)


def test_a_few_syncs_that_fail_and_lose_what_was_written(walk: Walk):
    walk.survives_all(faults(walk, SYNC, ["EIO"], most=FEW), rf"^stas: {walk.root}.*{REFUSALS['EIO']}")


@pytest.mark.chaos
@LASTING
def test_every_sync_that_fails_and_loses_what_was_written(walk: Walk, lasting: bool):
    walk.survives_all(faults(walk, SYNC, ["EIO"], lasting), rf"^stas: {walk.root}.*{REFUSALS['EIO']}")


@LASTING
def test_a_few_reads_that_fail(walk: Walk, lasting: bool):
    walk.survives_all(faults(walk, READ, UNREADABLE, lasting, most=FEW))


@pytest.mark.chaos
@LASTING
def test_many_reads_that_fail(walk: Walk, lasting: bool):
    walk.survives_all(faults(walk, READ, UNREADABLE, lasting, most=MANY))


@LASTING
def test_a_few_allocations_that_fail(walk: Walk, lasting: bool):
    walk.survives_all(faults(walk, MEMORY, ["ENOMEM"], lasting, most=FEW, least=4096))


@pytest.mark.chaos
@LASTING
@pytest.mark.parametrize("least", [0, 4096])
def test_many_allocations_that_fail(walk: Walk, lasting: bool, least: int):
    walk.survives_all(faults(walk, MEMORY, ["ENOMEM"], lasting, most=SOME, least=least))


@pytest.mark.chaos
@pytest.mark.parametrize("name", LIMITS)
def test_little_memory_small_files_and_few_descriptors(walk: Walk, name: str):
    walk.survives_all(Fault(limit=(name, more)) for more in LIMITS[name])


@pytest.mark.skipif(not shutil.which("strace"), reason="no strace (Debian package strace)")
def test_the_faults_reach_every_call_that_changes_a_file(tmp_path: Path):
    """The library counts as many calls as the kernel sees."""
    root, log = tmp_path / "root", tmp_path / "log"
    sets = members(root)
    injector = Injector(tmp_path / "plan", [root])
    injector.prepare(Fault(CHANGE | SYNC))
    stage = [sys.executable, "-m", "stas", "vote", "--members", *sets, "--out", root / "vote", "--workers", "1"]
    preload = ["-E", f"LD_PRELOAD={library()}", "-E", f"STAS_FAULTS={injector.path}"]
    subprocess.run(["strace", "-f", "-y", "-o", log, *preload, *stage], check=True, capture_output=True)
    names = "open openat creat write pwrite64 writev pwritev fsync fdatasync ftruncate rename renameat renameat2 link"
    names += " linkat symlinkat unlink unlinkat mkdir mkdirat rmdir utimensat sendfile"
    changes = re.compile(rf"\d+ +(?!open[^(]*\(.*O_RDONLY)({names.replace(' ', '|')})\(")
    lines = [line for line in log.read_text().splitlines() if changes.match(line) and str(root) in line]
    assert len(lines) > 20
    assert injector.injected().seen == len(lines), "\n".join(lines)
