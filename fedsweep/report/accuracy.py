"""Test accuracy against the poison ratio."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsweep.report.coverage import runs
from fedsweep.report.labels import axis_of, is_empty, is_numeric, levels, value_of, varying
from fedsweep.report.look import ACCURACY_LEAST, FAINT, Scales, limits, new_figure, outer_labels, percent
from fedsweep.report.panels import (
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
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_ON_A_PAGE = 12
MOST_TICKS = 12
LABEL_ROOM = 0.045  # of the axis, for each character of its longest label
DIVERGED, BARE = "x", "o"  # the mark, at the foot, of a cell all of whose runs diverged, and of one without any row
ASIDE = 0.12  # how far apart points of one word stand
LOG_FROM = 8.0  # an axis whose last value is that many times its first is logarithmic


@dataclass(frozen=True)
class XAxis:
    """The parameter along the horizontal axis."""

    parameter: str
    levels: list[Any]

    @property
    def is_continuous(self) -> bool:
        """Whether the values are numbers, whose points are joined; if not, they stand side by side."""
        return is_numeric(self.parameter) and None not in self.levels

    @property
    def is_logarithmic(self) -> bool:
        """Whether the numbers span so much that their ratios count and not their differences."""
        return self.is_continuous and self.levels[0] > 0 and self.levels[-1] >= LOG_FROM * self.levels[0]

    def place(self, value: Any) -> float:
        """Where on the axis a value lies."""
        return float(value) if self.is_continuous else float(self.levels.index(None if is_empty(value) else value))


def accuracy_figures(phase: str, cells: pd.DataFrame, scales: Scales) -> Iterator[Figure]:
    """Mean test accuracy against the poison ratio, a line for each cell, with its 95 % interval over seeds.

    Where the ratio does not vary, another parameter takes its place on the axis: the numeric one with most values, or
    else one of words, whose points are not joined.
    """
    x = _x_axis(cells)
    roles = assign(cells, taken=(x.parameter,))
    every = panels(cells, roles.panels)
    columns = columns_for(cells, roles.panels, len(every))
    for title, page in pages(phase, every, columns, PANELS_ON_A_PAGE):
        yield _page(title, cells, page, columns, x, roles, scales)


def _x_axis(cells: pd.DataFrame) -> XAxis:
    names = varying(cells)
    axes = [XAxis(name, levels(name, cells[name])) for name in names or ["poison_ratio"]]
    ratio = next((each for each in axes if each.parameter == "poison_ratio"), None)
    return ratio or max(axes, key=lambda each: (each.is_continuous, len(each.levels) if each.is_continuous else 0))


def _page(
    title: str, cells: pd.DataFrame, page: Sequence[Panel], columns: int, x: XAxis, roles: Roles, scales: Scales
) -> Figure:
    rows = math.ceil(len(page) / columns)
    figure = new_figure(width_of(columns, roles), (2.5 if rows == 1 else 1.75 * rows) + 0.6)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, panel in zip(grid, page, strict=False):
        _draw_panel(axes, panel, x, roles, scales)
    for unused in grid[len(page) :]:
        unused.remove()
    outer_labels(grid[: len(page)], columns, axis_of(x.parameter), "Test accuracy (%)")
    _set_x_axis(grid[0], x)
    _set_y_limits(grid[0], cells)
    legend(figure, cells, roles, scales, "line and marker" if x.is_continuous else "marker")
    caption(figure, title, cells, f"{'bands' if x.is_continuous else 'bars'}: 95 % confidence interval")
    return figure


def _draw_panel(axes: Axes, panel: Panel, x: XAxis, roles: Roles, scales: Scales) -> None:
    axes.set_title(panel.title)
    every = list(lines(panel, roles))
    for number, (values, own) in enumerate(every):
        aside = 0.0 if x.is_continuous else ASIDE * (number - (len(every) - 1) / 2)
        own = own.assign(place=[x.place(value) + aside for value in own[x.parameter]]).sort_values("place")
        _draw_line(axes, own, x, look(roles, values, scales))


def _draw_line(axes: Axes, own: pd.DataFrame, x: XAxis, appearance: dict[str, Any]) -> None:
    places, colour = own["place"].to_numpy(float), appearance["color"]
    means = np.array([percent(share) for share in own["mean_test_acc"]])
    halves = np.array([percent(share) for share in own["ci95_test_acc"]])
    axes.plot(places, means, **appearance | ({} if x.is_continuous else {"linestyle": "none"}))
    if np.isfinite(halves).any():
        low, high = np.clip(means - halves, 0, 100), np.clip(means + halves, 0, 100)
        if x.is_continuous and np.isfinite(means).sum() > 1:
            axes.fill_between(places, low, high, color=colour, alpha=FAINT, linewidth=0)
        else:
            axes.vlines(places, low, high, color=colour, linewidth=0.9)
    are_bare, are_lost = runs(own).to_numpy() == 0, own["n_seeds"].to_numpy() == 0
    for marker, at in ((DIVERGED, places[are_lost & ~are_bare]), (BARE, places[are_bare])):
        foot = axes.get_xaxis_transform()
        shape: dict[str, Any] = {"marker": marker, "linestyle": "none", "markersize": 5, "markerfacecolor": "none"}
        if len(at):
            axes.plot(at, np.zeros(len(at)), color=colour, transform=foot, clip_on=False, **shape)


def _set_x_axis(axes: Axes, x: XAxis) -> None:
    if not x.is_continuous:
        axes.set_xticks(range(len(x.levels)), [value_of(x.parameter, value) for value in x.levels])
        axes.set_xlim(-0.5, len(x.levels) - 0.5)
        return
    places = np.array([x.place(value) for value in x.levels])
    if x.is_logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
    if len(places) <= MOST_TICKS:
        distances = np.log(places) if x.is_logarithmic else places
        axes.set_xticks(places, _spaced([f"{place:g}" for place in places], distances))


def _spaced(labels: list[str], places: npt.NDArray[np.float64]) -> list[str]:
    """The labels without those that would touch the one before; the first always stays."""
    room = LABEL_ROOM * max(map(len, labels)) * (places[-1] - places[0])
    last = -np.inf
    for number, place in enumerate(places):
        if place - last < room:
            labels[number] = ""
        else:
            last = place
    return labels


def _set_y_limits(axes: Axes, cells: pd.DataFrame) -> None:
    means = 100 * cells["mean_test_acc"].to_numpy(float)
    halves = 100 * cells["ci95_test_acc"].to_numpy(float)
    ends = limits(means, np.clip(means - halves, 0, 100), np.clip(means + halves, 0, 100), ACCURACY_LEAST)
    if ends:
        axes.set_ylim(ends)
