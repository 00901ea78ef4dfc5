"""Read everything that the stages made, and say what of it is damaged or missing."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stas.config import Recipe
from stas.data.store import Store
from stas.errors import InputDataError, UsageError
from stas.models.checkpoint import Checkpoint, fitting, load_checkpoint
from stas.paths import RunPaths, Workspace, manifest_file, store_data
from stas.recipe import parse_recipe
from stas.system.files import read_json
from stas.system.printing import named, one_line, say
from stas.system.publish import FORMATS, damage, read_manifest
from stas.system.untrusted import MAX_JSON_BYTES, MAX_YAML_BYTES, parse_json, parse_yaml, read_bounded

PLACES = ("stores", "runs", "predictions")  # of a workspace
CHECKPOINTS = ("best", "last", "previous", "next")
AGAIN = "move it away and run the stage that made it again"


def verify(paths: Sequence[Path]) -> None:
    """Check stores, runs, prediction sets, votes, evaluations and mask sets, and print a line or more for each.

    Args:
        paths: any of these, or workspaces, all of whose outputs are checked.

    Raises:
        InputDataError: something is damaged or missing; the printed lines name it.
        UsageError: a path holds nothing that `stas` made.
    """
    outputs = list(dict.fromkeys(output for path in paths for output in _outputs(path)))
    damaged = 0
    for output in outputs:
        what, problems = _check(output)
        damaged += bool(problems)
        say(one_line(f"{'damaged' if problems else 'ok':8}{output}: {what}"))
        for problem in problems:
            say(one_line(f"{'':8}{problem}"))
    if damaged:
        raise InputDataError(f"{damaged} of {len(outputs)} outputs are damaged: the lines above say what to do")


def _outputs(path: Path) -> list[Path]:
    """The outputs at a path: itself, or those of a workspace or of one of its directories."""
    if not path.exists():
        raise UsageError(f"{path}: not there: give a workspace, or a directory that stas made")
    if _is_run(path) or manifest_file(path).exists():
        return [path]
    places = [path] if path.name in PLACES else [path / place for place in PLACES]
    found = [child for place in places for child in _children(place)]
    if path.name not in PLACES:  # evaluations, and sets that were given a directory of their own
        found += [child for child in _children(path) if manifest_file(child).exists()]
    if not found:
        raise UsageError(f"{path}: holds nothing that stas made: give a workspace, or a directory that stas made")
    return found


def _children(place: Path) -> list[Path]:
    """The outputs in a directory, and the pointers to stores, but no locks and no unfinished work."""
    if not place.is_dir():
        return []
    kept = (path for path in place.iterdir() if not path.name.startswith("."))
    return sorted(path for path in kept if path.is_dir() or (place.name == "stores" and path.suffix == ".json"))


def _is_run(path: Path) -> bool:
    run = RunPaths(path)
    return any(part.exists() for part in (run.recipe, run.split, run.checkpoint("last").parent))


def _check(output: Path) -> tuple[str, list[str]]:
    """What an output is, and its problems, each with its remedy."""
    try:
        if output.is_file():
            return "names the newest store", _pointer_problems(output)
        if _is_run(output) or output.parent.name == "runs":
            return _check_run(RunPaths(output))
        content = read_manifest(output, *FORMATS)
        return _check_published(output, content)
    except (InputDataError, OSError) as error:
        return "not readable", [str(error)]


def _pointer_problems(pointer: Path) -> list[str]:
    content = read_json(pointer)
    key = content.get("store") if isinstance(content, dict) else None
    if isinstance(key, str) and (pointer.parent / Path(key).name).is_dir():
        return []
    return ["the store that it names is not there: run `stas preprocess` again"]


def _check_published(directory: Path, content: dict[str, Any]) -> tuple[str, list[str]]:
    kind, count = content["kind"], len(content["files"])
    problems = damage(directory, kind)
    remedy = "the files that were added are not its own; move them away" if _only_added(problems) else AGAIN
    problems = [f"{problem}: {remedy}" for problem in problems]
    if kind == "store":
        return _check_store(directory, problems)
    return f"{kind}, {count} files", problems


def _only_added(problems: Sequence[str]) -> bool:
    return all(problem.endswith("added since it was made") for problem in problems)


def _check_store(directory: Path, problems: list[str]) -> tuple[str, list[str]]:
    """Besides the files, open the store as training does, and check every sample."""
    try:
        store = Store(directory)
    except InputDataError as error:
        return "store", [*problems, str(error)]
    try:
        damaged = list(store.damaged())
    except InputDataError as error:
        return "store", [*problems, str(error)]
    finally:
        store.close()
    if damaged:
        problems.append(f"{store_data(directory).name}: {len(damaged)} samples are damaged ({named(damaged)}): {AGAIN}")
    return f"store, {len(store)} samples of {store.spec}", problems


def _check_run(run: RunPaths) -> tuple[str, list[str]]:
    problems: list[str] = []
    checkpoints: dict[str, Checkpoint] = {}
    for which in CHECKPOINTS:
        if run.checkpoint(which).exists():
            try:
                checkpoints[which] = load_checkpoint(run.checkpoint(which))
            except (InputDataError, OSError) as error:
                problems.append(str(error))
    readable = ", ".join(checkpoints) or "none"
    epochs, bad_lines = _epochs(run)
    problems += bad_lines
    newest = checkpoints.get("next") or checkpoints.get("last") or checkpoints.get("previous")
    if newest:
        problems += _contradictions(run, newest)
        problems += _missing_epochs(run, newest, epochs)
    elif not problems and epochs:
        problems.append(
            f"{run.checkpoint('last')}: missing, and so are the others: restore them, or give a new run "
            "another name with --run"
        )
    note = _note(run, newest)
    return f"run, {len(epochs)} epochs, readable checkpoints: {readable}{note}", problems


def _contradictions(run: RunPaths, newest: Checkpoint) -> Iterator[str]:
    """How the run's other files contradict its newest checkpoint."""
    metadata = newest.metadata
    with fitting(run.root):
        recipe = parse_recipe(metadata["recipe"], str(run.root))
        best = metadata["state"]["best_epoch"]
    if best and not run.checkpoint("best").exists():
        yield (
            f"{run.checkpoint('best')}: missing, though epoch {best} was the best: restore it, or use `stas infer "
            "--checkpoint last`"
        )
    try:
        written = parse_recipe(parse_yaml(read_bounded(run.recipe, MAX_YAML_BYTES)), str(run.recipe))
        if _settled(written) != _settled(recipe):
            yield f"{run.recipe}: not the recipe in the checkpoint, which is the one used: restore the file"
    except ValueError as error:
        yield f"{run.recipe}: {_without(run.recipe, error)}; the checkpoint has the recipe: restore the file"
    try:
        split = read_json(run.split)
        same = isinstance(split, dict) and split.get("store") == metadata["store"]
        if not same or split.get("validation") != metadata["validation"]:
            yield f"{run.split}: not the store and the held-out images in the checkpoint: restore the file"
    except InputDataError as error:
        yield str(error)


def _without(path: Path, error: ValueError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _settled(recipe: Recipe) -> dict[str, Any]:
    """What may not change while a run goes on."""
    values = recipe.model_dump(mode="json", exclude={"name", "summary", "infer"})
    del values["train"]["epochs"]
    return values


def _epochs(run: RunPaths) -> tuple[list[int], list[str]]:
    """The epochs in the metrics, and the lines that cannot be read; an unfinished last line is none."""
    epochs: list[int] = []
    problems = []
    for path in (run.metrics, run.bad_steps):
        if not path.exists():
            continue
        for number, line in enumerate(read_bounded(path, MAX_JSON_BYTES).split(b"\n")[:-1], start=1):
            try:
                record = parse_json(line)
                if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
                    raise ValueError("not an object with an integer 'epoch'")
            except ValueError as error:
                problems.append(f"{path}: line {number} is not a record ({error}): restore it, or remove the line")
                continue
            if path == run.metrics:
                epochs.append(record["epoch"])
    return epochs, problems


def _missing_epochs(run: RunPaths, newest: Checkpoint, epochs: Sequence[int]) -> list[str]:
    with fitting(run.root):
        finished = range(1, int(newest.metadata["state"]["epoch"]))  # the last one may be being written
    missing = sorted(set(finished) - set(epochs))
    if not missing:
        return []
    return [f"{run.metrics}: lacks {len(missing)} epochs ({named(map(str, missing))}): restore the file"]


def _note(run: RunPaths, newest: Checkpoint | None) -> str:
    """What is no damage, but worth knowing."""
    notes = [f"; {path.name} was set aside" for path in sorted(run.checkpoint("last").parent.glob("*.damaged"))]
    if newest and run.root.parent.name == "runs":
        store = Workspace(run.root.parent.parent).stores / Path(str(newest.metadata.get("store"))).name
        if not store.is_dir():
            notes.append(f"; its store {store.name} is no longer there, so it cannot be resumed")
    return "".join(notes)
