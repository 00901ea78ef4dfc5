"""The command line. A stage's module is imported when it is asked for, so that --help answers at once."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

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
from stas.files import disk_trouble
from stas.paths import Workspace, default_workspace, status_file
from stas.resources import keep_freed_memory

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong option or recipe, 3 bad input data, "
    "75 stopped early (the same command goes on)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("stas").setLevel(logging.INFO)
    keep_freed_memory()
    if status := status_file():
        status.touch()  # the launcher will miss a code there if this process dies
    code = _run(options)
    if status:
        status.write_text(str(code))
    return code


def check(arguments: Sequence[str]) -> None:
    """Exit with code 2 and the reason, as `main` would, if these are no command."""
    _parser().parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    try:
        return options.command(options) or EXIT_OK
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

    return launch(options.stage, options.processes, options.nodes, options.rendezvous, options.job, options.node)


def _preprocess(options: argparse.Namespace) -> None:
    from stas.config import load_recipe
    from stas.ensemble import load_ensemble
    from stas.preprocess import preprocess

    if options.ensemble:
        # Members that see the same label, size and split share a store.
        recipes = list(
            {recipe.data: recipe for recipe in load_ensemble(options.ensemble, options.set).recipes}.values()
        )
    else:
        recipes = [load_recipe(options.recipe, options.set)]
    for recipe in recipes:
        preprocess(
            options.images,
            options.annotations,
            _workspace(options),
            recipe.data,
            masks=options.masks,
            skip_bad=options.skip_bad,
            workers=options.workers,
        )


def _train(options: argparse.Namespace) -> None:
    from stas.config import load_recipe
    from stas.ensemble import load_member
    from stas.train import train

    if options.ensemble:
        recipe = load_member(options.ensemble, _member(options), options.set)
    else:
        recipe = load_recipe(options.recipe, options.set)
    train(recipe, _workspace(options), options.run, options.time_limit, options.checkpoint_every)


def _infer(options: argparse.Namespace) -> None:
    from stas.ensemble import load_member
    from stas.infer import infer

    run = load_member(options.ensemble, _member(options)).name if options.ensemble else options.run
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
    from stas.ensemble import load_ensemble
    from stas.vote import vote

    ties = options.ties
    if bool(options.members) + bool(options.runs) + bool(options.ensemble) != 1:
        raise UsageError("vote: give one of: runs of a workspace, --ensemble NAME, or --members DIR DIR DIR")
    if options.members:
        if not options.out:
            raise UsageError("vote: --members needs --out DIR")
        members, out = options.members, options.out
    else:
        workspace = _workspace(options)
        runs = options.runs
        if options.ensemble:
            ensemble = load_ensemble(options.ensemble)
            runs, ties = ensemble.runs, ties or ensemble.ties
        members = [workspace.predictions(_set_name(run, options)) for run in runs]
        out = options.out or workspace.predictions(options.name or _set_name("vote", options))
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
    from stas.ensemble import load_ensemble
    from stas.evaluate import evaluate

    predictions = options.predictions
    if options.ensemble:
        workspace = _workspace(options)
        names = [*load_ensemble(options.ensemble).runs, "vote"]
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
    from stas.config import recipes
    from stas.ensemble import ensemble_names, load_ensemble

    print(recipes())
    for name in ensemble_names():
        print(f"ensemble {name}: {', '.join(load_ensemble(name).runs)}")


def _weights_fetch(options: argparse.Namespace) -> None:
    from stas.config import load_recipe
    from stas.ensemble import load_ensemble
    from stas.weights import fetch_weights

    recipes = (
        [load_recipe(options.recipe)] if options.recipe else load_ensemble(options.ensemble or "reference").recipes
    )
    fetch_weights(options.directory, [recipe.model for recipe in recipes], options.allow_pickle)


def _weights_convert(options: argparse.Namespace) -> None:
    from stas.pickles import convert_weights

    convert_weights(options.pickle, options.target, options.allow_pickle)


def _doctor(options: argparse.Namespace) -> int:
    from stas.config import load_recipe
    from stas.doctor import doctor

    recipe = load_recipe(options.recipe, options.set) if options.recipe else None
    workspace = options.workspace or default_workspace()
    return 0 if doctor(Path(workspace) if workspace else None, recipe) else 1


def _workspace(options: argparse.Namespace) -> Workspace:
    root = options.workspace or default_workspace()
    if not root:
        raise UsageError("no workspace: give --workspace DIR or set STAS_WORKSPACE")
    return Workspace(Path(root))


def _member(options: argparse.Namespace) -> int:
    if options.member is None:
        raise UsageError(f"--ensemble {options.ensemble} needs --member INDEX, from 0: which of its recipes")
    return options.member


def _set_name(run: str, options: argparse.Namespace) -> str:
    """The prediction set of a run: held-out images have one of their own, so that new images do not replace it."""
    return f"{run}-held-out" if options.held_out else run


def seconds(text: str) -> float:
    """Read a time such as 90m, 7.5h, 3600 or 8:00:00 as seconds."""
    try:
        if ":" in text:
            hours, minutes, rest = (float(part) for part in text.split(":"))
            value = hours * 3600 + minutes * 60 + rest
        else:
            unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
            value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90m, 7.5h, 3600 (seconds) or 8:00:00")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stas", description="Outline STAS in H&E images with an ensemble of segmentation networks.", epilog=EPILOG
    )
    stages = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_preprocess(stages)
    _add_train(stages)
    _add_infer(stages)
    _add_vote(stages)
    _add_evaluate(stages)
    _add_launch(stages)
    command = stages.add_parser("recipes", help="list the recipes with encoder, size and batch; and the ensembles")
    command.set_defaults(command=_recipes)
    _add_weights(stages)
    command = stages.add_parser("doctor", help="what this machine can run, and what will go wrong")
    command.set_defaults(command=_doctor)
    _add_workspace(command)
    command.add_argument("--recipe", help="check whether this recipe can run; exit code 1 if not")
    _add_set(command)
    return parser


def _add_preprocess(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("preprocess", help="images and annotations to one store of samples")
    command.set_defaults(command=_preprocess)
    command.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR")
    command.add_argument(
        "--annotations", type=Path, nargs="+", required=True, metavar="DIR", help="LabelMe JSON, or mask PNGs"
    )
    _add_workspace(command)
    command.add_argument(
        "--recipe", default="efficientnet_b6_ns", help="its data section counts (default: %(default)s)"
    )
    _add_set(command)
    _add_ensemble(command, "make what each of its recipes needs, instead of --recipe")
    command.add_argument("--masks", type=Path, metavar="DIR", help="also write the masks as PNG")
    command.add_argument("--skip-bad", action="store_true", help="go on without bad pairs instead of exit code 3")
    command.add_argument("--workers", type=int, help="processes (default: all cores)")


def _add_train(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("train", help="train one member; alone or under torchrun")
    command.set_defaults(command=_train)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--recipe", help="a name that `stas recipes` lists, or a YAML file")
    _add_ensemble(which, "take the recipe from a list, with --member")
    _add_member(command)
    _add_workspace(command)
    command.add_argument("--run", help="name of the run (default: the recipe's)")
    _add_set(command)
    command.add_argument("--time-limit", type=seconds, metavar="TIME", help="all the run may take: 7.5h, 90m, 8:00:00")
    command.add_argument(
        "--checkpoint-every", type=seconds, default="10m", metavar="TIME", help="within an epoch (default: %(default)s)"
    )


def _add_infer(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("infer", help="masks of a directory of images by one run; alone or under torchrun")
    command.set_defaults(command=_infer)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--run")
    _add_ensemble(which, "take the run from a list, with --member")
    _add_member(command)
    command.add_argument("--images", type=Path, required=True, metavar="DIR")
    _add_workspace(command)
    command.add_argument("--name", help="name of the prediction set (default: the run's; RUN-held-out)")
    command.add_argument("--checkpoint", choices=("best", "last"), default="best")
    command.add_argument(
        "--tta", action=argparse.BooleanOptionalAction, default=None, help="average over the square's 8 symmetries"
    )
    command.add_argument("--threshold", type=float, help="probability above which a pixel is foreground")
    command.add_argument("--probabilities", action="store_true", help="also write 16-bit probabilities")
    _add_held_out(command)


def _add_vote(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("vote", help="one mask per image by majority of the members")
    command.set_defaults(command=_vote)
    command.add_argument("runs", nargs="*", metavar="RUN", help="prediction sets of the workspace")
    _add_ensemble(command, "the runs of a list")
    _add_held_out(command)
    _add_workspace(command)
    command.add_argument("--name", help="name of the result (default: vote; vote-held-out)")
    command.add_argument("--members", type=Path, nargs="+", metavar="DIR", help="directories of masks of any maker")
    command.add_argument("--out", type=Path, metavar="DIR")
    command.add_argument("--ties", choices=("foreground", "background"), help="what a tie becomes")
    command.add_argument("--weights", type=float, nargs="+", metavar="W", help="one weight per member")
    command.add_argument("--soft", action="store_true", help="mean of the probabilities instead of the masks")
    command.add_argument("--threshold", type=float, help="members' values above this are foreground, in their units")
    command.add_argument("--workers", type=int, help="threads (default: all cores)")


def _add_evaluate(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("evaluate", help="scores and pictures of members and vote against the truth")
    command.set_defaults(command=_evaluate)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--predictions", type=Path, nargs="+", metavar="DIR")
    _add_ensemble(which, "the members of a list, and their vote")
    _add_held_out(command)
    _add_workspace(command)
    command.add_argument("--truth", type=Path, required=True, metavar="DIR", help="LabelMe JSON or mask PNG")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--images", type=Path, metavar="DIR", help="for the pictures (default: the JSON's imagePath)")
    command.add_argument("--label", default="STAS")
    command.add_argument("--threshold", type=float, help="members' values above this are foreground, in their units")
    command.add_argument("--sheets", type=int, default=9, help="how many pictures (default: %(default)s)")


def _add_launch(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("launch", help="run a stage as a job: train and infer on all GPUs, by torchrun")
    command.set_defaults(command=_launch)
    command.add_argument("--processes", type=int, help="of train and infer on this node (default: one for each GPU)")
    command.add_argument("--nodes", type=int, default=1, help="each runs this command (default: %(default)s)")
    command.add_argument("--rendezvous", metavar="HOST:PORT", help="where several nodes meet: one of them")
    command.add_argument("--node", type=int, metavar="INDEX", help="this node's number; 0 is the one they meet at")
    command.add_argument("--job", metavar="NAME", help="what tells this job of several nodes from others")
    command.add_argument("stage", nargs=argparse.REMAINDER, metavar="STAGE ...", help="a stage with its arguments")


def _add_weights(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("weights", help="fetch pretrained weights for machines without network")
    actions = command.add_subparsers(metavar="ACTION", required=True)
    command = actions.add_parser("fetch", help="put encoder weights into a directory, to be named by STAS_WEIGHTS_DIR")
    command.set_defaults(command=_weights_fetch)
    command.add_argument("directory", type=Path, metavar="DIR")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--recipe", help="of this recipe only")
    _add_ensemble(which, "of its recipes (default: reference)")
    trust = "of makers that you trust: a pickle may hold code"
    command.add_argument("--allow-pickle", action="store_true", help=f"convert pickles where needed, {trust}")
    command = actions.add_parser("convert", help="make weights of your own safetensors, which alone are read")
    command.set_defaults(command=_weights_convert)
    command.add_argument("pickle", type=Path, metavar="FILE.pth")
    command.add_argument("target", type=Path, metavar="DIR/NAME.safetensors")
    command.add_argument("--allow-pickle", action="store_true", help=f"needed: read a pickle, {trust}")


def _add_ensemble(command: argparse._ActionsContainer, purpose: str) -> None:
    command.add_argument("--ensemble", metavar="NAME", help=f"{purpose}: a name that `stas recipes` lists, or a file")


def _add_member(command: argparse.ArgumentParser) -> None:
    command.add_argument("--member", type=int, metavar="INDEX", help="which member of --ensemble, from 0")


def _add_held_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--held-out", action="store_true", help="only the images the runs held out for validation")


def _add_workspace(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workspace", metavar="DIR", help="where the stages meet (default: STAS_WORKSPACE)")


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the recipe; repeatable"
    )
