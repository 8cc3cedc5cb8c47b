"""Width × depth heat maps of test accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsweep.report.labels import axis_of, levels, value_of, varying
from fedsweep.report.look import new_figure, outer_labels, percent
from fedsweep.report.panels import DEVIATION, Marks, Panel, caption, columns_for, pages, panels, rank

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

PANELS_ON_A_PAGE = 12
DIVERGED, BARE = "div.", "○"  # in a field: all runs diverged, or there is no row
MARKS = Marks(diverged=f"{DIVERGED}: all of a cell", bare=f"{BARE}: cell without a result")
MOST_WITH_DEVIATION = 30  # fields; a larger map shows means only
DARK_BELOW = 0.55  # of the colour scale: white words below, black ones above


def heat_figures(phase: str, cells: pd.DataFrame) -> Iterator[Figure]:
    """Mean test accuracy for each width and depth, a map for each combination of everything else that varies.

    All maps of a phase have one colour scale. The second number in a field is the standard deviation over seeds.
    """
    others = [name for name in varying(cells) if name not in ("width_factor", "depth")]
    others.sort(key=lambda name: (name == "poison_ratio", -rank(name)))
    every = panels(cells, others)
    columns = columns_for(cells, others, len(every))
    means = 100 * cells["mean_test_acc"].to_numpy(float)
    finite = means[np.isfinite(means)]
    limits = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 100.0)
    for title, page in pages(phase, every, columns, PANELS_ON_A_PAGE):
        yield _page(title, cells, page, columns, limits)


def _page(title: str, cells: pd.DataFrame, page: Sequence[Panel], columns: int, limits: tuple[float, float]) -> Figure:
    widths, depths = levels("width_factor", cells["width_factor"]), levels("depth", cells["depth"])
    rows = math.ceil(len(page) / columns)
    side = (max(0.42 * len(widths), 1.2), max(0.34 * len(depths), 1.0))
    figure = new_figure(columns * (side[0] + 0.15) + 1.4, rows * (side[1] + 0.3) + 0.9)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, panel in zip(grid, page, strict=False):
        image = _map(axes, panel, widths, depths, limits)
    for unused in grid[len(page) :]:
        unused.remove()
    outer_labels(grid[: len(page)], columns, axis_of("width_factor"), axis_of("depth"))
    bar = figure.colorbar(image, ax=grid[: len(page)], label="Test accuracy (%)", aspect=25, shrink=0.9)
    bar.outline.set_visible(False)
    spread = DEVIATION if _shows_deviation(cells, widths, depths) else None
    caption(figure, title, cells, spread, marks=MARKS, page=page)
    return figure


def _shows_deviation(cells: pd.DataFrame, widths: list[Any], depths: list[Any]) -> bool:
    return bool((cells["n_seeds"] > 1).any()) and len(widths) * len(depths) <= MOST_WITH_DEVIATION


def _map(axes: Axes, panel: Panel, widths: list[Any], depths: list[Any], limits: tuple[float, float]) -> AxesImage:
    means = np.full((len(depths), len(widths)), np.nan)
    words: dict[tuple[int, int], str] = {}
    with_deviation = _shows_deviation(panel.cells, widths, depths)
    for cell in panel.cells.to_dict("records"):
        place = depths.index(cell["depth"]), widths.index(cell["width_factor"])
        means[place] = percent(cell["mean_test_acc"])
        words[place] = f"{means[place]:.1f}" if cell["n_seeds"] else DIVERGED if cell["n_diverged"] else BARE
        if with_deviation and cell["n_seeds"] > 1:
            words[place] += f"\n± {percent(cell['std_test_acc']):.1f}"
    image = axes.imshow(means, origin="lower", aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
    for (row, column), text in words.items():
        shade = (means[row, column] - limits[0]) / ((limits[1] - limits[0]) or 1)
        colour = "white" if shade < DARK_BELOW else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour, linespacing=0.95)
    axes.set_title(panel.title)
    axes.set_xticks(range(len(widths)), [value_of("width_factor", value) for value in widths])
    axes.set_yticks(range(len(depths)), [value_of("depth", value) for value in depths])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image
