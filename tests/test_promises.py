"""docs/promises.md names existing tests, and every promise has one."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text()


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 30
    texts = {path.name: path.read_text() for path in TESTS.rglob("test_*.py")}
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in texts.get(file, "")]
    assert not missing, f"docs/promises.md names tests that do not exist: {missing}"


def test_every_promise_has_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert rows and all("::test_" in row.split("|")[2] for row in rows)
