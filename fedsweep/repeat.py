"""`fedsweep repeat`: one experiment of a sweep once more, in this process, to see what it does."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsweep.errors import FedsweepError
from fedsweep.plan.experiment import unusual
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
    verbose: bool = False,
) -> int:
    """Run the experiment of a task with its seed, and show its rounds and its result, or what it raised.

    Nothing is written and no manager is told. By the same engine and plan the result has the same bits as its row; all
    of them are in the JSON.

    Args:
        task: as the manager tells it: `task_id`, `config`, `seed`.
        device: `auto`, `cpu` or `cuda:N`.
        data_dir: folder with the official data files.
        engine: `batched` or `reference`; that of the configuration if not given.
        as_json: print the result, or the failure, as one JSON object and nothing else on standard output.
        verbose: show the traceback also of an error whose message is made for people.

    Returns:
        The exit status: 0 if the experiment ended, 1 if it raised.
    """
    config = dict(task["config"]) | ({} if engine is None else {"engine": engine})
    claimed = claim_device(device)
    say = _no_words if as_json else print
    say(f"{task['task_id']}, seed {task['seed']}, on {device_name(claimed.torch_name)}, engine {config['engine']}")
    say(_parameters(config))

    def on_round(progress: Progress) -> None:
        where = f"round {progress.round}/{progress.rounds}"
        say(f"{where}: validation loss {_shown(progress.val_loss)}, accuracy {_shown(progress.val_acc)}")

    try:
        result, history = run_single_experiment(
            config, task["seed"], device=claimed.torch_name, data_dir=data_dir, on_round=on_round
        )
    except Exception as error:
        if as_json:
            print(json.dumps({"exception": type(error).__name__, "message": str(error)}))
        if verbose or not isinstance(error, FedsweepError):
            traceback.print_exception(error, file=sys.stderr)
        else:
            print(f"{type(error).__name__}: {error}\n(--verbose shows where it was raised)", file=sys.stderr)
        return 1
    finally:
        claimed.release()
    if as_json:
        print(json.dumps(result | {"history": history}, allow_nan=False))
    for line in _lines(result):
        say(line)
    return 0


def _parameters(config: Mapping[str, Any]) -> str:
    """The experiment's parameters that are not as built in."""
    own = [f"{name} {value}" for name, value in unusual(config).items()]
    return ", ".join([*own, "all else by default"])


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A result for people: one seed has no spread, and what is not known is left out."""
    known = {name: value for name, value in result.items() if value is not None and not name.startswith("std_")}
    width = max(map(len, known))
    for name, value in known.items():
        yield f"{name:{width}}  {_shown(value)}"


def _shown(value: object) -> str:
    """A number to four places; a list of them side by side."""
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.4f}"
    return "not finite" if value is None else str(value)


def _no_words(*_: object) -> None:
    """Say nothing."""
