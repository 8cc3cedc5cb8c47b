"""The token stays between those who have it: nobody reads it off a process, a log, an answer or a screen."""

from __future__ import annotations

import json
import shutil
import socket

import psutil
import pytest

from fedsweep.manager.protocol import REQUESTS
from fedsweep.worker.client import ManagerClient, notify_task_failed, request_task_from_manager

pytestmark = pytest.mark.acceptance

# One experiment trains on until the sweep is stopped; the other is for somebody who fails it.
SWEEP = """\
defaults: {dataset: digits, model_type: lr, depth: 1, num_clients: 4, global_rounds: 50000, output_dir: out,
  early_stopping_patience: 50000}
seeds: [1]
long: {combinations: [{width_factor: [2]}]}
other: {combinations: [{width_factor: [1]}]}
"""


def answers_of(port: int, token: str) -> str:
    """Everything that a manager says to good and bad requests of every type."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        lines = connection.makefile("rb")

        def ask(**message: object) -> str:
            connection.sendall(json.dumps(message).encode() + b"\n")
            return lines.readline().decode()

        said = [ask(type="status", token=token), ask(type="failures", token=token)]
        for kind in [*(set(REQUESTS) - {"drain", "stop", "retry"}), "no such type"]:
            said += [
                ask(type=kind, token=given) for given in (token[:-1], token + "x", token.swapcase(), [token], None)
            ]
            said += [ask(type=kind, token=token, worker_id=["x"], **{"made up": token[:5]})]
        said += [ask(type="show_task", token=token, task_id="long_0_1")]
        connection.sendall(b'{"token":"' + token.encode() + b'", "token":')
        connection.shutdown(socket.SHUT_WR)
        said += [lines.read().decode()]
    assert sum('"error"' in line for line in said) > 50
    return "".join(said)


def test_the_token_is_seen_nowhere(processes, tmp_path, fedsweep, wait_until):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sweep = processes("sweep.yaml")
    manager = sweep.manager(port)
    own = tmp_path / ".fedsweep/token"
    wait_until((tmp_path / ".fedsweep/manager.json").exists, 30, "the manager listens")
    token = own.read_text().strip()
    copy = tmp_path / "copy"
    shutil.copy(own, copy)
    worker = sweep._start("worker", "--manager", f"127.0.0.1:{port}", "--token-file", str(copy), "--device", "cpu")

    shown: dict[str, str] = {}
    with ManagerClient("127.0.0.1", port, token) as client:

        def status() -> dict:
            return client.ask({"type": "status"})["status"]

        wait_until(lambda: any(each["round"] for each in status()["workers"]), 60, "a finished round")
        task = request_task_from_manager(client, "another").task
        assert notify_task_failed(client, task.task_id, "another", "it raised", task.attempt)
    for process in (manager, worker):
        running = psutil.Process(process.pid)
        for each in [running, *running.children(recursive=True)]:
            shown[f"command line of {each.pid}"] = " ".join(each.cmdline())
            shown[f"environment of {each.pid}"] = json.dumps(each.environ())
    (tmp_path / "wrong").write_text(token[:-1] + "\n")
    for arguments in (["status"], ["status", "--json"], ["failures"], ["status", "--token-file", "wrong"]):
        done = fedsweep(*arguments)
        shown[" ".join(arguments)] = done.stdout + done.stderr
    assert "the token is wrong" in shown["status --token-file wrong"]
    shown["answers"] = answers_of(port, token)
    assert fedsweep("stop").returncode == 0
    assert (worker.wait(20), manager.wait(40)) == (0, 0)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path not in (own, copy)]
    assert {"manager.log", "worker.log", "ledger.sqlite3"} <= {path.name for path in files}
    shown |= {str(path.relative_to(tmp_path)): path.read_bytes().decode("latin-1") for path in files}
    for where, text in shown.items():
        assert token not in text, where
        assert where == "wrong" or token[:-1] not in text, where
