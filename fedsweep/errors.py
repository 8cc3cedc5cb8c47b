"""One tree of exceptions. The docstring of a class is its default message and says what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class FedsweepError(Exception):
    """Something went wrong in fedsweep."""

    exit_code = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class UsageError(FedsweepError):
    """The command was called wrongly. See `fedsweep --help`."""

    exit_code = 2


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong in a configuration: where it stands and what to do about it."""

    file: str
    line: int  # counted from 1; 0 where no line can be named
    path: str  # e.g. exp1.combinations[2].poison_ratio[1]; empty for the file as a whole
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class ConfigError(FedsweepError):
    """The configuration is wrong. Nothing was started; correct every line named and run the command again."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


class StateError(FedsweepError):
    """The state file cannot be used, and nothing was changed. Move it away or name another --state-dir."""

    exit_code = 2


class StateHeldError(StateError):
    """Another manager is using this state directory. Stop it, or name another --state-dir."""


class TransitionRefused(FedsweepError):
    """The task is not in the state that this change leaves; nothing was changed."""


class DataError(FedsweepError):
    """A data set is missing or damaged. Name a folder with the official files by --data-dir or FEDSWEEP_DATA."""

    exit_code = 2


class PartitionError(FedsweepError):
    """The training set cannot be divided so. Raise alpha, or lower num_clients or min_client_size."""


class ProtocolError(FedsweepError):
    """A message cannot be understood. docs/protocol.md lists the messages and the error codes."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class ManagerUnreachable(FedsweepError):
    """The manager does not answer. See that `fedsweep manager` runs and that --manager names its host and port."""


class ManagerNotTrusted(UsageError):
    """What answers is not the manager that was named. Use the join string that the manager printed."""


class Preempted(FedsweepError):
    """The worker was asked to stop; its task goes back to the manager without blame."""
