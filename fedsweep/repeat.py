"""`fedsweep repeat`: one experiment of a sweep once more, in this process, to see what it does."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsweep.worker.device import claim_device, device_name
from fedsweep.worker.result import Progress
from fedsweep.worker.runner import run_single_experiment


def repeat(
    task: Mapping[str, Any],
    *,
    device: str = "auto",
    data_dir: Path | None = None,
    engine: str | None = None,
    as_json: bool = False,
) -> int:
    """Run the experiment of a task with its seed, and show its rounds and its result, or the whole traceback.

    Nothing is written and no manager is told. By the same engine and plan the result has the same bits as its row.

    Args:
        task: as the manager tells it: `task_id`, `config`, `seed`.
        device: `auto`, `cpu` or `cuda:N`.
        data_dir: folder with the official data files.
        engine: `batched` or `reference`; that of the configuration if not given.
        as_json: print the result, or the failure, as one JSON object and nothing else.

    Returns:
        The exit status: 0 if the experiment ended, 1 if it raised.
    """
    config = dict(task["config"]) | ({} if engine is None else {"engine": engine})
    claimed = claim_device(device)
    say = _no_words if as_json else print
    say(f"{task['task_id']}, seed {task['seed']}, on {device_name(claimed.torch_name)}, engine {config['engine']}")
    say(json.dumps({**config, "seed": task["seed"]}, sort_keys=True))

    def on_round(progress: Progress) -> None:
        where = f"round {progress.round}/{progress.rounds}"
        say(f"{where}: validation loss {progress.val_loss}, accuracy {progress.val_acc}")

    try:
        result, history = run_single_experiment(
            config, task["seed"], device=claimed.torch_name, data_dir=data_dir, on_round=on_round
        )
    except Exception as error:
        if as_json:
            print(json.dumps({"exception": type(error).__name__, "message": str(error)}))
        traceback.print_exception(error, file=sys.stderr)
        return 1
    finally:
        claimed.release()
    if as_json:
        print(json.dumps(result | {"history": history}, allow_nan=False))
    for name, value in result.items():
        say(f"{name}: {value}")
    return 0


def _no_words(*_: object) -> None:
    """Say nothing."""
