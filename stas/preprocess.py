"""preprocess: turn images and annotations into the store that training reads."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stas.config import Data, Split
from stas.data.annotations import Annotation, rasterise, read_labelme
from stas.data.images import is_graded, read_grey, read_image, stated_size
from stas.data.masks import check_apart, is_within, write_masks
from stas.data.pairs import Pair, find_pairs, skipped, stop_if_gone, store_key
from stas.data.split import split_samples, warn_of_shared_images
from stas.data.store import Store, point_to, pointer
from stas.data.store_manifest import Skipped
from stas.data.store_spec import StoreSpec, store_spec
from stas.data.store_writer import Record, Source, StoreWriter, build_store, check_count, make_record
from stas.data.workers import records
from stas.errors import InputDataError, StoppedEarly, UsageError
from stas.paths import Workspace
from stas.system.files import sha256
from stas.system.printing import named, say
from stas.system.publish import check_replaceable
from stas.system.resources import cores
from stas.system.threads import bar

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """A worker's input for one sample."""

    pair: Pair
    spec: StoreSpec


def preprocess(
    images: Sequence[Path],
    annotations: Sequence[Path],
    workspace: Workspace,
    data: Data,
    masks: Path | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    splits: Sequence[Split] = (),
) -> Path:
    """Make the store for a recipe, unless it exists.

    Args:
        images: directories of images; a stem may occur in only one of them.
        annotations: directories of LabelMe JSON files and of mask PNGs, each with the stem of its image.
        workspace: where the store goes.
        data: the recipe's section.
        masks: a directory of its own for each sample's mask as PNG, at the image's own size.
        skip_bad: leave bad pairs out and list them in the manifest, instead of failing.
        workers: processes; by default one per core this process may use.
        splits: the splits of all recipes that share the store, which must fit its samples; by default that of `data`.

    Returns:
        The store's directory.

    Raises:
        InputDataError: bad pairs, each listed with file, reason and remedy; nothing is stored.
        StoppedEarly: a file could not be read for a reason that may pass; nothing is stored.
        UsageError: no shape has the label, a split does not fit the samples (the store is kept), or `masks` may not be
            written.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be 1 or more")
    spec = store_spec(data)
    pointer(workspace, spec)  # before the work, because it refuses a label that cannot be in a file name
    for place in (*images, *annotations):
        if is_within(place, workspace.stores):
            raise UsageError(f"{place}: is where stores are written: use another --workspace")
    if masks is not None:
        check_apart(masks, [*images, *annotations, workspace.stores])
        check_replaceable(masks, "mask set")
    pairs, bad = find_pairs(images, annotations)
    check_count(len(pairs))
    directory = workspace.store(store_key(spec, pairs, bad))
    with build_store(directory, spec) as writer:
        if writer:
            _fill(writer, pairs, bad, spec, skip_bad, workers or cores())
    del pairs  # for a large data set they take as much memory as the manifest, which is read next
    store = Store(directory)
    if not writer:
        log.info("%s already exists, made from the same files", directory)
        _check_skipped(store.skipped, skip_bad)
        if store.skipped:
            log.warning("should any of them be readable by now: delete %s and run this again", directory)
    point_to(workspace, store)
    if masks is not None:
        write_masks(store, masks)
    _report(store)
    for split in splits or [data.split]:
        _report_split(store, split)
    return directory


def make_sample(task: Task) -> Record | Skipped:
    """Read, check and resize one pair. Runs in a worker process."""
    pair = task.pair
    blamed, problem = pair.annotation, None
    try:
        annotation = read_labelme(pair.annotation) if pair.annotation.suffix.lower() == ".json" else None
        blamed = pair.image or pair.annotation
        image = read_image(_image_source(pair, annotation))
        blamed = pair.annotation
        mask = _mask(pair.annotation, annotation, (image.shape[0], image.shape[1]), task.spec.labels[0])
        _check_unchanged(pair)
        return _record(pair, image, mask, task.spec)
    except (InputDataError, OSError, MemoryError) as error:
        problem = skipped(blamed, error, pair.annotation, pair.image)
    _check_unchanged(pair)  # bad as a whole, not just half written
    return problem


def _record(pair: Pair, image: NDArray[np.uint8], mask: NDArray[np.bool_], spec: StoreSpec) -> Record:
    source = Source(
        stem=pair.stem,
        image=pair.image.name if pair.image else pair.annotation.name,
        image_sha256=pair.image_sha256,
        annotation=pair.annotation.name,
        annotation_sha256=pair.annotation_sha256,
    )
    return make_record(source, image, mask, spec)


def _check_unchanged(pair: Pair) -> None:
    """Stop if a file is no longer the one that was hashed: what was read may be neither version of it."""
    stop_if_gone(pair.annotation, pair.image)
    hashes = sha256(pair.annotation), sha256(pair.image) if pair.image else pair.image_sha256
    if hashes != (pair.annotation_sha256, pair.image_sha256):
        raise StoppedEarly(f"{pair.annotation}: it or its image changed while being read: run the command again")


def _fill(
    writer: StoreWriter, pairs: Sequence[Pair], bad: Sequence[Skipped], spec: StoreSpec, skip_bad: bool, workers: int
) -> None:
    """Store every pair, looking at all of them before failing."""
    tasks = [Task(pair, spec) for pair in pairs]
    writer.skipped += bad
    made = records(make_sample, tasks, _largest(pairs, spec), max(1, min(workers, len(tasks))))
    for result in bar(made, len(tasks), "preprocess"):
        if not isinstance(result, Record):
            writer.skipped.append(result)
        elif skip_bad or not writer.skipped:  # otherwise the store will not be published
            writer.add(result)
    writer.skipped.sort(key=lambda entry: entry["file"])
    _check_skipped(writer.skipped, skip_bad)
    if not writer.samples:
        raise InputDataError("no usable pair of image and annotation is left: repair the files above")
    if not any(sample["area"] for sample in writer.samples):
        _check_label([pair.annotation for pair in pairs], spec.labels[0])


def _largest(pairs: Sequence[Pair], spec: StoreSpec) -> tuple[int, int]:
    """(height, width) of the stored image with the most pixels."""
    if spec.size:
        return spec.size
    shapes = [(1, 1)]
    for pair in pairs:
        with suppress(InputDataError):  # it is reported as bad when it is decoded
            annotation = None if pair.image else read_labelme(pair.annotation)
            shapes.append(spec.shape(*stated_size(_image_source(pair, annotation))))
    return max(shapes, key=math.prod)


def _image_source(pair: Pair, annotation: Annotation | None) -> Path | bytes:
    if pair.image is not None:
        return pair.image
    if annotation is None or annotation.image_data is None:
        raise StoppedEarly(
            f"{pair.annotation}: its embedded image disappeared after it was hashed: run the command again"
        )
    return annotation.image_data


def _mask(path: Path, annotation: Annotation | None, size: tuple[int, int], label: str) -> NDArray[np.bool_]:
    """The foreground at the image's (height, width), from LabelMe's shapes or from a mask PNG."""
    if annotation is not None:
        _check_size(path, annotation.size or size, size)
        return rasterise(annotation.shapes, size, label, path)
    values = read_grey(path)
    if is_graded(values):
        raise InputDataError(
            f"{path}: its values are not just 0 and one of 1, 255 and 65535, so it is not clear where the "
            "foreground begins: save it with 0 and 255"
        )
    _check_size(path, (values.shape[0], values.shape[1]), size)
    return values > 0


def _check_size(path: Path, declared: tuple[int, int], size: tuple[int, int]) -> None:
    if declared != size:
        raise InputDataError(
            f"{path}: made for {declared[1]} x {declared[0]} pixels (width x height), but its image has {size[1]} x "
            f"{size[0]}: give the image it was drawn on, or annotate this one again"
        )


def _check_skipped(entries: Sequence[Skipped], skip_bad: bool) -> None:
    """Fail on bad pairs, or log that they are left out."""
    listing = "\n".join(f"  {entry['file']}: {entry['reason']}. Remedy: {entry['remedy']}" for entry in entries)
    if entries and not skip_bad:
        raise InputDataError(
            f"{len(entries)} files cannot be used:\n{listing}\nrepair them, or leave them out with --skip-bad"
        )
    if entries:
        log.warning("%d files are left out:\n%s", len(entries), listing)


def _check_label(annotations: Sequence[Path], label: str) -> None:
    """Refuse a misspelt label; warn of a data set without foreground."""
    labels: Counter[str] = Counter()
    for path in annotations:
        if path.suffix.lower() == ".json":
            try:
                labels += read_labelme(path).labels
            except InputDataError:
                continue  # already listed as bad
    if labels and label not in labels:
        found = named(f"{name} ({count})" for name, count in labels.most_common())
        raise UsageError(f"data.label {label!r}: no shape has this label; found {found}: use --set data.label=...")
    log.warning("no sample has any foreground: a network cannot learn from them")


def _report(store: Store) -> None:
    """Print what the store holds."""
    shares = np.array([100 * sample["area"] / (sample["height"] * sample["width"]) for sample in store.samples])
    say(f"store  {store.directory}")
    say(f"       {len(store)} samples of {store.spec}, {len(store.skipped)} left out")
    say(
        f"       foreground {shares.min():.2f} to {shares.max():.2f} % of an image, median {np.median(shares):.2f} %; "
        f"{np.count_nonzero(shares == 0)} without any"
    )


def _report_split(store: Store, split: Split) -> None:
    """Print how a split divides the samples; refuse one that does not fit them."""
    training, validation = split_samples(store.samples, split)
    warn_of_shared_images(store.samples, training, validation)
    fold = f" {split.fold} of {split.folds}" if split.kind == "kfold" else ""
    say(f"split  {split.kind}{fold}: {len(training)} for training, {len(validation)} for validation")
