"""The client of P3, in a module of its own, for Ray's processes to import."""

from __future__ import annotations

import os
import resource
from functools import cache
from typing import Any

import local
import torch
import workload as workloads
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from workload import Workload


@cache
def resident(path: str) -> tuple[Workload, local.Local, torch.Tensor]:
    """Data and model of an actor's process, kept for all clients that it plays."""
    torch.set_num_threads(1)
    workload = workloads.load(path)
    return workload, local.prepare(workload), torch.from_numpy(workload.labels).long()


def client_train(message: Message, context: Context) -> Message:
    """Train a client; or, in the warm-up, load everything and say which client this is."""
    config = message.content["config"]
    workload, trainer, labels = resident(str(config["path"]))
    client = int(context.node_config["partition-id"])
    usage = {"pid": os.getpid(), "peak-kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if config["experiment"] < 0:
        reply: dict[str, Any] = {"metrics": MetricRecord({"client": client, "num-examples": 1} | usage)}
        return Message(content=RecordDict(reply), reply_to=message)
    experiment, number = int(config["experiment"]), int(config["server-round"]) - 1
    work = next(work for work in workload.works(experiment, number) if work.client == client)
    given = message.content["arrays"].to_torch_state_dict()
    start = [given[name].float() for name in trainer.names]
    batches = local.batches_of(work, workload.settings)
    trained = trainer.train(start, batches, labels[experiment])
    counted = max(int(given[name]) for name in trainer.counters) + len(batches) if trainer.counters else 0
    state = local.state_of(trainer, trained, counted)
    reply = {
        "arrays": ArrayRecord(dict(state)),
        "metrics": MetricRecord({"num-examples": len(work.order)} | usage),
    }
    return Message(content=RecordDict(reply), reply_to=message)
