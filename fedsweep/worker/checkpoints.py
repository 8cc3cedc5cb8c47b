"""Experiments in the middle, on disk: what a worker that is killed has trained is not trained again."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsweep import __version__
from fedsweep.files import fsync, make_folder, read_plain
from fedsweep.worker import kernels
from fedsweep.worker.device import device_name

log = logging.getLogger(__name__)

SUFFIX = ".pt"
UNFINISHED = ".part"
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Origin:
    """What has to be the same for an experiment to go on with the same bits."""

    signature: str
    plan: str  # its arithmetic, see `fl.candidates.arithmetic`
    device: str  # its name
    fedsweep_version: str
    torch_version: str

    @classmethod
    def of(cls, signature: str, plan: str, device: str) -> Origin:
        """The origin of what is computed here and now, on a torch device."""
        version = f"{__version__} {kernels.kernel_version()}"
        return cls(signature, plan, device_name(device), version, str(torch.__version__))


@dataclass(frozen=True)
class Checkpoint:
    """An experiment between two rounds."""

    origin: Origin
    seconds: float  # that it has taken so far
    saved: Mapping[str, Any]  # for `Cohort.join`


class Checkpoints:
    """The checkpoints in a folder, one file for each signature. A file is either whole or not there."""

    def __init__(self, folder: Path | None) -> None:
        """Keep checkpoints in `folder`; None: keep none."""
        self.folder = folder

    def write(self, checkpoint: Checkpoint) -> bool:
        """Keep a checkpoint in the place of an earlier one; it survives a crash from when this returns.

        Returns:
            Whether it could be written; if not, a line in the log says why.
        """
        if self.folder is None:
            return False
        try:
            make_folder(self.folder)
            self._replace(self._path(checkpoint.origin.signature), _packed(checkpoint))
        except OSError as error:
            log.warning("%s cannot be kept in the middle: %s", checkpoint.origin.signature, error)
            return False
        return True

    def _replace(self, path: Path, content: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=UNFINISHED, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
            fsync(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def plan(self, signature: str) -> str | None:
        """The arithmetic under which an experiment was begun; None where there is no checkpoint that can be read."""
        found = self._read(signature)
        return None if found is None else found.origin.plan

    def find(self, origin: Origin) -> Checkpoint | None:
        """The checkpoint of an experiment, if it has one of this origin; one of another is removed."""
        found = self._read(origin.signature)
        if found is None or found.origin == origin:
            return found
        differing = [name for name, value in asdict(origin).items() if getattr(found.origin, name) != value]
        self._discard(origin.signature, f"another {', '.join(differing)}")
        return None

    def remove(self, signature: str) -> None:
        """Forget the checkpoint of an experiment, if there is one, and what a killed worker left of another."""
        if self.folder is None:
            return
        path = self._path(signature)
        try:
            for each in (path, *self.folder.glob(f"{path.stem}-*{UNFINISHED}")):
                each.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, error)

    def _path(self, signature: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(signature.encode()).hexdigest()}{SUFFIX}"

    def _read(self, signature: str) -> Checkpoint | None:
        if self.folder is None:
            return None
        try:
            return _unpacked(read_plain(self._path(signature)))
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever reading garbage raises
            self._discard(signature, f"it cannot be read: {error}")
            return None

    def _discard(self, signature: str, reason: str) -> None:
        log.warning("the checkpoint %s is not used and removed: %s", self._path(signature), reason)
        self.remove(signature)


def _packed(checkpoint: Checkpoint) -> bytes:
    """The digest of what follows, and the checkpoint."""
    buffer = io.BytesIO()
    content = {"origin": asdict(checkpoint.origin), "seconds": checkpoint.seconds, "saved": _own(checkpoint.saved)}
    torch.save(content, buffer)
    payload = buffer.getvalue()
    return hashlib.sha256(payload).digest() + payload


def _unpacked(raw: bytes) -> Checkpoint:
    digest, payload = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError("it is damaged")
    content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return Checkpoint(Origin(**content["origin"]), float(content["seconds"]), dict(content["saved"]))


def _own(value: Any) -> Any:
    """The same with tensors that are nobody's part: of a view the whole would be written."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {name: _own(each) for name, each in value.items()}
    return value
