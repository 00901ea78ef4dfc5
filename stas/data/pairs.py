"""Pair annotations with their images by name, and hash both, before any is decoded."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stas.data.annotations import MAX_FILE_BYTES, Annotation, find_image, read_labelme
from stas.data.images import MAX_IMAGE_BYTES
from stas.data.listing import IMAGE_SUFFIXES, SAME_NAME, check_plain, check_stem, fold, list_files, list_images
from stas.data.store_manifest import Skipped
from stas.data.store_spec import StoreSpec
from stas.errors import InputDataError, StoppedEarly, UnreadableError
from stas.paths import manifest_file
from stas.system.files import sha256
from stas.system.publish import FORMATS, read_manifest
from stas.system.resources import cores
from stas.system.threads import bar, map_ahead
from stas.system.untrusted import check_file, refusal, resolved, shown, stop_if_passing

ANNOTATION_SUFFIXES = (".json", ".png")


@dataclass(frozen=True, slots=True)
class Pair:
    """An annotation (LabelMe JSON or mask PNG) and its image; None if the image is embedded in the JSON."""

    annotation: Path
    image: Path | None
    annotation_sha256: str
    image_sha256: str

    @property
    def stem(self) -> str:
        """The sample's name: the stem of the annotation, and usually of the image too."""
        return self.annotation.stem


def find_pairs(images: Sequence[Path], annotations: Sequence[Path]) -> tuple[list[Pair], list[Skipped]]:
    """Pair every annotation with its image.

    Args:
        images: directories of images.
        annotations: directories of LabelMe JSON files and mask PNGs. If one is also a directory of images, its PNGs
            are images.

    Returns:
        The pairs sorted by stem, and the files that have no partner or cannot be read.

    Raises:
        InputDataError: a directory is missing, there is no annotation, two directories contain the same stem, or this
            user may not read a file.
        StoppedEarly: this machine could not read a file for now, or a file has just been removed.
    """
    image_places, annotation_places = ({resolved(place) for place in places} for places in (images, annotations))
    image_files = _by_stem(
        images,
        # It may have none, because images can be embedded in the annotations.
        lambda place: list_images(
            place,
            others=ANNOTATION_SUFFIXES if resolved(place) in annotation_places else (),
            may_be_empty=True,
            any_name=True,
        ),
    )
    annotation_files, double = _list_annotations(annotations, image_places)
    if not annotation_files and not double:
        where = ", ".join(map(str, annotations))
        raise InputDataError(f"{where}: no annotation in it: name the directory with LabelMe JSON files or mask PNGs")

    def resolve(stem: str) -> Pair | Skipped:
        try:
            return _pair(annotation_files[stem], image_files.get(stem), images)
        except (InputDataError, OSError, MemoryError) as error:
            return skipped(annotation_files[stem], error, image_files.get(stem))

    # Reading and hashing release the GIL.
    found = list(bar(map_ahead(resolve, annotation_files, min(8, cores())), len(annotation_files), "hash"))
    pairs, twice = _one_annotation_each([pair for pair in found if isinstance(pair, Pair)])
    bad = [*double.values(), *(entry for entry in found if not isinstance(entry, Pair)), *twice]
    used = {resolved(pair.image) for pair in pairs if pair.image}
    remedy = "annotate it (a LabelMe file without shapes means that there is no foreground) or move it away"
    bad += [
        skipped(path, InputDataError(f"{path}: no annotation with this stem: {remedy}"))
        for stem, path in image_files.items()
        if stem not in annotation_files and stem not in double and resolved(path) not in used
    ]
    return pairs, sorted(bad, key=lambda entry: entry["file"])


def store_key(spec: StoreSpec, pairs: Sequence[Pair], bad: Sequence[Skipped]) -> str:
    """The name of the store built from these inputs: 20 hexadecimal digits of a SHA-256."""
    content = {
        "format": FORMATS["store"],
        "spec": asdict(spec),
        "samples": sorted((pair.stem, pair.image_sha256, pair.annotation_sha256) for pair in pairs),
        "bad": sorted(Path(entry["file"]).name for entry in bad),  # because the manifest lists them
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def pair_hashes(annotation: Path, image: Path | None, content: Annotation | None) -> tuple[str, str]:
    """SHA-256 of the annotation's file and of the image, which is embedded in `content` unless it is a file."""
    if image is not None:
        return sha256(annotation), sha256(image)
    assert content is not None
    assert content.image_data is not None
    return sha256(annotation), hashlib.sha256(content.image_data).hexdigest()


def skipped(file: Path, error: Exception, *others: Path | None) -> Skipped:
    """Turn an error into a manifest's entry, if a file is at fault. Messages read 'file: reason: remedy'.

    Args:
        file: the file at fault.
        error: the error in reading it or `others`.
        others: files that were read with it.

    Raises:
        StoppedEarly: the fault may pass: the machine's, or a file has just been removed.
        UnreadableError: this user may not read the file, so nothing is known about it.
    """
    stop_if_passing(file, error)
    stop_if_gone(file, *others)
    if isinstance(error, OSError):
        error = refusal(file, error)
    if isinstance(error, UnreadableError):
        raise error
    reason, _, remedy = str(error).removeprefix(f"{file}: ").rpartition(": ")
    # JSON cannot contain a name that is not UTF-8, and a reason may quote another file's name.
    name, reason = (text.encode(errors="backslashreplace").decode() for text in (str(file), reason))
    return Skipped(file=name, reason=reason, remedy=remedy)


def stop_if_gone(*files: Path | None) -> None:
    """Stop if a file that was listed is no longer there. A link that leads nowhere is there.

    Raises:
        StoppedEarly: names the file.
    """
    for file in files:
        if file is not None and not os.path.lexists(file):
            raise StoppedEarly(
                f"{file}: disappeared while the data set was being read: run the same command again once nothing "
                "changes there and the volume is mounted"
            )


def _pair(annotation: Path, image: Path | None, images: Sequence[Path]) -> Pair:
    """Find and hash the image of an annotation, given the image file of its stem if there is one."""
    check_plain(annotation, annotation)
    check_stem(annotation)
    check_file(annotation, MAX_FILE_BYTES)  # before hashing, which never ends for a pipe
    content = None
    if image is None:
        if annotation.suffix.lower() != ".json":
            raise InputDataError(f"{annotation}: no image with this stem: put it into {images[0]}")
        content = read_labelme(annotation)
        found = find_image(annotation, content, images)
        if found is None:
            raise InputDataError(
                f"{annotation}: no image, neither with this stem, nor at imagePath {shown(content.image_path)} within "
                f"the given directories, nor embedded: put it into {images[0]}"
            )
        image = found if isinstance(found, Path) else None
    if image is not None:
        check_plain(annotation, image)
        check_file(image, MAX_IMAGE_BYTES)
    return Pair(annotation, image, *pair_hashes(annotation, image, content))


def _one_annotation_each(found: Sequence[Pair]) -> tuple[list[Pair], list[Skipped]]:
    """Refuse an image's second annotation: the image could end up in both training and validation."""
    pairs: list[Pair] = []
    bad: list[Skipped] = []
    annotated: dict[Path, Path] = {}
    # An annotation with the image's own stem comes first.
    for pair in sorted(found, key=lambda pair: (pair.image is not None and pair.image.stem != pair.stem, pair.stem)):
        first = annotated.setdefault(resolved(pair.image), pair.annotation) if pair.image else pair.annotation
        if first == pair.annotation:
            pairs.append(pair)
        else:
            reason = f"its image {pair.image} also belongs to {first}"
            bad.append(skipped(pair.annotation, InputDataError(f"{reason}: keep one of the two annotations")))
    return sorted(pairs, key=lambda pair: pair.stem), bad


def _list_annotations(directories: Sequence[Path], images: set[Path]) -> tuple[dict[str, Path], dict[str, Skipped]]:
    """The annotations sorted by stem, and separately those whose stem has two kinds of annotation."""
    bad: dict[str, Skipped] = {}

    def listing(directory: Path) -> dict[str, Path]:
        if not directory.is_dir():
            raise InputDataError(f"{directory}: not a directory: name the directory that contains the annotations")
        suffixes, others = ANNOTATION_SUFFIXES, ()
        if resolved(directory) in images:
            suffixes, others = (".json",), IMAGE_SUFFIXES
        found: dict[str, Path] = {}
        folded: dict[str, Path] = {}
        for path in list_files(directory, suffixes, others):
            if path == manifest_file(directory) and _is_published(directory):
                continue
            other = folded.setdefault(fold(path.stem), path)
            if other != path:
                note = "" if other.stem == path.stem else f", with the same stem{SAME_NAME}"
                for one, two in ((path, other), (other, path)):  # one entry, for `path`, if the stems are equal
                    error = InputDataError(f"{two.name} annotates the same image{note}: keep one of the two")
                    bad.setdefault(one.stem, skipped(one, error))
            found[path.stem] = path
        return found

    files = _by_stem(directories, listing)
    return {stem: files[stem] for stem in sorted(files) if stem not in bad}, bad


def _is_published(directory: Path) -> bool:
    """Whether a directory's manifest.json is that of masks made by stas, not an annotation of manifest.png."""
    try:
        return bool(read_manifest(directory, *FORMATS))
    except InputDataError:
        return False


def _by_stem(directories: Sequence[Path], listing: Callable[[Path], dict[str, Path]]) -> dict[str, Path]:
    """The files of several directories by stem."""
    files: dict[str, Path] = {}
    folded: dict[str, Path] = {}
    for directory in {resolved(directory): directory for directory in directories}.values():
        before = dict(folded)
        for stem, path in listing(directory).items():
            if other := before.get(fold(stem)):
                note = "" if other.stem == stem else SAME_NAME
                raise InputDataError(
                    f"{other} and {path} share the stem {stem!r}{note}, which names a sample: rename one"
                )
            folded[fold(stem)] = files[stem] = path
    return files
