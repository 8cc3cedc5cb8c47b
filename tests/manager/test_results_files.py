"""`final_results.csv` against the ledger: written, torn, edited, appended to by others, not writable."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest

from fedsweep.manager import columns, csv_lines, projection
from fedsweep.manager.columns import PROVENANCE_COLUMNS, RESULT_COLUMNS, guard, header, line, unguard
from fedsweep.manager.protocol import SCIENCE_FIELDS
from fedsweep.plan.experiment import NAMED_COLUMNS

FIRST, SECOND = Path("out/first/final_results.csv"), Path("out/second/final_results.csv")


@pytest.fixture
def finish(make_result):
    """Run tasks of a manager to their end, all or some of them."""

    def run(manager, count: int = 100, **changes):
        done = []
        while len(done) < count and (task := manager.get_next_task("w")) is not None:
            result = make_result(task, **changes)
            assert manager.save_result(task["task_id"], "w", result, task["attempt"]) == "accepted"
            done.append((task, result))
        return done

    return run


@pytest.fixture
def finished(managers, finish, folder):
    """A finished sweep of two phases; its manager."""
    manager = managers()
    finish(manager)
    return manager


# ---- what is written


def test_the_columns_are_the_promised_ones():
    assert (
        *("phase", "dataset", "model_type", "width_factor", "depth", "poison_ratio", "poison_type", "alpha"),
        *("data_ordering", "aggregator", "batch_size", "mean_test_acc", "std_test_acc", "mean_test_loss"),
        *("std_test_loss", "mean_val_acc", "std_val_acc", "mean_val_loss", "std_val_loss", "num_parameters"),
        *("best_epoch", "seed"),
    ) == RESULT_COLUMNS
    assert header({"lr", "seed", "alpha", "num_clients"}) == (*RESULT_COLUMNS, "num_clients", "lr", *PROVENANCE_COLUMNS)
    assert set(NAMED_COLUMNS) < set(RESULT_COLUMNS)
    kept_elsewhere = {"history", "per_class_test_acc"}
    assert set(SCIENCE_FIELDS) - kept_elsewhere < {*RESULT_COLUMNS, *PROVENANCE_COLUMNS}


def test_every_cell_gets_its_row_as_soon_as_there_is_a_result(managers, finish, read_rows, check_sound):
    manager = managers()
    ((task, result),) = finish(manager, 1)
    rows = read_rows(FIRST)
    assert [(row["phase"], row["poison_ratio"], row["poison_type"]) for row in rows] == [
        ("first", "0.0", "label_flip"),
        ("first", "0.0", "random_noise"),
    ]
    assert {row["signature"] for row in rows} == {task["signature"]}
    assert {float(row["mean_test_acc"]) for row in rows} == {result["mean_test_acc"]}
    finish(manager)
    manager.save_state()
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")
    assert (len(read_rows(FIRST)), len(read_rows(SECOND))) == (8, 4)


def test_a_shared_experiment_has_a_row_in_each_folder_with_its_own_phase(managers, finish, read_rows):
    manager = managers("""\
defaults: {output_dir: "out/{phase}"}
first: {combinations: [{poison_ratio: [0.0]}]}
second: {combinations: [{poison_ratio: [0.0]}, {poison_type: [random_noise]}]}
""")
    ((task, _),) = finish(manager)
    assert task["output_dirs"] == ["out/first", "out/second"]
    (first,), (second,) = read_rows(FIRST), read_rows(SECOND)
    assert (first.pop("phase"), first.pop("poison_type")) == ("first", "label_flip")
    assert (second.pop("phase"), second.pop("poison_type")) == ("second", "random_noise")
    assert first == second


def test_varying_parameters_get_a_column(finished):
    assert "lr" not in FIRST.read_text().splitlines()[0].split(",")
    columns = SECOND.read_text().splitlines()[0].split(",")
    assert columns[len(RESULT_COLUMNS)] == "lr"


@pytest.mark.parametrize(
    ("value", "field"),
    [(0.1 + 0.2, "0.30000000000000004"), (1.0, "1.0"), (5e-324, "5e-324"), (-3, "-3"), (None, ""), (2**62, str(2**62))],
)
def test_numbers_read_back_as_they_were(value, field):
    assert line([value, 0]) == f"{field},0".encode()
    if value is not None:
        assert type(value)(field) == value


@pytest.mark.parametrize("words", ["=1+1", "+1", "-x", "@cmd", "'quoted"])
def test_free_text_is_guarded_and_numbers_are_not(words):
    assert guard(words) == f"'{words}"
    assert unguard(guard(words)) == words


def test_free_text_stays_on_one_line():
    assert guard("a\nb\r\0\tc") == "a b   c"
    assert guard("NVIDIA H100, 80 GB") == unguard("NVIDIA H100, 80 GB") == "NVIDIA H100, 80 GB"
    assert line(["a,b", 'c"d']) == b'"a,b","c""d"'


def test_diverged_rows_have_no_metrics(managers, finish, read_rows):
    finish(
        managers(), 1, outcome="diverged", mean_test_acc=None, mean_test_loss=None, mean_val_acc=None, best_epoch=None
    )
    row = read_rows(FIRST)[0]
    assert row["outcome"] == "diverged"
    empty = (
        "mean_test_acc",
        "std_test_acc",
        "mean_test_loss",
        "std_test_loss",
        "mean_val_acc",
        "std_val_acc",
        "best_epoch",
    )
    assert {row[name] for name in empty} == {""}


def test_the_worker_s_name_cannot_run_in_a_spreadsheet(managers, finish, read_rows):
    finish(managers(), 1, worker="=HYPERLINK(1)", device="@gpu\n1")
    assert (read_rows(FIRST)[0]["worker"], read_rows(FIRST)[0]["device"]) == ("'=HYPERLINK(1)", "'@gpu 1")


def test_a_row_says_which_plan_computed_it(managers, finish, read_rows):
    assert PROVENANCE_COLUMNS.index("plan") == PROVENANCE_COLUMNS.index("device") + 1
    finish(managers(), 1, plan="native w4x16")
    assert read_rows(FIRST)[0]["plan"] == "native w4x16"


def test_a_file_from_before_a_column_was_added_gets_it_and_keeps_its_rows(managers, finish, read_rows, check_sound):
    manager = managers()
    finish(manager, 3, device="cpu", plan="loop")
    manager.close()
    before = read_rows(FIRST)
    with FIRST.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [name for name in before[0] if name != "plan"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(before)
        writer.writerow({**before[0], "phase": "a colleague's", "seed": 99, "signature": ""})
    manager = managers()
    finish(manager, plan="loop")
    manager.close()
    rows = read_rows(FIRST)
    ours, others = [row for row in rows if row["signature"]], [row for row in rows if not row["signature"]]
    assert ours[: len(before)] == before
    assert {row["plan"] for row in ours} == {"loop"}
    assert [(row["phase"], row["plan"]) for row in others] == [("a colleague's", "")]
    assert list(FIRST.parent.glob("*.torn-*")) == []
    check_sound(".fedsweep/ledger.sqlite3")


# ---- repair


def restart(managers, **options):
    """Start the sweep again as a new process would, and let go of it."""
    manager = managers(**options)
    manager.save_state()
    manager.close()


def test_a_clean_restart_leaves_the_files_alone(finished, managers):
    before = (FIRST.stat().st_ino, FIRST.stat().st_mtime_ns, FIRST.read_bytes())
    restart(managers)
    assert (FIRST.stat().st_ino, FIRST.stat().st_mtime_ns, FIRST.read_bytes()) == before
    assert sorted(os.listdir("out/first")) == ["final_results.csv"]


def test_a_missing_file_or_folder_is_written_again(finished, managers, check_sound):
    FIRST.unlink()
    shutil.rmtree("out/second")
    restart(managers)
    check_sound(".fedsweep/ledger.sqlite3")


@pytest.mark.parametrize(
    "tail", [b"\0" * 500, b"\0" * 500 + b"\n", b"first,dig", b'first,"dig\n', b"\xff\xfe\n", b"a,b\n"]
)
def test_what_follows_the_rows_is_cut_off_and_kept_beside(finished, managers, check_sound, tail, caplog):
    whole = FIRST.read_bytes()
    FIRST.write_bytes(whole + tail)
    restart(managers)
    assert FIRST.read_bytes() == whole
    assert Path("out/first/final_results.csv.torn-1").read_bytes() == tail.removesuffix(b"\n") + b"\n"
    assert "1 line(s) that do not belong there were cut out" in caplog.text
    check_sound(".fedsweep/ledger.sqlite3")


def test_every_repair_keeps_what_it_cut_in_a_file_of_its_own(finished, managers):
    for number in (1, 2, 3):
        with FIRST.open("ab") as stream:
            stream.write(b"torn %d" % number)
        restart(managers)
    kept = sorted(Path("out/first").glob("*.torn-*"))
    assert [path.read_bytes() for path in kept] == [b"torn 1\n", b"torn 2\n", b"torn 3\n"]


def test_doubled_and_missing_rows_are_put_right(finished, managers, check_sound):
    header_line, *rows = FIRST.read_bytes().splitlines(keepends=True)
    FIRST.write_bytes(header_line + b"".join([rows[0], rows[0], rows[0], header_line, b"\n", *rows[2:]]))
    restart(managers)
    check_sound(".fedsweep/ledger.sqlite3")
    assert not list(Path("out/first").glob("*.torn-*"))  # nothing was lost


def test_an_edited_number_is_put_right_and_the_edit_kept_beside(finished, managers, check_sound):
    lines = FIRST.read_text().splitlines(keepends=True)
    fields = lines[3].split(",")
    fields[11] = "0.999"
    FIRST.write_text("".join([*lines[:3], ",".join(fields), *lines[4:]]))
    restart(managers)
    check_sound(".fedsweep/ledger.sqlite3")
    assert Path("out/first/final_results.csv.torn-1").read_text() == ",".join(fields)


def test_a_note_that_someone_wrote_beside_a_row_is_not_lost(finished, managers, check_sound):
    header_line, *rows = FIRST.read_text().splitlines()
    noted = [f"{row},strange" if number == 2 else f"{row}," for number, row in enumerate(rows)]
    FIRST.write_text("\n".join([f"{header_line},notes", *noted]) + "\n")
    restart(managers)
    check_sound(".fedsweep/ledger.sqlite3")
    assert Path("out/first/final_results.csv.torn-1").read_text() == f"{noted[2]}\n"


def test_a_file_saved_by_a_spreadsheet_is_put_right(finished, managers, check_sound):
    """Semicolons, decimal commas, a byte-order mark, and CRLF: what a European Excel makes of it."""
    rows = [row.split(",") for row in FIRST.read_text().splitlines()]
    saved = [
        ";".join(field.replace(".", ",") if i and field[:1].isdigit() else field for field in row)
        for i, row in enumerate(rows)
    ]
    FIRST.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(saved).encode() + b"\r\n")
    restart(managers)
    check_sound(".fedsweep/ledger.sqlite3")


def test_a_file_saved_by_a_spreadsheet_with_commas_loses_nothing(finished, managers, check_sound):
    FIRST.write_bytes(b"\xef\xbb\xbf" + FIRST.read_bytes().replace(b"\n", b"\r\n"))
    restart(managers)
    check_sound(".fedsweep/ledger.sqlite3")
    assert not list(Path("out/first").glob("*.torn-*"))


def test_rows_of_nobody_stay_when_the_file_is_written_anew(finished, managers, check_sound, read_rows):
    fields = FIRST.read_text().splitlines()[1].replace("digits", "cifar10").replace("first", "older").split(",")[:22]
    FIRST.write_bytes(line([*RESULT_COLUMNS, "comment"]) + b"\n" + line([*fields, "keep, me"]) + b"\n")
    restart(managers)
    check_sound(".fedsweep/ledger.sqlite3")
    rows = read_rows(FIRST)
    assert [row["comment"] for row in rows] == [""] * 8 + ["keep, me"]
    assert (rows[-1]["phase"], rows[-1]["dataset"]) == ("older", "cifar10")
    before = FIRST.read_bytes()
    restart(managers)
    assert FIRST.read_bytes() == before


def test_a_header_that_has_more_columns_is_kept(finished, managers, check_sound):
    """Two sweeps may share a folder: each accepts the other's columns, so that they do not rewrite in turns."""
    lines = FIRST.read_text().splitlines()
    FIRST.write_text("\n".join([f"{lines[0]},momentum", *(f"{row},0.9" for row in lines[1:])]) + "\n")
    before = FIRST.read_bytes()
    restart(managers)
    assert FIRST.read_bytes() == before


def test_the_file_may_be_a_link(finished, managers, check_sound, folder):
    FIRST.rename(folder / "real.csv")
    FIRST.symlink_to(folder / "real.csv")
    with (folder / "real.csv").open("ab") as stream:
        stream.write(b"torn")
    restart(managers)
    assert FIRST.is_symlink()
    check_sound(".fedsweep/ledger.sqlite3")


# ---- configurations that change


def test_new_cells_of_finished_experiments_get_their_rows_at_once(
    finished, managers, two_phases, read_rows, check_sound
):
    restart(managers, text=two_phases + "third:\n  combinations: [{poison_ratio: [0.5]}]\n")
    assert [row["phase"] for row in read_rows("out/third/final_results.csv")] == ["third", "third"]
    check_sound(".fedsweep/ledger.sqlite3")


def test_rows_of_removed_experiments_stay_and_can_be_told_apart(finished, managers, two_phases, finish, read_rows):
    edited = managers(text=two_phases.replace("num_clients: 2", "num_clients: 3"))
    status = edited.get_status()
    assert (status["complete"], status["pending"], status["orphaned"]) == (0, 8, 8)
    assert status["config_change"] == {"added": 8, "kept": 0, "removed": 8, "restored": 0}
    finish(edited)
    assert sorted(row["num_clients"] for row in read_rows(FIRST)) == ["2"] * 8 + ["3"] * 8
    restored = managers()
    assert restored.get_status()["config_change"] == {"added": 0, "kept": 0, "removed": 8, "restored": 8}
    assert restored.get_next_task("w") is None  # what is complete is never computed again


def test_a_folder_that_left_the_grid_and_was_deleted_stays_deleted(finished, managers, two_phases):
    shutil.rmtree("out/second")
    restart(managers, text=two_phases[: two_phases.index("second:")])
    assert not Path("out/second").exists()


# ---- others write too


def test_rows_appended_by_a_colleague_meanwhile_do_not_disturb_ours(managers, finish, read_rows, check_sound):
    manager = managers()
    finish(manager, 1)
    strange = FIRST.read_text().splitlines()[1].replace("digits", "mnist")
    for _ in range(4):
        with FIRST.open("a") as stream:
            stream.write(strange + "\n")
        finish(manager, 1)
    finish(manager)
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")
    assert sum(row["dataset"] == "mnist" for row in read_rows(FIRST)) == 4


def test_a_line_that_is_still_being_written_is_waited_for(managers, finish, read_rows, check_sound, clock):
    manager = managers()
    finish(manager, 1)
    strange = FIRST.read_text().splitlines()[1].replace("digits", "mnist")
    with FIRST.open("a") as stream:
        stream.write(strange[:40])
        stream.flush()
        manager.refresh_completed()
        finish(manager)  # results come; their rows wait as well
        assert not list(Path("out/first").glob("*.torn-*"))
        clock.advance(1)
        stream.write(strange[40:] + "\n")
    manager.refresh_completed()
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")
    assert read_rows(FIRST)[2]["dataset"] == "mnist"


def test_a_result_is_not_glued_to_a_line_that_is_still_being_written(managers, finish, read_rows, check_sound):
    manager = managers()
    finish(manager, 1)
    strange = FIRST.read_text().splitlines()[1].replace("digits", "mnist")
    with FIRST.open("a") as stream:
        stream.write(strange[:40])
        stream.flush()
        finish(manager, 1)
        stream.write(strange[40:] + "\n")
    manager.refresh_completed()
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")
    assert strange in FIRST.read_text().splitlines()
    assert not list(Path("out/first").glob("*.torn-*"))


def test_a_line_that_nobody_ends_is_cut_off_after_a_while(managers, finish, clock, check_sound):
    manager = managers()
    finish(manager, 1)
    with FIRST.open("a") as stream:
        stream.write("half a li")
    manager.refresh_completed()
    clock.advance(projection.GROWING_S + 1)
    manager.refresh_completed()
    manager.close()
    assert Path("out/first/final_results.csv.torn-1").read_text() == "half a li\n"
    check_sound(".fedsweep/ledger.sqlite3")


def test_a_row_written_at_the_moment_of_renaming_is_not_lost(finished, managers, monkeypatch, read_rows, check_sound):
    strange = FIRST.read_bytes().splitlines()[1].replace(b"digits", b"mnist") + b"\n"
    with FIRST.open("ab") as stream:
        stream.write(b"torn")
    replace = os.replace

    def late(source, target):
        if target == FIRST.resolve():
            with FIRST.open("ab") as stream:
                stream.write(strange)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(projection.os, "replace", late)
        restart(managers)
    restart(managers)
    check_sound(".fedsweep/ledger.sqlite3")
    assert FIRST.read_bytes().count(strange) == 1


def test_a_row_written_while_the_file_is_made_anew_is_seen(finished, managers, monkeypatch, check_sound):
    strange = FIRST.read_bytes().splitlines()[1].replace(b"digits", b"mnist") + b"\n"
    with FIRST.open("ab") as stream:
        stream.write(b"torn\n")
    fsync = os.fsync

    def busy(descriptor):
        if strange not in FIRST.read_bytes():
            with FIRST.open("ab") as stream:
                stream.write(strange)
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(projection.os, "fsync", busy)
        restart(managers)
    assert FIRST.read_bytes().count(strange) == 1
    check_sound(".fedsweep/ledger.sqlite3")


# ---- disks that refuse


def test_a_folder_that_cannot_be_written_lags_and_catches_up(managers, finish, check_sound, read_rows, caplog):
    Path("out").mkdir()
    Path("out/first").write_text("in the way")
    manager = managers()
    finish(manager)
    status = manager.get_status()
    assert (status["complete"], status["lagging"]) == (8, ["out/first"])
    assert len(read_rows(SECOND)) == 4  # the others go on
    assert caplog.text.count("results are safe in the ledger") == 1
    Path("out/first").unlink()
    manager.refresh_completed()
    assert manager.get_status()["lagging"] == []
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")


def test_a_full_disk_leaves_no_torn_row_and_no_lost_result(managers, finish, monkeypatch, check_sound, read_rows):
    manager = managers()
    finish(manager, 1)
    before, write = FIRST.read_bytes(), os.write
    with monkeypatch.context() as patched:
        patched.setattr(projection.os, "write", lambda descriptor, content: write(descriptor, content[:17]))
        finish(manager, 1)
    assert "out/first" in manager.get_status()["lagging"]
    assert FIRST.read_bytes() == before
    finish(manager)
    manager.refresh_completed()
    assert manager.get_status()["lagging"] == []
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")


@pytest.mark.parametrize("obstacle", ["folder", "fifo"])
def test_what_is_no_file_is_not_waited_for(managers, finish, obstacle, folder):
    FIRST.parent.mkdir(parents=True)
    FIRST.mkdir() if obstacle == "folder" else os.mkfifo(FIRST)
    manager = managers()
    finish(manager)
    assert manager.get_status()["lagging"] == ["out/first"]


def test_reading_is_strict_about_fields():
    found = csv_lines.read_header(line(RESULT_COLUMNS))
    assert found is not None
    assert found.is_plain
    with pytest.raises(ValueError, match="it has 2 fields where the header has 22"):
        csv_lines.read_row(b"a,b", found)
    with pytest.raises(ValueError, match="its quotes do not close"):
        csv_lines.read_row(b'"a', found)
    with pytest.raises(ValueError, match="it is not UTF-8"):
        csv_lines.read_row(b"\xff", found)
    with pytest.raises(ValueError, match="bytes that are zero"):
        csv_lines.read_row(b"\0", found)
    assert csv_lines.read_header(b"a,b,c") is None
    assert csv_lines.read_header(line((*RESULT_COLUMNS, "seed"))) is None
    assert set(RESULT_COLUMNS) < columns.OWN_COLUMNS
