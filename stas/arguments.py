"""The command-line parser: every command and its options."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

from stas.errors import UsageError
from stas.paths import MAX_NEW_NAME, check_given
from stas.system.printing import is_plain, one_line, say, show

MANY = 10**9  # upper limit of every number: Python's own functions refuse some that are larger

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong option or recipe, 3 bad input data, "
    "75 stopped early (run the same command again to resume)."
)


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
    if not 0 < value <= MANY:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a time: write 90m, 7.5h, 3600 (seconds) or 8:00:00")
    return value


def gpus(text: str) -> int | Literal["all"]:
    """Read a number of GPUs, or `all`."""
    if text == "all":
        return "all"
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs: write 4, 0 for the CPU, or all")
    return int(text)


def number(least: int) -> Callable[[str], int]:
    """Return a function that reads an integer from `least` to MANY."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= MANY:
            raise argparse.ArgumentTypeError(f"{_short(text)} is not a whole number from {least} to {MANY}")
        return value

    return read


def finite(text: str) -> float:
    """Read a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MANY:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a number from -{MANY} to {MANY}")
    return value


def word(text: str) -> str:
    """Read a name or another text of one line."""
    if not text.strip() or not is_plain(text):
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a name: give text without control characters")
    return text


def path(text: str, longest: int = 255) -> Path:
    """Read the name of a file or directory, which need not exist."""
    try:
        return check_given(text, longest)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def new_path(text: str) -> Path:
    """Read the name of an output, beside which there are temporary files with longer names."""
    return path(text, MAX_NEW_NAME)


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."


class _Parser(argparse.ArgumentParser):
    """A parser whose messages, in which arguments are quoted, are printed like all others."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        show(message, file)


class _Version(argparse.Action):
    """Look up the version only on request: that takes longer than all of --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            version = metadata.version("stas")
        except metadata.PackageNotFoundError:  # the image contains the source but does not install it
            project = Path(__file__).parents[1] / "pyproject.toml"
            lines = project.read_text(encoding="utf-8").splitlines() if project.is_file() else []
            version = next((line.split('"')[1] for line in lines if line.startswith('version = "')), "unknown")
        say(f"stas {version}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Build the parser. The parsed `command` is the command's name, such as train or 'weights fetch'."""
    parser = _Parser(
        prog="stas", description="Outline STAS in H&E images with an ensemble of segmentation networks.", epilog=EPILOG
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    stages = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_preprocess(stages)
    _add_train(stages)
    _add_infer(stages)
    _add_vote(stages)
    _add_evaluate(stages)
    _add_launch(stages)
    command = stages.add_parser("recipes", help="list the recipes (with encoder, size and batch) and the ensembles")
    command.set_defaults(command="recipes")
    command = stages.add_parser(
        "members", help="print the numbers of an ensemble's members, for scripts that train each one"
    )
    command.set_defaults(command="members")
    command.add_argument("name", type=word, metavar="ENSEMBLE", help="a name listed by `stas recipes`, or a file")
    _add_weights(stages)
    command = stages.add_parser("doctor", help="check what this machine can run and what would go wrong")
    command.set_defaults(command="doctor")
    _add_workspace(command)
    command.add_argument("--recipe", type=word, help="check whether this recipe can run; exit code 1 if not")
    _add_set(command)
    command = stages.add_parser("verify", help="read all that the stages made, and say what is damaged or missing")
    command.set_defaults(command="verify")
    command.add_argument(
        "paths",
        type=Path,
        nargs="*",
        metavar="PATH",
        help="stores, runs, prediction sets, votes, evaluations or workspaces (default: the workspace)",
    )
    _add_workspace(command)
    return parser


def _add_preprocess(stages: "argparse._SubParsersAction[_Parser]") -> None:
    command = stages.add_parser("preprocess", help="turn images and annotations into a store of samples")
    command.set_defaults(command="preprocess")
    command.add_argument(
        "--images", type=path, nargs="+", required=True, metavar="DIR", help="directories of the images"
    )
    command.add_argument(
        "--annotations",
        type=path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="LabelMe JSON, or mask PNGs",
    )
    _add_workspace(command)
    command.add_argument(
        "--recipe", type=word, default="efficientnet_b6_ns", help="only its data section is used (default: %(default)s)"
    )
    _add_set(command)
    _add_ensemble(command, "make the stores that all its members need, instead of --recipe")
    command.add_argument("--masks", type=new_path, metavar="DIR", help="also write the masks as PNG")
    command.add_argument(
        "--skip-bad", action="store_true", help="leave out bad pairs instead of failing with exit code 3"
    )
    command.add_argument("--workers", type=number(1), help="processes (default: one per core)")


def _add_train(stages: "argparse._SubParsersAction[_Parser]") -> None:
    command = stages.add_parser("train", help="train one member, on its own or under torchrun")
    command.set_defaults(command="train")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--recipe", type=word, help="a name listed by `stas recipes`, or a YAML file")
    _add_ensemble(which, "take the recipe and the run from an ensemble, with --member")
    _add_member(command)
    _add_workspace(command)
    command.add_argument("--run", type=word, help="name of the run (default: the member's or the recipe's)")
    _add_set(command)
    command.add_argument("--time-limit", type=seconds, metavar="TIME", help="total time allowed: 7.5h, 90m, 8:00:00")
    command.add_argument(
        "--checkpoint-every",
        type=seconds,
        default="10m",
        metavar="TIME",
        help="time between checkpoints within an epoch (default: %(default)s)",
    )
    _add_device(command)


def _add_infer(stages: "argparse._SubParsersAction[_Parser]") -> None:
    command = stages.add_parser(
        "infer", help="predict masks for a directory of images with one run, on its own or under torchrun"
    )
    command.set_defaults(command="infer")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=word, help="a trained run in the workspace")
    _add_ensemble(which, "take the run from an ensemble, with --member")
    _add_member(command)
    command.add_argument("--images", type=path, required=True, metavar="DIR", help="directory of the images to outline")
    _add_workspace(command)
    command.add_argument("--name", type=word, help="name of the prediction set (default: RUN, or RUN-held-out)")
    command.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="checkpoint to use (default: %(default)s)"
    )
    command.add_argument(
        "--tta",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="average over the square's 8 symmetries (default: the recipe's)",
    )
    command.add_argument(
        "--threshold", type=float, help="probability above which a pixel is foreground (default: the recipe's)"
    )
    command.add_argument("--probabilities", action="store_true", help="also write 16-bit probabilities")
    _add_held_out(command)
    _add_device(command)


def _add_vote(stages: "argparse._SubParsersAction[_Parser]") -> None:
    command = stages.add_parser("vote", help="combine the members' masks by majority, one per image")
    command.set_defaults(command="vote")
    command.add_argument("runs", type=word, nargs="*", metavar="RUN", help="prediction sets in the workspace")
    _add_ensemble(command, "the runs of an ensemble")
    _add_held_out(command)
    _add_workspace(command)
    command.add_argument("--name", type=word, help="name of the result (default: vote, or vote-held-out)")
    command.add_argument("--members", type=path, nargs="+", metavar="DIR", help="directories of masks from any source")
    command.add_argument(
        "--out", type=new_path, metavar="DIR", help="directory for the result (required with --members)"
    )
    command.add_argument("--ties", choices=("foreground", "background"), help="what a tied pixel becomes")
    command.add_argument(
        "--weights", type=number(1), nargs="+", metavar="W", help="number of votes per member, such as 2 1 1"
    )
    command.add_argument("--soft", action="store_true", help="average the probabilities instead of voting on masks")
    command.add_argument(
        "--threshold", type=float, help="a member's values above this are foreground, in its own units"
    )
    command.add_argument("--workers", type=number(1), help="threads (default: one per core)")


def _add_evaluate(stages: "argparse._SubParsersAction[_Parser]") -> None:
    command = stages.add_parser("evaluate", help="score members and their vote against the truth, and draw pictures")
    command.set_defaults(command="evaluate")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--predictions",
        type=path,
        nargs="+",
        metavar="DIR",
        help="directories of masks; the last decides what to draw",
    )
    _add_ensemble(which, "the members of an ensemble, and their vote")
    _add_held_out(command)
    _add_workspace(command)
    command.add_argument("--truth", type=path, required=True, metavar="DIR", help="LabelMe JSON or mask PNG")
    command.add_argument("--out", type=new_path, required=True, metavar="DIR", help="directory for scores and pictures")
    command.add_argument(
        "--images", type=path, metavar="DIR", help="images for the pictures (default: the JSON's imagePath)"
    )
    command.add_argument("--label", type=word, help="label of the truth's shapes (default: the predictions' label)")
    command.add_argument(
        "--threshold",
        type=float,
        help="values above this are foreground, of members and of a grey truth, each in its own units",
    )
    command.add_argument("--sheets", type=number(0), default=9, help="number of pictures (default: %(default)s)")


def _add_launch(stages: "argparse._SubParsersAction[_Parser]") -> None:
    command = stages.add_parser("launch", help="run a stage as a job; train and infer use all GPUs, through torchrun")
    command.set_defaults(command="launch")
    command.add_argument(
        "--processes", type=number(1), help="processes of train and infer on this node (default: one per GPU)"
    )
    command.add_argument(
        "--gpus",
        type=gpus,
        metavar="N",
        help="GPUs of this node that train and infer must find, one per process; 'all': as many as there are, at least "
        "one; 0: run on the CPU (default: GPUs if there are any)",
    )
    command.add_argument(
        "--nodes", type=number(1), default=1, help="number of nodes, each running this command (default: %(default)s)"
    )
    command.add_argument(
        "--rendezvous", type=word, metavar="HOST:PORT", help="where several nodes meet: the address of node 0"
    )
    command.add_argument(
        "--node",
        type=number(0),
        metavar="INDEX",
        help="this node's number; 0 is the node where they meet; required for several",
    )
    command.add_argument(
        "--job", type=word, metavar="NAME", help="name that distinguishes this job of several nodes from others"
    )
    command.add_argument(
        "--stalled-after",
        type=seconds,
        default="20m",
        metavar="TIME",
        help="end all ranks if one makes no progress for this long (default: %(default)s)",
    )
    command.add_argument("stage", nargs=argparse.REMAINDER, metavar="STAGE ...", help="a stage and its arguments")


def _add_weights(stages: "argparse._SubParsersAction[_Parser]") -> None:
    command = stages.add_parser("weights", help="get pretrained weights for machines without a network")
    actions = command.add_subparsers(metavar="ACTION", required=True)
    command = actions.add_parser("fetch", help="download encoder weights into a directory; set STAS_WEIGHTS_DIR to it")
    command.set_defaults(command="weights fetch")
    command.add_argument("directory", type=new_path, metavar="DIR", help="where the weights go")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--recipe", type=word, help="only this recipe's weights")
    _add_ensemble(which, "its members' weights (default: reference)")
    trust = "whose source you trust: a pickle may hold code"
    command.add_argument(
        "--allow-pickle", action="store_true", help=f"convert pickles where needed, but only those {trust}"
    )
    command = actions.add_parser(
        "convert", help="convert your own weights to safetensors, the only format that is read"
    )
    command.set_defaults(command="weights convert")
    command.add_argument("pickle", type=path, metavar="FILE.pth", help="weights written by torch.save")
    command.add_argument("target", type=new_path, metavar="DIR/NAME.safetensors", help="the file to write")
    command.add_argument("--allow-pickle", action="store_true", help=f"required: read a pickle {trust}")


def _add_ensemble(command: argparse._ActionsContainer, purpose: str) -> None:
    command.add_argument(
        "--ensemble", type=word, metavar="NAME", help=f"{purpose}: a name listed by `stas recipes`, or a file"
    )


def _add_member(command: argparse.ArgumentParser) -> None:
    command.add_argument("--member", type=number(0), metavar="INDEX", help="which member of --ensemble, from 0")


def _add_held_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--held-out", action="store_true", help="only the images the runs held out for validation")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="cuda: fail without a GPU; auto: use the CPU then (default: %(default)s)",
    )


def _add_workspace(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workspace", type=path, metavar="DIR", help="directory that the stages share (default: STAS_WORKSPACE)"
    )


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the recipe; repeatable"
    )
