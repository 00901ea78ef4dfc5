"""Measure `stas` against physical limits and rivals: `make bench`, or python -m scripts.bench [--quick] [NAME ...].

Every figure is a ratio of two things timed in turn in the same run, so that another machine's table can be compared.
"""

import argparse
import importlib
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from scripts.bench.measure import Row, machine
from scripts.bench.site import make_site

# Each is a module here with a function `measure(site) -> Iterator[Row]`.
PARTS = ("data", "preprocess", "infer", "vote", "evaluate", "optimizer", "memory", "start", "growth")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="NAME", help=f"only these of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, to see that everything works")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="stas-bench-") as scratch:
        site = make_site(Path(scratch), options.quick)
        for part in options.parts or PARTS:
            for row in importlib.import_module(f"scripts.bench.{part}").measure(site):
                print(line(row), flush=True)
                rows.append(row)
    if options.out:
        when = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        content = {"date": when, "quick": options.quick, "machine": machine(), "rows": [row.to_json() for row in rows]}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def line(row: Row) -> str:
    verdict = "reached" if row.reached else "MISSED"
    sign = "at least" if row.at_least else "at most"
    detail = ", ".join(f"{name} {value:.4g}" for name, value in row.detail.items())
    text = f"{row.what:64s} {row.value:9.3g} {row.unit}  {sign} {row.target:g}  {verdict}   [{detail}]"
    return f"{text}\n    {row.note}" if row.note else text


if __name__ == "__main__":
    sys.exit(main())
