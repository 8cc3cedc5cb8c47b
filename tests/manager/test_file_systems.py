"""Network file systems: told apart from local disks, said aloud, and without SQLite's write-ahead log."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from fedsweep.manager import doctor, file_systems
from fedsweep.manager.file_systems import is_network, kind_of, mounts, network_file_system, warning
from fedsweep.manager.invariants import check
from fedsweep.manager.ledger import Ledger

LEDGER = Path(".fedsweep/ledger.sqlite3")
WORDS = (
    ".fedsweep lies on a network file system (nfs4): the ledger does without SQLite's write-ahead log there, and is as "
    "safe as that file system syncs and locks files; a --state-dir on a local disk is safer and faster"
)

# What /proc/self/mounts says on a cluster; the last three lines are mounted over others.
CLUSTER = """\
sysfs /sys sysfs rw,nosuid 0 0
/dev/mapper/vg-root / ext4 rw,relatime,errors=remount-ro 0 0
tmpfs /run tmpfs rw,size=10% 0 0
tmpfs /tmp tmpfs rw 0 0
overlay /var/lib/docker/overlay2/a1/merged overlay rw,lowerdir=/l1:/l2 0 0
auto.home /home autofs rw,fd=5 0 0
fs1.example:/export/home/ada /home/ada nfs4 rw,vers=4.2,hard,proto=tcp 0 0
10.0.0.7@o2ib:/scratch /scratch lustre rw,flock 0 0
gpfs1 /gpfs/work gpfs rw 0 0
beegfs_nodev /mnt/beegfs beegfs rw 0 0
10.0.0.1:6789,10.0.0.2:6789:/ /mnt/ceph ceph rw,name=ada,secret=<hidden> 0 0
//server/share /mnt/my\\040share cifs rw,vers=3.1.1 0 0
//server/new /mnt/new smb3 rw 0 0
ada@node7:/data /home/ada/remote fuse.sshfs rw,user_id=1000 0 0
s3fs /mnt/bucket fuse.s3fs rw 0 0
lxcfs /var/lib/lxcfs fuse.lxcfs rw 0 0
/dev/sdb1 /mnt/usb fuseblk rw 0 0
fusectl /sys/fs/fuse/connections fusectl rw 0 0
share /mnt/guest 9p rw,trans=virtio 0 0
C:\\134 /mnt/c 9p rw,aname=drvfs 0 0
/dev/nvme0n1 /scratch/local xfs rw 0 0
/dev/nvme1n1 /home/ada/fast ext4 rw 0 0
fs1.example:/tmp /tmp nfs rw,vers=3 0 0
"""
PLACES = {
    "/": ("ext4", False),
    "/work/study/.fedsweep": ("ext4", False),
    "/run/sweep": ("tmpfs", False),
    "/tmp": ("nfs", True),  # the last mounted there counts
    "/tmpfiles": ("ext4", False),  # and a name that begins alike does not
    "/var/lib/docker/overlay2/a1/merged/work": ("overlay", False),
    "/home/eve": ("autofs", False),
    "/home/ada/study/.fedsweep": ("nfs4", True),
    "/home/ada/fast/.fedsweep": ("ext4", False),
    "/home/ada/faster": ("nfs4", True),
    "/home/ada/remote/x": ("fuse.sshfs", True),
    "/scratch/ada": ("lustre", True),
    "/scratch/local/ada": ("xfs", False),
    "/gpfs/work/x": ("gpfs", True),
    "/mnt/beegfs": ("beegfs", True),
    "/mnt/ceph/x": ("ceph", True),
    "/mnt/my share/x": ("cifs", True),
    "/mnt/new": ("smb3", True),
    "/mnt/bucket/x": ("fuse.s3fs", True),
    "/mnt/usb/x": ("fuseblk", False),
    "/mnt/guest/x": ("9p", True),
    "/mnt/c/Users": ("9p", True),
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[file_systems.Mount]:
    """What this machine would have mounted if it were of that cluster, as it is really read."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mounts").write_text(CLUSTER)
    (tmp_path / "proc/filesystems").write_text("\text4\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    return mounts()


@pytest.mark.parametrize("path", PLACES)
def test_the_file_system_of_a_path_is_that_of_the_longest_mount_point_above_it(cluster, path):
    kind = kind_of(path, cluster)
    assert (kind, is_network(str(kind))) == PLACES[path]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *((kind, True) for kind in ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "9p")),
        *((kind, True) for kind in ("fuse", "fuse.sshfs", "fuse.glusterfs", "fuse.rclone", "virtiofs", "vboxsf")),
        *((kind, False) for kind in ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "ramfs", "apfs", "hfs", "")),
        *((kind, False) for kind in ("fuseblk", "fusectl", "fuse.mergerfs", "fuse.gocryptfs", "nfsd", "ceph2")),
    ],
)
def test_types(kind, expected):
    assert is_network(kind) is expected


def test_a_link_is_followed_to_where_the_state_lies(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / ".fedsweep").symlink_to("far")
    monkeypatch.setattr(file_systems, "mounts", lambda: [("/", "ext4"), (str(tmp_path / "far"), "nfs4")])
    assert network_file_system(tmp_path / ".fedsweep") == "nfs4"
    assert network_file_system(tmp_path) is None


def test_what_cannot_be_told_is_taken_for_local(monkeypatch):
    monkeypatch.setattr(psutil, "PROCFS_PATH", "/nowhere")
    assert mounts() == []
    assert network_file_system(Path()) is None
    assert warning(Path()) is None


def test_this_machine_says_where_it_lies(tmp_path):
    assert kind_of(str(tmp_path), mounts())
    assert kind_of("/proc/self", mounts()) == "proc"


# ---- the ledger there


@pytest.fixture
def on_nfs(monkeypatch):
    """Let everything of this test lie on a network file system, or on a local disk."""

    def put(is_remote: bool = True) -> None:
        monkeypatch.setattr(file_systems, "mounts", lambda: [("/", "nfs4" if is_remote else "ext4")])

    put()
    return put


def journal_of(ledger: Ledger) -> str:
    (mode,) = ledger._db.execute("PRAGMA journal_mode").fetchone()
    return str(mode)


def companions() -> list[str]:
    return sorted(path.name for path in LEDGER.parent.glob("ledger.sqlite3?*"))


def test_there_the_ledger_has_a_rollback_journal_and_one_connection(on_nfs, managers, make_result, check_sound):
    manager = managers()
    assert journal_of(manager.sweep.ledger) == "delete"
    assert manager.sweep.ledger._db.execute("PRAGMA locking_mode").fetchone()[0] == "exclusive"
    task = manager.get_next_task("w")
    manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])
    assert companions() == ["ledger.sqlite3-journal"]
    with closing(sqlite3.connect(LEDGER, timeout=0)) as other, pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("SELECT * FROM tasks").fetchone()
    manager.close()
    assert companions() == []
    check_sound(LEDGER)


def test_it_syncs_before_it_acknowledges(on_nfs, ledgers):
    assert ledgers()._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


@pytest.mark.parametrize("dies", [False, True], ids=["closed in order", "killed"])
def test_a_ledger_that_is_moved_is_converted_there_and_back(on_nfs, managers, make_result, check_sound, dies):
    acknowledged = {}
    for is_remote, mode in ((False, "wal"), (True, "delete"), (False, "wal"), (True, "delete")):
        on_nfs(is_remote)
        manager = managers()
        assert journal_of(manager.sweep.ledger) == mode
        assert {signature for signature, _ in manager.sweep.ledger.view.results()} == set(acknowledged)
        task = manager.get_next_task("w")
        acknowledged[task["signature"]] = make_result(task)
        assert manager.save_result(task["task_id"], "w", make_result(task), task["attempt"]) == "accepted"
        if dies:  # what a killed manager leaves is what lies there now
            shutil.copytree(".fedsweep", "left")
            manager.close()
            shutil.rmtree(".fedsweep")
            Path("left").rename(".fedsweep")
    managers().close()
    check_sound(LEDGER, acknowledged)


def test_it_is_said_in_one_line_at_the_start(on_nfs, managers, make_result, caplog):
    manager = managers()
    while task := manager.get_next_task("w"):
        manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])
    assert manager.start() == 0
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [WORDS]


def test_the_doctor_says_it_too_and_examines_what_lies_there(on_nfs, managers, make_result, capsys):
    manager = managers()
    task = manager.get_next_task("w")
    manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])
    shutil.copytree(".fedsweep", "left")
    manager.close()
    shutil.rmtree(".fedsweep")
    Path("left").rename(".fedsweep")  # with its journal, as after a kill
    assert companions() == ["ledger.sqlite3-journal"]
    assert check(".fedsweep") == []
    found = doctor.examine(Path(".fedsweep"))
    doctor.show_diagnosis(found)
    assert capsys.readouterr().out.splitlines()[0] == f"note: {WORDS}"
    doctor.show_diagnosis(found, as_json=True)
    assert json.loads(capsys.readouterr().out)["notes"] == [WORDS]
    on_nfs(False)
    assert doctor.examine(Path(".fedsweep")).notes == ()


def test_a_transaction_that_broke_off_is_rolled_back_by_the_next_start(on_nfs, ledgers, make_grid, tmp_path):
    """The journal that a killed manager left in the middle of a commit."""
    ledger = ledgers()
    ledger.store_plan(make_grid("p: {combinations: [{width_factor: [1, 2]}]}").tasks)
    ledger.close()
    path = tmp_path / "ledger.sqlite3"
    code = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('PRAGMA cache_size = 1')\n"  # so that changes reach the file before the commit
        "db.execute('PRAGMA cache_spill = 1')\n"
        "db.execute('BEGIN IMMEDIATE')\n"
        "db.execute(\"UPDATE tasks SET status = 'failed', last_error = hex(zeroblob(20000))\")\n"
        "db.execute('CREATE TABLE more AS SELECT hex(zeroblob(100000)) FROM tasks')\n"
        "os._exit(0)\n"
    )
    before = path.read_bytes()
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert path.read_bytes() != before
    assert Path(f"{path}-journal").stat().st_size > 512
    ledger = ledgers()
    assert ledger.view.counts().pending == 2
    assert not ledger._db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'more'").fetchall()


def test_a_command_beside_a_running_manager_asks_it_and_the_doctor_leaves_its_ledger_alone(on_nfs, managers):
    from fedsweep.control import Sweep
    from fedsweep.errors import StateHeldError

    managers()
    with pytest.raises(StateHeldError, match="is in use by process"):
        Sweep(Path(".fedsweep")).ask({"type": "failures"})
    with pytest.raises(StateHeldError, match="is in use by process"):
        doctor.examine(Path(".fedsweep"))


@pytest.mark.parametrize("reason", ["Function not implemented", "No locks available"])
def test_a_file_system_without_locks_is_not_mistaken_for_another_manager(folder, monkeypatch, reason):
    """As Lustre mounted without `flock`, or NFS without its lock service."""
    from fedsweep.errors import StateError
    from fedsweep.manager import state_dir

    def refuse(*_: object) -> None:
        raise OSError(38, reason)

    monkeypatch.setattr(state_dir.fcntl, "flock", refuse)
    with pytest.raises(StateError) as caught:
        state_dir.StateLock(Path(".fedsweep"))
    assert str(caught.value) == (
        f".fedsweep/manager.lock cannot be locked ({reason}): its file system has no locks; name a --state-dir on a "
        "local disk"
    )
