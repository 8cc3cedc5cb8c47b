"""The names that users of the first scripts know exist, are importable and are documented."""

from __future__ import annotations

import importlib
import inspect

import pytest

NAMES = {
    "fedsweep.manager": ["ExperimentManager"],
    "fedsweep.worker": [
        *("get_available_gpu", "release_gpu_lock", "request_task_from_manager", "notify_task_complete"),
        *("notify_task_failed", "submit_result_to_manager", "create_model", "train_client_worker"),
        *("run_single_experiment", "run_task", "worker_loop"),
    ],
    "fedsweep.datasets": ["load_global_dataset"],
    "fedsweep.fl": [
        *("ScalableCNN", "LogisticRegression", "partition_data_dirichlet", "get_client_dataloader", "train_client"),
        *("evaluate_model", "fed_avg", "fed_median", "EarlyStopping"),
    ],
}
METHODS = [
    *("load_all_configs", "generate_experiments", "generate_all_tasks", "load_completed_tasks", "save_state"),
    *("load_state", "check_stale_assignments", "refresh_completed", "get_next_task", "mark_complete", "save_result"),
    *("mark_failed", "check_all_complete", "get_status", "handle_client", "run_server", "start"),
]
ATTRIBUTES = ["host", "port", "tasks", "completed_tasks", "assigned_tasks", "lock", "running", "state_file"]
TASK_FIELDS = [
    *("task_id", "phase", "config", "seed", "output_dir", "output_dirs", "status", "assigned_to", "assigned_at"),
    *("retry_count", "last_error"),
]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_name_is_there_and_documented(module, name):
    found = getattr(importlib.import_module(module), name)
    assert inspect.getdoc(found)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module("fedsweep.worker").no_such_name  # noqa: B018


@pytest.mark.parametrize("method", METHODS)
def test_manager_has_the_method_with_a_description(method):
    from fedsweep.manager import ExperimentManager

    assert inspect.getdoc(getattr(ExperimentManager, method))


def test_manager_has_the_attributes_and_its_tasks_the_fields(tmp_path, monkeypatch):
    from fedsweep.manager import ExperimentManager

    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text("phase:\n  combinations:\n    - poison_ratio: [0.0, 0.5]\n")
    manager = ExperimentManager(["grid.yaml"])
    manager.generate_all_tasks()
    for name in ATTRIBUTES:
        assert hasattr(manager, name), name
    task = manager.get_next_task("somebody")
    assert list(manager.tasks) == ["phase_0_42", "phase_1_42"]
    for name in TASK_FIELDS:
        assert name in manager.tasks["phase_0_42"], name
    assert task["task_id"] in manager.assigned_tasks
    assert manager._create_task_signature(task["config"]).startswith("digits|cnn|4|2|")
