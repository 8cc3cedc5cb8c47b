"""Reading rows back, summaries over seeds by hand-computed values, histories, and what they are kept from."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from fedsweep.errors import DataError
from fedsweep.manager.columns import PROVENANCE_COLUMNS, RESULT_COLUMNS, line
from fedsweep.manager.history import write_history
from fedsweep.manager.records import History
from fedsweep.manager.results import parse_results, read_results, summarise, write_summary

NAN = math.nan


def rows(*cells: dict, **common) -> pd.DataFrame:
    """Rows with the values given and plain ones for the rest."""
    plain = {
        **dict.fromkeys(RESULT_COLUMNS, 0),
        **{
            "phase": "p",
            "dataset": "digits",
            "model_type": "lr",
            "poison_type": "label_flip",
            "data_ordering": "shuffle",
        },
        **{"aggregator": "fedavg", "alpha": 1.0, "poison_ratio": 0.0, "outcome": "ok", "attack_success_rate": NAN},
        **{"mean_test_loss": 0.5, "mean_val_acc": 0.5, "mean_val_loss": 0.5, "best_epoch": 3, "num_parameters": 9},
    }
    return pd.DataFrame([{**plain, **common, **cell} for cell in cells])


def test_rows_that_are_read_in_parts_are_the_same(tmp_path, monkeypatch):
    """Whole numbers, some of which are missing in one part alone; text; and a file without rows."""
    columns = [*RESULT_COLUMNS, "rounds_run"]
    plain = {**dict.fromkeys(columns, "1"), "phase": "p", "dataset": "digits", "mean_test_acc": "0.25"}
    table = pd.DataFrame([{**plain, "seed": str(seed), "rounds_run": "" if seed == 4 else "7"} for seed in range(5)])
    table.to_csv(tmp_path / "final_results.csv", index=False)
    whole = read_results(tmp_path)
    monkeypatch.setattr("fedsweep.manager.results.AT_ONCE", 2)
    pd.testing.assert_frame_equal(read_results(tmp_path), whole)
    assert (whole["seed"].dtype, whole["rounds_run"].dtype) == ("int64", "Int64")
    (tmp_path / "final_results.csv").write_text(",".join(columns) + "\n")
    assert read_results(tmp_path).empty


# ---- over seeds


def test_mean_deviation_and_interval_of_three_seeds():
    """Of 0.5, 0.6, 0.8: mean 1.9/3, variance ((2/15)^2 + (1/30)^2 + (1/6)^2)/2 = 7/300, t(0.975, 2) = 4.302653."""
    (row,) = summarise(
        rows(*({"seed": seed, "mean_test_acc": acc} for seed, acc in ((1, 0.5), (2, 0.6), (3, 0.8))))
    ).to_dict("records")
    assert row["mean_test_acc"] == pytest.approx(1.9 / 3, abs=1e-12)
    assert row["std_test_acc"] == pytest.approx(math.sqrt(7 / 300), abs=1e-12)
    assert row["ci95_test_acc"] == pytest.approx(4.302652729911275 * math.sqrt(7 / 300) / math.sqrt(3), abs=1e-9)
    assert (row["n_seeds"], row["n_diverged"], row["best_epoch"], row["num_parameters"]) == (3, 0, 3.0, 9)
    assert row["std_val_acc"] == 0.0


def test_two_seeds_have_the_interval_of_one_degree_of_freedom():
    """Half the difference times t(0.975, 1) = 12.7062: std/sqrt(2) = |a-b|/2."""
    (row,) = summarise(rows({"seed": 1, "mean_test_acc": 0.5}, {"seed": 2, "mean_test_acc": 0.7})).to_dict("records")
    assert row["ci95_test_acc"] == pytest.approx(12.706204736174694 * 0.1, abs=1e-9)


def test_one_seed_has_neither_deviation_nor_interval():
    (row,) = summarise(rows({"seed": 1, "mean_test_acc": 0.5})).to_dict("records")
    assert (row["mean_test_acc"], row["n_seeds"]) == (0.5, 1)
    assert all(math.isnan(row[name]) for name in ("std_test_acc", "ci95_test_acc", "accuracy_drop_std"))


def test_accuracy_drop_is_paired_by_seed():
    """Drops 0.9-0.5 and 0.8-0.7: mean 0.25, deviation 0.3/sqrt(2). Unpaired means would hide the deviation."""
    summary = summarise(
        rows(
            {"seed": 1, "mean_test_acc": 0.9},
            {"seed": 2, "mean_test_acc": 0.8},
            {"seed": 1, "mean_test_acc": 0.5, "poison_ratio": 0.3, "poison_type": "random_noise"},
            {"seed": 2, "mean_test_acc": 0.7, "poison_ratio": 0.3, "poison_type": "random_noise"},
            {"seed": 3, "mean_test_acc": 0.1, "poison_ratio": 0.3, "poison_type": "random_noise"},  # no clean twin
        )
    ).set_index("poison_ratio")
    assert summary.loc[0.3, "accuracy_drop"] == pytest.approx(0.25, abs=1e-12)
    assert summary.loc[0.3, "accuracy_drop_std"] == pytest.approx(0.3 / math.sqrt(2), abs=1e-12)
    assert summary.loc[0.0, "accuracy_drop"] == 0.0


def test_the_clean_twin_differs_in_the_attack_only():
    summary = summarise(
        rows(
            {"mean_test_acc": 0.9, "aggregator": "median", "phase": "other", "poison_level": "sample"},
            {"mean_test_acc": 0.6, "poison_ratio": 0.3, "aggregator": "median", "poison_level": "client"},
            {"mean_test_acc": 0.5, "poison_ratio": 0.3, "aggregator": "fedavg", "poison_level": "client"},
            seed=1,
        )
    )
    drops = {row["aggregator"]: row["accuracy_drop"] for row in summary.to_dict("records") if row["poison_ratio"] > 0}
    assert drops["median"] == pytest.approx(0.3)
    assert math.isnan(drops["fedavg"])


def test_diverged_rows_are_counted_and_left_out():
    empty = dict.fromkeys(("mean_test_acc", "mean_test_loss", "mean_val_acc", "mean_val_loss", "best_epoch"), NAN)
    (row,) = summarise(
        rows(
            {"seed": 1, "mean_test_acc": 0.5},
            {"seed": 2, **empty, "outcome": "diverged"},
            {"seed": 3, "mean_test_acc": 0.7},
        )
    ).to_dict("records")
    assert (row["mean_test_acc"], row["n_seeds"], row["n_diverged"]) == (pytest.approx(0.6), 2, 1)
    (row,) = summarise(rows({"seed": 2, **empty, "outcome": "diverged"})).to_dict("records")
    assert (row["n_seeds"], row["n_diverged"]) == (0, 1)
    assert math.isnan(row["mean_test_acc"])


def test_groups_are_the_cells_of_each_phase():
    frame = rows(
        {"seed": 1, "mean_test_acc": 0.5},
        {"seed": 2, "mean_test_acc": 0.7},
        {"seed": 1, "mean_test_acc": 0.5, "phase": "q"},
        {"seed": 1, "mean_test_acc": 0.9, "lr": 0.1},
        {"seed": 1, "mean_test_acc": 0.9, "lr": 0.1},  # doubled by someone: counts once
    )
    summary = summarise(frame)
    assert sorted(summary["n_seeds"]) == [1, 1, 2]
    assert list(summary.columns[: len(RESULT_COLUMNS) - 1]) == [name for name in RESULT_COLUMNS if name != "seed"]


def test_the_attack_s_success_is_averaged():
    (row,) = summarise(
        rows(
            {"seed": 1, "attack_success_rate": 0.2},
            {"seed": 2, "attack_success_rate": 0.4},
            mean_test_acc=0.5,
            poison_ratio=0.1,
        )
    ).to_dict("records")
    assert row["attack_success_rate"] == pytest.approx(0.3)


def test_the_order_of_the_rows_does_not_matter():
    frame = rows(*({"seed": seed, "mean_test_acc": seed / 8, "lr": lr} for seed in (1, 2) for lr in (0.1, 0.2)))
    pd.testing.assert_frame_equal(summarise(frame), summarise(frame.iloc[::-1]))


# ---- reading


@pytest.fixture
def finished(managers, make_result):
    manager = managers()
    while task := manager.get_next_task("w"):
        manager.save_result(task["task_id"], "w", make_result(task, worker="=w"), task["attempt"])
    return manager


def test_rows_are_read_as_they_were_written(finished):
    frame = read_results("out/second")
    assert tuple(frame.columns) == (*RESULT_COLUMNS, "lr", *PROVENANCE_COLUMNS)
    assert frame["seed"].dtype == "int64"
    assert frame["rounds_run"].dtype == "Int64"
    assert frame["mean_test_acc"].dtype == "float64"
    assert set(frame["worker"]) == {"=w"}
    results = dict(finished.sweep.ledger.view.results())
    for row in frame.to_dict("records"):
        assert row["mean_test_acc"] == results[row["signature"]]["mean_test_acc"]
        assert row["mean_test_loss"] == 1 / 3


def test_a_seed_near_the_limit_keeps_every_digit(managers, make_result):
    seed = 2**63 - 1
    manager = managers(f"p: {{combinations: [{{seed: [{seed}]}}]}}")
    task = manager.get_next_task("w")
    manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])
    assert read_results("results_p")["seed"].tolist() == [seed]


def test_folders_without_results_say_so(folder):
    with pytest.raises(DataError, match=r"final_results.csv cannot be read"):
        read_results(folder)
    (folder / "final_results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="is no results file: its first line is not the header of one"):
        read_results(folder)
    (folder / "final_results.csv").write_text("signature,mean_test_acc\na,0.5\n")
    with pytest.raises(DataError, match="is no results file: it has no column phase"):
        read_results(folder)


OLD_ROW = b"p,digits,lr,2,1,0.5,label_flip,1,shuffle,fedavg,32,0.75" + b",0.5" * 8 + b",2,7"
OLD_HEADER = line(RESULT_COLUMNS)


def test_a_row_that_does_not_fit_its_header_is_named_and_never_read_in_other_columns():
    for number, wrong in enumerate((OLD_ROW + b",x", b"x," + OLD_ROW, OLD_ROW.rpartition(b",")[0]), start=1):
        rows = [OLD_ROW] * number
        with pytest.raises(DataError) as caught:
            parse_results("a.csv", b"\n".join([OLD_HEADER, *rows, wrong, b""]))
        fields = wrong.count(b",") + 1
        assert str(caught.value) == (
            f"a.csv: line {number + 2} is no row (it has {fields} fields where the header has 22); remove it, or let "
            "`fedsweep doctor --repair` cut it out"
        )


def test_a_last_line_without_an_end_counts_if_it_is_a_row():
    for tail, count in ((b"", 1), (OLD_ROW, 2), (OLD_ROW[:40], 1), (b'"', 1), (b"\0" * 9, 1)):
        assert len(parse_results("a.csv", b"\n".join([OLD_HEADER, OLD_ROW, tail]))) == count


def test_numbers_that_are_none_are_missing():
    row = OLD_ROW.split(b",")
    row[3], row[11], row[20] = b"9" * 30, b"a", b"1.5"
    rows = parse_results("a.csv", b"\n".join([OLD_HEADER, b",".join(row), b""]))
    assert rows[["width_factor", "mean_test_acc", "best_epoch"]].isna().all(axis=None)
    assert rows["seed"].tolist() == [7]


def test_a_file_that_a_spreadsheet_saved_is_read():
    saved = b"\xef\xbb\xbf" + OLD_HEADER.replace(b",", b";") + b"\r\n" + OLD_ROW.replace(b",", b";").replace(b".", b",")
    rows = parse_results("a.csv", saved + b"\r\n")
    assert (rows["phase"][0], rows["mean_test_acc"][0], rows["seed"][0]) == ("p", 0.75, 7)


def test_the_summary_is_written_beside_the_rows(finished):
    path = write_summary("out/first")
    summary = pd.read_csv(path)
    assert list(summary["n_seeds"]) == [2, 2, 2, 2]
    assert summary["ci95_test_acc"].notna().all()
    assert sorted(file.name for file in path.parent.iterdir()) == ["final_results.csv", "summary.csv"]


# ---- histories


def test_every_round_of_every_experiment_is_kept(finished):
    finished.sweep.write_outputs()
    table = pq.read_table("out/first/history.parquet")
    assert table.column_names == [
        *("signature", "task_id", "seed", "round", "val_loss", "val_acc", "nonfinite_clients", "is_best"),
        "per_class_test_acc",
    ]
    frame = table.to_pandas()
    assert len(frame) == 6 * 2  # clean cells share an experiment
    assert sorted(set(frame["signature"])) == sorted(set(read_results("out/first")["signature"]))
    assert list(frame.loc[frame["is_best"], "round"].unique()) == [2]
    assert set(frame["val_loss"]) == {1.0, 0.5}


def history(place: int, signature: str, **result) -> History:
    rounds = [
        {"round": 1, "val_loss": None, "val_acc": 0.5, "nonfinite_clients": 2},
        {"round": 2, "val_loss": 0.25, "val_acc": None},
    ]
    return History(place, signature, f"p_{place}_1", 1, {"best_epoch": 2, "history": rounds, **result})


def pages(*histories: History):
    """Pages of one history each."""
    return lambda after: [each for each in histories if each.place > after][:1]


def test_losses_that_are_not_finite_are_null_and_classes_stand_in_the_best_round(tmp_path):
    assert write_history(tmp_path, pages(history(1, "a", per_class_test_acc=[0.5, None, 1.0])))
    first, second = pq.read_table(tmp_path / "history.parquet").to_pylist()
    assert (first["val_loss"], first["nonfinite_clients"], first["is_best"], first["per_class_test_acc"]) == (
        None,
        2,
        False,
        None,
    )
    assert (second["val_acc"], second["is_best"], second["per_class_test_acc"]) == (None, True, [0.5, None, 1.0])


def test_rounds_of_other_sweeps_are_kept(tmp_path):
    write_history(tmp_path, pages(history(1, "theirs"), history(2, "both")))
    write_history(tmp_path, pages(history(1, "both", best_epoch=1), history(2, "ours"), history(3, "more")))
    table = pq.read_table(tmp_path / "history.parquet").to_pandas()
    assert table.groupby("signature").size().to_dict() == {"theirs": 2, "both": 2, "ours": 2, "more": 2}
    assert table.loc[(table["signature"] == "both") & table["is_best"], "round"].tolist() == [1]


def test_a_history_that_cannot_be_read_is_moved_away(tmp_path, caplog):
    Path(tmp_path / "history.parquet").write_bytes(b"garbage")
    write_history(tmp_path, pages(history(1, "a")))
    assert pq.read_table(tmp_path / "history.parquet").num_rows == 2
    assert (tmp_path / "history.parquet.unreadable").read_bytes() == b"garbage"
    assert "history.parquet.unreadable" in caplog.text


def test_several_small_pages_are_one_row_group(tmp_path, monkeypatch):
    """Else a long history would be a heap of tiny groups, each with its own statistics."""
    monkeypatch.setattr("fedsweep.manager.history.ROW_GROUP", 2)
    every = [history(number, f"s{number}") for number in range(1, 6)]
    assert write_history(tmp_path, pages(*every))
    written = pq.ParquetFile(tmp_path / "history.parquet")
    assert [written.metadata.row_group(number).num_rows for number in range(3)] == [4, 4, 2]
    assert written.read()["signature"].to_pylist() == [each.signature for each in every for _ in range(2)]


def test_without_histories_there_is_no_file(tmp_path):
    assert not write_history(tmp_path, pages())
    assert list(tmp_path.iterdir()) == []
