"""What people ask of a sweep, running or at rest: what failed, to try it again, not to run it, to end."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedsweep.errors import ManagerUnreachable, ProtocolError, UsageError
from fedsweep.manager.answers import answer
from fedsweep.manager.clock import Clock
from fedsweep.manager.protocol import parse_request
from fedsweep.manager.state_dir import LEDGER_FILE
from fedsweep.manager.sweep import OpenSweep
from fedsweep.run import ask_manager

SHOWN_LINES = 8  # of a traceback
# What becomes of a task that has failed, but not for good.
TRIED_NOW = "{} tried again"
TRIED_LATER = "will be tried again when the sweep is started again"
NOT_RUN = "will not be tried again"
ASK_S = 60.0  # many tasks may change at once


class Sweep:
    """A sweep: its running manager or, where none runs, its state directory.

    Args:
        state_dir: its state directory.
        manager: HOST:PORT or join string of its manager, if that runs on another machine; then the manager must run.
        token_file: the manager's token, if not in `state_dir`.
        insecure_plaintext: send the token to another machine although nothing is encrypted.
    """

    def __init__(
        self,
        state_dir: Path,
        manager: str | None = None,
        token_file: Path | None = None,
        *,
        insecure_plaintext: bool = False,
    ) -> None:
        self.state_dir = state_dir
        self.manager = manager
        self.token_file = token_file
        self.insecure_plaintext = insecure_plaintext

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a message of docs/protocol.md, the same from a running manager and at rest.

        Raises:
            ManagerUnreachable: nobody answers at `manager`.
            UsageError: there is no sweep, or it has nothing of the name that was given.
            StateError: the state directory cannot be used.
        """
        try:
            try:
                return self.ask_running(message)
            except ManagerUnreachable:
                if self.manager is not None:
                    raise
                return self._ask_at_rest(message)
        except ProtocolError as error:
            if error.code in ("unknown_name", "unknown_task", "bad_field"):
                raise UsageError(str(error)) from None
            raise

    def ask_running(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of the running manager.

        Raises:
            ManagerUnreachable: none runs.
        """
        return ask_manager(
            message,
            self.state_dir,
            self.manager,
            self.token_file,
            timeout=ASK_S,
            insecure_plaintext=self.insecure_plaintext,
        )

    def _ask_at_rest(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if not (self.state_dir / LEDGER_FILE).exists():
            raise UsageError(f"{self.state_dir} holds no sweep; name another --state-dir, or a running --manager")
        sweep = OpenSweep(self.state_dir, threading.RLock(), Clock(), heartbeat_s=10.0, lease_s=120.0)
        sweep.hands_out = False
        try:
            return answer(sweep, parse_request(message), legacy=False)
        finally:
            sweep.close()


# ---- failures


def ask_failures(sweep: Sweep, state_option: str = "", *, earlier: bool = False) -> dict[str, Any]:
    """What failed, in groups of one cause; each with the command that repeats one of its experiments.

    `state_option` is what the command needs to find the same sweep; `earlier` asks for the tasks of an earlier
    configuration instead of the present ones.
    """
    answered = sweep.ask({"type": "failures"} | ({"earlier": True} if earlier else {}))
    for group in answered["groups"]:
        group["repeat"] = f"fedsweep repeat {group['task_ids'][0]}{state_option}"
    return {name: value for name, value in answered.items() if name != "type"}


def show_failures(
    failures: Mapping[str, Any], *, as_json: bool = False, state_option: str = "", earlier: bool = False
) -> None:
    """Print failures, as `ask_failures` gave them for the same `earlier`, for people, or as one JSON object."""
    if as_json:
        print(json.dumps(failures))
        return
    outlook = NOT_RUN if earlier else TRIED_NOW if failures.get("hands_out", True) else TRIED_LATER
    paragraphs = [_group_words(group, state_option, outlook) for group in failures["groups"]]
    if failures["left_out"]:
        paragraphs.append(f"and {failures['left_out']} more causes, which failed fewer tasks")
    if earlier:
        print("\n\n".join(paragraphs) if paragraphs else "Nothing of an earlier configuration has failed.")
        return
    paragraphs += [set_aside_words(worker) for worker in failures["set_aside"]]
    if not paragraphs:
        paragraphs.append("Nothing has failed.")
    if number := failures.get("earlier"):
        paragraphs.append(
            f"{_tasks(number)} of an earlier configuration had failed and will not be run: "
            f"fedsweep failures --earlier{state_option}"
        )
    print("\n\n".join(paragraphs))


def _group_words(group: Mapping[str, Any], state_option: str, outlook: str) -> str:
    lines = [f"{group['group']}  {group['cause']}"]
    if group["frame"]:
        lines.append(f"in {group['frame']}")
    lines.append(_amounts(group, outlook))
    if group["hosts"]:
        lines.append(f"on {', '.join(group['hosts'])}; workers {', '.join(group['workers'])}")
    if group["last_at"]:
        lines.append(_period(group["first_at"], group["last_at"]))
    more = group["failed"] + group["open"] - len(group["task_ids"])
    lines.append("tasks: " + ", ".join(group["task_ids"]) + (f" and {more} more" if more > 0 else ""))
    if group["group"] not in ("lost", "cancelled"):
        lines += ["  " + line for line in group["text"].splitlines()[-SHOWN_LINES:]]
    if group["group"] != "cancelled":
        lines.append(f"repeat one here:    {group['repeat']}")
    if group["failed"] and outlook != NOT_RUN:
        lines.append(f"run all of it again: fedsweep retry {group['group']}{state_option}")
    return "\n        ".join(lines)


def _period(first_at: str, last_at: str) -> str:
    """When it happened, to the second."""
    first, last = (datetime.fromisoformat(each).isoformat(timespec="seconds") for each in (first_at, last_at))
    return f"at {first}" if first == last else f"from {first} to {last}"


def _amounts(group: Mapping[str, Any], outlook: str) -> str:
    parts = []
    if group["failed"]:
        parts.append(f"{group['failed']} task{'s' * (group['failed'] != 1)} failed for good")
    if group["open"]:
        parts.append(f"{group['open']} {outlook.format('are' if group['open'] != 1 else 'is')}")
    if group["group"] == "cancelled":
        return f"{group['failed']} task{'s' * (group['failed'] != 1)} will not be run"
    return f"{group['failures']} time{'s' * (group['failures'] != 1)}; " + ", ".join(parts)


def set_aside_words(worker: Mapping[str, Any]) -> str:
    """What a person should know of a worker that was set aside."""
    device = f", {worker['device']}" if worker.get("device") else ""
    return (
        f"set aside: worker {worker['worker_id']} ({worker['host']}{device}), {worker['at']}: {worker['reason']}\n"
        f"        It failed {worker['failures']} tasks and finished none in between; they went to others."
    )


# ---- decisions


def retry(sweep: Sweep, names: Sequence[str]) -> str:
    """Let failed tasks be tried again; what came of it, in words."""
    answered = sweep.ask({"type": "retry", "names": list(names)})
    words = f"{_tasks(answered['retried'])} will be tried again (where nothing runs, once the sweep is started again)"
    if not answered["retried"]:
        words = "Nothing to try again"
    if answered["cancelled"]:
        words += f"; {answered['cancelled']} cancelled stay so (`fedsweep retry cancelled` brings them back)"
    return words + "."


def cancel(sweep: Sweep, names: Sequence[str]) -> str:
    """Let tasks not be run; what came of it, in words."""
    answered = sweep.ask({"type": "cancel", "names": list(names)})
    words = f"{_tasks(answered['cancelled'])} cancelled"
    if answered["running"]:
        words += f", {answered['running']} of them running: dropped with their worker's next sign of life"
    if answered["left"]:
        words += f"; {answered['left']} had ended before"
    return words + "."


def end(sweep: Sweep, how: str) -> str:
    """Let a running sweep `drain` or `stop`; what will come of it, in words."""
    answered = sweep.ask_running({"type": how})
    what = {
        "drain": "Workers finish what they hold and get nothing more; then all ends.",
        "stop": "Workers save what they hold and give it back with their next sign of life; then all ends.",
    }
    kept = "Everything finished is kept; the command that started the sweep goes on from there."
    return " ".join(filter(None, (what[how], _waiting(answered) if how == "drain" else "", kept)))


def _waiting(answered: Mapping[str, Any]) -> str:
    """Whom a drain waits for, and how long at most if it gives no sign; empty where it waits for none."""
    if not answered.get("tasks"):
        return ""
    count = answered["workers"]
    return (
        f"Waiting for {count} worker{'s' * (count != 1)} with {_tasks(answered['tasks'])}; a worker without a sign is "
        f"given up after {answered['lease_s']:.0f} s; `fedsweep stop` ends now."
    )


def _tasks(count: int) -> str:
    return f"{count} task{'s' * (count != 1)}"
