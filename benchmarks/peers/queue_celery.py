"""Celery: the application with its task, and what fills its queue. Run as a script in Celery's own environment.

A task is acknowledged after it has run, and given to another when its worker dies, which is what a user would set who
does not want to lose experiments; everything else is as it is by default. Celery sends its tasks one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from typing import Any

from celery import Celery
from simulated import config, result_data

app = Celery("queue_celery")
app.conf.update(
    broker_url=f"redis://127.0.0.1:{os.environ['REDIS_PORT']}/0",
    result_backend=f"redis://127.0.0.1:{os.environ['REDIS_PORT']}/1",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    broker_connection_retry_on_startup=True,
)


@app.task(name="experiment")
def experiment(number: int, config: dict[str, Any]) -> dict[str, Any]:
    """What takes a task's place: the result of an experiment."""
    return result_data(number)


def fill(queue_name: str, count: int) -> float:
    """Enqueue so many tasks, over one connection; the seconds that took."""
    with app.producer_or_acquire() as producer:
        began = time.perf_counter()
        for number in range(count):
            experiment.apply_async((number, config(number)), producer=producer, queue=queue_name)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("fill", "ready"))
    parser.add_argument("--queue", default="celery")
    parser.add_argument("--count", type=int, default=0)
    args = parser.parse_args()
    if args.what == "ready":
        print(json.dumps({"ready": len(app.control.ping(timeout=1.0))}))
        return
    names = {"celery": "celery", "kombu": "kombu", "redis-py": "redis"}
    versions = {name: version(package) for name, package in names.items()} | {"python": platform.python_version()}
    print(json.dumps({"seconds": fill(args.queue, args.count), "versions": versions}))


if __name__ == "__main__":
    main()
