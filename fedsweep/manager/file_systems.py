"""On what kind of file system the state lies. SQLite's write-ahead log is for local disks: https://sqlite.org/wal.html."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

# As the kernel names them: those that several machines can have mounted at once, or that a host lends its guests.
NETWORK = {
    *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afpfs", "afs", "coda", "davfs", "ncpfs", "webdav"),
    *("lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "glusterfs", "panfs", "pvfs2", "wekafs", "cvfs"),
    *("gfs", "gfs2", "ocfs2", "acfs"),
    *("9p", "virtiofs", "drvfs", "vboxsf", "vmhgfs", "prl_fs"),
}
# Behind FUSE may be anything; these are local. To take another for a network file system costs a little speed only.
LOCAL_FUSE = {
    *("fuseblk", "fuse.bindfs", "fuse.encfs", "fuse.fuse-overlayfs", "fuse.gocryptfs", "fuse.mergerfs"),
    *("fuse.unionfs", "fuse.unionfs-fuse", "fuse.zfs", "fusectl"),
}

Mount = tuple[str, str]  # where it is mounted, and its type


def network_file_system(folder: Path) -> str | None:
    """The type of the network file system that a folder lies on, `nfs4` say; None on a local one, or if unknown."""
    kind = kind_of(os.path.realpath(folder), mounts())
    return kind if kind is not None and is_network(kind) else None


def warning(folder: Path) -> str | None:
    """What a person should know who keeps the state on a network file system."""
    kind = network_file_system(folder)
    if kind is None:
        return None
    return (
        f"{folder} lies on a network file system ({kind}): the ledger does without SQLite's write-ahead log "
        "there, and is as safe as that file system syncs and locks files; a --state-dir on a local disk is safer and "
        "faster"
    )


def is_network(kind: str) -> bool:
    """Whether file systems of this type are those of a network."""
    return kind in NETWORK or (kind.startswith("fuse") and kind not in LOCAL_FUSE)


def kind_of(path: str, mounted: Iterable[Mount]) -> str | None:
    """The type of the file system that an absolute path without links lies on.

    It is that of the longest mount point above the path, and of the last mounted where several share it.
    """
    found: Mount | None = None
    for point, kind in mounted:
        is_above = path == point or path.startswith(point.rstrip("/") + "/")
        if is_above and (found is None or len(point) >= len(found[0])):
            found = point, kind
    return None if found is None else found[1]


def mounts() -> list[Mount]:
    """What is mounted, in the order of mounting; nothing where the system does not tell."""
    import psutil

    try:
        return [(each.mountpoint, each.fstype) for each in psutil.disk_partitions(all=True)]
    except (OSError, psutil.Error):
        return []
