"""Finding official files in folders and archives, and having them downloaded where they are not."""

from __future__ import annotations

import gzip
import logging
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from fedsweep.datasets.download import MIRROR_VARIABLE, cache_dir, download
from fedsweep.datasets.readers import Blob, Split
from fedsweep.datasets.sources import SOURCES, Form, Source
from fedsweep.errors import DataError

logger = logging.getLogger(__name__)


def read_official(name: str, folders: Sequence[Path]) -> tuple[Split, Split]:
    """Training and test set of the data set `name`, from the first folder that has it, or from a download.

    Raises:
        DataError: it is nowhere to be had, or a file is damaged or belongs to another data set.
    """
    form, place = ensure(name, folders)
    blobs = _read_archive(place, form.members) if place.is_file() else _read_folder(place, form.members)
    train, test = form.read(blobs)
    _check_identity(name, train, test)
    return train, test


def ensure(name: str, folders: Sequence[Path]) -> tuple[Form, Path]:
    """A form of the data set and the folder or archive that holds it, downloaded where no folder has one.

    Raises:
        DataError: it is nowhere to be had. The message says what is needed, where it was looked for, what to do.
    """
    for folder in folders:
        for form in SOURCES[name].forms:
            place = _locate(form, folder)
            if place:
                return form, place
    failures: list[str] = []
    for form in SOURCES[name].forms:
        try:
            return form, _download(name, form)
        except DataError as error:
            failures.append(str(error))
    raise DataError(_how_to_get(name, folders, failures))


def _locate(form: Form, root: Path) -> Path | None:
    """The folder or the archive, in `root` or a sub-folder, that has every file of the form."""
    for folder in (root, *(root / name for name in form.folders)):
        if all(_plain_or_gz(folder / member) for member in form.members):
            return folder
        if form.archive and (folder / form.archive).is_file():
            return folder / form.archive
    return None


def _download(name: str, form: Form) -> Path:
    folder = cache_dir() / name
    for remote in form.downloads:
        download(name, remote, folder)
    return folder / form.archive if form.archive else folder


def _plain_or_gz(path: Path) -> Path | None:
    return next((each for each in (path, path.with_name(f"{path.name}.gz")) if each.is_file()), None)


def _read_folder(folder: Path, members: Sequence[str]) -> dict[str, Blob]:
    return {member: _read_file(_plain_or_gz(folder / member) or folder / member) for member in members}


def _read_file(path: Path) -> Blob:
    try:
        content = path.read_bytes()
        return Blob(str(path), gzip.decompress(content) if path.suffix == ".gz" else content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_archive(path: Path, members: Sequence[str]) -> dict[str, Blob]:
    blobs = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for entry in archive:
                member = PurePosixPath(entry.name).name
                stream = archive.extractfile(entry) if entry.isreg() and member in members else None
                if stream:
                    blobs[member] = Blob(f"{path}: {entry.name}", stream.read())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    missing = [member for member in members if member not in blobs]
    if missing:
        raise DataError(f"{path}: found no {', '.join(missing)} in it")
    return blobs


def _check_identity(name: str, train: Split, test: Split) -> None:
    """Refuse the files of a data set that has the same file names; say so where a set is not the whole one."""
    source = SOURCES[name]
    for other, each in SOURCES.items():
        if other != name and _begins(train.labels, each.first_labels):
            raise DataError(f"{train.path}: found the labels of {other}; expected {name}. {_own_folder(source)}")
    is_whole = (len(train.labels), len(test.labels)) == (source.train_size, source.test_size)
    if is_whole and source.first_labels and not _begins(train.labels, source.first_labels):
        raise DataError(f"{train.path}: found other labels than those of {name}. {_own_folder(source)}")
    if not is_whole:
        logger.warning(
            "%s: %d training and %d test images, where the official %s has %d and %d",
            *(train.path, len(train.labels), len(test.labels), name, source.train_size, source.test_size),
        )


def _begins(labels: npt.NDArray[np.int64], first: tuple[int, ...]) -> bool:
    return bool(first) and tuple(labels[: len(first)].tolist()) == first


def _own_folder(source: Source) -> str:
    return f"Put each data set into a sub-folder of its own ({' or '.join(source.forms[0].folders)})."


def _how_to_get(name: str, folders: Sequence[Path], failures: Sequence[str]) -> str:
    forms = SOURCES[name].forms
    needed = [
        ", ".join(form.members)
        + (f" (or all of them in {form.archive})" if form.archive else " (each as it is or .gz)")
        for form in forms
    ]
    missing = {folder: "" if folder.is_dir() else " (no such folder)" for folder in folders}
    looked_in = "; ".join(f"{folder}{note}" for folder, note in missing.items()) or "no folder was named"
    subfolders = ", ".join(dict.fromkeys(sub for form in forms for sub in form.folders))
    lines = [
        f"the data set {name} is in no folder, and could not be downloaded",
        f"  files needed: {'; or '.join(needed)}",
        f"  looked in: {looked_in} (and the sub-folders {subfolders})",
        *(f"  tried: {line}" for failure in failures for line in failure.splitlines()),
        f"  what to do: put the files into a folder and name it by --data-dir or FEDSWEEP_DATA, or name by "
        f"{MIRROR_VARIABLE} a server that has {name}/{forms[0].downloads[0].name}",
    ]
    return "\n".join(lines)
