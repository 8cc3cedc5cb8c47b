"""Finding and reading configuration files: the one place that does."""

from __future__ import annotations

import glob
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedsweep.errors import ConfigError, Problem, UsageError
from fedsweep.plan.config import Source
from fedsweep.plan.words import did_you_mean

MAX_BYTES = 4 * 2**20
OVERRIDE = re.compile(r"[^=/\\*?\[\]]+=")  # what no path of a YAML file begins with


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The CONFIG and the KEY=VALUE arguments of a command line that mixes them.

    A file whose name looks like KEY=VALUE is a CONFIG if it exists.

    Raises:
        UsageError: there is no CONFIG.
    """
    overrides = [each for each in arguments if OVERRIDE.match(each) and not Path(each).exists()]
    paths = [each for each in arguments if each not in overrides]
    if not paths:
        raise UsageError("no configuration is named; name a YAML file, a folder or a glob: configs/quickstart.yaml")
    return paths, overrides


def read_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The configuration files that `paths` name, each once.

    Args:
        paths: files, folders (their `config_exp*.yaml`, then their other YAML files) and globs.

    Raises:
        ConfigError: with everything that is missing or cannot be read.
    """
    problems: list[Problem] = []
    files: dict[Path, Path] = {}  # by what they resolve to, so that no file is read twice
    for path in paths:
        try:
            for file in _find(str(path)):
                files.setdefault(file.resolve(), file)
        except (OSError, ValueError) as error:
            problems.append(Problem(str(path), 0, "", _reason(error)))
    sources = []
    for file in files.values():
        try:
            sources.append(Source(str(file), _read(file)))
        except NotText as error:
            problems.append(Problem(str(file), error.line, "", str(error)))
        except (OSError, ValueError) as error:
            problems.append(Problem(str(file), 0, "", _reason(error)))
    if problems:
        raise ConfigError(problems)
    return sources


class NotText(ValueError):
    """The file is not UTF-8 from a line on."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(message)


def _find(path: str) -> Iterator[Path]:
    """The files that one argument names.

    Raises:
        ValueError: there are none; the message says so.
        OSError: a folder cannot be listed.
    """
    place = Path(path)
    if place.is_dir():
        found = _yaml_files(place)
        if not found:
            raise ValueError("the folder holds no *.yaml or *.yml file")
        yield from found
    elif place.exists():
        yield place
    elif glob.has_magic(path):
        found = [match for match in map(Path, sorted(glob.glob(path, recursive=True))) if not match.is_dir()]
        if not found:
            raise ValueError("no file matches this pattern")
        yield from found
    else:
        raise ValueError(_why_missing(place))


def _yaml_files(folder: Path) -> list[Path]:
    entries = [entry for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml") and not entry.is_dir()]
    names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    first = [name for name in names if name.startswith("config_exp")]
    return [folder / name for name in [*first, *(name for name in names if name not in first)]]


def _why_missing(path: Path) -> str:
    folder = path.parent
    if path.is_symlink():
        return "no such file: a link to nothing"
    if not folder.is_dir():
        return f"no such file: there is no folder {folder}"
    return f"no such file{did_you_mean(path.name, [entry.name for entry in folder.iterdir()])}"


def _read(file: Path) -> str:
    """The text of a file.

    Raises:
        NotText: it is not UTF-8.
        ValueError: it is no regular file, or too large.
        OSError: it cannot be read.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a regular file; a configuration is a text file")
    if found.st_size > MAX_BYTES:
        raise ValueError(f"{found.st_size:,} bytes; a configuration has at most {MAX_BYTES:,}")
    return text_of(file.read_bytes())


def text_of(content: bytes) -> str:
    """The text of a configuration, UTF-8 with or without a byte-order mark.

    Raises:
        NotText: it is something else; says from which line on.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise NotText(1, "the file is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise NotText(line, f"the byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error)
