"""The ensemble's mask: for each pixel, the majority of the members' masks or the mean of their probabilities."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stas import paths
from stas.data.images import write_mask, write_probability
from stas.ensemble import Ties
from stas.errors import InputDataError, UsageError
from stas.paths import Workspace
from stas.results.foreground import Seen, check_threshold, foreground, log_seen
from stas.results.predictions import (
    Grey,
    Member,
    Members,
    changed,
    digest,
    list_members,
    pixel_hashes,
    read_once,
    write_set_manifest,
)
from stas.results.provenance import check_present, check_unchanged
from stas.system.printing import named, say
from stas.system.publish import Output, building, check_replaceable
from stas.system.threads import in_threads
from stas.system.untrusted import resolved

log = logging.getLogger(__name__)

MAX_WEIGHT = 1000  # summed over members, times a 16-bit probability, this stays far below 64 bits


@dataclass(frozen=True)
class Read:
    """A file of a member, as it was when it was first read: its path, and the SHA-256 of its pixels and its bytes."""

    path: Path
    pixels: str
    content: str

    def again(self) -> Grey:
        """Its values, (height, width).

        Raises:
            StoppedEarly: it is not the same file any more.
        """
        values, content = read_once(self.path)
        if content != self.content:
            raise changed(self.path)
        return values

    def mask(self, threshold: float | None, size: tuple[int, int]) -> tuple[NDArray[np.bool_], Seen]:
        """Its foreground; see `foreground`. The size is that of its header when the members were listed."""
        values = self.again()
        if values.shape != size:
            raise changed(self.path)
        return foreground(values, threshold, self.path)


def vote(
    members: Sequence[Path],
    out: Path,
    ties: Ties | None = None,
    weights: Sequence[int] | None = None,
    soft: bool = False,
    threshold: float | None = None,
    workers: int | None = None,
    workspace: Workspace | None = None,
    runs: Sequence[str] | None = None,
) -> Path:
    """Write the members' vote on every image as a prediction set.

    Args:
        members: directories of mask PNGs with the same stems and sizes; at least two.
        out: the new set, `<stem>.png` (8-bit L, 0/255) and a manifest; an identical earlier vote is kept.
        ties: what a pixel with exactly half of the votes becomes; required if that can happen.
        weights: votes of each member, whole numbers from 1; one each by default.
        soft: foreground is where the (weighted) mean of the members' 16-bit probabilities is above 0.5; also
            writes the mean into `probabilities/`.
        threshold: a member's mask is foreground above this value; above 0 by default (see `foreground`).
        workers: threads; by default one per processor.
        workspace: if given, masks with a manifest must be those of their run's present checkpoint there.
        runs: the run that each member must be the masks of; by default any, or none.

    Returns:
        `out`.

    Raises:
        UsageError: options that contradict each other, or a possible tie without `ties`.
        InputDataError: members whose cases, sizes or images differ, without probabilities, of another checkpoint than
            the run's present one, or with masks that were changed since they were predicted; names them.
        StoppedEarly: a mask changed while it was read.
    """
    votes = _votes(weights, len(members))
    _check_options(members, out, votes, ties, soft, threshold)
    listed = list_members(members)
    if workspace:
        check_present(listed.members, workspace, runs)
    read = {member.name: _read(member, soft, workers) for member in listed.members}
    key = {
        "members": [_recorded(member, read[member.name]) for member in listed.members],
        "options": {"votes": votes, "ties": ties, "soft": soft, "threshold": threshold},
        "images": _common_images(listed),
    }
    output = Output(out, "vote", key)
    with building(output) as partial:
        if partial is None:
            log.info("%s: already the vote of these members, nothing to do", out)
            return out

        def one_image(stem: str) -> list[Seen]:
            sources = [read[name][stem] for name in listed.names]
            if soft:
                _soft_vote(sources, votes, listed.sizes[stem], partial, stem)
                return [Seen()] * len(sources)
            masks, seen = zip(*(source.mask(threshold, listed.sizes[stem]) for source in sources), strict=True)
            write_mask(paths.mask_file(partial, stem), majority(masks, votes, ties), synced=False)
            return list(seen)

        log_seen(listed.names, in_threads(one_image, listed.stems, "vote", workers))
        write_set_manifest(partial, output, listed.label, listed.sizes, soft)
    say(f"vote of {', '.join(listed.names)}: {len(listed.sizes)} masks in {out}")
    return out


def majority(
    masks: Sequence[NDArray[np.bool_]], votes: Sequence[int] | None = None, ties: Ties | None = None
) -> NDArray[np.bool_]:
    """The pixels that have more than half of the votes.

    Args:
        masks: one per member, all (height, width), bool.
        votes: of each member, whole numbers above 0; one each by default.
        ties: a pixel with exactly half of the votes is background unless this is "foreground".

    Returns:
        (height, width), bool.
    """
    votes = votes or [1] * len(masks)
    total = sum(votes)
    counted = np.zeros(masks[0].shape, np.min_scalar_type(total))
    for mask, count in zip(masks, votes, strict=True):
        counted += mask.view(np.uint8) if count == 1 else mask * counted.dtype.type(count)
    return counted >= total - total // 2 if ties == "foreground" else counted > total // 2


def tie_possible(votes: Sequence[int]) -> bool:
    """Whether some subset of the members has exactly half of all votes."""
    half, odd = divmod(sum(votes), 2)
    if odd:
        return False
    sums = {0}
    for count in votes:
        sums |= {value + count for value in sums if value + count <= half}
    return half in sums


def _check_options(
    members: Sequence[Path],
    out: Path,
    votes: Sequence[int],
    ties: Ties | None,
    soft: bool,
    threshold: float | None,
) -> None:
    if resolved(out) in [resolved(member) for member in members]:
        raise UsageError(f"{out} is a member and cannot also be the vote's directory: give another")
    check_threshold(threshold)
    check_replaceable(out, "vote")
    if soft and (ties or threshold is not None):
        raise UsageError(
            "a soft vote marks the pixels whose mean probability is above 0.5: leave out --ties and --threshold"
        )
    if not soft and ties is None and tie_possible(votes):
        raise UsageError(
            f"{len(votes)} members with votes {', '.join(map(str, votes))} can tie: choose what a tie becomes with "
            "--ties foreground or --ties background, or give an odd number of members"
        )


def _votes(weights: Sequence[int] | None, members: int) -> list[int]:
    """The votes of each member; one each by default."""
    if members < 2:
        raise UsageError(
            f"{members} member given: a vote needs at least two, and an odd number if there is no rule for ties"
        )
    if weights is None:
        return [1] * members
    if len(weights) != members:
        raise UsageError(f"{len(weights)} weights for {members} members: give one weight per member")
    for weight in weights:
        if not 1 <= weight <= MAX_WEIGHT:
            raise UsageError(
                f"weight {weight}: give whole numbers from 1 to {MAX_WEIGHT}; leave out a member that should not count"
            )
    return list(weights)


def _read(member: Member, soft: bool, workers: int | None) -> dict[str, Read]:
    """Read and hash the files that a vote needs of a member, by stem; refuse any that are not its own."""
    files = _files(member, soft)
    hashes = pixel_hashes(list(files.values()), workers)
    read = {stem: Read(path, *both) for (stem, path), both in zip(files.items(), hashes, strict=True)}
    check_unchanged(member, {str(one.path.relative_to(member.directory)): one.content for one in read.values()})
    return read


def _recorded(member: Member, read: dict[str, Read]) -> dict[str, Any]:
    """A member as the vote's manifest records it."""
    pixels = digest([one.path for one in read.values()], [one.pixels for one in read.values()])
    made = member.made
    origin = {"set": made.set, "run": made.run, "checksum": made.checksum} if made else {}
    return {"name": member.name, "sha256": pixels, **origin}


def _common_images(listed: Members) -> dict[str, str] | None:
    """The SHA-256 of the image of every mask, by stem; None unless every member's manifest has it."""
    known = [member.made.images if member.made else {} for member in listed.members]
    if not all(images.keys() >= listed.sizes.keys() for images in known):
        return None
    return {stem: known[0][stem] for stem in listed.stems}


def _files(member: Member, soft: bool) -> dict[str, Path]:
    """The files a vote reads of a member, by stem."""
    if not soft:
        return member.images
    files = {stem: paths.probability_file(member.directory, stem) for stem in member.images}
    missing = [stem for stem, path in files.items() if not path.is_file()]
    if missing:
        raise InputDataError(
            f"{member.directory}: no probabilities for {len(missing)} of {len(files)} images ({named(missing)}): a "
            "soft vote needs them: run `stas infer --probabilities`"
        )
    return files


def _soft_vote(sources: Sequence[Read], votes: Sequence[int], size: tuple[int, int], out: Path, stem: str) -> None:
    """Write the mask and the mean probability of one image, in exact integer arithmetic."""
    summed = np.zeros(size, np.int64)
    for source, count in zip(sources, votes, strict=True):
        values = source.again()
        if values.dtype != np.uint16 or values.shape != size:
            raise InputDataError(
                f"{source.path}: {values.dtype}, {values.shape[1]} x {values.shape[0]} pixels (width x height), but "
                f"16-bit probabilities of {size[1]} x {size[0]} are needed: run `stas infer --probabilities`"
            )
        summed += values.astype(np.int64) * count
    total = sum(votes)
    write_mask(paths.mask_file(out, stem), 2 * summed > 65535 * total, synced=False)
    mean = (2 * summed + total - 1) // (2 * total)  # to nearest, halves down, like `write_probability`
    write_probability(paths.probability_file(out, stem), (mean / 65535).astype(np.float32), synced=False)
