"""What leaves the program as text: printed lines, log records, errors and cells of a CSV.

Names of files, members and labels come from strangers. Escape sequences in them could rewrite what a terminal shows,
and line breaks could forge lines of a log. So everything goes through this module, which escapes them, and also
decides what happens if nobody reads: work that is done stays done.
"""

import contextlib
import io
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from typing import TextIO

log = logging.getLogger(__name__)
MAX_CHARACTERS = 20_000  # of one log record or error: a name in it may be megabytes long
SHOWN = 10  # cases named in a message; more would bury the rest of it
_ENDING = 2000  # characters kept from the end of a longer one, which is where the remedy is
# Control characters but tab and line feed, signs that reorder text, other line breaks, and halves of characters.
_UNSAFE = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)
# The wide signs count too, where a spreadsheet is set to Japanese.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\t", "\r", "'")


def printable(text: str) -> str:
    """`text` with every character escaped that could control a terminal; its lines stay lines."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """`text` on one line, and not too much of it."""
    return printable(_shortened(text)).replace("\n", "\\n")


def named(cases: Iterable[str], most: int = SHOWN) -> str:
    """The names of the first cases, and how many more there are."""
    listed = list(cases)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def itemised(problems: Sequence[str]) -> str:
    """The first problems on lines of their own, and how many more there are."""
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "".join(f"\n  {line}" for line in [*problems[:SHOWN], *more])


def is_plain(name: str) -> bool:
    """Whether a name can be printed on one line as it is, and written as UTF-8."""
    return not _UNSAFE.search(name) and not {"\n", "\t"} & set(name)


def escaped_json(text: str) -> str:
    """JSON with the same content, in which no character can control a terminal that shows it."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def csv_cell(text: str) -> str:
    """`text` for a CSV: a spreadsheet takes what begins with = + - @ for a formula, so it gets a ' before it.

    So does a text that begins with ' itself: a reader takes one ' away from the beginning, and has the text again.
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def say(text: str) -> bool:
    """Print a result. Return whether it was written, or at least its reader did not want more of it, as `head` does."""
    return _write(sys.stdout, printable(text) + "\n")


def complain(text: object) -> None:
    """Print an error, as one entry: its further lines are indented, so none can pass for an entry of its own."""
    _write(sys.stderr, f"stas: {_entry(str(text))}\n")


def report_bug() -> None:
    """Print the exception being handled, which no code expected, and what to do about it."""
    _write(sys.stderr, _entry(traceback.format_exc()) + "\n")
    complain(
        "stopped by an error that it did not expect. If the lines above do not say how to mend it, please report "
        "them as a bug, with the command and the version that `stas --version` prints"
    )


def show(text: str, stream: TextIO | None) -> None:
    """Write the text of a parser, such as its help or an error, to one of the standard streams."""
    _write(stream, printable(text))


def start_logging() -> None:
    """Log to stderr: our own messages from INFO, those of libraries from WARNING."""
    handler = _Handler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("stas").setLevel(logging.INFO)
    threading.excepthook = _thread_ended
    sys.unraisablehook = _ignored


def open_standard_streams() -> None:
    """Make sure that standard input, output and error are open, and that every character can be written to them.

    If one is closed, the next file that is opened would get its number, and messages would end up in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_standard_streams() -> None:
    """Write what is still buffered, while an error can be handled: at exit, Python would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        _write(stream, "")


def _thread_ended(failed: "threading.ExceptHookArgs") -> None:
    """Say in a line that a thread met a trouble of the machine, which the stage reports when it needs the thread."""
    if isinstance(failed.exc_value, (OSError, MemoryError)):
        log.warning("a thread ended: %s", str(failed.exc_value) or "memory ran out")
    else:
        threading.__excepthook__(failed)


def _ignored(failed: "sys.UnraisableHookArgs") -> None:
    """Say nothing of a want of memory while an object is cleared up: whoever needs the memory says so."""
    if not isinstance(failed.exc_value, MemoryError):
        sys.__unraisablehook__(failed)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _entry(super().format(record))


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            _silence(self.stream)
        else:
            super().handleError(record)


def _entry(text: str) -> str:
    return re.sub(r"\n(?!  )", "\n  ", printable(_shortened(text.rstrip("\n"))))


def _shortened(text: str) -> str:
    left_out = len(text) - MAX_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[: MAX_CHARACTERS - _ENDING]} ... ({left_out} characters left out) ... {text[-_ENDING:]}"


def _write(stream: TextIO | None, text: str) -> bool:
    """Write and flush. Once a stream fails, everything more that is written to it is dropped."""
    if stream is None:
        return False
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
    except OSError as error:
        _silence(stream)
        if stream is not sys.stderr:
            complain(f"the output could not be written ({error.strerror}): use another file, or free some space there")
        return False
    return True


def _silence(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()  # what had not been written yet
