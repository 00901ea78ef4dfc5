"""What must hold before a run starts or goes on: the recipe, images and weights that it recorded."""

from collections.abc import Sequence
from typing import Any

from stas.config import Recipe
from stas.data.store import Store
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.models.checkpoint import Checkpoint, load_checkpoint
from stas.paths import RunPaths
from stas.system import distributed
from stas.system.distributed import Ranks
from stas.system.untrusted import shown

NAMED = 5  # images named in a message


def check_never_saved(paths: RunPaths) -> None:
    """Refuse to start a run again if it had a checkpoint: that would cut off its metrics and replace its weights.

    A run killed before its first checkpoint may have left its first epoch's best weights, but no line of metrics: the
    first line is written once the first checkpoint is on disk.

    Raises:
        InputDataError: the run has metrics or best weights, but no checkpoint to resume from.
    """
    found = [path.name for path in (paths.metrics,) if path.exists() and path.stat().st_size]
    if paths.checkpoint("best").exists() and not _from_first_epoch(paths):
        found.append(paths.checkpoint("best").name)
    if found:
        raise InputDataError(
            f"{paths.root}: has {' and '.join(found)}, but no checkpoint to resume from "
            f"({paths.checkpoint('last').name} and {paths.checkpoint('previous').name} are gone): put one back from a "
            f"copy, give the run another name with --run, or move {paths.root} away to train it again"
        )


def _from_first_epoch(paths: RunPaths) -> bool:
    try:
        return load_checkpoint(paths.checkpoint("best")).metadata["state"]["epoch"] == 1
    except (InputDataError, KeyError, TypeError):
        return False


def check_best(paths: RunPaths, saved: Checkpoint, best_epoch: int, ranks: Ranks) -> None:
    """Refuse to go on, or to call a run finished, without its best weights. Every rank must call this.

    Args:
        paths: the run.
        saved: the checkpoint that it resumes from.
        best_epoch: its best epoch so far, from 1; 0 if there is none.
        ranks: only the first reads the file.

    Raises:
        InputDataError: the best checkpoint is missing, damaged, of another run, or of an earlier epoch.
    """
    problem = _problem_with_best(paths, saved, best_epoch) if ranks.first and best_epoch else None
    if problem := distributed.broadcast(problem):
        raise InputDataError(
            f"{paths.checkpoint('best')}: the best weights, of epoch {best_epoch}, {problem}: put them back from a "
            "copy, predict with `stas infer --checkpoint last`, or train again under another name (--run)"
        )


def _problem_with_best(paths: RunPaths, saved: Checkpoint, best_epoch: int) -> str | None:
    path = paths.checkpoint("best")
    if not path.exists():
        return "are missing"
    try:
        best = load_checkpoint(path)
        epoch = best.metadata["state"]["epoch"]
    except InputDataError as error:
        return f"cannot be read ({error})"
    except (KeyError, TypeError):
        return "cannot be read (they do not say their epoch)"
    for key in ("run", "store", "validation"):
        if best.metadata.get(key) != saved.metadata.get(key):
            what = f"run {shown(best.metadata.get('run'))}" if key == "run" else "a run on other images"
            return f"are not there: these are of {what}"
    # They may be newer: a kill can come between the best and the last checkpoint.
    if not isinstance(epoch, int) or epoch < best_epoch:
        return f"are not there: these are of epoch {shown(epoch)}"
    return None


def check_same_recipe(recipe: Recipe, saved: Recipe, paths: RunPaths) -> None:
    """Refuse a changed recipe. Inference settings may change, and so may the number of epochs at a constant rate.

    Raises:
        UsageError: a setting changed; the message lists each, before and now.
    """
    same_rates = recipe.schedule.name == "constant" and not recipe.schedule.warmup
    changed = [
        f"{section}.{key}: {old!r} before, {new!r} now"
        for section in ("data", "model", "loss", "optimizer", "schedule", "augment", "train")
        for (key, old), (_, new) in zip(getattr(saved, section), getattr(recipe, section), strict=True)
        if old != new and not (same_rates and (section, key) == ("train", "epochs"))
    ]
    if changed:
        raise UsageError(
            f"{paths.root} was started with another recipe:\n  " + "\n  ".join(changed) + "\nGive the run another name "
            "with --run, or use the settings it was started with"
        )


def check_same_split(paths: RunPaths, saved: dict[str, Any] | None, store: Store, validation: Sequence[int]) -> None:
    """Refuse a split that holds out other images than the run did so far. Every rank must call this.

    Args:
        paths: the run.
        saved: the metadata of the checkpoint that it resumes from; None for a new run.
        store: the run's store; what is not held out is trained on.
        validation: positions of the held-out images.

    Raises:
        StoppedEarly: the ranks read different stores or splits, because one was changed meanwhile.
        UsageError: images moved from one side to the other; the first are named.
    """
    now = [store.samples[index]["stem"] for index in validation]
    mine = [store.key, now]
    if any(each != mine for each in distributed.gather_objects(mine)):
        raise StoppedEarly(
            f"{paths.root}: not every rank read the same store and split, because one of them was changed meanwhile; "
            "run the same command again"
        )
    before = now if saved is None else saved["validation"]
    moved = [
        f"{verb} {_named(stems)}, which the split now {does}"
        for verb, stems, does in (
            ("trained on", sorted(set(now) - set(before)), "holds out"),
            ("held out", sorted(set(before) - set(now)), "trains on"),
        )
        if stems
    ]
    if moved:
        raise UsageError(
            f"{paths.root} {', and '.join(moved)}: scores on images seen in training would be too good. Restore the "
            f"split (the run's own list is in {paths.split}), or start a new run with --run"
        )


def _named(stems: Sequence[str]) -> str:
    return ", ".join(stems[:NAMED]) + (f" and {len(stems) - NAMED} more" if len(stems) > NAMED else "")
