"""What the figures draw: lines, bands, crosses, words in fields, panels, colours, against the numbers they are of."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from fedsweep.manager.results import summarise
from fedsweep.report.accuracy import accuracy_figures
from fedsweep.report.coverage import coverage_note
from fedsweep.report.curves import curve_figures, over_seeds
from fedsweep.report.heatmap import heat_figures
from fedsweep.report.labels import pair_of, parameters
from fedsweep.report.look import HUES, limits, scales, style
from fedsweep.report.panels import assign

T_2 = 4.302652729911275  # Student's t, 0.975, two degrees of freedom


@pytest.fixture(autouse=True)
def looks():
    with style():
        yield


def accuracy(rows):
    return accuracy_of(summarise(rows))


def accuracy_of(cells):
    return list(accuracy_figures("attack", cells, scales([cells])))


def drawn(axes):
    """The lines of some axes that hold values: label-free data lines with at least one point."""
    return [line for line in axes.get_lines() if line.get_marker() != "x"]


def bands(axes):
    return [each for each in axes.collections if each.get_paths()]


def legend_words(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def caption(figure):
    return figure.get_supxlabel().replace("\n", " ").replace("\u00a0", " ")


@pytest.fixture
def small(make_rows):
    rows = make_rows({"poison_ratio": [0.0, 0.2, 0.4]}, seeds=(1, 2, 3))
    rows["mean_test_acc"] = [0.9, 0.8, 0.7, 0.5, 0.6, 0.4, 0.02, 0.01, 0.03]
    return rows


def test_a_line_is_the_mean_over_seeds_in_percent(small):
    [figure] = accuracy(small)
    [axes] = figure.axes
    [line] = drawn(axes)
    assert line.get_xdata().tolist() == [0, 0.2, 0.4]
    assert np.allclose(line.get_ydata(), [80, 50, 2])
    assert axes.get_xlabel() == "Poison ratio ρ"
    assert axes.get_ylabel() == "Test accuracy (%)"


def test_the_band_is_the_95_percent_interval_cut_at_0_and_100(small):
    [figure] = accuracy(small)
    [band] = bands(figure.axes[0])
    half = 100 * T_2 * 0.1 / math.sqrt(3)  # deviation 0.1 at the first two ratios, 0.01 at the last
    ends = {tuple(np.round(vertex, 6)) for vertex in band.get_paths()[0].vertices}
    expected = {(0.0, 80 - half), (0.0, 100), (0.2, 50 - half), (0.2, 50 + half), (0.4, 0), (0.4, 2 + half / 10)}
    assert {(x, round(y, 6)) for x, y in expected} <= ends


def test_the_figure_is_named_for_its_phase_and_says_what_is_constant(small):
    [figure] = accuracy(small)
    assert figure.get_suptitle() == "attack"
    assert caption(figure) == (
        "in all rows: digits, CNN, width 8, depth 1, label flip, α = 1, order shuffle, FedAvg, batch size 32. "
        "3 seeds; bands: 95 % confidence interval"
    )


def test_where_the_plan_is_known_what_is_constant_is_so_in_the_plan(small, without):
    [figure] = accuracy_of(without(small, small["seed"] == 0))
    assert caption(figure) == (
        "digits, CNN, width 8, depth 1, label flip, α = 1, order shuffle, FedAvg, batch size 32. "
        "3 seeds; bands: 95 % confidence interval"
    )


@pytest.fixture
def no_alpha(make_rows, without):
    """A sweep over alpha and the aggregator of which all with alpha 0.1 failed; its rows and its cells."""
    grid = {"alpha": [100.0, 0.1], "aggregator": ["fedavg", "median"], "poison_ratio": [0.0, 0.3]}
    rows = make_rows(grid)
    lost = rows["alpha"] == 0.1
    return rows[~lost], without(rows, lost)


def marks(axes, marker):
    """The lines of some axes that are marks of cells without a mean."""
    return [line for line in axes.get_lines() if line.get_markerfacecolor() == "none" and line.get_marker() == marker]


def box(axes, x, y):
    """Where in its figure a place of the axes is: x as in the data, y as a share of the axes."""
    return axes.get_xaxis_transform().transform((x, y))


def test_cells_without_a_result_are_circles_below_all_values_and_named(no_alpha):
    _, cells = no_alpha
    [figure] = accuracy_of(cells)
    [axes] = figure.axes
    circles = marks(axes, "o")
    assert [line.get_xdata().tolist() for line in circles] == [[0, 0.3], [0, 0.3]]
    assert [to_hex(line.get_color()).upper() for line in circles] == [HUES[0], HUES[2]]
    assert legend_words(figure) == ["aggregator", "FedAvg", "median", "α", "0.1", "100"]
    assert caption(figure) == (
        "digits, CNN, width 8, depth 1, label flip, order shuffle, batch size 32. 3 seeds; bands: 95 % confidence "
        "interval. 12 of 24 runs have no result (12 failed): all with α = 0.1 (○: cell without a result)"
    )


def test_no_mark_lies_on_another_on_a_value_or_on_the_axis(make_rows, without):
    grid = {"alpha": [0.1, 1.0], "aggregator": ["fedavg", "median"], "poison_ratio": [0.0, 0.3]}
    grid["poison_type"] = ["label_flip", "random_noise"]
    rows = make_rows(grid)
    lost = rows["poison_ratio"] == 0.3
    rows.loc[lost & (rows["alpha"] == 1), ["outcome", "mean_test_acc"]] = ["diverged", np.nan]
    rows.loc[~lost, "mean_test_acc"] = [0.0, 0.01, 0.02] * 8  # the least values there are
    [figure] = accuracy_of(without(rows, lost & (rows["alpha"] == 0.1)))
    figure.canvas.draw()
    apart = 0
    for axes in figure.axes:
        every = [line for marker in "ox" for line in marks(axes, marker)]
        spots = [tuple(box(axes, *xy)) for line in every for xy in zip(*line.get_data(), strict=True)]
        apart += len(spots)
        gap = 72 / figure.dpi  # in pixels, of a point
        distances = [math.dist(one, other) * gap for one, other in combinations(spots, 2)]
        size = every[0].get_markersize()
        assert min(distances, default=size) >= size
        assert min(y for _, y in spots) - axes.bbox.y0 >= size / 2 / gap
        least = axes.transData.transform((0, 0))[1]
        assert max(y for _, y in spots) + size / 2 / gap < least
        assert all(tick >= -1 for tick in axes.get_yticks())  # no value is written beside the strip
    assert apart == 8


def test_the_strip_stays_small_with_many_lines_and_hides_no_mean(make_rows, without):
    rows = make_rows({"width_factor": list(range(1, 25)), "poison_ratio": [0.0, 0.3]}, seeds=(1,))
    [figure] = accuracy_of(without(rows, rows["poison_ratio"] == 0.3))
    [axes] = figure.axes
    heights = sorted(line.get_ydata()[0] for line in marks(axes, "o"))
    assert len(set(heights)) == 24
    assert 0 < heights[0] < heights[-1] < 0.34
    [strip] = [each for each in axes.patches]
    lowest = min(np.nanmin(line.get_ydata()) for line in axes.get_lines() if line not in marks(axes, "o"))
    figure.canvas.draw()
    foot = axes.transData.transform((0, lowest))[1]
    assert foot > strip.get_window_extent().y1


def test_without_such_cells_there_is_no_strip(small):
    [figure] = accuracy(small)
    assert list(figure.axes[0].patches) == []


def test_a_mark_is_explained_only_where_it_is_drawn(make_rows, without, monkeypatch):
    monkeypatch.setattr("fedsweep.report.accuracy.PANELS_ON_A_PAGE", 1)
    monkeypatch.setattr("fedsweep.report.panels.COLUMNS", 1)
    grid = {"alpha": [0.1, 1.0], "aggregator": ["fedavg", "median"], "poison_ratio": [0.0, 0.3]}
    rows = make_rows(grid | {"poison_type": ["label_flip", "random_noise"]})
    rows.loc[(rows["alpha"] == 1) & (rows["seed"] == 1), ["outcome", "mean_test_acc"]] = ["diverged", np.nan]
    first, second = accuracy_of(without(rows, (rows["alpha"] == 0.1) & (rows["poison_ratio"] == 0.3)))
    assert [("○" in caption(each), "×" in caption(each)) for each in (first, second)] == [(True, False), (False, False)]
    assert "8 diverged runs left out. 12 of 48 runs have no result" in caption(second)


def test_curves_say_which_cells_have_no_result(no_alpha, make_history):
    rows, cells = no_alpha
    rounds = rows[["signature", "outcome", *parameters(rows)]].merge(make_history(rows), on="signature")
    [figure] = curve_figures("attack", cells, rounds, scales([cells]))
    assert [axes.get_title() for axes in figure.axes] == ["α = 100", ""]
    assert "α" not in caption(figure).partition(". ")[0]
    assert caption(figure).endswith(
        "12 of 24 runs have no result (12 failed): all with α = 0.1 (a cell without a result has no curve)"
    )
    assert "○" not in caption(figure)


def test_the_legend_of_the_curves_names_what_has_none(make_rows, without, make_history):
    rows = make_rows({"aggregator": ["fedavg", "median"], "poison_ratio": [0.0, 0.3]})
    lost = rows["aggregator"] == "median"
    cells, rounds = without(rows, lost), rounds_of(rows[~lost], make_history(rows[~lost]))
    [figure] = curve_figures("attack", cells, rounds, scales([cells]))
    assert legend_words(figure) == ["poison ratio ρ", "0", "0.3", "aggregator", "FedAvg", "median (no result)"]
    assert [len(drawn(axes)) for axes in figure.axes] == [2, 2]


def test_curves_of_diverged_runs_explain_no_cross(make_rows, make_history):
    rows = make_rows({"poison_ratio": [0.0, 0.3]})
    rows.loc[rows["poison_ratio"] == 0.3, ["outcome", "mean_test_acc"]] = ["diverged", np.nan]
    [figure] = curve_figures("attack", summarise(rows), rounds_of(rows, make_history(rows)), scales([rows]))
    assert caption(figure).endswith(
        "3 diverged runs left out (a cell of which all diverged has its curve while that is finite)"
    )


def test_a_field_of_the_map_without_a_result_is_a_circle(make_rows, without):
    rows = make_rows({"width_factor": [4, 8], "depth": [1, 2]})
    lost = (rows["width_factor"] == 8) & (rows["depth"] == 2)
    [figure] = heat_figures("size", without(rows, lost))
    words = [text.get_text().partition("\n")[0] for text in figure.axes[0].texts]
    assert words.count("○") == 1
    assert "all with width 8, depth 2 (○: cell without a result)" in caption(figure)


def test_one_seed_has_no_band_and_says_so(make_rows):
    [figure] = accuracy(make_rows({"poison_ratio": [0.0, 0.3]}, seeds=(1,)))
    assert bands(figure.axes[0]) == []
    assert caption(figure).endswith("batch size 32. 1 seed")


def test_where_some_points_have_one_seed_the_caption_says_so(make_rows, without, make_history):
    rows = make_rows({"poison_ratio": [0.0, 0.2, 0.4]}, seeds=(1, 2, 3, 4))
    lost = (rows["poison_ratio"] == 0.4) & (rows["seed"] > 1)
    [figure] = accuracy_of(without(rows, lost))
    assert "1 to 4 seeds; bands: 95 % confidence interval; no band where there is one seed. 3 of 12 " in caption(figure)
    [figure] = accuracy_of(without(rows, lost & (rows["seed"] > 2)))
    assert "2 to 4 seeds; bands: 95 % confidence interval. 2 of 12 " in caption(figure)
    rows.loc[lost, ["outcome", "mean_test_acc"]] = ["diverged", np.nan]  # no part of the mean, like one that failed
    [figure] = accuracy(rows)
    assert "1 to 4 seeds; bands: 95 % confidence interval; no band where there is one seed. 3 diverged " in caption(
        figure
    )


def test_bars_and_deviations_are_not_called_bands(make_rows, without):
    rows = make_rows({"aggregator": ["fedavg", "median"], "poison_type": ["label_flip", "random_noise"]})
    [figure] = accuracy_of(without(rows, (rows["aggregator"] == "median") & (rows["seed"] > 1)))
    assert "1 to 3 seeds; bars: 95 % confidence interval; no bar where there is one seed." in caption(figure)
    rows = make_rows({"width_factor": [4, 8], "depth": [1, 2]})
    [figure] = heat_figures("size", without(rows, (rows["depth"] == 2) & (rows["seed"] > 1)))
    assert "1 to 3 seeds; ± standard deviation over seeds; no ± where there is one seed." in caption(figure)


def test_a_point_with_an_interval_between_points_without_has_a_bar(make_rows, without):
    rows = make_rows({"poison_ratio": [0.0, 0.2, 0.4, 0.6, 0.8]})
    [figure] = accuracy_of(without(rows, rows["poison_ratio"].isin([0.2]) & (rows["seed"] > 1)))
    band, bar = bands(figure.axes[0])
    assert [tuple(path.vertices[:, 0]) for path in bar.get_paths()] == [(0, 0)]
    assert {x for path in band.get_paths() for x in path.vertices[:, 0]} == {0.4, 0.6, 0.8}


@pytest.mark.parametrize("dataset", ["parquet:" + "d" * length for length in range(3, 43, 4)])
def test_no_line_of_the_caption_ends_within_a_name_and_its_value(make_rows, without, dataset):
    rows = make_rows({"alpha": [0.01, 0.1, 1.0], "poison_ratio": [0.0, 0.25]}, dataset=dataset, poison_label=3)
    lost = (rows["alpha"] == 0.01) | ((rows["poison_ratio"] == 0.25) & (rows["seed"] == 2))
    [figure] = accuracy_of(without(rows, lost))
    lines = figure.get_supxlabel().replace("\u00a0", " ").split("\n")
    assert len(lines) > 3
    for words in ("95\u00a0%", "1\u00a0of\u00a03", "(○:\u00a0cell"):
        assert words in figure.get_supxlabel()
    for words in (
        "width 8",
        "depth 1",
        "batch size 32",
        "α = 0.01",
        "α = 0.1",
        "ρ = 0.25",
        "2 to 3 seeds",
        "1 of 3",
        "○: cell",
    ):
        assert any(words in line for line in lines)
        assert caption(figure).count(words) == sum(line.count(words) for line in lines)


@pytest.fixture
def four_seeds(make_rows):
    grid = {"alpha": [0.07, 100.0], "width_factor": [4, 8], "poison_ratio": [0.0, 0.3]}
    return make_rows(grid, seeds=(1, 2, 3, 4))


def note(cells):
    """What the sentence on what is missing says after its count."""
    return coverage_note(cells, pair_of).partition(": ")[2]


def test_cells_that_lack_the_same_are_told_together(four_seeds, without):
    rows = four_seeds
    rough, few, wide, poisoned = (
        rows["alpha"] == 0.07,
        rows["seed"] > 1,
        rows["width_factor"] == 8,
        rows["poison_ratio"] > 0,
    )
    assert note(without(rows, rough & few)) == "3 of 4 in each cell with α = 0.07"
    assert note(without(rows, rough & wide & few)) == "3 of 4 in each cell with width 8, α = 0.07"
    assert note(without(rows, rough & wide & poisoned & few)) == "3 of 4 with width 8, ρ = 0.3, α = 0.07"
    assert note(without(rows, few)) == "3 of 4 in each cell"
    mixed = (rough & few) | (~rough & (rows["seed"] == 1))
    assert note(without(rows, mixed)) == "3 of 4 in each cell with α = 0.07; 1 of 4 in each cell with α = 100"


def test_a_value_is_not_said_of_cells_that_lack_another_number(four_seeds, without):
    rows = four_seeds
    rough, wide, poisoned = rows["alpha"] == 0.07, rows["width_factor"] == 8, rows["poison_ratio"] > 0
    assert note(without(rows, rough & (wide | (rows["seed"] > 1)))) == (
        "all with width 8, α = 0.07; 3 of 4 in each cell with width 4, α = 0.07"
    )
    last = rough & wide & poisoned
    assert note(without(rows, rough & (rows["seed"] > 1) & ~(last & (rows["seed"] == 2)))) == (
        "3 of 4 in each cell with width 4, α = 0.07; 3 of 4 in each cell with ρ = 0, α = 0.07; "
        "2 of 4 with width 8, ρ = 0.3, α = 0.07"
    )


def test_of_one_cell_alone_the_count_says_all(make_rows, without):
    rows = make_rows({})
    assert coverage_note(without(rows, rows["seed"] == 1), pair_of) == "1 of 3 runs has no result (1 failed)"


def test_every_cell_has_its_line_colour_by_one_parameter_and_dashes_by_another(make_rows):
    grid = {
        "aggregator": ["fedavg", "median"],
        "poison_type": ["label_flip", "random_noise"],
        "poison_ratio": [0.0, 0.3],
    }
    [figure] = accuracy(make_rows(grid))
    [axes] = figure.axes
    looks = {(to_hex(line.get_color()).upper(), line.get_linestyle(), line.get_marker()) for line in drawn(axes)}
    assert looks == {(HUES[0], "-", "o"), (HUES[0], "--", "s"), (HUES[2], "-", "o"), (HUES[2], "--", "s")}
    assert legend_words(figure) == ["aggregator", "FedAvg", "median", "attack", "label flip", "random noise"]


def test_a_third_parameter_is_spread_over_panels(make_rows):
    grid = {
        "model_type": ["cnn", "lr"],
        "aggregator": ["fedavg", "median"],
        "poison_type": ["label_flip", "random_noise"],
        "poison_ratio": [0.0, 0.1, 0.2, 0.3, 0.4],
    }
    [figure] = accuracy(make_rows(grid, seeds=(1, 2, 3, 4, 5)))
    assert [axes.get_title() for axes in figure.axes] == ["CNN", "LR"]
    assert [len(drawn(axes)) for axes in figure.axes] == [4, 4]
    assert [axes.get_ylabel() for axes in figure.axes] == ["Test accuracy (%)", ""]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


def test_no_axes_are_crowded_and_no_point_is_lost_in_a_large_grid(make_rows):
    grid = {
        "width_factor": [1, 4, 16, 64],
        "depth": [1, 2, 4, 8],
        "poison_ratio": [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5],
    }
    rows = make_rows(grid, seeds=(1, 2, 3, 4, 5))
    [figure] = accuracy(rows)
    assert [axes.get_title() for axes in figure.axes] == ["depth 1", "depth 2", "depth 4", "depth 8"]
    points = [
        (x, round(y, 9)) for axes in figure.axes for line in drawn(axes) for x, y in zip(*line.get_data(), strict=True)
    ]
    means = rows.groupby(["width_factor", "depth", "poison_ratio"])["mean_test_acc"].mean().reset_index()
    expected = [(ratio, round(100 * mean, 9)) for ratio, mean in means[["poison_ratio", "mean_test_acc"]].to_numpy()]
    assert sorted(points) == sorted(expected)


def test_many_panels_go_to_several_pages(make_rows):
    grid = {
        "width_factor": [1, 2, 4],
        "depth": [1, 2, 3],
        "alpha": [0.1, 1.0, 10.0],
        "num_clients": [5, 10, 20],
        "poison_ratio": [0, 0.3],
    }
    figures = accuracy(make_rows(grid, seeds=(1, 2)))
    titles = [axes.get_title() for figure in figures for axes in figure.axes]
    assert len(titles) == len(set(titles)) == 27
    assert [len(figure.axes) for figure in figures] == [12, 12, 3]
    assert [figure.get_suptitle() for figure in figures] == [f"attack ({page} of 3)" for page in (1, 2, 3)]


def test_the_order_of_numbers_is_the_order_of_brightness(make_rows):
    [figure] = accuracy(make_rows({"alpha": [10.0, 0.1, 1.0], "poison_ratio": [0, 0.3]}))
    assert legend_words(figure) == ["α", "0.1", "1", "10"]
    brightness = [np.dot(line.get_color()[:3], [0.3, 0.6, 0.1]) for line in drawn(figure.axes[0])]
    assert brightness == sorted(brightness)
    assert brightness[-1] < 0.8


def test_a_value_has_the_same_colour_in_every_figure_of_a_report(make_rows):
    both = summarise(make_rows({"width_factor": [4, 16, 64], "poison_ratio": [0, 0.3]}))
    some = summarise(make_rows({"width_factor": [16, 64], "poison_ratio": [0, 0.3]}))
    common = scales([both, some])
    [one], [other] = (list(accuracy_figures("p", each, common)) for each in (both, some))
    colours = [[line.get_color() for line in drawn(figure.axes[0])] for figure in (one, other)]
    assert colours[1] == colours[0][1:]


def test_words_have_the_same_colour_in_every_report(make_rows):
    [figure] = accuracy(make_rows({"aggregator": ["median", "fedavg_uniform"], "poison_ratio": [0, 0.3]}))
    assert [to_hex(line.get_color()).upper() for line in drawn(figure.axes[0])] == [HUES[1], HUES[2]]


def test_diverged_cells_are_crosses_below_the_values_and_gaps_in_the_line(small):
    lost = small["poison_ratio"] == 0.2
    small.loc[lost, "outcome"] = "diverged"
    small.loc[lost, ["mean_test_acc", "mean_val_acc"]] = np.nan
    [figure] = accuracy(small)
    [axes] = figure.axes
    [line] = drawn(axes)
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False]
    [cross] = [each for each in axes.get_lines() if each.get_marker() == "x"]
    assert cross.get_xdata().tolist() == [0.2]
    assert "3 diverged runs left out (×: all of a cell)" in caption(figure)


def test_if_all_diverged_there_is_still_a_figure(small):
    small["outcome"] = "diverged"
    small["mean_test_acc"] = np.nan
    [figure] = accuracy(small)
    figure.canvas.draw()


def test_a_line_of_one_point_has_a_bar(make_rows):
    rows = make_rows({"aggregator": ["fedavg", "median"], "poison_ratio": [0.0, 0.3]})
    [figure] = accuracy(rows[(rows["aggregator"] == "fedavg") | (rows["poison_ratio"] == 0)])
    lengths = [int(np.isfinite(line.get_ydata()).sum()) for line in drawn(figure.axes[0])]
    assert lengths == [2, 1]
    assert len(bands(figure.axes[0])) == 2  # a band and a bar


def test_where_the_ratio_is_constant_another_number_is_on_the_axis(make_rows):
    rows = make_rows({"alpha": [0.1, 1.0, 10.0, 100.0], "aggregator": ["fedavg", "median"]}, poison_ratio=0.3)
    [figure] = accuracy(rows)
    [axes] = figure.axes
    assert axes.get_xlabel() == "α"
    assert axes.get_xscale() == "log"
    assert "depth 1, ρ = 0.3, label flip" in caption(figure)
    assert drawn(axes)[0].get_xdata().tolist() == [0.1, 1, 10, 100]


def test_where_only_words_vary_points_stand_side_by_side(make_rows):
    rows = make_rows(
        {"poison_type": ["label_flip", "random_noise"], "aggregator": ["fedavg", "median"]}, poison_ratio=0.3
    )
    [figure] = accuracy(rows)
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["label flip", "random noise"]
    assert {line.get_linestyle() for line in drawn(axes)} == {"None"}
    places = sorted(place for line in drawn(axes) for place in line.get_xdata())
    assert len(set(places)) == 4
    assert "bars: 95 % confidence interval" in caption(figure)


def test_one_cell_alone_is_a_point(make_rows):
    [figure] = accuracy(make_rows({}, seeds=(1,)))
    assert drawn(figure.axes[0])[0].get_xdata().tolist() == [0]
    assert legend_words(figure) == []


def test_close_ratios_have_ticks_but_not_touching_labels(make_rows):
    [figure] = accuracy(make_rows({"poison_ratio": [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]}))
    figure.canvas.draw()
    labels = figure.axes[0].get_xticklabels()
    assert len(labels) == 7
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    assert len(boxes) >= 3
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_wide_bands_do_not_dwarf_the_lines():
    means, low, high = np.array([90.0, 80, 50]), np.array([88.0, 20, 0]), np.array([92.0, 100, 100])
    bottom, top = limits(means, low, high, least=10)
    assert (bottom, top) == pytest.approx((30 - 0.04 * 70, 100 + 0.04 * 70))  # 50 - 40 / 2, and the end of the band
    assert limits(np.array([np.nan]), low[:1], high[:1], least=10) is None
    bottom, top = limits(np.array([90.0]), np.array([np.nan]), np.array([np.nan]), least=10)
    assert bottom < 90 < top


# ------------------------------------------------------------------------------------------------------- heat maps


def test_every_field_of_the_map_is_annotated_with_mean_and_deviation(make_rows):
    rows = make_rows({"width_factor": [1, 4, 16], "depth": [1, 2]})
    summary = summarise(rows)
    [figure] = heat_figures("size", summary)
    axes, bar = figure.axes
    means = axes.get_images()[0].get_array()
    assert means.shape == (2, 3)
    words = {text.get_position(): text.get_text() for text in axes.texts}
    for cell in summary.to_dict("records"):
        place = [1, 4, 16].index(cell["width_factor"]), [1, 2].index(cell["depth"])
        assert means[place[1], place[0]] == pytest.approx(100 * cell["mean_test_acc"])
        assert words[place] == f"{100 * cell['mean_test_acc']:.1f}\n± {100 * cell['std_test_acc']:.1f}"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "16"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Width (channels or units)", "Depth (blocks)")
    assert bar.get_ylabel() == "Test accuracy (%)"
    assert axes.get_images()[0].origin == "lower"


def test_a_map_for_each_ratio_with_one_colour_scale(make_rows):
    ratios = [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]
    [figure] = heat_figures(
        "size", summarise(make_rows({"width_factor": [1, 4, 16, 64], "depth": [1, 2, 4, 8], "poison_ratio": ratios}))
    )
    maps = [axes for axes in figure.axes if axes.get_images() and axes.get_title()]
    assert [axes.get_title() for axes in maps] == [f"ρ = {ratio:g}" for ratio in ratios]
    assert len({axes.get_images()[0].get_clim() for axes in maps}) == 1


def test_a_missing_field_is_empty_and_a_diverged_one_says_so(make_rows):
    rows = make_rows({"width_factor": [1, 4], "depth": [1, 2]})
    lost = (rows["width_factor"] == 1) & (rows["depth"] == 1)
    rows.loc[lost, "outcome"] = "diverged"
    rows.loc[lost, "mean_test_acc"] = np.nan
    [figure] = heat_figures("size", summarise(rows[(rows["width_factor"] == 1) | (rows["depth"] == 1)]))
    words = {text.get_position(): text.get_text().split("\n")[0] for text in figure.axes[0].texts}
    assert set(words) == {(0, 0), (1, 0), (0, 1)}
    assert words[0, 0] == "div."
    figure.canvas.draw()


def test_words_stand_out_from_their_field(make_rows):
    rows = make_rows({"width_factor": [1, 4, 16], "depth": [1, 2], "poison_ratio": [0, 0.3, 0.6]})
    [figure] = heat_figures("size", summarise(rows))
    for axes in figure.axes[:3]:
        image = axes.get_images()[0]
        for text in axes.texts:
            column, row = text.get_position()
            field, word = (
                np.dot(colour[:3], [0.2126, 0.7152, 0.0722]) ** 2.2
                for colour in (
                    image.cmap(image.norm(image.get_array()[row, column])),
                    matplotlib.colors.to_rgb(text.get_color()),
                )
            )
            light, dark = max(field, word), min(field, word)
            assert (light + 0.05) / (dark + 0.05) > 3


def test_a_large_map_shows_means_only(make_rows):
    [figure] = heat_figures(
        "size", summarise(make_rows({"width_factor": [1, 2, 4, 8, 16, 32], "depth": [1, 2, 3, 4, 5, 6]}))
    )
    assert all("±" not in text.get_text() for text in figure.axes[0].texts)


# ---------------------------------------------------------------------------------------------------------- curves


def rounds_of(rows, history):
    return rows[["signature", "phase", "outcome", "seed", *parameters(rows)]].merge(
        history.drop(columns="seed"), on="signature"
    )


def test_a_curve_is_the_mean_over_seeds_with_its_interval():
    rounds = pd.DataFrame(
        {"outcome": "ok", "seed": [1, 1, 2, 2, 3, 3], "round": [1, 2] * 3, "val_acc": [0.1, 0.7, 0.2, 0.8, 0.3, 0.9]}
    )
    table = over_seeds(rounds, "val_acc")
    assert table.index.tolist() == [1, 2]
    assert table["mean"].tolist() == pytest.approx([0.2, 0.8])
    assert table["half"].tolist() == pytest.approx([T_2 * 0.1 / math.sqrt(3)] * 2)


def test_a_curve_goes_as_far_as_every_seed_went():
    rounds = pd.DataFrame({"outcome": "ok", "seed": [1, 1, 1, 2, 2], "round": [1, 2, 3, 1, 2], "val_acc": 0.5})
    assert over_seeds(rounds, "val_acc").index.tolist() == [1, 2]


def test_diverged_runs_do_not_cut_the_curve_of_the_others():
    rounds = pd.DataFrame(
        {"outcome": ["ok", "ok", "diverged"], "seed": [1, 1, 2], "round": [1, 2, 1], "val_loss": [0.5, 0.4, np.nan]}
    )
    assert over_seeds(rounds, "val_loss")["mean"].tolist() == [0.5, 0.4]
    assert np.isnan(over_seeds(rounds.iloc[2:], "val_loss")["mean"]).all()


def test_a_loss_that_is_not_finite_is_a_gap():
    rounds = pd.DataFrame(
        {"outcome": "ok", "seed": [1, 1, 1, 2, 2, 2], "round": [1, 2, 3] * 2, "val_loss": [1, np.nan, 2] + [3] * 3}
    )
    assert over_seeds(rounds, "val_loss")["mean"].isna().tolist() == [False, True, False]


def test_accuracy_stands_above_loss_with_a_line_for_each_cell(make_rows, make_history):
    rows = make_rows({"model_type": ["cnn", "lr"], "poison_ratio": [0, 0.2, 0.4], "aggregator": ["fedavg", "median"]})
    rounds = rounds_of(rows, make_history(rows, 8))
    [figure] = curve_figures("attack", summarise(rows), rounds, scales([rows]))
    assert [axes.get_ylabel().replace("\n", " ") for axes in figure.axes] == [
        "Validation accuracy (%)", "", "Validation loss (nats)", "",
    ]  # fmt: skip
    assert [axes.get_title() for axes in figure.axes] == ["CNN", "LR", "", ""]
    assert [len(drawn(axes)) for axes in figure.axes] == [6] * 4
    first = rounds[(rounds["model_type"] == "cnn") & (rounds["poison_ratio"] == 0) & (rounds["aggregator"] == "fedavg")]
    assert np.allclose(drawn(figure.axes[0])[0].get_ydata(), 100 * first.groupby("round")["val_acc"].mean())
    assert np.allclose(drawn(figure.axes[2])[0].get_ydata(), first.groupby("round")["val_loss"].mean())
    assert legend_words(figure) == ["poison ratio ρ", "0", "0.2", "0.4", "aggregator", "FedAvg", "median"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "Round", "Round"]


def test_of_a_very_large_grid_not_all_curves_are_drawn_and_the_last_page_says_so(make_rows, make_history, monkeypatch):
    monkeypatch.setattr("fedsweep.report.curves.MOST_PANELS", 5)
    monkeypatch.setattr("fedsweep.report.curves.PANELS_ON_A_PAGE", 3)
    rows = make_rows({"width_factor": [1, 2, 4], "depth": [1, 2, 3], "poison_ratio": [0, 0.2, 0.4]}, seeds=(1,))
    figures = list(curve_figures("attack", summarise(rows), rounds_of(rows, make_history(rows, 2)), scales([rows])))
    assert [sum(bool(axes.get_title()) for axes in figure.axes) for figure in figures] == [3, 2]
    assert "panels" not in caption(figures[0])
    assert "4 more panels are not drawn; their rounds are in history.parquet" in caption(figures[1])


def test_a_loss_of_many_sizes_has_a_logarithmic_axis(make_rows, make_history):
    rows = make_rows({"poison_ratio": [0, 0.4]})
    rounds = rounds_of(rows, make_history(rows, 8))
    rounds.loc[rounds["poison_ratio"] == 0.4, "val_loss"] *= 100
    [figure] = curve_figures("attack", summarise(rows), rounds, scales([rows]))
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log"]
    assert [axes.get_ylabel().replace("\n", " ") for axes in figure.axes] == [
        "Validation accuracy (%)", "Validation loss (nats, log scale)",
    ]  # fmt: skip


def test_wide_bands_do_not_dwarf_the_curves(make_rows, make_history):
    rows = make_rows({"poison_ratio": [0, 0.4]}, seeds=(1, 2))
    rounds = rounds_of(rows, make_history(rows, 8))
    rounds.loc[rounds["seed"] == 2, "val_loss"] += 1  # with two seeds t is 12.7, so the half width is 6.4
    [figure] = curve_figures("attack", summarise(rows), rounds, scales([rows]))
    highest = max(line.get_ydata().max() for line in drawn(figure.axes[1]))
    assert figure.axes[1].get_ylim()[1] < 1.7 * highest


# ----------------------------------------------------------------------------------------------------------- roles


def test_roles_put_together_what_is_compared(make_rows):
    grid = {
        "aggregator": ["fedavg", "median"],
        "poison_level": ["sample", "client"],
        "alpha": [0.1, 100.0],
        "poison_ratio": [0, 0.3],
    }
    roles = assign(summarise(make_rows(grid)), taken=("poison_ratio",))
    assert (roles.colour, roles.style, roles.panels) == ("aggregator", "poison_level", ("alpha",))


def test_a_parameter_with_many_words_is_spread_over_panels(make_rows):
    datasets = [f"parquet:set{number}" for number in range(12)]
    roles = assign(summarise(make_rows({"dataset": datasets, "poison_ratio": [0, 0.3]})), taken=("poison_ratio",))
    assert (roles.colour, roles.panels) == (None, ("dataset",))
