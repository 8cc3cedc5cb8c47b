"""A simulated worker: what it holds, and so what it says next. No sockets, no clock."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

HEARTBEATS = 2  # while a task is under way
SAID_OF_A_TASK = HEARTBEATS + 2  # two of them change the ledger
FAILING, RELEASING = 0.02, 0.02  # shares of the tasks
ROUNDS = 20  # of an experiment, each with its line in the history

Message = dict[str, Any]


def result_data(number: int) -> Message:
    """The result of an experiment, as long as real ones are."""
    share = (number * 7919 % 10_007) / 10_007
    history = [
        {"round": each, "val_loss": 2.3 / each, "val_acc": share * each / ROUNDS, "nonfinite_clients": 0}
        for each in range(1, ROUNDS + 1)
    ]
    return {
        **{"outcome": "ok", "mean_test_acc": share, "std_test_acc": 0.0, "mean_test_loss": 2.3 - share},
        **{"std_test_loss": 0.0, "mean_val_acc": share, "std_val_acc": 0.0, "mean_val_loss": 2.3 - share},
        **{"std_val_loss": 0.0, "num_parameters": 31_786, "best_epoch": 17, "attack_success_rate": 0.1},
        **{"poisoned_clients": 3, "poisoned_samples": 1800, "nonfinite_clients": 0, "rounds_run": ROUNDS},
        **{"wall_time_s": 12.34, "device": "cpu", "plan": "native/16", "worker": "simulated"},
        **{"fedsweep_version": "0.1.0", "torch_version": "2.13.0+cpu", "finished_at": "2026-01-01T00:00:00+00:00"},
        **{"history": history, "per_class_test_acc": [share] * 10},
    }


def config(number: int) -> Message:
    """What a task says of its experiment, as long as it is in a real task."""
    return {
        **{"dataset": "mnist", "model_type": "lr", "width_factor": 16, "depth": 2, "poison_ratio": 0.2},
        **{"poison_type": "label_flip", "poison_level": "sample", "target_class": 0, "poison_label": 7, "alpha": 0.3},
        **{"data_ordering": "shuffle", "aggregator": "median", "batch_size": 32, "seed": number, "num_clients": 10},
        **{"fraction_fit": 1.0, "global_rounds": 20, "local_epochs": 1, "lr": 0.02, "momentum": 0.9},
        **{"weight_decay": 0.0005, "max_grad_norm": 1.0, "validation_split": 0.1, "early_stopping_patience": 5},
        **{"min_delta": 0.001, "split_seed": 0, "partition_seed": 0, "partition": "dirichlet", "output_dir": "results"},
    }


class SimulatedWorker:
    """Asks for a task, says twice that it lives, brings the result (or fails, or gives the task back), and again."""

    def __init__(self, worker_id: str, seed: int = 0) -> None:
        self.worker_id = worker_id
        self.done = 0  # results that were acknowledged
        self.refused: dict[str, int] = {}  # code of an error -> how often
        self.heard_done = False
        self._random = random.Random(f"{seed} {worker_id}")
        self._task: Message | None = None
        self._beats = 0
        self._said: Message = {}

    def next(self) -> Message:
        """The next request."""
        if self._task is None:
            self._said = {"type": "request_task", "worker_id": self.worker_id, "worker_type": "cpu", "device": "cpu"}
        elif self._beats < HEARTBEATS:
            self._beats += 1
            progress = {**self._held(), "round": self._beats * 5, "rounds": ROUNDS, "val_loss": 1.5, "val_acc": 0.5}
            self._said = {"type": "heartbeat", "worker_id": self.worker_id, "device": "cpu", "tasks": [progress]}
        else:
            self._said = {"worker_id": self.worker_id, **self._held(), **self._end()}
        return self._said

    def give_back(self) -> Message | None:
        """The request that gives back what it holds, if it holds anything."""
        if self._task is None:
            return None
        self._said = {"type": "release", "worker_id": self.worker_id, **self._held()}
        return self._said

    def _held(self) -> Message:
        assert self._task is not None
        return {"task_id": self._task["task_id"], "attempt": self._task["attempt"]}

    def _end(self) -> Message:
        chance = self._random.random()
        if chance < FAILING:
            return {"type": "task_failed", "error": "RuntimeError: simulated", "exception": "RuntimeError"}
        if chance < FAILING + RELEASING:
            return {"type": "release"}
        return {"type": "submit_result", "result_data": result_data(self._random.randrange(10_000))}

    def hear(self, answer: Mapping[str, Any]) -> None:
        """Take an answer in."""
        kind = answer["type"]
        if kind == "error":
            self.refused[answer["code"]] = self.refused.get(answer["code"], 0) + 1
        elif kind == "task":
            self._task, self._beats = answer["task"], 0
        elif kind == "no_task":
            self.heard_done = self.heard_done or answer["done"]
        elif self._said["type"] != "heartbeat" or answer.get("drop"):
            self.done += self._said["type"] == "submit_result"
            self._task = None


def encoded(message: Mapping[str, Any], token: str) -> bytes:
    """A message as a worker sends it."""
    return json.dumps({**message, "token": token}, separators=(",", ":")).encode() + b"\n"
