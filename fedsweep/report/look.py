"""How every plot looks, and the files it is saved to."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsweep.report.labels import choices, is_empty, is_numeric, levels, parameters

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = npt.NDArray[np.float64]

# Okabe & Ito, "Color Universal Design" (2008), without the yellow that is faint on white.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[tuple[Any, str], ...] = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
FAINT = 0.13  # opacity of a band
ACCURACY_LEAST = 10.0  # points that a band may always go beyond the means; see `limits`
BRIGHTEST = 0.85  # of viridis, whose end is faint on white
GREY = "#666666"
DARK = "#444444"
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "savefig.bbox": None,
    "pdf.fonttype": 42,
}
# What would make two runs write different bytes.
METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the user has set, for the time of a `with` block."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would say that it builds its font cache
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, on a canvas of its own that no global state knows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, stem: Path, formats: Sequence[str]) -> list[Path]:
    """Write the figure in each format; the same figure always gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in formats]
    for path, kind in zip(paths, formats, strict=True):
        figure.savefig(path, format=kind, metadata=METADATA.get(kind))
    return paths


@dataclass(frozen=True)
class Scales:
    """Which colour and line a value has: the same in every figure of a report."""

    levels: dict[str, list[Any]]  # of every parameter, over all folders and phases

    def colour(self, parameter: str, value: Any) -> Any:
        """The colour of a value: along viridis for numbers, by Okabe and Ito for words."""
        known = self.levels[parameter]
        place = known.index(None if is_empty(value) else value)
        if not is_numeric(parameter) and len(known) <= len(HUES):
            return HUES[place]
        import matplotlib

        return matplotlib.colormaps["viridis"](BRIGHTEST * place / max(len(known) - 1, 1))

    def line(self, parameter: str, value: Any, among: Sequence[Any]) -> tuple[Any, str]:
        """The dashes and the marker of a value; for a number, by its place among those of the figure."""
        known = list(among) if is_numeric(parameter) else self.levels[parameter]
        return LINES[known.index(None if is_empty(value) else value) % len(LINES)]


def scales(frames: Iterable[pd.DataFrame]) -> Scales:
    """The scales of every value that a parameter has in these frames, or may have if it is a choice of words."""
    values: dict[str, list[Any]] = {}
    for frame in frames:
        for name in parameters(frame):
            values.setdefault(name, choices(name)).extend(frame[name])
    return Scales({name: levels(name, found) for name, found in values.items()})


def percent(share: float) -> float:
    """A share as a percentage; NaN for what is empty."""
    return math.nan if is_empty(share) else 100 * float(share)


def limits(means: Numbers, low: Numbers, high: Numbers, least: float) -> tuple[float, float] | None:
    """The ends of an axis: every mean, and the bands from `low` to `high` as far as they do not dwarf the means.

    A band may go beyond the means by half of what these span, and by `least` in any case; then the axis cuts it off.
    None where no mean is finite.
    """
    means = means[np.isfinite(means)]
    if not len(means):
        return None
    beyond = max(float(means.max() - means.min()) / 2, least)
    bottom = max(float(np.nanmin([means.min(), *low])), float(means.min()) - beyond)
    top = min(float(np.nanmax([means.max(), *high])), float(means.max()) + beyond)
    margin = 0.04 * (top - bottom) or least / 10
    return bottom - margin, top + margin


def outer_labels(axes: Sequence[Axes], columns: int, x_label: str, y_label: str) -> None:
    """Label the left column and whatever has nothing below it; the others keep their ticks only.

    Without an `x_label` something lies below all of them.
    """
    for place, each in enumerate(axes):
        is_left, is_lowest = place % columns == 0, bool(x_label) and place + columns >= len(axes)
        if is_left:
            each.set_ylabel(y_label)
        if is_lowest:
            each.set_xlabel(x_label)
        each.tick_params(labelleft=is_left, labelbottom=is_lowest)
