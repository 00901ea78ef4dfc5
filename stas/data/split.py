"""Split samples into training and validation.

Random choices hash the seed and the stem, so they depend neither on the order of the samples nor on a library's
generator, and adding a sample moves few of the others.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from stas.config import Split
from stas.data.store import Sample
from stas.errors import UsageError
from stas.system.printing import named
from stas.system.untrusted import read_bounded, shown

log = logging.getLogger(__name__)

MAX_LIST_BYTES = 16 * 1024 * 1024


def split_samples(samples: Sequence[Sample], split: Split) -> tuple[list[int], list[int]]:
    """Split samples as the recipe says.

    Args:
        samples: entries of a store's manifest; `stem` and `area` are used.
        split: the recipe's section.

    Returns:
        Positions in `samples` for training and for validation, each sorted by stem.

    Raises:
        UsageError: training or validation would be empty, or the list file is missing or names an unknown stem.
    """
    order = sorted(range(len(samples)), key=lambda index: samples[index]["stem"])
    if split.kind == "first":
        chosen, words = set(order[: split.count]), f"the first {split.count}"
    elif split.kind == "fraction":
        count = max(1, round(len(order) * split.fraction))
        shuffled = sorted(order, key=lambda index: _draw(split.seed, samples[index]["stem"]))
        chosen, words = set(shuffled[:count]), f"a fraction of {split.fraction}"
    elif split.kind == "kfold":
        chosen, words = _fold(samples, split), f"fold {split.fold} of {split.folds}"
    else:
        assert split.file is not None
        stems = _listed(split.file, {sample["stem"] for sample in samples})
        chosen, words = {index for index in order if samples[index]["stem"] in stems}, f"the list {split.file}"
    training = [index for index in order if index not in chosen]
    validation = [index for index in order if index in chosen]
    if not training or not validation:
        missing = "validation" if training else "training"
        raise UsageError(
            f"data.split takes {words} of {len(samples)} samples for validation, which leaves none for {missing}: "
            "use another split, e.g. --set data.split.kind=fraction"
        )
    return training, validation


def warn_of_shared_images(samples: Sequence[Sample], training: Sequence[int], validation: Sequence[int]) -> None:
    """Warn of the same image file under two stems, one trained on and one held out: its score would say too much.

    Compares the files, so an image that was saved again, with other bytes, is not found.
    """
    trained = {samples[index]["image_sha256"]: samples[index]["stem"] for index in reversed(training)}
    held_out = [(trained.get(samples[index]["image_sha256"]), samples[index]["stem"]) for index in validation]
    shared = [f"{one} and {other}" for one, other in held_out if one]
    if shared:
        log.warning(
            "%d images are both trained on and held out, as the same file under two names (training and validation): "
            "%s. Scores on them say nothing: remove one of each, or move them to one side with data.split.kind=list",
            len(shared),
            named(shared),
        )


def _fold(samples: Sequence[Sample], split: Split) -> set[int]:
    """The samples of one fold: in order of foreground area, each group of `folds` samples is dealt out at random."""
    by_area = sorted(range(len(samples)), key=lambda index: (samples[index]["area"], samples[index]["stem"]))
    chosen: set[int] = set()
    for start in range(0, len(by_area), split.folds):
        hand = by_area[start : start + split.folds]
        hand.sort(key=lambda index: _draw(split.seed, samples[index]["stem"]))
        chosen.update(hand[split.fold : split.fold + 1])
    return chosen


def _draw(seed: int, stem: str) -> bytes:
    """A pseudorandom value that depends only on the seed and the stem."""
    return hashlib.sha256(f"{seed} {stem}".encode()).digest()


def _listed(file: Path, known: set[str]) -> set[str]:
    """The stems in a list file, one per line; empty lines and lines that begin with # are ignored."""
    try:
        lines = [line.strip() for line in read_bounded(file, MAX_LIST_BYTES).decode("utf-8").splitlines()]
    except ValueError as error:
        raise UsageError(
            f"data.split.file {file}: not readable ({error}): use a UTF-8 text file, one stem per line"
        ) from error
    stems = {line for line in lines if line and not line.startswith("#")}
    unknown = sorted(stems - known)
    if unknown:
        quoted = f" ({', '.join(map(shown, unknown[:5]))}{', ...' if len(unknown) > 5 else ''})"
        if not stems & known:  # not a list of stems at all: a recipe from a stranger may name a file with passwords
            quoted = ""
        raise UsageError(
            f"data.split.file {file}: {len(unknown)} of {len(stems)} stems are not in the store{quoted}: "
            "write one stem per line, without suffix"
        )
    return stems
