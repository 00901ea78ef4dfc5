"""Work in threads keeps its order, raises errors in the caller, and limits how far ahead it works."""

import io
import threading

import pytest

from stas.system.threads import bar, in_threads, map_ahead, prefetch


def test_in_threads_keeps_order_and_raises():
    assert in_threads(str, [3, 1, 2], "test", workers=2) == ["3", "1", "2"]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda value: 1 / value, [1, 0], "test")


def test_map_ahead_keeps_order_and_raises():
    assert list(map_ahead(str, range(50), workers=3)) == [str(number) for number in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda value: 1 / value, [1, 0], workers=1))


def test_map_ahead_works_no_further_ahead_than_it_says():
    begun: list[int] = []
    results = map_ahead(lambda number: begun.append(number), range(1000), workers=2)
    for taken in range(1, 20):
        next(results)
        assert len(begun) <= taken + 2 * 2
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() < 100 and len(begun) < 30


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(prefetch(iter(range(20)))) == list(range(20))

    def failing():
        yield 1
        raise ValueError("no")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no"):
        next(items)


def test_prefetch_ends_its_thread_when_left_early():
    before = threading.active_count()
    items = prefetch(iter(range(1000)))
    next(items)
    items.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("terminal", "show", "drawn"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bar_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch, terminal: bool, show: bool, drawn: bool):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", screen)
    assert list(bar(iter("abc"), 3, "epoch 1", show)) == ["a", "b", "c"]
    assert ("epoch 1" in screen.getvalue()) == drawn
    if drawn:
        assert "/3" in screen.getvalue()
