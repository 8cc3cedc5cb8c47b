"""Validation accuracy and loss against the round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedsweep.report.coverage import lacking
from fedsweep.report.look import ACCURACY_LEAST, FAINT, Numbers, Scales, limits, new_figure, outer_labels
from fedsweep.report.panels import (
    BAND,
    Marks,
    Panel,
    Roles,
    assign,
    caption,
    columns_for,
    legend,
    lines,
    look,
    pages,
    panels,
    width_of,
    without_result,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_ON_A_PAGE = 8
MOST_PANELS = 48
METRICS = {"val_acc": "Validation\naccuracy (%)", "val_loss": "Validation\nloss (nats)"}
LOG_LOSS = "Validation loss\n(nats, log scale)"
MARKS = Marks(
    diverged="a cell of which all diverged has its curve while that is finite",
    bare="a cell without a result has no curve",
)
LOG_FROM = 30.0  # a loss axis whose largest value is that many times its least is logarithmic


def curve_figures(phase: str, cells: pd.DataFrame, rounds: pd.DataFrame, scales: Scales) -> Iterator[Figure]:
    """Validation accuracy (above) and loss (below) after each round: the mean over seeds with its 95 % interval.

    A line goes as far as every seed of its cell went, for beyond that the mean is of the seeds that stopped late.
    Diverged runs are left out where the cell has others. Of a very large grid the first panels are drawn, and the last
    page says how many are not.
    """
    known = cells if lacking(cells).any() else rounds
    roles = assign(known, first=("poison_ratio",))
    every = panels(rounds, roles.panels)
    hidden = len(every) - MOST_PANELS
    columns = columns_for(rounds, roles.panels, len(every))
    for title, page in pages(phase, every[:MOST_PANELS], columns, PANELS_ON_A_PAGE):
        is_cut = hidden > 0 and page[-1] is every[MOST_PANELS - 1]
        note = f"{hidden} more panels are not drawn; their rounds are in history.parquet" if is_cut else ""
        yield _page(title, cells, known, page, columns, roles, scales, note)


def over_seeds(rounds: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Of one cell: for each round that every seed reached, the `mean` and the `half` width of its 95 % interval.

    The interval is Student's t with n - 1 degrees of freedom; `half` is NaN for one seed. Where a seed's value is not
    finite, both are NaN.
    """
    from scipy.special import stdtrit

    sound = rounds[rounds["outcome"] != "diverged"]
    rounds = sound if len(sound) else rounds
    last = rounds.groupby("seed")["round"].max().min()
    table = rounds[rounds["round"] <= last].pivot_table(index="round", columns="seed", values=metric, dropna=False)
    count = table.shape[1]
    half = (
        stdtrit(count - 1, 0.975) * table.std(axis=1, ddof=1, skipna=False) / math.sqrt(count) if count > 1 else np.nan
    )
    means: pd.DataFrame = table.mean(axis=1, skipna=False).to_frame("mean")
    return means.assign(half=half)


def _page(
    title: str,
    cells: pd.DataFrame,
    known: pd.DataFrame,
    page: Sequence[Panel],
    columns: int,
    roles: Roles,
    scales: Scales,
    note: str,
) -> Figure:
    from matplotlib.ticker import MaxNLocator

    blocks = math.ceil(len(page) / columns)
    figure = new_figure(width_of(columns, roles), blocks * 2.9 + 0.6)
    grid = figure.subplots(2 * blocks, columns, sharex=True, squeeze=False)
    for offset, (metric, label) in enumerate(METRICS.items()):
        axes = list(grid[offset::2].flat)
        drawn = [_draw(each, panel, metric, roles, scales) for each, panel in zip(axes, page, strict=False)]
        _share_limits(axes, metric, np.concatenate(drawn, axis=1))
        for unused in axes[len(page) :]:
            unused.remove()
        words = LOG_LOSS if axes[0].get_yscale() == "log" else label
        outer_labels(axes[: len(page)], columns, "Round" if metric == "val_loss" else "", words)
    for axes, panel in zip(grid[::2].flat, page, strict=False):
        axes.set_title(panel.title)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    legend(figure, known, roles, scales, "line", without_result(cells, roles))
    caption(figure, title, cells, BAND, note, marks=MARKS, page=[Panel("", cells)])
    return figure


def _draw(axes: Axes, panel: Panel, metric: str, roles: Roles, scales: Scales) -> Numbers:
    """Draw the lines of a panel; their means and the ends of their bands [3, points]."""
    factor, top = (100.0, 100.0) if metric == "val_acc" else (1.0, np.inf)
    drawn = []
    for values, own in lines(panel, roles):
        appearance = look(roles, values, scales)
        table = factor * over_seeds(own, metric)
        means, halves = table["mean"].to_numpy(float), table["half"].to_numpy(float)
        low, high = np.clip(means - halves, 0, top), np.clip(means + halves, 0, top)
        marker = "." if len(table) == 1 else ""
        axes.plot(table.index, means, **appearance | {"marker": marker})
        if np.isfinite(halves).any():
            axes.fill_between(table.index, low, high, color=appearance["color"], alpha=FAINT, linewidth=0)
        drawn.append(np.stack([means, low, high]))
    return np.concatenate(drawn, axis=1)


def _share_limits(axes: Sequence[Axes], metric: str, drawn: Numbers) -> None:
    """One scale for all panels."""
    means, low, high = drawn
    if not np.isfinite(means).any():
        return
    lowest, highest = float(np.nanmin(means)), float(np.nanmax(means))
    ends = limits(means, low, high, ACCURACY_LEAST if metric == "val_acc" else highest / 2)
    is_log = metric == "val_loss" and 0 < lowest < highest / LOG_FROM
    for each in axes:
        if is_log:
            each.set_yscale("log")
            each.set_ylim(lowest / 1.5, highest * 1.5)
        else:
            each.set_ylim(ends)
