"""Who does what, and what came back: the ledger, the results files, the protocol, and `ExperimentManager`.

Nothing here imports torch. `ExperimentManager` is loaded when it is first used, so that a worker, which needs the
messages only, loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsweep.manager.manager import ExperimentManager

__all__ = ["ExperimentManager"]


def __getattr__(name: str) -> Any:
    if name == "ExperimentManager":
        from fedsweep.manager.manager import ExperimentManager

        return ExperimentManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
