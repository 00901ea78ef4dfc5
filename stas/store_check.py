"""Whether LMDB may map a store's data file: it trusts what it maps, and a wrong page number there ends the process."""

import hashlib
import logging
from pathlib import Path

from lmdb.verify import VerifyError, verify

from stas.errors import InputDataError

log = logging.getLogger(__name__)


def check_data_file(file: Path, cache: Path | None) -> None:
    """Walk the file's pages with py-lmdb's own verifier, which reads them as plain bytes, before it is mapped.

    The manifest's hashes would find damage, but not a store that somebody made to harm, whose manifest he made, too.
    A walk takes a millisecond for each sample, so that it is done once and remembered under the file's inode, size and
    times, of which a file that was changed or came from elsewhere cannot have the same: the kernel sets the last.

    Args:
        file: the data file, which must not change while it is open.
        cache: a directory of this user alone, for what is remembered; None for nothing.

    Raises:
        InputDataError: the file is not what LMDB writes.
    """
    found = file.stat()
    identity = [str(file), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    mark = cache / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.checked" if cache else None
    if mark and mark.exists():
        return
    try:
        problems = verify(str(file), subdir=False)
    except (VerifyError, OSError) as error:
        problems = [str(error)]
    except Exception as error:  # a gap in the verifier is a damaged file, too
        problems = [f"{type(error).__name__}: {error}"]
    if problems:
        raise InputDataError(
            f"{file}: not a data file as LMDB writes it ({problems[0]}): "
            "delete the store and run `stas preprocess` again"
        )
    try:
        if mark:
            mark.touch()
    except OSError as error:
        log.debug("%s: not remembered as checked (%s)", file, error)
