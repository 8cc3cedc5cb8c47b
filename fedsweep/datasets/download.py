"""Downloads: each file whole and with its checksum, or not there at all."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedsweep.errors import DataError

MIRROR_VARIABLE = "FEDSWEEP_MIRROR"
TIMEOUT_S = (10.0, 60.0)  # to connect; between two pieces
PIECE = 2**18

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file to download: its name, its SHA-256, and the addresses that the name is appended to, tried in turn."""

    name: str
    sha256: str
    mirrors: tuple[str, ...]


def cache_dir() -> Path:
    """The folder that downloads are kept in, for all sweeps: ~/.cache/fedsweep, or under XDG_CACHE_HOME."""
    import pooch

    return Path(pooch.os_cache("fedsweep"))


def download(dataset: str, remote: RemoteFile, folder: Path) -> None:
    """Have `remote` in `folder`, from the first mirror that gives it with the right checksum.

    A file that is there already with that checksum stays. A mirror that FEDSWEEP_MIRROR names is tried first, with
    `{dataset}/{name}` appended. Of several processes one downloads and the others wait.

    Raises:
        DataError: no mirror gave it; the message has a line for each. Nothing of the file is kept.
    """
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)  # the log line and the bar are ours
    own = os.environ.get(MIRROR_VARIABLE)
    mirrors = (f"{own.rstrip('/')}/{dataset}/", *remote.mirrors) if own else remote.mirrors
    failures = []
    with _one_at_a_time(folder):
        for mirror in mirrors:
            url = mirror + remote.name
            try:
                with _Progress(url) as progress:
                    fetch = pooch.HTTPDownloader(progressbar=progress, chunk_size=PIECE, timeout=TIMEOUT_S)
                    pooch.retrieve(url, f"sha256:{remote.sha256}", remote.name, folder, downloader=fetch)
                return
            except (ValueError, OSError) as error:  # a wrong checksum; whatever the network or the disk raises
                logger.info("%s: %s", url, error)
                failures.append(f"{url}: {_reason(error)}")
    raise DataError("\n".join(failures) or f"{remote.name}: no mirror is known")


def _reason(error: Exception) -> str:
    """Why a download failed, on one short line."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    if isinstance(error, requests.ConnectionError):
        return "the server cannot be reached"
    return " ".join(str(error).split())


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: downloads cannot be kept there: {error}") from error
    with lock:
        # Where there are no locks (some network file systems) each process downloads; the rename at the end of a
        # download still keeps every file whole.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Progress:
    """A bar on stderr where that is a terminal, one line in the log elsewhere. The methods are those pooch calls."""

    def __init__(self, url: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("downloading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.url = url
        self.task = self.bar.add_task(url.rpartition("/")[2], total=None, visible=False)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    @property
    def total(self) -> float | None:
        """Bytes of the whole file."""
        return self.bar.tasks[0].total

    @total.setter
    def total(self, total: int) -> None:
        logger.info("downloading %s (%.1f MB)", self.url, total / 1e6)
        self.bar.update(self.task, total=total or None, visible=True)

    def update(self, count: int) -> None:
        """Show `count` bytes more."""
        self.bar.advance(self.task, count)

    def reset(self) -> None:
        """Begin at 0 again."""
        self.bar.reset(self.task, total=self.total)

    def close(self) -> None:
        """The `with` block ends the bar."""
