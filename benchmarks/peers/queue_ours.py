"""Worker processes that do nothing but ask for tasks and bring results, by the client that real workers use.

One task at a time, over one connection each. Nothing is asked before a line comes on standard input. Each process ends
when it is told that all is done.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from simulated import result_data

from fedsweep.worker.client import ManagerClient, request_task_from_manager, submit_result_to_manager


def work(number: int, port: int, token: str, begin: Event) -> int:
    """Do tasks until there are no more; how many."""
    client = ManagerClient("127.0.0.1", port, token)
    worker_id, done = f"loop-{number}-0", 0
    begin.wait()
    while (reply := request_task_from_manager(client, worker_id)).task is not None:
        task = reply.task
        if not submit_result_to_manager(client, task.task_id, worker_id, result_data(done), task.attempt):
            raise SystemExit(f"the result of {task.task_id} was not taken")
        done += 1
    return done


def _work(number: int, port: int, token: str, begin: Event, told: multiprocessing.Queue[tuple[int, float]]) -> None:
    told.put((work(number, port, token, begin), time.time()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token-file", type=Path, required=True)
    parser.add_argument("--processes", type=int, required=True)
    args = parser.parse_args()
    context = multiprocessing.get_context("fork")
    begin, told = context.Event(), context.Queue()
    token = args.token_file.read_text().strip()
    processes = [
        context.Process(target=_work, args=(number, args.port, token, begin, told)) for number in range(args.processes)
    ]
    for process in processes:
        process.start()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.time()
    begin.set()
    done = [told.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    print(json.dumps({"done": sum(number for number, _ in done), "seconds": max(at for _, at in done) - began}))


if __name__ == "__main__":
    main()
