"""The type of file system a path is on: LMDB's documentation rules out remote ones."""

from pathlib import Path

MOUNTS = Path("/proc/self/mounts")  # one mount per line: device, mount point, type, options
# fmt: off
NETWORK_FILE_SYSTEMS = frozenset((
    "9p", "afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "fuse.beegfs", "fuse.ceph", "fuse.gcsfuse",
    "fuse.glusterfs", "fuse.juicefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre",
    "ncpfs", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs",
))
# fmt: on


def file_system_type(path: Path, mounts: Path = MOUNTS) -> str:
    """The type of the file system that `path` is on. The path need not exist yet.

    Args:
        path: symbolic links are followed.
        mounts: the mount table.

    Returns:
        For example 'ext4'; 'unknown' on a system without a mount table.
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
        # >= because of two mounts on the same point, the later one hides the earlier.
        if len(mount.parts) >= deepest and resolved.is_relative_to(mount):
            found, deepest = kind, len(mount.parts)
    return found


def on_network(path: Path) -> bool:
    """Whether `path` is on a network file system, where LMDB must not be read in place."""
    return file_system_type(path) in NETWORK_FILE_SYSTEMS


def _unescaped(name: str) -> str:
    """Undo the mount table's octal escapes for blanks and backslashes."""
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        name = name.replace(escape, character)
    return name
