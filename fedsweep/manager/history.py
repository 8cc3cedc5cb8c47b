"""`history.parquet`: every round of every experiment of an output folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsweep.files import fsync, open_fresh, open_plain
from fedsweep.manager.records import History

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

HISTORY_FILE = "history.parquet"
NextPage = Callable[[int], list[History]]  # results behind this place in the order of acceptance
ROW_GROUP = 500  # results; pages are smaller, so that nobody waits for long while one is made


def write_history(output_dir: str | Path, next_page: NextPage) -> bool:
    """Write the rounds of all results that `next_page` gives, page by page; False if there are none.

    Rounds of experiments that are in the file already and in no page (of another sweep, say) are kept.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(output_dir) / HISTORY_FILE
    page = next_page(0)
    if not page:
        return False
    fresh = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    written: set[str] = set()
    with open_fresh(fresh) as stream, pq.ParquetWriter(stream, _schema()) as writer:
        for tables in _groups(page, next_page, written):
            writer.write_table(pa.concat_tables(tables).combine_chunks())
        for others in _rounds_of_others(path, written):
            writer.write_table(others)
    fsync(fresh)
    os.replace(fresh, path)
    fsync(path.parent)
    return True


def _groups(page: list[History], next_page: NextPage, written: set[str]) -> Iterator[list[pa.Table]]:
    """The rounds of this page and all behind it, enough for a row group at a time; notes whose they are."""
    tables: list[pa.Table] = []
    gathered = 0
    while page:
        tables.append(_table(page))
        written.update(history.signature for history in page)
        gathered += len(page)
        page = next_page(page[-1].place)
        if gathered >= ROW_GROUP or not page:
            yield tables
            tables, gathered = [], 0


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("signature", pa.string()),
            ("task_id", pa.string()),
            ("seed", pa.int64()),
            ("round", pa.int64()),
            ("val_loss", pa.float64()),
            ("val_acc", pa.float64()),
            ("nonfinite_clients", pa.int64()),
            ("is_best", pa.bool_()),
            ("per_class_test_acc", pa.list_(pa.float64())),
        ]
    )


def _table(page: list[History]) -> pa.Table:
    """The rounds of these results; made by columns, which is quicker than by rows."""
    import pyarrow as pa

    rounds = [(history, record) for history in page for record in history.result["history"]]
    best = [record["round"] == history.result.get("best_epoch") for history, record in rounds]
    columns: dict[str, list[Any]] = {
        "signature": [history.signature for history, _ in rounds],
        "task_id": [history.task_id for history, _ in rounds],
        "seed": [history.seed for history, _ in rounds],
        "round": [record["round"] for _, record in rounds],
        "val_loss": [record.get("val_loss") for _, record in rounds],
        "val_acc": [record.get("val_acc") for _, record in rounds],
        "nonfinite_clients": [record.get("nonfinite_clients", 0) for _, record in rounds],
        "is_best": best,
        "per_class_test_acc": [
            history.result.get("per_class_test_acc") if is_best else None
            for (history, _), is_best in zip(rounds, best, strict=True)
        ],
    }
    return pa.table(columns, schema=_schema())


def _rounds_of_others(path: Path, written: set[str]) -> list[pa.Table]:
    """What the present file has of experiments that were not written; nothing if it is no such file."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not os.path.lexists(path):
        return []
    try:
        with os.fdopen(open_plain(path), "rb") as stream:
            present = pq.read_table(stream).select(_schema().names).cast(_schema())
    except (pa.ArrowException, KeyError, OSError) as error:
        kept = path.with_name(f"{path.name}.unreadable")
        os.replace(path, kept)
        log.warning("%s cannot be read (%s); it was moved to %s and is written anew", path, error, kept)
        return []
    others = present.filter(pc.invert(pc.is_in(present["signature"], pa.array(sorted(written), pa.string()))))
    return [others] if others.num_rows else []
