"""Whatever becomes of a results file, its rows are those of the ledger again, and what was cut out is kept."""

from __future__ import annotations

import gzip
import json
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from permissions import bound_by_permissions

from fedsweep.errors import DataError, StateError
from fedsweep.manager.invariants import check
from fedsweep.manager.results import finished_signatures, read_results
from fedsweep.report import has_results

FIRST = Path("out/first/final_results.csv")
TORN = Path("out/first/final_results.csv.torn-1")
LEDGER = ".fedsweep/ledger.sqlite3"


@pytest.fixture
def manager(managers, make_result):
    """The manager of a finished sweep; `out/first` has eight rows."""
    manager = managers()
    while task := manager.get_next_task("w"):
        result = make_result(task, device="cpu", worker="=w", wall_time_s=1.5)
        manager.save_result(task["task_id"], "w", result, task["attempt"])
    return manager


# ---- contents


@dataclass(frozen=True)
class Bad:
    """What a file may hold instead; what of it is kept beside; how many rows of others stay in it."""

    change: Callable[[bytes], bytes]
    kept: bytes | None = None  # stands in what was cut out; None: nothing was cut out
    others: int = 0


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda content: b"".join(line + b"\n" for line in change(content.splitlines()))


def fields(row: int, change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    """Change the fields of one line, of the header if that is 0."""

    def changed(rows: list[bytes]) -> list[bytes]:
        return [*rows[:row], b",".join(change(rows[row].split(b","))), *rows[row + 1 :]]

    return lines(changed)


def field(row: int, column: int, value: bytes) -> Callable[[bytes], bytes]:
    return fields(row, lambda found: [*found[:column], value, *found[column + 1 :]])


def every_field(change: Callable[[bytes], bytes], delimiter: bytes = b",") -> Callable[[bytes], bytes]:
    return lines(lambda rows: [delimiter.join(map(change, row.split(b","))) for row in rows])


def text(change: Callable[[str], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: change(content.decode())


def whole(content: bytes) -> Callable[[bytes], bytes]:
    return lambda _: content


def append(*added: bytes) -> Callable[[bytes], bytes]:
    return lines(lambda rows: [*rows, *added])


def with_others(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Append a row of somebody else, made from the last."""
    return lambda content: content + change(content.splitlines()[-1]) + b"\n"


def rounded(value: bytes) -> bytes:
    """As a spreadsheet writes a number: fifteen digits."""
    try:
        return b"%.15g" % float(value)
    except ValueError:
        return value


def in_german(value: bytes) -> bytes:
    return value.replace(b".", b",") if value[:1].isdigit() else value


def poisoned(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    """Change the fields of the first row that says 0.5: no other experiment has its values."""

    def changed(content: bytes) -> bytes:
        at = next(number for number, row in enumerate(content.splitlines()) if b",0.5,label_flip," in row)
        return fields(at, change)(content)

    return changed


ACCURACY, SEED, SIGNATURE = 11, 21, 22
CONTENTS = {
    # another encoding
    "UTF-16, as Excel's Unicode text": Bad(text(lambda words: words.encode("utf-16")), kept=b"\xff\xfe"),
    "UTF-16, the other way round": Bad(text(lambda words: b"\xfe\xff" + words.encode("utf-16-be")), kept=b"\xfe\xff"),
    "UTF-16 without a mark": Bad(text(lambda words: words.encode("utf-16-le")), kept=b"p\0h\0a\0s\0e\0"),
    "UTF-32": Bad(text(lambda words: words.encode("utf-32")), kept=b"p\0\0\0h\0\0\0"),
    "a byte-order mark": Bad(lambda content: b"\xef\xbb\xbf" + content),
    "two byte-order marks": Bad(lambda content: b"\xef\xbb\xbf" * 2 + content),
    "a row of others in Latin-1": Bad(
        with_others(lambda row: row.replace(b"digits", b"\xe9t\xe9")), kept=b",\xe9t\xe9,"
    ),
    # other line ends
    "CRLF": Bad(lambda content: content.replace(b"\n", b"\r\n")),
    "CRLF here and there": Bad(lines(lambda rows: [row + b"\r" * (at % 2) for at, row in enumerate(rows)])),
    "CR alone": Bad(lambda content: content.replace(b"\n", b"\r"), kept=b"phase,dataset"),
    "no end of the last line": Bad(lambda content: content[:-1]),
    "blank lines": Bad(lines(lambda rows: [line for row in rows for line in (row, b"", b"  ", b"\t")])),
    "ten thousand blank lines": Bad(lambda content: content + b"\n" * 10_000),
    # other delimiters and quotes
    "semicolons": Bad(lambda content: content.replace(b",", b";")),
    "semicolons and decimal commas": Bad(every_field(in_german, b";")),
    "the same, rounded to fifteen digits": Bad(
        every_field(lambda value: in_german(rounded(value)), b";"), kept=b";0,333333333333333;"
    ),
    "tabs": Bad(lambda content: content.replace(b",", b"\t"), kept=b"phase\tdataset"),
    "Excel's line that names the delimiter": Bad(lambda content: b"sep=,\n" + content, kept=b"sep=,"),
    "quotes around everything": Bad(every_field(lambda value: b'"' + value + b'"')),
    "a quote that does not close": Bad(fields(2, lambda row: [b'"first', *row[1:]]), kept=b'"first,digits'),
    "a line break in a row of others": Bad(
        with_others(lambda row: row.replace(b"digits", b'"mn\nist"')), kept=b'first,"mn\nist"'
    ),
    "a carriage return in a row of others": Bad(
        with_others(lambda row: row.replace(b"digits", b"mnist").replace(b",mnist,", b',"mn\rist",')), others=1
    ),
    "the same, below a header that is made again": Bad(
        lambda content: with_others(lambda row: row.replace(b"digits", b"mnist").replace(b",mnist,", b',"mn\rist",'))(
            content
        ).replace(b"phase", b'"phase"'),
        others=1,
    ),
    # not a results file at all
    "nothing": Bad(whole(b"")),
    "one byte": Bad(whole(b"p"), kept=b"p"),
    "NULs alone": Bad(lambda content: bytes(len(content)), kept=b"\0\0\0"),
    "NULs from the middle on": Bad(lambda content: content[:900] + bytes(len(content) - 900), kept=b"\0\0\0"),
    "NULs in the middle": Bad(lambda content: content[:900] + bytes(100) + content[1000:], kept=b"\0\0\0"),
    "every byte there is": Bad(whole(bytes(range(256)) * 8), kept=bytes(range(11, 256))),
    "compressed": Bad(lambda content: gzip.compress(content, mtime=0), kept=b"\x1f\x8b"),
    "a workbook": Bad(whole(b"PK\x03\x04" + b"[Content_Types].xml\n" * 9), kept=b"PK\x03\x04[Content"),
    "a web page": Bad(whole(b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"), kept=b"Sign in"),
    "JSON": Bad(whole(json.dumps([{"phase": "first"}]).encode()), kept=b'[{"phase": "first"}]'),
    "the mark of a large file": Bad(
        whole(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"), kept=b"git-lfs"
    ),
    "both sides of a merge": Bad(
        lines(lambda rows: [rows[0], b"<<<<<<< HEAD", *rows[1:4], b"=======", *rows[2:], b">>>>>>> theirs"]),
        kept=b"<<<<<<< HEAD\n=======\n>>>>>>> theirs\n",
    ),
    "a table of something else": Bad(whole(b"name,price\napple,1\npear,2\n"), kept=b"name,price\napple,1\npear,2\n"),
    # another header
    "no header": Bad(lines(lambda rows: rows[1:]), kept=None),
    "the header alone": Bad(lines(lambda rows: rows[:1])),
    "the header twice": Bad(lines(lambda rows: [rows[0], *rows])),
    "the header at the end": Bad(lines(lambda rows: [*rows[1:], rows[0]])),
    "the header cut": Bad(fields(0, lambda names: names[:20]), kept=b"phase,dataset"),
    "a column of an older version missing": Bad(
        lines(lambda rows: [b",".join([*row.split(b",")[:30], *row.split(b",")[31:]]) for row in rows])
    ),
    "a column of a newer version": Bad(
        lines(lambda rows: [row + b"," + b"energy" * (not at) for at, row in enumerate(rows)])
    ),
    "a column renamed": Bad(field(0, ACCURACY, b"accuracy"), kept=b"accuracy"),
    "a column named twice": Bad(field(0, ACCURACY, b"seed"), kept=b"phase,dataset"),
    "a column without a name": Bad(lines(lambda rows: [b"" * (not at) + b"," + row for at, row in enumerate(rows)])),
    "columns in another order": Bad(lines(lambda rows: [b",".join(reversed(row.split(b","))) for row in rows])),
    "names in capitals": Bad(lines(lambda rows: [rows[0].upper(), *rows[1:]]), kept=b"PHASE,DATASET"),
    # other rows
    "in another order": Bad(lines(lambda rows: [rows[0], *sorted(rows[1:])])),
    "each row twice": Bad(lines(lambda rows: [rows[0], *rows[1:], *rows[1:]])),
    "a row missing": Bad(lines(lambda rows: [*rows[:3], *rows[4:]])),
    "two rows glued together": Bad(lines(lambda rows: [*rows[:2], rows[2] + rows[3], *rows[4:]]), kept=b"first,digits"),
    "half of a row before the others": Bad(
        lines(lambda rows: [rows[0], rows[1][:77], *rows[1:]]), kept=b"first,digits"
    ),
    "a field too many": Bad(fields(2, lambda row: [*row, b"5"]), kept=b",5\n"),
    "a field too few": Bad(fields(2, lambda row: row[:-1]), kept=b"first,digits"),
    "as many fields as the oldest files have": Bad(poisoned(lambda row: row[:22])),
    "so many, and more than one experiment has these values": Bad(fields(2, lambda row: row[:22]), others=1),
    "a field alone": Bad(append(b"oops"), kept=b"oops\n"),
    "a comment": Bad(append(b"# checked by Ada, 3 May"), kept=b"# checked by Ada, 3 May\n"),
    "a row of another sweep": Bad(with_others(lambda row: row.replace(b"digits", b"mnist")), others=1),
    "a row of a seed that nobody asks for": Bad(
        lambda content: content + field(0, SEED, b"99")(content.splitlines()[-1].replace(b"|2|", b"|99|") + b"\n"),
        others=1,
    ),
    "a row of a megabyte": Bad(
        with_others(lambda row: row.replace(b"digits", b"d" * 1_000_000)), kept=b"d" * 1_000_000
    ),
    # edited fields
    "another accuracy": Bad(field(2, ACCURACY, b"0.999"), kept=b",0.999,"),
    "an accuracy in percent": Bad(field(2, ACCURACY, b"87.5%"), kept=b",87.5%,"),
    "no accuracy": Bad(field(2, ACCURACY, b""), kept=b",32,,0.0,"),
    "a number in other words": Bad(field(1, 6 - 1, b"0.00")),
    "a date for a number": Bad(field(2, ACCURACY, b"2026-05-01"), kept=b",2026-05-01,"),
    "NaN": Bad(field(2, ACCURACY, b"nan"), kept=b",nan,"),
    "a number beyond all bounds": Bad(field(2, ACCURACY, b"1e999"), kept=b",1e999,"),
    "fifteen digits": Bad(every_field(rounded), kept=b"digits"),
    "another signature": Bad(field(2, SIGNATURE, b"digits|lr|2|1|none"), others=1),
    "no signature": Bad(poisoned(lambda row: [*row[:SIGNATURE], b"", *row[SIGNATURE + 1 :]])),
    "no signature, and more than one experiment has these values": Bad(field(2, SIGNATURE, b""), others=1),
    "a formula in a row of others": Bad(
        with_others(lambda row: row.replace(b"digits", b"mnist").replace(b"'=w", b"=cmd|' /C calc'!A0")), others=1
    ),
    "a guard that a spreadsheet took away": Bad(lambda content: content.replace(b"'=w", b"=w")),
}


@pytest.mark.parametrize("bad", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_file_with_other_contents_is_put_right(manager, check_sound, read_rows, bad):
    before = FIRST.read_bytes()
    content = bad.change(before)
    assert content != before
    FIRST.write_bytes(content)
    manager.load_completed_tasks()
    assert manager.get_status()["complete"] == 8
    assert manager.get_status()["lagging"] == []
    after = FIRST.read_bytes()
    rows = read_rows(FIRST)
    ours = [row for row in rows if row["device"] == "cpu" and row["worker"] == "'=w" and row["dataset"] == "digits"]
    assert len(rows) - 8 == bad.others, rows
    assert len(ours) >= 8
    if bad.kept is None:
        assert not TORN.exists(), TORN.read_bytes()[:2000]
    else:
        assert bad.kept in TORN.read_bytes()
    # It is as it shall be: the next look, and the next start, change nothing.
    manager.load_completed_tasks()
    assert FIRST.read_bytes() == after
    assert [path.name for path in FIRST.parent.glob("*.torn-*")] == ([] if bad.kept is None else [TORN.name])
    manager.save_state()
    manager.close()
    check_sound(LEDGER)
    assert check(".fedsweep") == []


def test_a_row_under_another_phase_is_one_of_others(manager, read_rows):
    """Two sweeps may share a folder and an experiment."""
    FIRST.write_bytes(field(2, 0, b"mine")(FIRST.read_bytes()))
    manager.load_completed_tasks()
    assert [row["phase"] for row in read_rows(FIRST)].count("mine") == 1
    assert check_closed(manager) == []


def check_closed(manager):
    manager.save_state()
    manager.close()
    return check(".fedsweep")


def test_a_file_torn_at_every_byte_is_repaired(managers, make_result, check_sound):
    """A small one, at each of its bytes, header and rows."""
    manager = managers("defaults: {output_dir: out/first}\na: {combinations: [{width_factor: [1, 2]}]}\nseeds: [1]\n")
    for _ in range(2):
        task = manager.get_next_task("w")
        manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])
    whole_file = FIRST.read_bytes()
    assert whole_file.count(b"\n") == 3
    for size in range(len(whole_file)):
        FIRST.write_bytes(whole_file[:size])
        manager.load_completed_tasks()
        assert FIRST.read_bytes() == whole_file, size
        lost = whole_file[:size].rpartition(b"\n")[2]
        is_kept = lost and lost not in whole_file.splitlines()
        assert [path.read_bytes() for path in FIRST.parent.glob("*.torn-*")] == [lost + b"\n"] * bool(is_kept), size
        TORN.unlink(missing_ok=True)
    manager.save_state()
    manager.close()
    check_sound(LEDGER)


# ---- kinds of files


def instead(make: Callable[[Path], object]) -> Callable[[], None]:
    def put() -> None:
        FIRST.unlink()
        make(FIRST)

    return put


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


LAGGING = {
    "a folder": ("it is not a plain file", instead(Path.mkdir)),
    "a folder with things in it": ("it is not a plain file", instead(lambda path: (path / "a").mkdir(parents=True))),
    "a FIFO": ("it is not a plain file", instead(os.mkfifo)),
    "a socket": ("it is not a plain file", instead(bind_socket)),
    "a device that never ends": ("it is not a plain file", instead(lambda path: path.symlink_to("/dev/zero"))),
    "a device that is always full": ("it is not a plain file", instead(lambda path: path.symlink_to("/dev/full"))),
    "a link to itself": ("Too many levels of symbolic links", instead(lambda path: path.symlink_to(path.name))),
    "a link to a link to itself": (
        "Too many levels of symbolic links",
        instead(lambda path: (path.symlink_to("other"), path.with_name("other").symlink_to(path.name))),
    ),
    "a link to a FIFO": (
        "it is not a plain file",
        instead(lambda path: (os.mkfifo("fifo"), path.symlink_to(Path("fifo").resolve()))),
    ),
    "a link to a folder": ("it is not a plain file", instead(lambda path: path.symlink_to(Path.cwd()))),
    "a link into a file": (
        "Not a directory",
        instead(lambda path: path.symlink_to(Path("sweep.yaml").resolve() / "x")),
    ),
    "a file for its folder": (
        "Not a directory",
        lambda: (FIRST.unlink(), FIRST.parent.rmdir(), FIRST.parent.write_text("")),
    ),
    "not readable": ("Permission denied", lambda: (FIRST.write_bytes(b"x"), FIRST.chmod(0))),
    "a torn file in a folder that is not writable": (
        "Permission denied",
        lambda: (FIRST.write_bytes(b"x"), FIRST.parent.chmod(0o555)),
    ),
    "a torn file, a folder where the new one is made": (
        "Is a directory",
        lambda: (FIRST.write_bytes(b"x"), unfinished().mkdir()),
    ),
}


def unfinished() -> Path:
    """Where a file is written anew before it takes the place of the old."""
    import sqlite3

    with sqlite3.connect(f"file:{LEDGER}?mode=ro&immutable=1", uri=True) as db:
        (ledger_id,) = db.execute("SELECT value FROM meta WHERE key = 'ledger_id'").fetchone()
    return FIRST.with_name(f".{FIRST.name}.{ledger_id}.tmp")


@pytest.mark.timeout(20)  # opening a FIFO the usual way waits for ever
@pytest.mark.parametrize(("reason", "make"), LAGGING.values(), ids=LAGGING.keys())
def test_what_cannot_be_written_lags_with_its_reason_and_the_others_go_on(
    manager, make_grid, two_phases, reason, make, caplog
):
    make()
    with bound_by_permissions():
        manager.load_completed_tasks()
    assert manager.sweep.projection.lagging == {"out/first": reason}
    assert manager.get_status()["lagging"] == ["out/first"]
    assert f"out/first: final_results.csv cannot be written ({reason}); results are safe in the ledger" in caplog.text
    found = FIRST.lstat() if FIRST.parent.is_dir() else None
    manager.sweep.write_outputs()  # nobody waits here either
    assert len(finished_signatures(make_grid(two_phases))) >= 2  # those that have rows in the other folder
    assert has_results(FIRST.parent) is False
    with (
        pytest.raises(DataError, match=r"final_results\.csv (cannot be read|is no results file)"),
        bound_by_permissions(),
    ):
        read_results(FIRST.parent)
    assert (FIRST.lstat() if FIRST.parent.is_dir() else None) == found
    FIRST.parent.chmod(0o755)


@pytest.mark.timeout(20)
def test_a_file_that_becomes_a_fifo_while_results_come_in_stops_nobody(managers, make_result, check_sound):
    manager = managers()
    os_results = 0
    while task := manager.get_next_task("w"):
        if os_results == 3:
            FIRST.unlink()
            os.mkfifo(FIRST)
        manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])
        os_results += 1
    assert manager.get_status()["lagging"] == ["out/first"]
    FIRST.unlink()
    manager.refresh_completed()
    assert manager.get_status()["lagging"] == []
    manager.save_state()
    manager.close()
    check_sound(LEDGER)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_made_read_only_catches_up_when_it_may(managers, make_result, check_sound, kind):
    manager = managers()

    def finish(count: int) -> None:
        for _ in range(count):
            task = manager.get_next_task("w")
            manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])

    finish(2)
    place = FIRST if kind == "file" else FIRST.parent
    mode = stat.S_IMODE(place.stat().st_mode)
    before = FIRST.read_bytes()
    place.chmod(0o444 if kind == "file" else 0o555)
    if kind == "folder":
        FIRST.write_bytes(before + b"torn")
    with bound_by_permissions():
        finish(6)
        manager.load_completed_tasks()
    assert manager.sweep.projection.lagging == {"out/first": "Permission denied"}
    assert FIRST.read_bytes().startswith(before)
    place.chmod(mode)
    manager.load_completed_tasks()
    assert manager.get_status()["lagging"] == []
    manager.save_state()
    manager.close()
    check_sound(LEDGER)


def test_a_file_that_is_written_anew_keeps_its_permissions(manager):
    FIRST.chmod(0o664)
    FIRST.write_bytes(b"torn")
    manager.load_completed_tasks()
    assert stat.S_IMODE(FIRST.stat().st_mode) == 0o664


@pytest.mark.parametrize("torn", [b"", b"torn"])
def test_a_link_to_another_place_in_the_project_is_followed(manager, check_sound, torn):
    FIRST.rename("rows.csv")
    FIRST.symlink_to(Path("rows.csv").resolve())
    Path("rows.csv").write_bytes(torn)
    manager.load_completed_tasks()
    manager.save_state()
    manager.close()
    assert FIRST.is_symlink()
    assert Path("rows.csv").read_bytes().count(b"\n") == 9
    check_sound(LEDGER)


def test_a_link_to_a_file_that_is_not_there_yet_is_followed(manager, check_sound):
    FIRST.unlink()
    FIRST.symlink_to(Path("more/rows.csv").resolve())
    manager.load_completed_tasks()
    manager.save_state()
    manager.close()
    assert Path("more/rows.csv").read_bytes().count(b"\n") == 9
    check_sound(LEDGER)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_link_out_of_the_project_is_refused_before_anything_is_written(manager, managers, tmp_path_factory, is_there):
    outside = tmp_path_factory.mktemp("outside") / "notes.csv"
    if is_there:
        outside.write_text("mine\n")
    manager.close()
    FIRST.unlink()
    FIRST.symlink_to(outside)
    from fedsweep.manager import ExperimentManager

    with pytest.raises(StateError, match=rf'"out/first" lies outside, by a link, at "{outside}";'):
        ExperimentManager(["sweep.yaml"], port=0).start()
    assert (outside.read_text() if outside.exists() else "") == "mine\n" * is_there
    admitted = ExperimentManager(["sweep.yaml"], port=0, output_roots=[outside.parent])
    assert admitted.start() == 0
    assert outside.read_bytes().count(b"\n") == 9


# ---- what stands where files are made, and beside them


def put_link(path: Path) -> None:
    Path("precious").write_text("mine\n")
    path.symlink_to(Path("precious").resolve())


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "put", [os.mkfifo, put_link, lambda path: path.write_bytes(b"old")], ids=["FIFO", "link", "file"]
)
@pytest.mark.parametrize(
    "name", ["results", ".summary.csv.tmp", ".history.parquet.tmp", "summary.csv", "history.parquet"]
)
def test_what_has_one_of_our_names_is_replaced_not_followed_nor_waited_for(manager, check_sound, name, put):
    path = unfinished() if name == "results" else FIRST.with_name(name)
    put(path)
    if path.is_file() and not path.is_symlink():
        os.utime(path, (0, 0))  # older than the rows
    FIRST.write_bytes(b"torn")
    manager.load_completed_tasks()
    manager.sweep.write_outputs()
    assert read_results(FIRST.parent).shape[0] == 8
    assert (FIRST.parent / "summary.csv").is_file()
    assert (FIRST.parent / "history.parquet").is_file()
    assert not (FIRST.parent / "summary.csv").is_symlink()
    if Path("precious").exists():
        assert Path("precious").read_text() == "mine\n"
    manager.save_state()
    manager.close()
    check_sound(LEDGER)


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_cut_out_finds_a_name_that_nothing_has(manager, put):
    put(TORN)
    FIRST.write_bytes(b"torn")
    manager.load_completed_tasks()
    assert FIRST.with_name("final_results.csv.torn-2").read_bytes() == b"torn\n"
    assert not Path("out/first/nowhere").exists()
