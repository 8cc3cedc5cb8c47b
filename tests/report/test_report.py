"""From output folders to files: which are written, where, and what happens when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedsweep.errors import UsageError
from fedsweep.manager.results import summarise
from fedsweep.report import report
from fedsweep.report.look import scales
from fedsweep.report.plots import plot_folder

GRID = {"aggregator": ["fedavg", "median"], "poison_ratio": [0.0, 0.3]}
SIZES = {"width_factor": [4, 8], "depth": [1, 2], "poison_ratio": [0.0, 0.3]}


def names(paths, base):
    return sorted(str(path.relative_to(base)) for path in paths)


def test_a_folder_gets_its_summary_and_plots_as_png_and_pdf(make_rows, folder_of):
    folder = folder_of(make_rows(SIZES, phase="size"))
    made = report([folder])
    assert names(made.files, folder) == [
        "plots/size_accuracy.pdf",
        "plots/size_accuracy.png",
        "plots/size_validation.pdf",
        "plots/size_validation.png",
        "plots/size_width_depth.pdf",
        "plots/size_width_depth.png",
        "summary.csv",
    ]
    for path in made.folders[0].plots:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.verify()
                assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)
                assert min(picture.size) > 300
        else:
            content = path.read_bytes()
            assert content.startswith(b"%PDF")
            assert b"/CIDFontType2" in content or b"/Type42" in content or b"/TrueType" in content
            assert b"/Type3" not in content


def test_the_report_has_the_summary(make_rows, folder_of):
    rows = make_rows(GRID)
    [folder] = report([folder_of(rows)], formats=()).folders
    pd.testing.assert_frame_equal(
        folder.summary[["mean_test_acc", "n_seeds"]], summarise(rows)[["mean_test_acc", "n_seeds"]], check_dtype=False
    )


def test_the_same_rows_give_the_same_bytes(make_rows, folder_of):
    rows = make_rows(GRID)
    one, other = (report([folder_of(rows, name)]).folders[0].plots for name in ("one", "other"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_each_phase_has_its_figures(make_rows, folder_of):
    rows = pd.concat([make_rows(GRID, phase="a/b"), make_rows(GRID, phase="a b"), make_rows(GRID, phase="…")])
    folder = folder_of(rows, rounds=0)
    assert names(report([folder], formats=("png",)).folders[0].plots, folder / "plots") == [
        "a_b_accuracy.png", "a_b_accuracy_.png", "phase_accuracy.png",
    ]  # fmt: skip


def test_without_a_history_there_are_no_curves(make_rows, folder_of):
    folder = folder_of(make_rows(GRID), rounds=0)
    assert names(report([folder], formats=("png",)).folders[0].plots, folder) == ["plots/attack_accuracy.png"]


def test_rows_of_others_without_a_signature_are_plotted(make_rows, folder_of):
    rows = make_rows(GRID)
    rows["signature"] = ""
    folder = folder_of(rows, rounds=0)
    make_history = pd.DataFrame(
        {"signature": ["", "x"], "round": [1, 1], "val_loss": [1.0, 1.0], "val_acc": [0.5, 0.5]}
    )
    make_history.to_parquet(folder / "history.parquet")
    assert names(report([folder], formats=("png",)).folders[0].plots, folder) == ["plots/attack_accuracy.png"]


def test_a_row_under_two_cells_is_drawn_under_both(make_rows, folder_of, make_history):
    """A clean experiment is one result with a row for each attack; its curve belongs to both."""
    rows = make_rows({"poison_type": ["label_flip", "random_noise"], "poison_ratio": [0.0]})
    rows["signature"] = [*rows["signature"][:3], *rows["signature"][:3]]
    folder = folder_of(rows)
    assert "plots/attack_validation.png" in names(report([folder]).files, folder)


def test_elsewhere(make_rows, folder_of, tmp_path):
    one, other = folder_of(make_rows(GRID), "a/results", 0), folder_of(make_rows(GRID), "b/results", 0)
    assert names(report([one], tmp_path / "out", ("pdf",)).folders[0].plots, tmp_path) == ["out/attack_accuracy.pdf"]
    both = report([one, other], tmp_path / "both", ("pdf",))
    assert names([path for each in both.folders for path in each.plots], tmp_path) == [
        "both/results/attack_accuracy.pdf",
        "both/results_2/attack_accuracy.pdf",
    ]
    assert not (one / "plots").exists()


def test_a_folder_named_twice_is_reported_once(make_rows, folder_of):
    folder = folder_of(make_rows(GRID), rounds=0)
    assert len(report([folder, str(folder)], formats=()).folders) == 1


def test_a_summary_is_written_where_it_is_missing_or_stale_and_left_where_it_is_fresh(make_rows, folder_of):
    folder = folder_of(make_rows(GRID), rounds=0)
    report([folder], formats=())
    written = (folder / "summary.csv").read_text()
    assert "ci95_test_acc" in written

    (folder / "summary.csv").write_text("mine")
    report([folder], formats=())
    assert (folder / "summary.csv").read_text() == "mine"

    os.utime(folder / "summary.csv", ns=(0, 0))
    report([folder], formats=())
    assert (folder / "summary.csv").read_text() == written


def test_a_folder_without_results_is_a_wrong_usage(tmp_path):
    with pytest.raises(UsageError) as refused:
        report([tmp_path / "nothing"])
    assert str(refused.value).startswith(f"{tmp_path}/nothing is no folder of results: ")
    assert "final_results.csv" in str(refused.value)


def test_a_file_that_is_none_of_results_is_a_wrong_usage(tmp_path):
    (tmp_path / "final_results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match=r"is no folder of results: .* its first line is not the header of one"):
        report([tmp_path])


def test_a_folder_whose_file_has_no_rows_yet(make_rows, folder_of):
    folder = folder_of(make_rows(GRID).iloc[:0], rounds=0)
    made = report([folder])
    assert made.folders[0].plots == ()
    assert len(made.folders[0].summary) == 0


def test_a_damaged_history_is_named(make_rows, folder_of):
    folder = folder_of(make_rows(GRID), rounds=0)
    (folder / "history.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UsageError, match=rf"^{folder}/history.parquet cannot be read: .*; delete it"):
        report([folder])


def test_a_folder_for_plots_that_cannot_be_written(make_rows, folder_of):
    folder = folder_of(make_rows(GRID), rounds=0)
    (folder / "plots").write_text("in the way")
    with pytest.raises(UsageError, match=rf"^the plots of {folder} cannot be written: "):
        report([folder])


def test_everything_diverged(make_rows, folder_of):
    rows = make_rows(SIZES)
    rows["outcome"] = "diverged"
    metrics = [name for name in rows if name.startswith(("mean_", "std_"))]
    rows[[*metrics, "best_epoch", "attack_success_rate"]] = np.nan
    folder = folder_of(rows, rounds=0)
    assert len(report([folder], formats=("png",)).folders[0].plots) == 2


def test_nothing_of_a_report_stays_behind_in_matplotlib(make_rows, folder_of):
    """Run apart, with a user's own settings in place: they come back, and pyplot is never loaded."""
    folder = folder_of(make_rows(GRID))
    code = (
        "import sys, matplotlib; matplotlib.rcParams['font.size'] = 23\n"
        "from fedsweep.report import report\n"
        f"report([{str(folder)!r}])\n"
        "print(matplotlib.rcParams['font.size'], 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "23.0 False\n"
    assert done.stderr == ""


def test_a_users_settings_do_not_change_the_plots(make_rows, folder_of):
    import matplotlib

    rows = make_rows(GRID)
    plain = report([folder_of(rows, "plain", 0)]).folders[0].plots
    with matplotlib.rc_context({"font.size": 23, "axes.facecolor": "pink", "savefig.dpi": 50}):
        own = report([folder_of(rows, "own", 0)]).folders[0].plots
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in own]


def test_importing_loads_neither_pandas_nor_matplotlib():
    code = "import fedsweep.report, fedsweep.report.tables, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pandas", "matplotlib", "numpy", "torch"} & set(modules)


def test_a_whole_number_that_is_set_in_some_rows_only(make_rows, folder_of):
    rows = make_rows({"poison_label": [None, 3], "poison_ratio": [0.2]}, target_class=1)
    rows["poison_label"] = rows["poison_label"].astype("Int64")
    made = report([folder_of(rows)], formats=("png",))
    assert len(made.folders[0].plots) == 2


def test_a_phase_without_any_row_has_no_figure(make_rows, without, tmp_path):
    rows = pd.concat([make_rows(GRID), make_rows(GRID, phase="lost")], ignore_index=True)
    cells = without(rows, rows["phase"] == "lost")
    assert set(cells["phase"]) == {"attack", "lost"}
    assert names(plot_folder(cells, None, tmp_path, scales([cells]), ("png",)), tmp_path) == ["attack_accuracy.png"]
