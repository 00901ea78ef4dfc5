"""Which file system a path lies on: LMDB's own documentation forbids the remote ones."""

from pathlib import Path

MOUNTS = Path("/proc/self/mounts")  # one mount a line: device, mount point, type, options
# fmt: off
NETWORK_FILE_SYSTEMS = frozenset((
    "9p", "afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "fuse.beegfs", "fuse.ceph", "fuse.gcsfuse",
    "fuse.glusterfs", "fuse.juicefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre",
    "ncpfs", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs",
))
# fmt: on


def file_system_type(path: Path, mounts: Path = MOUNTS) -> str:
    """The type of the file system that holds `path`, which need not exist yet.

    Args:
        path: followed through links.
        mounts: the table of mounts.

    Returns:
        Such as ext4; 'unknown' on a system without such a table.
    """
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return "unknown"
    found, deepest = "unknown", -1
    resolved = path.resolve()
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        mount = Path(_unescaped(mount))
        # >= because of two mounts on one point the later hides the earlier.
        if len(mount.parts) >= deepest and resolved.is_relative_to(mount):
            found, deepest = kind, len(mount.parts)
    return found


def on_network(path: Path) -> bool:
    """Whether `path` lies on a file system from which LMDB must not be read in place."""
    return file_system_type(path) in NETWORK_FILE_SYSTEMS


def _unescaped(name: str) -> str:
    """A mount point as the table writes it, with octal escapes for blanks and backslashes."""
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        name = name.replace(escape, character)
    return name
