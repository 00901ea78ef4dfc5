"""The entry point: `stas`, and `python -m stas`.

Before anything else is imported, the current directory leaves the search path. Signals are caught before anything that
takes time is.
"""

import os
import sys


def _leave_current_directory() -> None:
    """Take it off the search path: after `python -m` or an empty entry in PYTHONPATH, its yaml.py would be run.

    What Python imports before this is protected only by `python -P` and a PYTHONPATH without empty entries.
    """
    try:
        here = os.getcwd()  # noqa: PTH109
    except OSError:  # deleted: nothing can be imported from it
        return
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120
    if here != root:
        sys.path[:] = [place for place in sys.path if os.path.realpath(place) != here]


_leave_current_directory()

STAGES = ("launch", "preprocess", "train", "infer", "vote", "evaluate")


def main() -> int:
    """Run one command; return its exit code. A signal during a stage gives 75, or the code of a stage that is done."""
    from stas.system.stop import listen, stop_listening

    stage = len(sys.argv) > 1 and sys.argv[1] in STAGES
    if stage:
        listen()
    # The same for the Python processes that this one starts.
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in os.environ:
        places = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(place for place in places if os.path.isabs(place))  # noqa: PTH117
    from stas.cli import main as run

    code = run()
    if stage:
        stop_listening()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
