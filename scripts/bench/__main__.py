"""Measure `stas` against physical limits and rivals: `make bench`, or python -m scripts.bench [--quick] [NAME ...].

Most figures are ratios of two things timed in turn in the same run, so they can be compared across machines.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import datetime, timezone
from pathlib import Path

from scripts.bench.measure import Row, machine
from scripts.bench.report import figure, markdown
from scripts.bench.site import Site, make_site
from stas.system.files import write_json, write_text
from stas.system.resources import keep_freed_memory

# Each is a module here with a function `measure(site) -> Iterator[Row]`.
PARTS = ("data", "preprocess", "infer", "vote", "evaluate", "checkpoint", "optimizer", "memory", "start", "growth")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="NAME", help=f"only these parts, of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, to see that everything works")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="directory of the results (default: .bench)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: not a part; choose from {', '.join(PARTS)}")
    keep_freed_memory()  # as every command does
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stas-bench-") as scratch:
        site = make_site(Path(scratch), options.out, options.quick)
        for part in options.parts or PARTS:
            for row in _measured(part, site):
                print(line(row), flush=True)
                rows.append(row)
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    content = {"date": when, "quick": options.quick, "machine": machine(), "rows": [row.to_json() for row in rows]}
    write_json(options.out / "benchmarks.json", content)
    write_text(options.out / "benchmarks.md", markdown(content))
    print(f"\nresults: {options.out / 'benchmarks.json'}, {options.out / 'benchmarks.md'}")
    return 0


def line(row: Row) -> str:
    """A row of the table for the terminal."""
    sign = "at least" if row.at_least else "at most"
    verdict = "reached" if row.reached else "MISSED"
    return f"{row.what:70s} {figure(row.to_json()):>10s}  {sign:>8s} {row.target:<5g} {verdict}"


def _measured(part: str, site: Site) -> Iterator[Row]:
    """A part's rows as they come; the stages' output goes to stderr."""
    rows = importlib.import_module(f"scripts.bench.{part}").measure(site)
    while True:
        with redirect_stdout(sys.stderr):
            row = next(rows, None)
        if row is None:
            return
        yield row


if __name__ == "__main__":
    sys.exit(main())
