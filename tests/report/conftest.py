"""Made-up sweeps: rows, summaries and histories of any grid, with believable numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsweep.manager.columns import METRICS, PROVENANCE_COLUMNS, RESULT_COLUMNS
from fedsweep.manager.gaps import Gap
from fedsweep.manager.results import summarise
from fedsweep.report.coverage import with_gaps
from fedsweep.report.labels import parameters

BASE = {
    "phase": "attack",
    "dataset": "digits",
    "model_type": "cnn",
    "width_factor": 8,
    "depth": 1,
    "poison_ratio": 0.0,
    "poison_type": "label_flip",
    "alpha": 1.0,
    "data_ordering": "shuffle",
    "aggregator": "fedavg",
    "batch_size": 32,
}


def _accuracy(cell: Mapping[str, Any], seed: int) -> float:
    """Falls with the poison ratio, less under the median, and differs from seed to seed."""
    generator = np.random.default_rng([seed, int(1000 * cell["poison_ratio"]), cell["width_factor"], cell["depth"]])
    best = 0.97 - 0.06 * (cell["model_type"] == "lr") - 0.12 / cell["width_factor"] - 0.04 / (cell["depth"] + 1)
    steepness = 1.6 if cell["poison_type"] == "label_flip" else 0.7
    loss = steepness * cell["poison_ratio"] ** (1.5 if cell["aggregator"] == "fedavg" else 2.5)
    return float(np.clip(best - loss + generator.normal(0, 0.012), 0.05, 1))


@pytest.fixture
def make_rows() -> Callable[..., pd.DataFrame]:
    """Rows of a full grid over these parameters, a row for each seed, as `read_results` gives them."""

    def make(grid: Mapping[str, Sequence[Any]], seeds: Sequence[int] = (1, 2, 3), **fixed: Any) -> pd.DataFrame:
        rows = []
        for values in product(*grid.values()):
            cell = BASE | fixed | dict(zip(grid, values, strict=True))
            for seed in seeds:
                accuracy = _accuracy(cell, seed)
                metrics = {"mean_test_acc": accuracy, "mean_test_loss": 2 * (1 - accuracy)}
                metrics |= {"mean_val_acc": accuracy + 0.01, "mean_val_loss": 1.9 * (1 - accuracy)}
                metrics |= {f"std_{metric}": 0.0 for metric in METRICS}
                signature = hashlib.sha256(repr([*sorted(cell.items()), seed]).encode()).hexdigest()[:12]
                rest = {"num_parameters": 650, "best_epoch": 7, "seed": seed, "signature": signature, "outcome": "ok"}
                success = {"attack_success_rate": 0.01 + cell["poison_ratio"] / 2 if cell["poison_ratio"] else np.nan}
                rows.append(cell | metrics | rest | success)
        others = [name for name in rows[0] if name not in RESULT_COLUMNS + PROVENANCE_COLUMNS]
        return pd.DataFrame(rows).reindex(columns=[*RESULT_COLUMNS, *others, *PROVENANCE_COLUMNS])

    return make


@pytest.fixture
def without() -> Callable[..., pd.DataFrame]:
    """The cells of a sweep that was to have all these rows and has not those that are `lost`, each for a reason."""

    def make(rows: pd.DataFrame, lost: pd.Series, reason: str = "failed") -> pd.DataFrame:
        names = [*parameters(rows), "seed"]
        gaps = [
            Gap(phase=row["phase"], values={name: row[name] for name in names}, reason=reason)
            for row in rows[lost].to_dict("records")
        ]
        return with_gaps(summarise(rows[~lost]), rows[~lost], gaps)

    return make


@pytest.fixture
def make_history() -> Callable[..., pd.DataFrame]:
    """The rounds of these rows, as `history.parquet` has them: accuracy rises to the row's, loss falls."""

    def make(rows: pd.DataFrame, rounds: int = 8) -> pd.DataFrame:
        histories = []
        for row in rows.drop_duplicates("signature").to_dict("records"):
            generator = np.random.default_rng(row["seed"])
            numbers = np.arange(1, rounds + 1)
            accuracy = row["mean_val_acc"] * (1 - 0.8 * np.exp(-0.6 * numbers)) + generator.normal(0, 0.006, rounds)
            histories.append(
                pd.DataFrame(
                    {
                        "signature": row["signature"],
                        "task_id": f"{row['phase']}_0_{row['seed']}",
                        "seed": row["seed"],
                        "round": numbers,
                        "val_loss": 2.3 * (1 - accuracy) + 0.05,
                        "val_acc": accuracy,
                        "nonfinite_clients": 0,
                        "is_best": numbers == rounds,
                        "per_class_test_acc": None,
                    }
                )
            )
        return pd.concat(histories, ignore_index=True)

    return make


@pytest.fixture
def folder_of(tmp_path: Path, make_history: Callable[..., pd.DataFrame]) -> Callable[..., Path]:
    """Write rows, and rounds for them, into an output folder."""

    def write(rows: pd.DataFrame, name: str = "results", rounds: int = 8) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows.to_csv(folder / "final_results.csv", index=False)
        if rounds:
            make_history(rows, rounds).to_parquet(folder / "history.parquet")
        return folder

    return write
