"""The summary as tables: numbers against hand-computed ones, and what is left out or said when there is much."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fedsweep.manager.gaps import Gap
from fedsweep.manager.results import summarise
from fedsweep.report import FolderReport, Report
from fedsweep.report.coverage import with_gaps
from fedsweep.report.labels import parameters
from fedsweep.report.tables import (
    SHOWN_ROWS,
    as_records,
    by_phase,
    constants_line,
    heading,
    markdown,
    missing_line,
    show_report,
    spread_line,
)


def cells_of(rows):
    [(_, cells)] = by_phase(summarise(rows))
    return cells


def fields_of(table):
    """Headings and rows of a Markdown table."""
    lines = [[field.strip() for field in line.strip("|").split("|")] for line in table.splitlines()]
    return lines[0], lines[2:]


@pytest.fixture
def small(make_rows):
    """Two ratios, three seeds, with numbers that a hand can check."""
    rows = make_rows({"poison_ratio": [0.0, 0.3]}, seeds=(1, 2, 3))
    rows["mean_test_acc"] = [0.9, 0.8, 0.7, 0.5, 0.6, 0.4]
    rows["attack_success_rate"] = [np.nan, np.nan, np.nan, 0.2, 0.3, 0.25]
    return rows


def test_numbers_are_those_of_the_hand(small):
    # clean: mean 0.8, deviation 0.1, t(0.975, 2) = 4.30265 → half width 4.30265 · 0.1 / √3 = 0.2484
    # poisoned: mean 0.5; drops paired by seed 0.4, 0.2, 0.3: mean 0.3, deviation 0.1; success (0.2 + 0.3 + 0.25) / 3
    headings, rows = fields_of(markdown(cells_of(small)))
    assert headings == ["poison_ratio", "test accuracy (%)", "95 % CI", "drop (points)", "attack success (%)"]
    assert rows == [
        ["0", "80.0 ± 10.0", "± 24.8", "0.0 ± 0.0", ""],
        ["0.3", "50.0 ± 10.0", "± 24.8", "30.0 ± 10.0", "25.0"],
    ]


def test_the_table_for_a_terminal_says_the_same(small):
    text = shown(report_of(small), width=120)
    assert "80.0 ± 10.0" in text
    assert "30.0 ± 10.0" in text
    assert "attack: 2 cells, 3 seeds each" in text
    assert "dataset digits, model_type cnn, width_factor 8, depth 1, poison_type label_flip, alpha 1" in text


def report_of(*frames):
    from pathlib import Path

    summaries = map(summarise, frames)
    return Report(tuple(FolderReport(Path(f"out{n}"), cells, cells, ()) for n, cells in enumerate(summaries)))


def shown(report, width=80, terminal=True):
    buffer = io.StringIO()
    show_report(
        report, console=Console(file=buffer, width=width, force_terminal=terminal, no_color=True, color_system=None)
    )
    return buffer.getvalue()


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_no_value_is_cut_off_in_a_narrow_terminal(small, width):
    text = shown(report_of(small), width=width)
    for value in ("80.0 ± 10.0", "± 24.8", "30.0 ± 10.0", "25.0"):
        assert value in text


def test_only_what_varies_has_a_column(make_rows):
    rows = make_rows({"model_type": ["cnn", "lr"], "poison_ratio": [0.0, 0.5]})
    headings, _ = fields_of(markdown(cells_of(rows)))
    assert headings[:3] == ["model_type", "poison_ratio", "test accuracy (%)"]
    assert constants_line(cells_of(rows)) == (
        "in all rows: dataset digits, width_factor 8, depth 1, poison_type label_flip, alpha 1, data_ordering shuffle, "
        "aggregator fedavg, batch_size 32"
    )


def test_rows_are_ordered_by_value_with_the_ratios_of_a_series_together(make_rows):
    grid = {"poison_ratio": [0.3, 0.0], "width_factor": [16, 4], "aggregator": ["median", "fedavg"]}
    _, rows = fields_of(markdown(cells_of(make_rows(grid).sample(frac=1, random_state=3))))
    assert [row[:3] for row in rows] == [
        [width, aggregator, ratio]
        for width in ("4", "16")
        for aggregator in ("fedavg", "median")
        for ratio in ("0", "0.3")
    ]


def test_a_parameter_that_is_set_in_some_cells_only(make_rows):
    rows = make_rows({"poison_label": [None, 3], "poison_ratio": [0.2]}, target_class=1)
    assert [row[0] for row in fields_of(markdown(cells_of(rows)))[1]] == ["none", "3"]


def test_one_seed_has_no_deviation_and_no_interval(make_rows):
    rows = make_rows({"poison_ratio": [0.0, 0.3]}, seeds=(1,))
    rows["mean_test_acc"] = [0.9, 0.85]
    headings, fields = fields_of(markdown(cells_of(rows)))
    assert headings == ["poison_ratio", "test accuracy (%)", "drop (points)", "attack success (%)"]
    assert fields == [["0", "90.0", "0.0", ""], ["0.3", "85.0", "5.0", "16.0"]]


def test_without_a_clean_twin_there_is_no_drop(make_rows):
    headings, _ = fields_of(markdown(cells_of(make_rows({"poison_ratio": [0.1, 0.3]}))))
    assert "drop (points)" not in headings


def test_a_cell_that_wins_by_poison_has_a_negative_drop_and_none_a_minus_zero(make_rows):
    rows = make_rows({"poison_ratio": [0.0, 0.3]}, seeds=(1,))
    rows["mean_test_acc"] = [0.9, 0.95]
    assert fields_of(markdown(cells_of(rows)))[1][1][2] == "-5.0"
    rows["mean_test_acc"] = [0.9, 0.9001]
    assert fields_of(markdown(cells_of(rows)))[1][1][2] == "0.0"


def test_diverged_runs_are_counted_and_left_out(small):
    small.loc[[1, 3, 4, 5], "outcome"] = "diverged"
    small.loc[[1, 3, 4, 5], ["mean_test_acc", "attack_success_rate"]] = np.nan
    cells = cells_of(small)
    assert heading("attack", cells) == "attack: 2 cells, 3 seeds each, 4 runs diverged"
    headings, rows = fields_of(markdown(cells))
    assert headings == ["poison_ratio", "test accuracy (%)", "95 % CI", "drop (points)", "seeds", "diverged"]
    # clean: 0.9 and 0.7 are left: mean 0.8, deviation 0.1414; t(0.975, 1) = 12.706 → 12.706 · 0.1414 / √2 = 1.2706
    assert rows == [["0", "80.0 ± 14.1", "± 127.1", "0.0 ± 0.0", "2", "1"], ["0.3", "diverged", "", "", "0", "3"]]


def test_cells_with_different_numbers_of_seeds_say_so(small):
    cells = cells_of(small.iloc[:5])
    assert heading("attack", cells) == "attack: 2 cells, 5 runs"
    assert [row[-1] for row in fields_of(markdown(cells))[1]] == ["3", "2"]


def test_hundreds_of_rows_are_cut_with_a_line_that_says_where_the_rest_is(make_rows):
    rows = make_rows(
        {"width_factor": [1, 2, 4, 8, 16], "depth": list(range(1, 11)), "poison_ratio": [0.0, 0.1, 0.2, 0.3]}
    )
    for terminal in (True, False):
        text = shown(report_of(rows), width=150, terminal=terminal)
        assert f"… and {200 - SHOWN_ROWS} more rows in out0/summary.csv" in text
        assert len(text.splitlines()) < SHOWN_ROWS + 12


def test_into_a_pipe_goes_markdown_without_line_breaks(make_rows):
    rows = make_rows({"aggregator": ["fedavg", "median"], "poison_ratio": [0.0, 0.3]})
    text = shown(report_of(rows), width=40, terminal=False)
    assert text.startswith("attack: 4 cells, 3 seeds each\n\nin all rows: dataset digits, ")
    assert "\x1b" not in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert len(table) == 2 + 4


def test_a_bar_in_a_value_does_not_break_markdown(make_rows):
    rows = make_rows({"dataset": ["parquet:a|b", "digits"], "poison_ratio": [0.0]})
    assert "parquet:a\\|b" in markdown(cells_of(rows))


def test_each_phase_has_its_own_table(make_rows):
    import pandas as pd

    both = pd.concat([make_rows({"poison_ratio": [0.0]}, phase=name) for name in ("one", "two")], ignore_index=True)
    text = shown(report_of(both))
    assert "one: 1 cell, 3 seeds" in text
    assert "two: 1 cell, 3 seeds" in text


def test_json_has_shares_and_null_and_nothing_else_on_standard_output(small, capsys):
    show_report(report_of(small), as_json=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    document = json.loads(lines[0])
    assert document == as_records(report_of(small))
    clean, poisoned = document["folders"][0]["cells"]
    assert math.isclose(clean["mean_test_acc"], 0.8)
    assert clean["attack_success_rate"] is None
    assert math.isclose(poisoned["accuracy_drop"], 0.3)
    assert poisoned["n_seeds"] == 3
    assert poisoned["width_factor"] == 8


def test_a_folder_without_rows_says_so(make_rows):
    empty = make_rows({"poison_ratio": [0.0]}).iloc[:0]
    assert "out0: no results yet" in shown(report_of(empty))


# ---- what has no result


@pytest.fixture
def no_alpha(make_rows, without):
    """A sweep over alpha of which all with alpha 0.1 failed, and one seed of another cell."""
    rows = make_rows({"alpha": [100.0, 0.1], "poison_ratio": [0.0, 0.3]})
    rows["mean_test_acc"] = [0.9, 0.8, 0.7, 0.5, 0.6, 0.4] * 2
    return without(rows, (rows["alpha"] == 0.1) | ((rows["poison_ratio"] == 0.3) & (rows["seed"] == 2)))


def ordered(cells):
    [(_, cells)] = by_phase(cells)
    return cells


def test_what_failed_has_rows_and_its_parameter_is_no_constant(no_alpha):
    cells = ordered(no_alpha)
    headings, rows = fields_of(markdown(cells))
    assert headings[:3] == ["alpha", "poison_ratio", "test accuracy (%)"]
    assert headings[-2:] == ["seeds", "no result"]
    assert [(*row[:3], *row[-2:]) for row in rows] == [
        ("0.1", "0", "—", "0 of 3", "3 failed"),
        ("0.1", "0.3", "—", "0 of 3", "3 failed"),
        ("100", "0", "80.0 ± 10.0", "3", ""),
        ("100", "0.3", "45.0 ± 7.1", "2 of 3", "1 failed"),
    ]
    assert "alpha" not in constants_line(cells)
    assert constants_line(cells).startswith("dataset digits, ")
    assert heading("attack", cells) == "attack: 4 cells, 3 seeds each"
    assert missing_line(cells) == (
        "7 of 12 runs have no result (7 failed): all with alpha 0.1; 1 of 3 with poison_ratio 0.3, alpha 100. "
        "`fedsweep failures` says why."
    )


def test_the_terminal_and_the_pipe_say_what_has_no_result(no_alpha, make_rows):
    from pathlib import Path

    summary = summarise(make_rows({"poison_ratio": [0.0]}))
    made = Report((FolderReport(Path("out"), summary, no_alpha, (), "nobody said so"),))
    for terminal in (True, False):
        text = shown(made, width=200, terminal=terminal)
        assert "7 of 12 runs have no result (7 failed): all with alpha 0.1; " in text
        assert text.count("3 failed") == 2
        assert text.startswith("out: which cells have no result is not known: nobody said so\n")
        assert "a ± b: mean and standard deviation over the seeds of the row; 95 % CI: " in text


@pytest.mark.parametrize(("count", "words"), [(1, "1 row of an earlier configuration is"), (48, "48 rows of an")])
def test_rows_that_were_left_out_are_counted_above_the_table(small, count, words):
    [folder] = report_of(small).folders
    text = shown(Report((replace(folder, left_out=count),)), width=200, terminal=False)
    first, *_ = text.splitlines()
    assert first.startswith(f"out0: {words}")
    assert first.endswith(f" left out (`fedsweep report --all` shows {'it' if count == 1 else 'them'})")
    assert "left out" not in shown(report_of(small), width=200)


@pytest.mark.parametrize(("reason", "words"), [("cancelled", "cancelled"), ("unfinished", "not finished")])
def test_what_did_not_fail_is_not_called_failed(make_rows, without, reason, words):
    rows = make_rows({"aggregator": ["fedavg", "median"]})
    cells = without(rows, rows["aggregator"] == "median", reason)
    assert missing_line(cells) == f"3 of 6 runs have no result (3 {words}): all with aggregator median."


def test_a_sweep_without_gaps_has_no_word_of_them(make_rows, without):
    rows = make_rows({"aggregator": ["fedavg", "median"]})
    cells = without(rows, rows["seed"] == 0)
    assert missing_line(cells) == ""
    assert "no result" not in markdown(cells)
    assert "seeds" not in markdown(cells)


def test_a_cell_that_diverged_in_part_and_failed_in_part_is_both(make_rows, without):
    rows = make_rows({"aggregator": ["fedavg", "median"]})
    own = rows["aggregator"] == "median"
    rows.loc[own, "outcome"] = "diverged"
    rows.loc[own, "mean_test_acc"] = np.nan
    _, fields = fields_of(markdown(ordered(without(rows, own & (rows["seed"] == 3)))))
    assert fields[1][1] == "diverged"
    assert fields[1][-3:] == ["0 of 3", "2", "1 failed"]


def test_many_gaps_are_told_in_few_words(make_rows, without):
    grid = {"alpha": [0.1, 1.0, 10.0], "width_factor": [4, 8], "depth": [1, 2], "poison_ratio": [0.0, 0.3]}
    rows = make_rows(grid, seeds=(1,))
    lost = (rows["alpha"] == 0.1) | ((rows["width_factor"] == 8) & (rows["depth"] == 2))
    assert missing_line(without(rows, lost)) == (
        "12 of 24 runs have no result (12 failed): all with alpha 0.1; all with width_factor 8, depth 2. "
        "`fedsweep failures` says why."
    )
    checkered = (rows["alpha"] > 1) != (rows["width_factor"] > 4)
    assert "; and " not in missing_line(without(rows, checkered))
    single = rows.index.isin([0, 5, 10, 15, 17, 23])
    assert missing_line(without(rows, single)).endswith("; and 2 more. `fedsweep failures` says why.")


def test_where_all_failed_there_is_nothing_to_tell_apart(make_rows, without):
    rows = make_rows({"aggregator": ["fedavg", "median"]}, seeds=(1,))
    cells = without(rows, rows["seed"] == 1)
    assert missing_line(cells) == "2 of 2 runs have no result (2 failed). `fedsweep failures` says why."
    assert [row[:2] for row in fields_of(markdown(ordered(cells)))[1]] == [["fedavg", "—"], ["median", "—"]]


def test_rows_alone_tell_of_fewer_seeds_and_of_combinations_that_are_not_there(make_rows):
    rows = make_rows({"aggregator": ["fedavg", "median"], "poison_ratio": [0.0, 0.3]})
    assert missing_line(cells_of(rows)) == ""
    assert missing_line(cells_of(rows.iloc[:-1])) == "1 of 4 cells has fewer than 3 seeds."
    assert missing_line(cells_of(rows.iloc[:-3])) == (
        "1 of 4 combinations of values has no row: poison_ratio 0.3, aggregator median."
    )


def test_hidden_rows_that_are_in_no_file_are_counted_apart(make_rows, without):
    from pathlib import Path

    rows = make_rows({"width_factor": list(range(1, 51))}, seeds=(1,))
    cells = without(rows, rows["width_factor"] > 47)
    text = shown(Report((FolderReport(Path("out"), summarise(rows), cells, ()),)))
    assert "… and 7 more rows in out/summary.csv; 3 more without a result" in text


def test_json_has_what_has_no_result_beside_the_cells(no_alpha, small):
    from pathlib import Path

    [folder] = as_records(Report((FolderReport(Path("out"), summarise(small), no_alpha, ()),)))["folders"]
    assert len(folder["cells"]) == 2
    keys = ("alpha", "poison_ratio", "n_seeds", "n_failed", "n_cancelled", "n_unfinished")
    assert [tuple(cell[key] for key in keys) for cell in folder["without_result"]] == [
        (100, 0.3, 2, 1, 0, 0),
        (0.1, 0, 0, 3, 0, 0),
        (0.1, 0.3, 0, 3, 0, 0),
    ]
    assert as_records(report_of(small))["folders"][0]["without_result"] is None


def test_what_stands_behind_a_plus_minus_is_said_if_there_is_one(small):
    assert spread_line(cells_of(small)) == (
        "a ± b: mean and standard deviation over 3 seeds; 95 % CI: half width of the interval of that mean"
    )
    assert spread_line(cells_of(small[small["seed"] == 1])) == ""


def test_gaps_keep_the_types_of_the_columns(make_rows, without):
    rows = make_rows({"poison_label": [3, None], "width_factor": [4, 8]})
    rows["poison_label"] = rows["poison_label"].astype("Int64")
    cells = without(rows, rows["poison_label"].isna())
    assert cells["width_factor"].dtype == "int64"
    assert [row[:2] for row in fields_of(markdown(ordered(cells)))[1]] == [
        ["4", "none"], ["4", "3"], ["8", "none"], ["8", "3"],
    ]  # fmt: skip


def test_a_row_that_came_after_the_ledger_was_read_is_no_gap(make_rows):
    rows = make_rows({"aggregator": ["fedavg", "median"]})
    names = [*parameters(rows), "seed"]
    gaps = [
        Gap(phase="attack", values={name: row[name] for name in names}, reason="unfinished")
        for row in rows.to_dict("records")
    ]
    cells = with_gaps(summarise(rows[:4]), rows[:4], gaps)
    assert missing_line(cells) == "2 of 6 runs have no result (2 not finished): 2 of 3 with aggregator median."
