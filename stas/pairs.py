"""Annotations and the images they belong to, found by name and hashed, before any is decoded."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stas.annotations import Annotation, find_image, read_labelme
from stas.errors import InputDataError
from stas.files import sha256
from stas.images import IMAGE_SUFFIXES, list_images
from stas.progress import bar
from stas.store import FORMAT, Skipped


@dataclass(frozen=True)
class Pair:
    """An annotation (LabelMe JSON or mask PNG) and its image; None for one that is embedded in the JSON."""

    annotation: Path
    image: Path | None
    annotation_sha256: str
    image_sha256: str

    @property
    def stem(self) -> str:
        """The sample's name, which is the annotation's and mostly the image's, too."""
        return self.annotation.stem


def find_pairs(images: Sequence[Path], annotations: Sequence[Path]) -> tuple[list[Pair], list[Skipped]]:
    """Pair every annotation with its image.

    Args:
        images: directories of images.
        annotations: directories of LabelMe JSON files and mask PNGs. In one that is also a directory of images, a PNG
            is an image.

    Returns:
        The pairs in sorted order of their stems, and the files that have no partner or cannot be read.

    Raises:
        InputDataError: a directory is missing, there is no annotation, or two directories have the same stem.
    """
    image_files = _by_stem(images, _list_pictures)
    annotation_files, double = _list_annotations(annotations, {directory.resolve() for directory in images})
    if not annotation_files and not double:
        where = ", ".join(map(str, annotations))
        raise InputDataError(f"{where}: no annotation in it: give the directory with LabelMe JSON files or mask PNGs")

    def resolve(stem: str) -> Pair | Skipped:
        try:
            return _pair(annotation_files[stem], image_files.get(stem), images)
        except (InputDataError, OSError) as error:
            return skipped(annotation_files[stem], error)

    with ThreadPoolExecutor(min(8, cores())) as threads:  # reading and hashing, for which Python's lock is released
        found = list(bar(threads.map(resolve, annotation_files), len(annotation_files), "hash"))
    pairs, twice = _one_annotation_each([pair for pair in found if isinstance(pair, Pair)])
    bad = [*double.values(), *(entry for entry in found if not isinstance(entry, Pair)), *twice]
    used = {pair.image.resolve() for pair in pairs if pair.image}
    remedy = "annotate it (a LabelMe file without shapes says that there is nothing to find) or take it out"
    bad += [
        skipped(path, InputDataError(f"{path}: no annotation of this stem: {remedy}"))
        for stem, path in image_files.items()
        if stem not in annotation_files and stem not in double and path.resolve() not in used
    ]
    return pairs, sorted(bad, key=lambda entry: entry["file"])


def store_key(label: str, size: tuple[int, int], pairs: Sequence[Pair], bad: Sequence[Skipped]) -> str:
    """The name of the store that these inputs make: 20 hexadecimal digits of a SHA-256."""
    content = {
        "format": FORMAT,
        "label": label,
        "size": size,
        "samples": sorted((pair.stem, pair.image_sha256, pair.annotation_sha256) for pair in pairs),
        "bad": sorted(Path(entry["file"]).name for entry in bad),  # because the manifest lists them
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def pair_hashes(annotation: Path, image: Path | None, content: Annotation | None) -> tuple[str, str]:
    """SHA-256 of the annotation's file and of the image, which is embedded in `content` if it is not a file."""
    if image is not None:
        return sha256(annotation), sha256(image)
    assert content is not None
    assert content.image_data is not None
    return sha256(annotation), hashlib.sha256(content.image_data).hexdigest()


def skipped(file: Path, error: Exception) -> Skipped:
    """An error as a manifest's entry. Messages of InputDataError read 'file: reason: remedy'."""
    name = str(file).encode(errors="backslashreplace").decode()  # a name that is not UTF-8 cannot stand in JSON
    if not isinstance(error, InputDataError):
        return Skipped(file=name, reason=f"not readable ({error})", remedy="look at its permissions and its disk")
    reason, _, remedy = str(error).removeprefix(f"{file}: ").rpartition(": ")
    return Skipped(file=name, reason=reason, remedy=remedy)


def cores() -> int:
    """How many cores this process may use, which in a job is often fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def _pair(annotation: Path, image: Path | None, images: Sequence[Path]) -> Pair:
    """Find and hash the image of an annotation, given the image file of its stem if there is one."""
    try:
        annotation.name.encode()
    except UnicodeEncodeError:
        raise InputDataError(f"{annotation}: its name is not UTF-8: rename it and its image") from None
    content = None
    if image is None:
        if annotation.suffix.lower() != ".json":
            raise InputDataError(f"{annotation}: no image of this stem: put it into {images[0]}")
        content = read_labelme(annotation)
        found = find_image(annotation, content, images)
        if found is None:
            raise InputDataError(
                f"{annotation}: no image, neither of this stem, nor at imagePath {content.image_path!r} within the "
                f"given directories, nor embedded: put it into {images[0]}"
            )
        image = found if isinstance(found, Path) else None
    return Pair(annotation, image, *pair_hashes(annotation, image, content))


def _one_annotation_each(found: Sequence[Pair]) -> tuple[list[Pair], list[Skipped]]:
    """Refuse an image's second annotation, with which it could stand in training and validation at once."""
    pairs: list[Pair] = []
    bad: list[Skipped] = []
    annotated: dict[Path, Path] = {}
    # An annotation of the image's own stem comes first.
    for pair in sorted(found, key=lambda pair: (pair.image is not None and pair.image.stem != pair.stem, pair.stem)):
        first = annotated.setdefault(pair.image.resolve(), pair.annotation) if pair.image else pair.annotation
        if first == pair.annotation:
            pairs.append(pair)
        else:
            reason = f"its image {pair.image} is also that of {first}"
            bad.append(skipped(pair.annotation, InputDataError(f"{reason}: keep one of the two annotations")))
    return sorted(pairs, key=lambda pair: pair.stem), bad


def _list_pictures(directory: Path) -> dict[str, Path]:
    """The images of a directory, which may be none where they are embedded in the annotations."""
    if directory.is_dir() and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in directory.iterdir()):
        return {}
    return list_images(directory)


def _list_annotations(directories: Sequence[Path], images: set[Path]) -> tuple[dict[str, Path], dict[str, Skipped]]:
    """The annotations by stem, sorted, and apart from them those of which there are two kinds for one stem."""
    bad: dict[str, Skipped] = {}

    def listing(directory: Path) -> dict[str, Path]:
        if not directory.is_dir():
            raise InputDataError(f"{directory}: not a directory: give the directory that holds the annotations")
        suffixes = (".json",) if directory.resolve() in images else (".json", ".png")
        found: dict[str, Path] = {}
        for path in sorted(directory.iterdir()):
            if path.suffix.lower() not in suffixes or path.name.startswith("."):
                continue
            if path.stem in found:
                reason = f"{found[path.stem].name} annotates the same image"
                bad[path.stem] = skipped(path, InputDataError(f"{reason}: keep one of the two"))
            found[path.stem] = path
        return found

    files = _by_stem(directories, listing)
    return {stem: files[stem] for stem in sorted(files) if stem not in bad}, bad


def _by_stem(directories: Sequence[Path], listing: Callable[[Path], dict[str, Path]]) -> dict[str, Path]:
    """The files of several directories by stem."""
    files: dict[str, Path] = {}
    for directory in {directory.resolve(): directory for directory in directories}.values():
        for stem, path in listing(directory).items():
            if stem in files:
                raise InputDataError(
                    f"{files[stem]} and {path} share the stem {stem!r}, which names a sample: rename one"
                )
            files[stem] = path
    return files
