"""The command line. Each stage's module is imported on demand, to keep --help fast."""

import argparse
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
    MachineError,
    StoppedEarly,
    TrainingError,
    UsageError,
)
from stas.paths import VOTE, Workspace, check_given, default_workspace, status_file
from stas.system import printing
from stas.system.files import system_trouble
from stas.system.resources import keep_freed_memory, memory_trouble

if TYPE_CHECKING:  # loaded when a stage needs it
    from stas.config import Data
    from stas.ensemble import Ensemble
Command = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    printing.open_standard_streams()
    try:
        return _main(arguments)
    finally:
        printing.close_standard_streams()


def _main(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell is asking for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    if sys.getfilesystemencoding() != "utf-8":
        return _fail(
            f"file names are read as {sys.getfilesystemencoding()}, which loses letters: set LC_ALL=C.UTF-8, or unset "
            "PYTHONUTF8",
            EXIT_USAGE,
        )
    options = parser.parse_args(arguments)
    printing.start_logging()
    keep_freed_memory()
    if status := status_file():
        status.touch()  # if this process dies, the launcher finds no exit code here
    try:
        code = _run(COMMANDS[options.command], options)
    except Exception:
        printing.report_bug()
        return EXIT_FAILED
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
    except (TrainingError, MachineError) as error:
        return _fail(error, EXIT_FAILED)
    except StoppedEarly as error:
        return _fail(error, EXIT_RESUMABLE)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if message := memory_trouble(error):
            return _fail(message, EXIT_FAILED)
        if isinstance(error, OSError) and (trouble := system_trouble(error)):
            return _fail(*trouble)
        raise


def _fail(error: BaseException | str, code: int) -> int:
    printing.complain(error)
    return code


def _launch(options: argparse.Namespace) -> int:
    from stas.launch import launch

    return launch(
        options.stage,
        run=main,
        check=check,
        processes=options.processes,
        gpus=options.gpus,
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
    _check_output(options, options.masks)
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
    train(recipe, _workspace(options), run, options.time_limit, options.checkpoint_every, options.device)


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
        device=options.device,
    )


def _vote(options: argparse.Namespace) -> None:
    from stas.vote import vote

    ties, workspace, runs = options.ties, None, None
    if bool(options.members) + bool(options.runs) + bool(options.ensemble) != 1:
        raise UsageError("vote: give exactly one of: names of runs, --ensemble NAME, or --members DIR DIR DIR")
    if options.members:
        if not options.out:
            raise UsageError("vote: --members needs --out DIR")
        members, out = options.members, options.out
    else:
        workspace = _workspace(options)
        names = options.runs
        if options.ensemble:
            ensemble = _scored_ensemble(options)
            names = runs = ensemble.runs
            ties = ties or (None if options.soft else ensemble.ties)
        members = [workspace.predictions(_set_name(name, options)) for name in names]
        out = options.out or workspace.predictions(options.name or _set_name(VOTE, options))
    _check_output(options, out)
    vote(
        members,
        out,
        ties=ties,
        weights=options.weights,
        soft=options.soft,
        threshold=options.threshold,
        workers=options.workers,
        workspace=workspace,
        runs=runs,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from stas.evaluate import evaluate

    predictions, workspace, runs = options.predictions, None, None
    _check_output(options, options.out)
    if options.ensemble:
        workspace = _workspace(options)
        names = _scored_ensemble(options).runs
        runs = [*names, None]
        names = [*names, VOTE]
        predictions = [workspace.predictions(_set_name(name, options)) for name in names]
    evaluate(
        predictions,
        options.truth,
        options.out,
        images=options.images,
        label=options.label,
        threshold=options.threshold,
        sheets=options.sheets,
        workspace=workspace,
        runs=runs,
    )


def _recipes(options: argparse.Namespace) -> int:
    from stas.ensemble import ensemble_names, load_ensemble
    from stas.recipe import recipes

    lines = [recipes()]
    for name in ensemble_names():
        runs = load_ensemble(name).runs
        lines.append(f"ensemble {name}: {len(runs)} members: {', '.join(runs)}")
    return EXIT_OK if printing.say("\n".join(lines)) else EXIT_FAILED


def _members(options: argparse.Namespace) -> int:
    from stas.ensemble import load_ensemble

    numbers = range(len(load_ensemble(options.name).members))
    return EXIT_OK if printing.say(" ".join(map(str, numbers))) else EXIT_FAILED


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
    return EXIT_OK if doctor(_workspace_root(options), recipe) else EXIT_FAILED


def _verify(options: argparse.Namespace) -> None:
    from stas.verify import verify

    verify(options.paths or [_workspace(options).root])


def _workspace(options: argparse.Namespace) -> Workspace:
    root = _workspace_root(options)
    if root is None:
        raise UsageError("no workspace: give --workspace DIR or set STAS_WORKSPACE")
    return Workspace(root)


def _check_output(options: argparse.Namespace, directory: Path | None) -> None:
    """Refuse an output in place of the workspace's own directories."""
    root = _workspace_root(options)
    if root and directory:
        Workspace(root).check_output(directory)


def _workspace_root(options: argparse.Namespace) -> Path | None:
    named = default_workspace()
    return options.workspace or (check_given(named) if named else None)


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
    "verify": _verify,
    "weights fetch": _weights_fetch,
    "weights convert": _weights_convert,
}
