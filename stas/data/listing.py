"""List the images and annotations of a directory, and refuse names that cannot name a mask or stand in a table."""

import logging
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from stas.errors import InputDataError
from stas.paths import manifest_file
from stas.system.printing import is_plain, named
from stas.system.publish import BYSTANDERS
from stas.system.untrusted import refusal

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
MAX_STEM_BYTES = 150  # in UTF-8: file names may have 255, and temporary names are longer
SAME_NAME = " (ignoring case and how accents are encoded)"


def list_images(
    directory: Path,
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    others: tuple[str, ...] = (),
    may_be_empty: bool = False,
    any_name: bool = False,
) -> dict[str, Path]:
    """The images of a directory by stem, sorted by stem. Logs which files were passed over because of their suffix.

    Args:
        directory: the directory; those inside it are not searched.
        suffixes: of the images, in lower case.
        others: suffixes of files that belong there too and are not mentioned.
        may_be_empty: whether there may be no image.
        any_name: whether to list names that `check_plain` refuses too, for a caller that reports each one itself.

    Raises:
        InputDataError: the directory is missing or has no image, two images have the same stem, or stems that differ
            only in case or in how accents are encoded, or `check_stem` or `check_plain` refuses a name.
    """
    if not directory.is_dir():
        raise InputDataError(f"{directory}: not a directory; name the directory that contains the images")
    found: dict[str, Path] = {}
    folded: dict[str, Path] = {}
    for path in list_files(directory, suffixes, others):
        check_stem(path)
        if not any_name:
            check_plain(path, path)
        other = folded.setdefault(fold(path.stem), path)
        if other != path:
            note = "" if other.stem == path.stem else SAME_NAME
            raise InputDataError(
                f"{directory}: {other.name} and {path.name} share the stem {path.stem!r}{note}, "
                "which names their masks: rename one"
            )
        found[path.stem] = path
    if not found and not may_be_empty:
        raise InputDataError(f"{directory}: no image in it (looked for {' '.join(suffixes)})")
    return dict(sorted(found.items()))


def list_files(directory: Path, suffixes: Iterable[str], others: Iterable[str] = ()) -> list[Path]:
    """The files of a directory with these suffixes, sorted by name; logs which others it passed over.

    Hidden files are ignored. `others` are suffixes of files that are not mentioned.
    """
    silent = {*BYSTANDERS, manifest_file(directory).name}
    try:
        visible = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
        unknown = [path for path in visible if path.suffix.lower() not in {*suffixes, *others}]
        over = [path.name for path in unknown if path.name not in silent and path.is_file()]
    except OSError as error:
        raise refusal(directory, error) from error
    if over:
        log.info("%s: %d files passed over because of their suffix: %s", directory, len(over), named(over))
    return [path for path in visible if path.suffix.lower() in suffixes]


def fold(stem: str) -> str:
    """A stem as seen by file systems that ignore case or how accents are encoded (macOS, Windows, network shares)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())


def is_plain_stem(stem: object) -> bool:
    """Whether a stem from a manifest names a file inside a directory, not outside it."""
    if not isinstance(stem, str) or not stem or stem.startswith(".") or set(stem) & {"/", "\0"}:
        return False
    return len(stem.encode(errors="surrogatepass")) <= MAX_STEM_BYTES


def check_stem(path: Path) -> None:
    """Refuse an image whose name is too long for its mask to be written.

    Raises:
        InputDataError: the stem has more than MAX_STEM_BYTES.
    """
    length = len(path.stem.encode(errors="surrogateescape"))
    if length > MAX_STEM_BYTES:
        raise InputDataError(f"{path}: the stem has {length} bytes, more than {MAX_STEM_BYTES}: rename it")


def check_plain(annotation: Path, file: Path) -> None:
    """Refuse an annotation if the name of `file`, itself or its image, cannot stand in manifests, tables and logs.

    Raises:
        InputDataError: it is not UTF-8, or has line breaks or other control characters.
    """
    if is_plain(file.name):
        return
    whose = "its name" if file == annotation else f"the name of its image {file}"
    if is_plain(file.name.encode(errors="ignore").decode()):
        raise InputDataError(f"{annotation}: {whose} is not UTF-8: rename it and its image")
    raise InputDataError(f"{annotation}: {whose} has line breaks or other control characters: rename it")
