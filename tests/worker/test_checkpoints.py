"""Checkpoints on disk: whole or not there, of the same origin or not used."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import pickle
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


def packed(payload: bytes) -> bytes:
    """As if we had written it: with its digest before it."""
    return hashlib.sha256(payload).digest() + payload


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return packed(buffer.getvalue())


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path.cwd() / "owned"),)


def link_to(target: str) -> Any:
    return lambda path: path.symlink_to(target)


ORIGIN_SAVED = dataclasses.asdict(ORIGIN)
FOREIGN: dict[str, Any] = {
    "nothing": lambda path: path.write_bytes(b""),
    "a digest alone": lambda path: path.write_bytes(hashlib.sha256(b"").digest()),
    "NULs": lambda path: path.write_bytes(bytes(4096)),
    "another program's": lambda path: path.write_bytes(saved({"model_state_dict": {}, "epoch": 3})),
    "of a plain torch.save": lambda path: torch.save({"origin": ORIGIN_SAVED, "seconds": 1.0, "saved": SAVED}, path),
    "a tensor": lambda path: path.write_bytes(saved(torch.ones(3))),
    "an origin of other fields": lambda path: path.write_bytes(
        saved({"origin": {**ORIGIN_SAVED, "host": "x"}, "seconds": 1.0, "saved": SAVED})
    ),
    "an origin without a field": lambda path: path.write_bytes(
        saved({"origin": {"signature": ORIGIN.signature}, "seconds": 1.0, "saved": SAVED})
    ),
    "seconds that are none": lambda path: path.write_bytes(
        saved({"origin": ORIGIN_SAVED, "seconds": "long", "saved": SAVED})
    ),
    "saved nothing": lambda path: path.write_bytes(saved({"origin": ORIGIN_SAVED, "seconds": 1.0, "saved": None})),
    "a pickle that runs code, with its digest": lambda path: path.write_bytes(packed(pickle.dumps(Evil()))),
    "a checkpoint that runs code, with its digest": lambda path: path.write_bytes(
        saved({"origin": ORIGIN_SAVED, "seconds": 1.0, "saved": Evil()})
    ),
    "an archive of nothing": lambda path: path.write_bytes(packed(b"PK\x05\x06" + bytes(18))),
    "a FIFO": os.mkfifo,
    "a link to nothing": link_to("nowhere"),
    "a link to itself": link_to(hashlib.sha256(ORIGIN.signature.encode()).hexdigest() + ".pt"),
    "a link to a device": link_to("/dev/zero"),
    "a link to a folder": link_to("."),
}


@pytest.mark.timeout(20)  # opening a FIFO the usual way waits for ever, reading /dev/zero until memory is full
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_is_no_checkpoint_of_ours_is_removed_and_the_next_one_kept(checkpoints, monkeypatch, tmp_path, make):
    monkeypatch.chdir(tmp_path)
    checkpoints.folder.mkdir()
    path = checkpoints._path(ORIGIN.signature)
    make(path)
    assert checkpoints.plan(ORIGIN.signature) is None
    assert checkpoints.find(ORIGIN) is None
    assert not (tmp_path / "owned").exists()
    assert not os.path.lexists(path) or os.readlink(path) == "nowhere"
    assert checkpoints.write(Checkpoint(ORIGIN, 2.0, SAVED))
    assert checkpoints.find(ORIGIN).seconds == 2.0
    assert not (checkpoints.folder / "nowhere").exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_text("x"), lambda path: path.symlink_to("away")])
def test_what_is_no_folder_of_checkpoints_means_that_none_is_kept(tmp_path, make, caplog):
    make(tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.find(ORIGIN) is None
    assert not checkpoints.write(Checkpoint(ORIGIN, 1.0, SAVED))
    assert "cannot be kept in the middle" in caplog.text
    checkpoints.remove(ORIGIN.signature)


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
