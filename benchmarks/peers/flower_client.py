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
def resident(path: str, dtype: str) -> tuple[Workload, local.Local, torch.Tensor]:
    """Data and model of an actor's process, kept for all clients that it plays."""
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    workload = workloads.load(path)
    return workload, local.prepare(workload), torch.from_numpy(workload.labels).long()


def client_train(message: Message, context: Context) -> Message:
    """Train a client; or, in the warm-up, load everything and say which client this is."""
    config = message.content["config"]
    workload, trainer, labels = resident(str(config["path"]), str(config["dtype"]))
    client = int(context.node_config["partition-id"])
    usage = {"pid": os.getpid(), "peak-kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if config["experiment"] < 0:
        reply: dict[str, Any] = {"metrics": MetricRecord({"client": client, "num-examples": 1} | usage)}
        return Message(content=RecordDict(reply), reply_to=message)
    experiment, number = int(config["experiment"]), int(config["server-round"]) - 1
    work = next(work for work in workload.works(experiment, number) if work.client == client)
    given = message.content["arrays"].to_torch_state_dict()
    batches = local.batches_of(work, workload.settings)
    trained = trainer.train(trainer.row_of(given), batches, labels[experiment])
    counts = [int(tensor) for name, tensor in given.items() if name.endswith("num_batches_tracked")]
    state = trainer.state_of(trained, max(counts, default=0) + len(batches))
    reply = {
        "arrays": ArrayRecord(state),
        "metrics": MetricRecord({"num-examples": len(work.order)} | usage),
    }
    return Message(content=RecordDict(reply), reply_to=message)
