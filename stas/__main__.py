"""The entry point: `stas`, and `python -m stas`.

Before anything else is imported, the current directory leaves the search path. Signals are caught before anything that
takes time is.
"""

import os
import sys

# With `python -m`, Python would run a yaml.py of the workspace. `python -P -m stas` protects Python's own start too.
_unsafe = __name__ == "__main__" and not getattr(sys.flags, "safe_path", False)
if _unsafe and sys.path[0] != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):  # noqa: PTH100, PTH120
    del sys.path[0]

STAGES = ("launch", "preprocess", "train", "infer", "vote", "evaluate")


def main() -> int:
    """Run one command; return its exit code. A signal during a stage gives 75, or the code of a stage that is done."""
    from stas.system.stop import listen, stop_listening

    stage = len(sys.argv) > 1 and sys.argv[1] in STAGES
    if stage:
        listen()
    os.environ["PYTHONSAFEPATH"] = "1"  # the same for the Python processes that this one starts
    from stas.cli import main as run

    code = run()
    if stage:
        stop_listening()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
