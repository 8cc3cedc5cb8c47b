"""Which parameter becomes colour, which line style, and which are spread over panels."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from fedsweep.report.coverage import coverage_note, is_plan_known, lacking, runs
from fedsweep.report.labels import constants, is_empty, is_numeric, levels, name_of, pair_of, value_of, varying
from fedsweep.report.look import DARK, GREY, HUES, LINES, Scales

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# What is best compared on the same axes comes first; what makes another world of the experiment comes last.
TOGETHER = ("aggregator", "poison_type", "poison_level", "data_ordering", "width_factor", "depth")
APART = ("alpha", "partition", "num_clients", "model_type", "dataset")
LINES_TOGETHER = 8
COLOURS_TOGETHER = 10
COLUMNS = 4
NO_BREAK = "\u00a0"  # the space at which no line ends
TOGETHER_IN_LINE = re.compile(r"\d+ of \d+|[○×]: \w+")  # `3 of 4`, and a mark with its explanation


@dataclass(frozen=True)
class Roles:
    """What each varying parameter of a phase does in its figure."""

    colour: str | None
    style: str | None
    panels: tuple[str, ...]
    style_levels: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Panel:
    """The part of a figure with its own axes."""

    title: str
    cells: pd.DataFrame


@dataclass(frozen=True)
class Spread:
    """What shows how the seeds of a cell spread, in words for the caption."""

    name: str
    words: str


BAND = Spread("band", f"bands: 95{NO_BREAK}% confidence interval")
BAR = Spread("bar", f"bars: 95{NO_BREAK}% confidence interval")
DEVIATION = Spread("±", f"±{NO_BREAK}standard deviation over seeds")


@dataclass(frozen=True)
class Marks:
    """How a kind of figure shows a cell without a mean, in words for the caption."""

    diverged: str  # a cell all of whose runs diverged
    bare: str  # a cell without any row


def assign(cells: pd.DataFrame, taken: Sequence[str] = (), first: Sequence[str] = ()) -> Roles:
    """Give each varying parameter but the `taken` ones a role; those of `first` are drawn together if any are."""
    names = [name for name in varying(cells) if name not in taken]
    names.sort(key=lambda name: rank(name, first))
    count = {name: len(levels(name, cells[name])) for name in names}
    colour = next((name for name in names if count[name] <= COLOURS_TOGETHER or is_numeric(name)), None)
    rest = [name for name in names if name != colour]
    room = LINES_TOGETHER // count[colour] if colour else 1
    style = next((name for name in rest if count[name] <= min(room, len(LINES))), None)
    panels = sorted((name for name in rest if name != style), key=lambda name: -rank(name, first))
    return Roles(colour, style, tuple(panels), tuple(levels(style, cells[style])) if style else ())


def rank(name: str, first: Sequence[str] = ()) -> int:
    """How much a parameter asks to be drawn on the same axes as the others; the least number asks most."""
    if name in first:
        return first.index(name)
    if name in TOGETHER:
        return 10 + TOGETHER.index(name)
    return 30 + APART.index(name) if name in APART else 20


def panels(cells: pd.DataFrame, names: Sequence[str]) -> list[Panel]:
    """The cells of each combination of these parameters that there is, in the order of their values."""
    found = []
    for values in product(*(levels(name, cells[name]) for name in names)):
        own = cells
        for name, value in zip(names, values, strict=True):
            own = own[own[name].isna()] if value is None else own[own[name] == value]
        if len(own):
            title = ", ".join(pair_of(name, value) for name, value in zip(names, values, strict=True))
            found.append(Panel(title, own))
    return found


def columns_for(cells: pd.DataFrame, names: Sequence[str], count: int) -> int:
    """How many panels stand side by side: the levels of the last parameters as far as they give a grid."""
    columns = 1
    for name in reversed(names):
        wider = columns * len(levels(name, cells[name]))
        if wider > COLUMNS or count % wider:
            break
        columns = wider
    return columns if columns > 1 else min(count, COLUMNS)


def pages(phase: str, every: Sequence[Panel], columns: int, most: int) -> list[tuple[str, list[Panel]]]:
    """The panels in groups of whole rows, of about `most` panels each, with a title for each group."""
    step = max(most // columns, 1) * columns
    groups = [list(every[start : start + step]) for start in range(0, len(every), step)]
    if len(groups) == 1:
        return [(phase, groups[0])]
    return [(f"{phase} ({number} of {len(groups)})", group) for number, group in enumerate(groups, 1)]


def width_of(columns: int, roles: Roles) -> float:
    """The width in inches of a figure with that many panels side by side, and a legend if there is one."""
    return (2.9 if columns == 1 else 1.9 * columns) + 0.5 + 1.3 * bool(roles.colour or roles.style)


def lines(panel: Panel, roles: Roles) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The cells of each line of a panel, with the values of its colour and style."""
    names = [name for name in (roles.colour, roles.style) if name]
    for each in panels(panel.cells, names):
        first = each.cells.iloc[0]
        yield {name: None if is_empty(first[name]) else first[name] for name in names}, each.cells


def look(roles: Roles, values: dict[str, Any], scales: Scales) -> dict[str, Any]:
    """Colour, dashes and marker of a line."""
    colour = scales.colour(roles.colour, values[roles.colour]) if roles.colour else HUES[0]
    dashes, marker = scales.line(roles.style, values[roles.style], roles.style_levels) if roles.style else LINES[0]
    return {"color": colour, "linestyle": dashes, "marker": marker}


def legend(
    figure: Figure,
    cells: pd.DataFrame,
    roles: Roles,
    scales: Scales,
    parts: str = "line and marker",
    absent: Collection[tuple[str, Any]] = (),
) -> None:
    """One legend at the right: a heading for each parameter, then its values; `parts` are what the figure draws.

    Of the values that are `absent` it says that they have no result.
    """
    entries = [
        entry for name in (roles.colour, roles.style) if name for entry in _entries(name, cells, roles, scales, absent)
    ]
    if not entries:
        return
    for handle, _ in entries:
        if "line" not in parts:
            handle.set_linestyle("none")
        if "marker" not in parts:
            handle.set_marker("")
    made = figure.legend([handle for handle, _ in entries], [text for _, text in entries], loc="outside right upper")
    headings = {name_of(name) for name in (roles.colour, roles.style) if name}
    for text in made.get_texts():
        if text.get_text() in headings:
            text.set_fontweight("bold")


def without_result(cells: pd.DataFrame, roles: Roles) -> frozenset[tuple[str, Any]]:
    """The values of colour and style of which no cell has any row, each with its parameter."""
    there = cells[runs(cells) > 0]
    names = [name for name in (roles.colour, roles.style) if name]
    return frozenset(
        (name, value) for name in names for value in set(levels(name, cells[name])) - set(levels(name, there[name]))
    )


def _entries(
    name: str, cells: pd.DataFrame, roles: Roles, scales: Scales, absent: Collection[tuple[str, Any]]
) -> list[tuple[Line2D, str]]:
    from matplotlib.lines import Line2D

    entries = [(Line2D([], [], linestyle="none"), name_of(name))]
    for value in levels(name, cells[name]):
        dashes, marker = LINES[0] if name == roles.colour else scales.line(name, value, roles.style_levels)
        colour = scales.colour(name, value) if name == roles.colour else DARK
        shape = "" if name == roles.colour and roles.style else marker  # the marker shows the style
        text = value_of(name, value) + (" (no result)" if (name, value) in absent else "")
        entries.append((Line2D([], [], color=colour, linestyle=dashes, marker=shape), text))
    return entries


def caption(
    figure: Figure,
    title: str,
    cells: pd.DataFrame,
    spread: Spread | None,
    *more: str,
    marks: Marks,
    page: Sequence[Panel],
) -> None:
    """The title above; below, small, what all cells share, how many seeds there are, what diverged, what is missing.

    Those `marks` are explained that the cells of the page need.
    """
    figure.suptitle(title, fontsize=9, fontweight="bold")
    shared = ", ".join(_bound_pair(name, value) for name, value in constants(cells).items())
    if shared and not is_plan_known(cells):
        shared = f"in all rows: {shared}"
    parts = list(filter(None, [shared, _seeds(cells, spread), *more]))
    bare, lost = (any(which(panel.cells).any() for panel in page) for which in (is_bare, is_lost))
    if diverged := int(cells["n_diverged"].sum()):
        left_out = f"{diverged} diverged run{'' if diverged == 1 else 's'} left out"
        parts.append(left_out + (f" ({marks.diverged})" if lost else ""))
    if missing := coverage_note(cells, _bound_pair):
        parts.append(missing + (f" ({marks.bare})" if bare else ""))
    figure.supxlabel("\n".join(_wrapped(". ".join(parts), figure.get_figwidth())), fontsize=6.5, color=GREY)


def _seeds(cells: pd.DataFrame, spread: Spread | None) -> str:
    """Over how many seeds the means are, and what shows how they spread."""
    counts = cells["n_seeds"][cells["n_seeds"] > 0]
    if not len(counts):
        counts = runs(cells) + lacking(cells)
    least, most = int(counts.min()), int(counts.max())
    parts = [_bound(f"{least} seed{'' if most == 1 else 's'}" if least == most else f"{least} to {most} seeds")]
    if spread and most > 1:
        parts.append(spread.words)
        parts += [f"no {spread.name} where there is one seed"] if least == 1 else []
    return "; ".join(parts)


def _bound_pair(name: str, value: Any) -> str:
    return _bound(pair_of(name, value))


def _bound(words: str) -> str:
    """These words so that no line ends between them."""
    return words.replace(" ", NO_BREAK)


def is_bare(cells: pd.DataFrame) -> pd.Series:
    """Which cells have no row at all."""
    return runs(cells) == 0


def is_lost(cells: pd.DataFrame) -> pd.Series:
    """Which cells have rows, all of them of runs that diverged."""
    return (cells["n_seeds"] == 0) & ~is_bare(cells)


def _wrapped(text: str, inches: float) -> list[str]:
    text = TOGETHER_IN_LINE.sub(lambda found: _bound(found[0]), text)
    return textwrap.wrap(text, max(int(inches * 19), 30), break_on_hyphens=False)
