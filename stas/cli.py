"""The command line. Each stage's module is imported on demand, to keep --help fast."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stas.arguments import build_parser
from stas.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_RESUMABLE,
    EXIT_USAGE,
    InputDataError,
    StoppedEarly,
    TrainingError,
    UsageError,
)
from stas.paths import VOTE, Workspace, default_workspace, status_file
from stas.system.files import disk_trouble
from stas.system.resources import keep_freed_memory

if TYPE_CHECKING:  # loaded when a stage needs it
    from stas.config import Data
    from stas.ensemble import Ensemble
Command = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell is asking for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("stas").setLevel(logging.INFO)
    keep_freed_memory()
    if status := status_file():
        status.touch()  # if this process dies, the launcher finds no exit code here
    code = _run(COMMANDS[options.command], options)
    if status:
        status.write_text(str(code))
    return code


def check(arguments: Sequence[str]) -> None:
    """Exit with code 2 and the reason, as `main` would, unless these arguments are a valid command."""
    build_parser().parse_args(arguments)


def _run(command: Command, options: argparse.Namespace) -> int:
    try:
        return command(options) or EXIT_OK
    except UsageError as error:
        return _fail(error, EXIT_USAGE)
    except InputDataError as error:
        return _fail(error, EXIT_BAD_INPUT)
    except TrainingError as error:
        return _fail(error, EXIT_FAILED)
    except StoppedEarly as error:
        return _fail(error, EXIT_RESUMABLE)
    except OSError as error:
        if message := disk_trouble(error):
            return _fail(message, EXIT_FAILED)
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(error: Exception | str, code: int) -> int:
    print(f"stas: {error}", file=sys.stderr)
    return code


def _launch(options: argparse.Namespace) -> int:
    from stas.launch import launch

    return launch(
        options.stage,
        run=main,
        check=check,
        processes=options.processes,
        nodes=options.nodes,
        rendezvous=options.rendezvous,
        job=options.job,
        node=options.node,
        stalled_after=options.stalled_after,
    )


def _preprocess(options: argparse.Namespace) -> None:
    from stas.data.store_spec import StoreSpec, store_spec
    from stas.ensemble import load_ensemble
    from stas.preprocess import preprocess
    from stas.recipe import load_recipe

    if options.ensemble:
        recipes = [member.recipe for member in load_ensemble(options.ensemble, options.set).members]
    else:
        recipes = [load_recipe(options.recipe, options.set)]
    workspace = _workspace(options)
    stores: dict[StoreSpec, list[Data]] = {}
    for recipe in recipes:
        stores.setdefault(store_spec(recipe.data), []).append(recipe.data)
    for sharing in stores.values():
        preprocess(
            options.images,
            options.annotations,
            workspace,
            sharing[0],
            masks=options.masks,
            skip_bad=options.skip_bad,
            workers=options.workers,
            splits=list(dict.fromkeys(data.split for data in sharing)),
        )


def _train(options: argparse.Namespace) -> None:
    from stas.ensemble import load_member
    from stas.recipe import load_recipe
    from stas.train import train

    if options.ensemble:
        member = load_member(options.ensemble, _member(options), options.set)
        recipe, run = member.recipe, options.run or member.run
    else:
        recipe, run = load_recipe(options.recipe, options.set), options.run
    train(recipe, _workspace(options), run, options.time_limit, options.checkpoint_every)


def _infer(options: argparse.Namespace) -> None:
    from stas.ensemble import load_member
    from stas.infer import infer

    run = load_member(options.ensemble, _member(options)).run if options.ensemble else options.run
    infer(
        run,
        options.images,
        _workspace(options),
        name=options.name or _set_name(run, options),
        checkpoint=options.checkpoint,
        tta=options.tta,
        threshold=options.threshold,
        probabilities=options.probabilities,
        held_out=options.held_out,
    )


def _vote(options: argparse.Namespace) -> None:
    from stas.vote import vote

    ties = options.ties
    if bool(options.members) + bool(options.runs) + bool(options.ensemble) != 1:
        raise UsageError("vote: give exactly one of: names of runs, --ensemble NAME, or --members DIR DIR DIR")
    if options.members:
        if not options.out:
            raise UsageError("vote: --members needs --out DIR")
        members, out = options.members, options.out
    else:
        workspace = _workspace(options)
        runs = options.runs
        if options.ensemble:
            ensemble = _scored_ensemble(options)
            runs, ties = ensemble.runs, ties or (None if options.soft else ensemble.ties)
        members = [workspace.predictions(_set_name(run, options)) for run in runs]
        out = options.out or workspace.predictions(options.name or _set_name(VOTE, options))
    vote(
        members,
        out,
        ties=ties,
        weights=options.weights,
        soft=options.soft,
        threshold=options.threshold,
        workers=options.workers,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from stas.evaluate import evaluate

    predictions = options.predictions
    if options.ensemble:
        workspace = _workspace(options)
        names = [*_scored_ensemble(options).runs, VOTE]
        predictions = [workspace.predictions(_set_name(name, options)) for name in names]
    evaluate(
        predictions,
        options.truth,
        options.out,
        images=options.images,
        label=options.label,
        threshold=options.threshold,
        sheets=options.sheets,
    )


def _recipes(options: argparse.Namespace) -> None:
    from stas.ensemble import ensemble_names, load_ensemble
    from stas.recipe import recipes

    print(recipes())
    for name in ensemble_names():
        runs = load_ensemble(name).runs
        print(f"ensemble {name}: {len(runs)} members: {', '.join(runs)}")


def _members(options: argparse.Namespace) -> None:
    from stas.ensemble import load_ensemble

    print(*range(len(load_ensemble(options.name).members)))


def _weights_fetch(options: argparse.Namespace) -> None:
    from stas.ensemble import load_ensemble
    from stas.models.weights import fetch_weights
    from stas.recipe import load_recipe

    if options.recipe:
        models = [load_recipe(options.recipe).model]
    else:
        models = [member.recipe.model for member in load_ensemble(options.ensemble or "reference").members]
    fetch_weights(options.directory, models, options.allow_pickle)


def _weights_convert(options: argparse.Namespace) -> None:
    from stas.models.pickles import convert_weights

    convert_weights(options.pickle, options.target, options.allow_pickle)


def _doctor(options: argparse.Namespace) -> int:
    from stas.doctor import doctor
    from stas.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set) if options.recipe else None
    workspace = options.workspace or default_workspace()
    return EXIT_OK if doctor(Path(workspace) if workspace else None, recipe) else EXIT_FAILED


def _workspace(options: argparse.Namespace) -> Workspace:
    root = options.workspace or default_workspace()
    if not root:
        raise UsageError("no workspace: give --workspace DIR or set STAS_WORKSPACE")
    return Workspace(Path(root))


def _member(options: argparse.Namespace) -> int:
    if options.member is None:
        raise UsageError(f"--ensemble {options.ensemble} also needs --member INDEX, counted from 0")
    return options.member


def _scored_ensemble(options: argparse.Namespace) -> "Ensemble":
    """The ensemble to vote with or to score. Folds have no held-out images in common."""
    from stas.ensemble import load_ensemble

    ensemble = load_ensemble(options.ensemble)
    if options.held_out and ensemble.folds:
        raise UsageError(
            f"--held-out: each member of {options.ensemble} holds out a different one of {ensemble.folds} folds, and "
            "scoring all of them out of fold is not supported yet: leave out --held-out to let all members vote on new "
            "images, or score one fold's own prediction set with `stas evaluate --predictions`"
        )
    return ensemble


def _set_name(run: str, options: argparse.Namespace) -> str:
    """The name of a run's prediction set. Held-out images get their own, which new images do not replace."""
    return f"{run}-held-out" if options.held_out else run


COMMANDS: dict[str, Command] = {
    "preprocess": _preprocess,
    "train": _train,
    "infer": _infer,
    "vote": _vote,
    "evaluate": _evaluate,
    "launch": _launch,
    "recipes": _recipes,
    "members": _members,
    "doctor": _doctor,
    "weights fetch": _weights_fetch,
    "weights convert": _weights_convert,
}
