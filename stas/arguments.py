"""What may be written after `stas`: every command with its options."""

import argparse
from pathlib import Path

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong option or recipe, 3 bad input data, "
    "75 stopped early (the same command goes on)."
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
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90m, 7.5h, 3600 (seconds) or 8:00:00")
    return value


class _Version(argparse.Action):
    """Look the version up only when it is asked for: that takes longer than all of --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            version = metadata.version("stas")
        except metadata.PackageNotFoundError:  # the image holds the source without installing it
            project = Path(__file__).parents[1] / "pyproject.toml"
            lines = project.read_text(encoding="utf-8").splitlines() if project.is_file() else []
            version = next((line.split('"')[1] for line in lines if line.startswith('version = "')), "unknown")
        print(f"stas {version}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser; `command` in its result is the name of the command, such as train or 'weights fetch'."""
    parser = argparse.ArgumentParser(
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
    command = stages.add_parser("recipes", help="list the recipes with encoder, size and batch; and the ensembles")
    command.set_defaults(command="recipes")
    command = stages.add_parser("members", help="the numbers of an ensemble's members, for scripts that train each")
    command.set_defaults(command="members")
    command.add_argument("name", metavar="ENSEMBLE", help="a name that `stas recipes` lists, or a file")
    _add_weights(stages)
    command = stages.add_parser("doctor", help="what this machine can run, and what will go wrong")
    command.set_defaults(command="doctor")
    _add_workspace(command)
    command.add_argument("--recipe", help="check whether this recipe can run; exit code 1 if not")
    _add_set(command)
    return parser


def _add_preprocess(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("preprocess", help="images and annotations to one store of samples")
    command.set_defaults(command="preprocess")
    command.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR")
    command.add_argument(
        "--annotations", type=Path, nargs="+", required=True, metavar="DIR", help="LabelMe JSON, or mask PNGs"
    )
    _add_workspace(command)
    command.add_argument(
        "--recipe", default="efficientnet_b6_ns", help="its data section counts (default: %(default)s)"
    )
    _add_set(command)
    _add_ensemble(command, "make what each of its members needs, instead of --recipe")
    command.add_argument("--masks", type=Path, metavar="DIR", help="also write the masks as PNG")
    command.add_argument("--skip-bad", action="store_true", help="go on without bad pairs instead of exit code 3")
    command.add_argument("--workers", type=int, help="processes (default: all cores)")


def _add_train(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("train", help="train one member; alone or under torchrun")
    command.set_defaults(command="train")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--recipe", help="a name that `stas recipes` lists, or a YAML file")
    _add_ensemble(which, "take recipe and run from a list, with --member")
    _add_member(command)
    _add_workspace(command)
    command.add_argument("--run", help="name of the run (default: the member's or the recipe's)")
    _add_set(command)
    command.add_argument("--time-limit", type=seconds, metavar="TIME", help="all the run may take: 7.5h, 90m, 8:00:00")
    command.add_argument(
        "--checkpoint-every", type=seconds, default="10m", metavar="TIME", help="within an epoch (default: %(default)s)"
    )


def _add_infer(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("infer", help="masks of a directory of images by one run; alone or under torchrun")
    command.set_defaults(command="infer")
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
    command.set_defaults(command="vote")
    command.add_argument("runs", nargs="*", metavar="RUN", help="prediction sets of the workspace")
    _add_ensemble(command, "the runs of a list")
    _add_held_out(command)
    _add_workspace(command)
    command.add_argument("--name", help="name of the result (default: vote; vote-held-out)")
    command.add_argument("--members", type=Path, nargs="+", metavar="DIR", help="directories of masks of any maker")
    command.add_argument("--out", type=Path, metavar="DIR")
    command.add_argument("--ties", choices=("foreground", "background"), help="what a tie becomes")
    command.add_argument("--weights", type=int, nargs="+", metavar="W", help="votes of each member, such as 2 1 1")
    command.add_argument("--soft", action="store_true", help="mean of the probabilities instead of the masks")
    command.add_argument("--threshold", type=float, help="members' values above this are foreground, in their units")
    command.add_argument("--workers", type=int, help="threads (default: all cores)")


def _add_evaluate(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("evaluate", help="scores and pictures of members and vote against the truth")
    command.set_defaults(command="evaluate")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--predictions", type=Path, nargs="+", metavar="DIR")
    _add_ensemble(which, "the members of a list, and their vote")
    _add_held_out(command)
    _add_workspace(command)
    command.add_argument("--truth", type=Path, required=True, metavar="DIR", help="LabelMe JSON or mask PNG")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--images", type=Path, metavar="DIR", help="for the pictures (default: the JSON's imagePath)")
    command.add_argument("--label", help="of the truth's shapes (default: the label that the predictions outline)")
    command.add_argument("--threshold", type=float, help="members' values above this are foreground, in their units")
    command.add_argument("--sheets", type=int, default=9, help="how many pictures (default: %(default)s)")


def _add_launch(stages: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = stages.add_parser("launch", help="run a stage as a job: train and infer on all GPUs, by torchrun")
    command.set_defaults(command="launch")
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
    command.set_defaults(command="weights fetch")
    command.add_argument("directory", type=Path, metavar="DIR")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--recipe", help="of this recipe only")
    _add_ensemble(which, "of its members (default: reference)")
    trust = "of makers that you trust: a pickle may hold code"
    command.add_argument("--allow-pickle", action="store_true", help=f"convert pickles where needed, {trust}")
    command = actions.add_parser("convert", help="make weights of your own safetensors, which alone are read")
    command.set_defaults(command="weights convert")
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
