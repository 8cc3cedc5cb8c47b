"""What differs in a set of cells and what does not, and how parameters and their values are written for people."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, get_args

from fedsweep.plan.experiment import PARQUET_PREFIX, Experiment

if TYPE_CHECKING:
    import pandas as pd

# Where a column says the same in fewer letters, or a name has a usual spelling.
NAMES = {
    "model_type": "model",
    "width_factor": "width",
    "poison_ratio": "poison ratio ρ",
    "poison_type": "attack",
    "data_ordering": "order",
    "alpha": "α",
    "lr": "learning rate",
    "num_clients": "clients",
    "global_rounds": "rounds",
}
SYMBOLS = {"poison_ratio": "ρ", "alpha": "α"}
SPEAKING = ("dataset", "model_type", "aggregator", "poison_type")
VALUES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "cnn": "CNN",
    "lr": "LR",
    "fedavg": "FedAvg",
    "fedavg_uniform": "FedAvg, unweighted",
    "good_bad": "good, then bad",
    "bad_good": "bad, then good",
}


def varying(cells: pd.DataFrame) -> list[str]:
    """The parameters that differ among the cells, in the order of their columns."""
    return [name for name in parameters(cells) if cells[name].nunique(dropna=False) > 1]


def constants(cells: pd.DataFrame) -> dict[str, Any]:
    """The parameters that are the same in all cells, with their value."""
    return {name: cells[name].iloc[0] for name in parameters(cells) if cells[name].nunique(dropna=False) == 1}


def parameters(cells: pd.DataFrame) -> list[str]:
    """The columns that hold parameters of the cells; the seed is none."""
    return [name for name in cells.columns if name in Experiment.model_fields and name != "seed"]


def is_numeric(parameter: str) -> bool:
    """Whether the values of the parameter are numbers, so that their order and distance mean something."""
    annotation = str(Experiment.model_fields[parameter].annotation)
    return "Literal" not in annotation and "str" not in annotation


def choices(parameter: str) -> list[str]:
    """The words that the parameter may be, if these are few and known."""
    return [choice for choice in get_args(Experiment.model_fields[parameter].annotation) if isinstance(choice, str)]


def levels(parameter: str, values: Iterable[Any]) -> list[Any]:
    """The distinct values in their natural order: as the parameter lists its choices, or by size; empty ones first."""
    distinct = list(dict.fromkeys(None if is_empty(value) else value for value in values))
    rank = {choice: place for place, choice in enumerate(choices(parameter))}

    def order(value: Any) -> tuple[int, Any]:
        if value is None:
            return (0, 0)
        return (1, value) if is_numeric(parameter) else (2, (rank.get(value, len(rank)), str(value)))

    return sorted(distinct, key=order)


def is_empty(value: Any) -> bool:
    """Whether a cell of a table holds nothing: None, NaN, NA or an empty string."""
    import pandas as pd

    return value is None or bool(pd.isna(value)) or value == ""


def name_of(parameter: str) -> str:
    """A parameter's name for a legend or an axis."""
    return NAMES.get(parameter, parameter.replace("_", " "))


def axis_of(parameter: str) -> str:
    """A parameter's name and unit for an axis."""
    name = name_of(parameter)
    extra = Experiment.model_fields[parameter].json_schema_extra
    unit = f" ({extra['unit']})" if isinstance(extra, dict) and "unit" in extra else ""
    return (name[0].upper() + name[1:] if name[0].isascii() else name) + unit


def value_of(parameter: str, value: Any) -> str:
    """A parameter's value for a legend, an axis or a title."""
    if is_empty(value):
        return "none"
    if parameter == "dataset" and str(value).startswith(PARQUET_PREFIX):
        return posixpath.basename(str(value))
    if isinstance(value, str):
        return VALUES.get(value, value.replace("_", " "))
    return f"{value:g}"


def pair_of(parameter: str, value: Any) -> str:
    """Name and value together: `width 8`, `ρ = 0.3`, `FedAvg`; words that speak for themselves stand alone."""
    text = value_of(parameter, value)
    if parameter in SYMBOLS:
        return f"{SYMBOLS[parameter]} = {text}"
    return text if parameter in SPEAKING and not is_empty(value) else f"{name_of(parameter)} {text}"


def sorted_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells ordered by their varying parameters, the poison ratio last, so that a series stands together."""
    names = [name for name in varying(cells) if name != "poison_ratio"]
    if "poison_ratio" in cells:
        names.append("poison_ratio")
    ranks = {name: {value: place for place, value in enumerate(levels(name, cells[name]))} for name in names}
    keys = [
        tuple(ranks[name][None if is_empty(value) else value] for name, value in zip(names, row, strict=True))
        for row in cells[names].itertuples(index=False, name=None)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return cells.iloc[order].reset_index(drop=True)
