"""RQ: the task, and what fills its queue. Run as a script in RQ's own environment.

Tasks are enqueued a thousand at a time, in one pipeline, as RQ's documentation advises for many. Results are kept, as a
result of an experiment must be (RQ's default is 500 seconds).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from typing import Any

from redis import Redis
from rq import Queue, Worker
from simulated import config, result_data

AT_ONCE = 1000
FOR_EVER = -1
TASK = "queue_rq.experiment"  # as workers import it; here it may stand in a script


def experiment(number: int, config: dict[str, Any]) -> dict[str, Any]:
    """What takes a task's place: the result of an experiment."""
    return result_data(number)


def fill(redis: Redis, queue_name: str, count: int) -> float:
    """Enqueue so many tasks; the seconds that took."""
    queue = Queue(queue_name, connection=redis)
    began = time.perf_counter()
    for first in range(0, count, AT_ONCE):
        jobs = [
            Queue.prepare_data(TASK, args=(number, config(number)), result_ttl=FOR_EVER)
            for number in range(first, min(first + AT_ONCE, count))
        ]
        queue.enqueue_many(jobs)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("fill", "ready"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--queue", default="default")
    parser.add_argument("--count", type=int, default=0)
    args = parser.parse_args()
    redis = Redis(port=args.port)
    if args.what == "ready":
        print(json.dumps({"ready": Worker.count(connection=redis)}))
        return
    versions = {"rq": version("rq"), "redis-py": version("redis"), "python": platform.python_version()}
    print(json.dumps({"seconds": fill(redis, args.queue, args.count), "versions": versions}))


if __name__ == "__main__":
    main()
