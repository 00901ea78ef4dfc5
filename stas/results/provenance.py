"""What a prediction set's manifest says of its masks, and whether that is still so.

A set with a manifest speaks for a run: its masks are those of one checkpoint on these images, and nothing else may be
passed off as them. Masks without a manifest are the user's own, and nothing is claimed about them.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stas.errors import InputDataError, StoppedEarly
from stas.models.checksum import written_checksum
from stas.paths import PLAIN_NAME, Workspace, manifest_file
from stas.system.printing import itemised, named
from stas.system.publish import Kind, read_manifest

if TYPE_CHECKING:  # the listing imports this file
    from stas.results.predictions import Member

log = logging.getLogger(__name__)

KINDS: tuple[Kind, ...] = ("prediction set", "vote")
CHECKPOINTS = ("best", "last")
OWN_MASKS = (
    "To keep a correction, copy the PNG files without manifest.json into a directory of your own and name that with "
    "--members (vote) or --predictions (evaluate)"
)


@dataclass(frozen=True)
class Made:
    """What a set was made from.

    Attributes:
        label: what its masks outline; None if its members' manifests named nothing.
        set: the SHA-256 of everything it was made from.
        run: the training run; None for a vote.
        which: the run's checkpoint, best or last; None for a vote.
        checksum: the one at that checkpoint's end.
        images: the SHA-256 of each mask's image, by stem; empty if not known.
        files: the SHA-256 of each file of the set, by its name in the set.
        members: of a vote, the `set` of each member that had a manifest, by name.
    """

    label: str | None
    set: str
    run: str | None
    which: str | None
    checksum: str | None
    images: dict[str, str]
    files: dict[str, str]
    members: dict[str, str]


def read_made(directory: Path) -> Made | None:
    """What the manifest of a set says; None if there is no manifest.

    Raises:
        InputDataError: there is a manifest, but not one of a prediction set or a vote.
    """
    if not manifest_file(directory).is_file():
        return None
    content = read_manifest(directory, *KINDS)
    try:
        return _made(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputDataError(
            f"{manifest_file(directory)}: not the manifest of a {content['kind']} ({error!r}): move the directory away "
            "and make it again"
        ) from error


def _made(content: Mapping[str, Any]) -> Made:
    key, label = content["key"], content.get("label")
    run, which, checksum = key.get("run"), key.get("which"), key.get("checksum")
    members = {entry["name"]: entry["set"] for entry in key.get("members", []) if entry.get("set")}
    if run is not None and not re.fullmatch(PLAIN_NAME, run):
        raise ValueError("run")
    if which is not None and which not in CHECKPOINTS:
        raise ValueError("which")
    texts = _texts(members), _texts(key.get("images") or {}), _texts(content["sha256"])
    whole = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Made(label if isinstance(label, str) else None, whole, run, which, checksum, texts[1], texts[2], texts[0])


def _texts(values: dict[str, Any]) -> dict[str, str]:
    if not all(isinstance(text, str) for pair in values.items() for text in pair):
        raise TypeError("hashes")
    return dict(values)


def check_unchanged(member: "Member", found: Mapping[str, str]) -> None:
    """Refuse masks that are not the ones that their set's manifest records.

    Args:
        member: the set.
        found: the SHA-256 of each file that was read, by its name in the set.

    Raises:
        InputDataError: a mask was changed, damaged or added; names the first.
        StoppedEarly: the set was replaced while it was read.
    """
    if member.made is None:
        return
    changed = [name for name, value in found.items() if member.made.files.get(name) != value]
    if not changed:
        return
    if read_made(member.directory) != member.made:
        raise StoppedEarly(f"{member.directory} was replaced while it was read: run the same command again")
    raise InputDataError(
        f"{member.directory}: {len(changed)} of {len(found)} files are not as stas wrote them, but were changed by "
        f"hand, added or damaged ({named(changed)}). {OWN_MASKS}; otherwise move the directory away and make it again"
    )


def check_same_images(members: Sequence["Member"]) -> None:
    """Refuse sets of different images that have the same names.

    Raises:
        InputDataError: names the sets and the first images.
    """
    first = next((member for member in members if member.made and member.made.images), None)
    if first is None or first.made is None:
        return
    problems = []
    for other in members:
        images = other.made.images if other.made else {}
        stems = [stem for stem, value in images.items() if first.made.images.get(stem, value) != value]
        if stems:
            problems.append(f"{other.name}, compared with {first.name}: {len(stems)} of {len(images)} ({named(stems)})")
    if problems:
        raise InputDataError(
            f"the members were predicted from different images of the same names:{itemised(problems)}\n"
            "Run `stas infer` for all of them with the same --images"
        )


def check_present(members: Sequence["Member"], workspace: Workspace, runs: Sequence[str | None] | None) -> None:
    """Refuse masks that were not predicted with their run's present checkpoint.

    Args:
        members: the sets. One without a manifest is accepted, unless `runs` are given.
        workspace: where their runs are.
        runs: the run of each member, None for a vote; None: any.

    Raises:
        InputDataError: names each such member and why.
    """
    expected = runs or [None] * len(members)
    reasons = [_stale(member, workspace, run) for member, run in zip(members, expected, strict=True)]
    problems = [f"{member.name}: {reason}" for member, reason in zip(members, reasons, strict=True) if reason]
    if problems:
        raise InputDataError(
            f"{len(problems)} of {len(members)} members' masks are not known to be those of their runs' present "
            f"checkpoints:{itemised(problems)}\n"
            "Run `stas infer` again for these members. To use these very masks, name their directories with --members "
            "(vote) or --predictions (evaluate)"
        )


def _stale(member: "Member", workspace: Workspace, run: str | None) -> str | None:
    """Why a member's masks are not known to be those of a run's present checkpoint; None if they are."""
    made = member.made
    if made is None:
        return run and f"no manifest in {member.directory}, so nothing tells which run made its masks"
    if made.run is None or made.which is None:
        return run and f"{member.directory} is not a set of masks of run {run}"
    if run is not None and made.run != run:
        return f"{member.directory} holds masks of run {made.run}, not of {run}"
    path = workspace.run(made.run).checkpoint(made.which)
    if not path.exists():
        return f"{path} is not there to compare them with"
    if written_checksum(path) != made.checksum:
        return f"predicted with another checkpoint than the present {path}"
    return None


def check_vote_of(members: Sequence["Member"]) -> None:
    """Refuse a vote beside members that were predicted anew since that vote.

    Raises:
        InputDataError: names the vote and those members.
    """
    present = {member.directory.name: member.made.set for member in members if member.made}
    for member in members:
        voted = member.made.members if member.made else {}
        others = {name.rpartition("/")[2]: value for name, value in voted.items()}
        newer = [name for name, value in others.items() if present.get(name, value) != value]
        if newer:
            raise InputDataError(
                f"{member.directory} is a vote on other masks than the present ones of {named(newer)}: "
                "run `stas vote` again"
            )
