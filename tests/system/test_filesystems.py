"""Types of file systems, read from a table of mounts."""

from pathlib import Path

import pytest

from stas.system.filesystems import NETWORK_FILE_SYSTEMS, file_system_type

MOUNTS = """\
overlay / overlay rw 0 0
proc /proc proc rw 0 0
/dev/sda1 /scratch ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
tmpfs /home/local tmpfs rw 0 0
10.0.0.1@o2ib:/lus /lus lustre rw 0 0
/dev/sdb1 /home xfs ro 0 0
server:/b /with\\040space cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "overlay"),
        ("/scratch/stas/not/yet/made", "ext4"),
        ("/scratchy", "overlay"),  # the name only begins alike
        ("/home/me", "xfs"),  # mounted later on the same place
        ("/home/local/me", "tmpfs"),  # the deeper mount, though it comes first
        ("/lus", "lustre"),
        ("/with space/x", "cifs"),
    ],
)
def test_the_deepest_and_latest_mount_counts(tmp_path: Path, path: str, kind: str):
    (tmp_path / "mounts").write_text(MOUNTS)
    assert file_system_type(Path(path), tmp_path / "mounts") == kind


def test_no_table_of_mounts(tmp_path: Path):
    assert file_system_type(tmp_path, tmp_path / "none") == "unknown"


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="needs Linux")
def test_this_machine():
    assert file_system_type(Path("/proc/self")) == "proc"


def test_network_file_systems():
    assert {"nfs", "nfs4", "lustre", "beegfs", "cifs", "ceph", "fuse.sshfs"} <= NETWORK_FILE_SYSTEMS
    assert not {"ext4", "xfs", "overlay", "tmpfs", "btrfs", "zfs"} & NETWORK_FILE_SYSTEMS
