"""Checkpoints on disk: whole or not there, of the same origin or not used."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsweep.worker.checkpoints import Checkpoint, Checkpoints, Origin

ORIGIN = Origin.of("digits|lr", "native x4", "cpu")
SAVED = {
    "weights": torch.tensor([1.0, -0.0, math.inf]),
    "steps": 3,
    "history": [[1, math.nan, 0.5, 0]],
    "best_weights": {},
    "best_round": None,
    "best_loss": math.inf,
    "rounds_without_progress": 0,
}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def file_of(checkpoints: Checkpoints) -> Path:
    assert checkpoints.folder is not None
    (path,) = checkpoints.folder.iterdir()
    return path


def test_what_is_written_is_found_bit_for_bit(checkpoints):
    assert checkpoints.find(ORIGIN) is None
    assert checkpoints.write(Checkpoint(ORIGIN, 12.5, SAVED))
    found = checkpoints.find(ORIGIN)
    assert (found.origin, found.seconds) == (ORIGIN, 12.5)
    assert found.saved["weights"].numpy().tobytes() == SAVED["weights"].numpy().tobytes()
    assert str(found.saved | {"weights": 0}) == str(SAVED | {"weights": 0})
    assert checkpoints.plan(ORIGIN.signature) == "native x4"
    checkpoints.write(Checkpoint(ORIGIN, 20.0, SAVED))
    assert checkpoints.find(ORIGIN).seconds == 20.0
    checkpoints.remove(ORIGIN.signature)
    checkpoints.remove(ORIGIN.signature)
    assert checkpoints.find(ORIGIN) is None
    assert list(checkpoints.folder.iterdir()) == []


@pytest.mark.parametrize("field", ["plan", "device", "fedsweep_version", "torch_version"])
def test_one_of_another_origin_is_removed_with_a_line_in_the_log(checkpoints, field, caplog):
    checkpoints.write(Checkpoint(dataclasses.replace(ORIGIN, **{field: "another"}), 1.0, SAVED))
    assert checkpoints.find(ORIGIN) is None
    assert list(checkpoints.folder.iterdir()) == []
    (line,) = caplog.messages
    assert line.endswith(f"is not used and removed: another {field}")


def test_one_of_another_experiment_under_this_name_is_not_used(checkpoints):
    checkpoints.write(Checkpoint(dataclasses.replace(ORIGIN, signature="other"), 1.0, SAVED))
    file_of(checkpoints).rename(checkpoints._path(ORIGIN.signature))
    assert checkpoints.find(ORIGIN) is None


def test_what_is_damaged_anywhere_is_not_used(checkpoints, caplog):
    checkpoints.write(Checkpoint(ORIGIN, 1.0, SAVED))
    path = file_of(checkpoints)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 97)]
    damaged += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 97)]
    for content in [*damaged, b"garbage" * 100]:
        path.write_bytes(content)
        caplog.clear()
        assert checkpoints.find(ORIGIN) is None
        assert len(caplog.messages) == 1
        assert not path.exists()
    path.mkdir()
    assert checkpoints.find(ORIGIN) is None


def test_nothing_that_runs_code_is_loaded(checkpoints, tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    checkpoints.write(Checkpoint(ORIGIN, 1.0, {"weights": Evil()}))
    assert checkpoints.find(ORIGIN) is None
    assert not (tmp_path / "owned").exists()


def test_a_row_of_a_large_tensor_is_written_alone(checkpoints):
    checkpoints.write(Checkpoint(ORIGIN, 1.0, {"weights": torch.zeros(1000, 1000)[3]}))
    assert file_of(checkpoints).stat().st_size < 10_000


def test_it_is_synced_before_it_takes_the_place_of_the_earlier(checkpoints, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("sync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths))[1])
    checkpoints.write(Checkpoint(ORIGIN, 1.0, SAVED))
    assert done[-3:] == ["sync", "replace", "sync"]  # the file, its name, the folder


def test_a_full_disk_leaves_the_earlier_one_and_nothing_else(checkpoints, monkeypatch, caplog):
    checkpoints.write(Checkpoint(ORIGIN, 1.0, SAVED))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not checkpoints.write(Checkpoint(ORIGIN, 2.0, SAVED))
    assert "No space left on device" in caplog.text
    assert file_of(checkpoints).suffix == ".pt"
    assert checkpoints.find(ORIGIN).seconds == 1.0


def test_without_a_folder_nothing_is_kept():
    nowhere = Checkpoints(None)
    assert not nowhere.write(Checkpoint(ORIGIN, 1.0, SAVED))
    assert nowhere.find(ORIGIN) is None
    nowhere.remove(ORIGIN.signature)
