"""P3: Flower's simulation (a `ServerApp` with its own `FedAvg` or `FedMedian`, a `ClientApp`, Ray actors of one CPU).

The runtime is started by `run_simulation`; `flwr run`, which Flower recommends to people, starts the same one from a
project folder. A client trains with P0's local loop, in one thread, and keeps the data in its actor's memory, so what
is slower than P0 is Flower. `FedAvg.configure_train` is replaced, to send a round to the workload's participants rather
than to a random choice of nodes; the aggregation is Flower's. All experiments run one after another in one simulation,
whose start (Ray, actors, data, tuning) is start-up.
"""

from __future__ import annotations

import os

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}

import logging
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import modules
import numpy as np
import running
import workload as workloads
from flower_client import client_train
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, FedMedian
from flwr.simulation import run_simulation
from workload import State, Workload


class _Chosen:
    """Sends a round to the participants that the workload names."""

    def follow(self, workload: Workload, experiment: int, nodes: dict[int, int]) -> None:
        self.workload, self.experiment, self.nodes = workload, experiment, nodes
        self.after_first: ArrayRecord | None = None
        self.peaks: dict[int, int] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["server-round"] = server_round
        record = RecordDict({"arrays": arrays, "config": config})
        works = self.workload.works(self.experiment, server_round - 1)
        return [Message(record, dst_node_id=self.nodes[work.client], message_type=MessageType.TRAIN) for work in works]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        replies = list(replies)
        for reply in replies:
            metrics = reply.content["metrics"]
            self.peaks[int(metrics["pid"])] = int(metrics["peak-kb"])
        arrays, metrics = super().aggregate_train(server_round, replies)
        if server_round == 1:
            self.after_first = arrays
        return arrays, metrics


class ChosenFedAvg(_Chosen, FedAvg):
    """Flower's FedAvg."""


class ChosenFedMedian(_Chosen, FedMedian):
    """Flower's FedMedian."""


STRATEGIES = {"fedavg": ChosenFedAvg, "median": ChosenFedMedian}


def warm_up(grid: Grid, config: dict[str, str], num_clients: int) -> dict[int, int]:
    """Have every node answer once, so that the actors have loaded everything; the node of each client."""
    record = RecordDict({"config": ConfigRecord(config | {"experiment": -1, "server-round": 0})})
    while len(nodes := list(grid.get_node_ids())) < num_clients:  # the simulation is still adding them
        time.sleep(0.05)
    messages = [Message(record, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
    replies = list(grid.send_and_receive(messages))
    if failed := [reply.error.reason for reply in replies if reply.has_error()]:
        raise RuntimeError(failed[0])
    return {int(reply.content["metrics"]["client"]): reply.metadata.src_node_id for reply in replies}


def clients_of(workload: Workload) -> int:
    """How many clients there are, as far as any takes part."""
    return max(work.client for group in workload.rounds for works in group for work in works) + 1


def train(request: running.Request, workload: Workload, grid: Grid) -> dict[str, Any]:
    """All experiments, one after another; what to report."""
    config = {"path": request.path, "dtype": request.dtype}
    nodes = warm_up(grid, config, clients_of(workload))
    weights: dict[int, State] = {}
    peaks: dict[int, int] = {}
    begin, started = time.perf_counter(), time.time()
    for index in running.chosen(request, workload):
        member = workload.members[index]
        strategy = STRATEGIES[member.aggregator](fraction_evaluate=0.0)
        strategy.follow(workload, index, nodes)
        initial = modules.arrays(modules.tensors(workload.initial[member.group]))
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord({name: Array(tensor) for name, tensor in initial.items()}),
            num_rounds=request.rounds,
            train_config=ConfigRecord(config | {"experiment": index}),
        )
        peaks |= strategy.peaks
        weights[index] = {name: np.asarray(array.numpy()) for name, array in strategy.after_first.items()}
    seconds = time.perf_counter() - begin
    actors = sum(sorted(peaks.values())[-request.processes :]) / 1024
    return {
        "seconds": seconds,
        "start_up": started - request.started,
        "peak": running.peak_mb() + actors,
        "weights": weights,
        "choices": {"actors": len(peaks), "without": "memory of Ray's own processes"},
    }


def main() -> None:
    request = running.parse()
    running.configure(request)
    workload = workloads.load(request.path)
    server, client, found = ServerApp(), ClientApp(), {}
    client.train()(client_train)

    @server.main()
    def _serve(grid: Grid, context: Context) -> None:
        found.update(train(request, workload, grid))

    logging.getLogger("flwr").setLevel(logging.WARNING)
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=clients_of(workload),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": request.processes, "include_dashboard": False, "log_to_driver": False},
        },
    )
    versions = modules.versions() | {"flwr": version("flwr"), "ray": version("ray")}
    running.report(request, workload, versions=versions, **found)


if __name__ == "__main__":
    main()
