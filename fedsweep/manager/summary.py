"""Means, deviations and confidence intervals over seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsweep.manager.columns import METRICS, PARAMETERS, RESULT_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

# Two experiments that agree in all but these, the one with ratio 0, are an attacked cell and its clean twin.
ATTACK = ("poison_ratio", "poison_type", "poison_level", "target_class", "poison_label", "data_ordering")


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell: the rows of `final_results.csv` (see `read_results`) over their seeds.

    `mean_*` and `std_*` are the mean and the sample deviation (n - 1; empty for one seed) of the rows' `mean_*`;
    `ci95_test_acc` is the half width of the 95 % interval of the mean, t(0.975, n - 1) * std / sqrt(n) (Student 1908;
    empty for one seed); `accuracy_drop` is the mean of clean minus poisoned test accuracy over the seeds that have
    both. Diverged rows count in `n_diverged` and nowhere else.
    """
    import pandas as pd

    keys = [name for name in rows.columns if name in ("phase", *PARAMETERS) and name != "seed"]
    rows = rows.drop_duplicates(subset=[*keys, "seed"]).reset_index(drop=True)
    rows = rows.assign(accuracy_drop=_accuracy_drops(rows), diverged=_diverged(rows))
    groups = rows.groupby(keys, dropna=False)
    counted = rows[~rows["diverged"]].groupby(keys, dropna=False)
    columns: dict[str, pd.Series] = {}
    for metric in METRICS:
        columns[f"mean_{metric}"] = counted[f"mean_{metric}"].mean()
        columns[f"std_{metric}"] = _deviation(counted[f"mean_{metric}"])
    columns["num_parameters"] = groups["num_parameters"].first()
    columns["best_epoch"] = counted["best_epoch"].mean()
    columns["n_seeds"] = counted["mean_test_acc"].count()
    columns["n_diverged"] = groups["diverged"].sum()
    columns["ci95_test_acc"] = _half_width(columns["std_test_acc"], columns["n_seeds"])
    columns["accuracy_drop"] = counted["accuracy_drop"].mean()
    columns["accuracy_drop_std"] = _deviation(counted["accuracy_drop"])
    if "attack_success_rate" in rows:
        columns["attack_success_rate"] = counted["attack_success_rate"].mean()
    table = pd.DataFrame(columns, index=groups.size().index)
    table = table.fillna({"n_seeds": 0}).astype({"n_seeds": "int64", "n_diverged": "int64"}).reset_index()
    first = [name for name in RESULT_COLUMNS if name in table.columns]
    return table[[*first, *(name for name in table.columns if name not in first)]]


def _diverged(rows: pd.DataFrame) -> pd.Series:
    import pandas as pd

    if "outcome" not in rows:
        return pd.Series(False, index=rows.index)
    return rows["outcome"] == "diverged"


def _deviation(grouped: pd.api.typing.SeriesGroupBy[Any, Any]) -> pd.Series:
    """The sample deviation of each group; NaN where there is one value, which has none."""
    return grouped.std(ddof=1)


def _half_width(deviation: pd.Series, count: pd.Series) -> pd.Series:
    """Half the width of the 95 % interval of a mean of `count` values; NaN for fewer than two."""
    import pandas as pd
    from scipy.special import stdtrit

    several = count.where(count > 1)
    quantile = pd.Series(stdtrit(several - 1, 0.975), index=several.index)
    return deviation * quantile / several**0.5


def _accuracy_drops(rows: pd.DataFrame) -> pd.Series:
    """Accuracy of the clean twin minus that of the row; NaN where there is no clean twin, or one of them diverged."""
    import pandas as pd

    same = [name for name in rows.columns if name in PARAMETERS and name not in ATTACK]
    clean = rows[rows["poison_ratio"] == 0].drop_duplicates(subset=same)
    twins = rows[same].merge(clean[[*same, "mean_test_acc"]], on=same, how="left")
    return pd.Series(twins["mean_test_acc"].to_numpy(), index=rows.index) - rows["mean_test_acc"]
