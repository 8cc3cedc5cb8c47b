"""Test accuracy against the poison ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsweep.report.labels import axis_of, is_empty, is_numeric, levels, value_of, varying
from fedsweep.report.look import ACCURACY_LEAST, FAINT, Numbers, Scales, limits, new_figure, outer_labels, percent
from fedsweep.report.panels import (
    BAND,
    BAR,
    Marks,
    Panel,
    Roles,
    assign,
    caption,
    columns_for,
    is_bare,
    is_lost,
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
DIVERGED, BARE = "x", "o"  # the mark of a cell all of whose runs diverged, and of one without any row
MARKS = Marks(diverged="×: all of a cell", bare="○: cell without a result")
MARK_SIZE = 5.0
MARK_ROOM, MOST_ROOM = 0.055, 0.33  # of the axis: for a row of marks, and for all of them
STRIP = "#F0F0F0"
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


@dataclass(frozen=True)
class Series:
    """The cells of one line, with their `place` on the axis, and how it looks."""

    cells: pd.DataFrame
    appearance: dict[str, Any]

    @property
    def places(self) -> Numbers:
        """Where on the axis each cell lies."""
        return np.asarray(self.cells["place"], float)

    @property
    def bare(self) -> Numbers:
        """The places of the cells without any row."""
        return self._where(is_bare)

    @property
    def lost(self) -> Numbers:
        """The places of the cells all of whose runs diverged."""
        return self._where(is_lost)

    def _where(self, which: Callable[[pd.DataFrame], pd.Series]) -> Numbers:
        found: Numbers = self.places[which(self.cells).to_numpy(bool)]
        return found

    @property
    def is_marked(self) -> bool:
        """Whether any cell has no mean."""
        return len(self.bare) + len(self.lost) > 0


def accuracy_figures(phase: str, cells: pd.DataFrame, scales: Scales) -> Iterator[Figure]:
    """Mean test accuracy against the poison ratio, a line for each cell, with its 95 % interval over seeds.

    Cells without a mean are marks in a grey strip below all values, a row for each line that has such cells.

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
    series = [_series(panel, x, roles, scales) for panel in page]
    marks = max(_rows_of_marks(each, x) for each in series)
    for axes, panel, own in zip(grid, page, series, strict=False):
        axes.set_title(panel.title)
        for each in own:
            _draw_line(axes, each, x)
        _draw_marks(axes, own, x, marks)
    for unused in grid[len(page) :]:
        unused.remove()
    outer_labels(grid[: len(page)], columns, axis_of(x.parameter), "Test accuracy (%)")
    _set_x_axis(grid[0], x)
    _set_y_axis(grid[0], cells, _height(marks))
    legend(figure, cells, roles, scales, "line and marker" if x.is_continuous else "marker")
    caption(figure, title, cells, BAND if x.is_continuous else BAR, marks=MARKS, page=page)
    return figure


def _series(panel: Panel, x: XAxis, roles: Roles, scales: Scales) -> list[Series]:
    """The lines of a panel; those of words stand beside each other."""
    every = list(lines(panel, roles))
    found = []
    for number, (values, own) in enumerate(every):
        aside = 0.0 if x.is_continuous else ASIDE * (number - (len(every) - 1) / 2)
        own = own.assign(place=[x.place(value) + aside for value in own[x.parameter]]).sort_values("place")
        found.append(Series(own, look(roles, values, scales)))
    return found


def _draw_line(axes: Axes, series: Series, x: XAxis) -> None:
    own, colour = series.cells, series.appearance["color"]
    places = series.places
    means = np.array([percent(share) for share in own["mean_test_acc"]])
    halves = np.array([percent(share) for share in own["ci95_test_acc"]])
    axes.plot(places, means, **series.appearance | ({} if x.is_continuous else {"linestyle": "none"}))
    low, high = np.clip(means - halves, 0, 100), np.clip(means + halves, 0, 100)
    has_ends = np.isfinite(halves)
    is_banded = has_ends & _beside(has_ends) & x.is_continuous
    if is_banded.any():
        axes.fill_between(places, low, high, color=colour, alpha=FAINT, linewidth=0, where=is_banded)
    if (is_barred := has_ends & ~is_banded).any():  # a band of one point would have no width
        axes.vlines(places[is_barred], low[is_barred], high[is_barred], color=colour, linewidth=0.9)


def _beside(those: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which places have one of those right before or after them."""
    padded = np.pad(those, 1)
    return padded[:-2] | padded[2:]


def _rows_of_marks(every: Sequence[Series], x: XAxis) -> int:
    """How many rows keep the marks of a panel apart; points that stand beside each other need one."""
    count = sum(series.is_marked for series in every)
    return count if x.is_continuous else min(count, 1)


def _height(rows: int) -> float:
    """How much of the axis the strip with that many rows of marks takes."""
    return min(rows * MARK_ROOM, MOST_ROOM)


def _draw_marks(axes: Axes, every: Sequence[Series], x: XAxis, rows: int) -> None:
    """The strip below the values, and in it the cells of these lines that have none."""
    from matplotlib.patches import Rectangle

    if not rows:
        return
    height, foot = _height(rows), axes.get_xaxis_transform()
    strip = Rectangle((0, 0), 1, height, color=STRIP, linewidth=0, transform=axes.transAxes, zorder=2.2)
    axes.add_patch(strip)  # over the ends of the bands
    size = MARK_SIZE * height / (rows * MARK_ROOM)
    for number, series in enumerate(series for series in every if series.is_marked):
        at = height * (1 - ((number if x.is_continuous else 0) + 0.5) / rows)
        for marker, places in ((DIVERGED, series.lost), (BARE, series.bare)):
            shape: dict[str, Any] = {"marker": marker, "linestyle": "none", "markersize": size, "zorder": 2.3}
            if len(places):
                colour = series.appearance["color"]
                axes.plot(
                    places, np.full(len(places), at), color=colour, transform=foot, markerfacecolor="none", **shape
                )


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


def _set_y_axis(axes: Axes, cells: pd.DataFrame, strip: float) -> None:
    """Every value above the strip, which takes that much of the axis and has no ticks."""
    means = 100 * cells["mean_test_acc"].to_numpy(float)
    halves = 100 * cells["ci95_test_acc"].to_numpy(float)
    ends = limits(means, np.clip(means - halves, 0, 100), np.clip(means + halves, 0, 100), ACCURACY_LEAST)
    bottom, top = ends or (0.0, 100.0)
    axes.set_ylim(bottom - (top - bottom) * strip / (1 - strip), top)
    if strip:
        axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
