"""A disk that loses power: of what was not synced, any part may be there afterwards, in any mixture.

What happened to a folder is a list of events (see `recording.py`). Replayed up to some moment they give, for every
file, the bytes that a sync has made safe and the changes that none has; and the same for the names in every folder.
`image` keeps any of the unsafe changes: none, all, the first so many, or some here and there, whole or in pieces.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

Event = tuple[Any, ...]
# ("file", node), ("folder", node): it exists; ("write", node, offset, bytes), ("resize", node, size), ("sync", node);
# ("name", folder, name, node), ("rename", folder, old, new), ("remove", folder, name), ("sync", folder)
ROOT = 0


@dataclass
class _Unsafe:
    """Something with changes that no sync has made safe."""

    pending: list[Event] = field(default_factory=list)


@dataclass
class _File(_Unsafe):
    safe: bytearray = field(default_factory=bytearray)


@dataclass
class _Folder(_Unsafe):
    safe: dict[str, int] = field(default_factory=dict)


def replay(events: Sequence[Event]) -> dict[int, _File | _Folder]:
    """Files and folders after these events, at the moment when the power goes."""
    nodes: dict[int, _File | _Folder] = {ROOT: _Folder()}
    for event in events:
        kind, node = event[0], event[1] if len(event) > 1 else None
        if kind == "file":
            nodes[node] = _File()
        elif kind == "folder":
            nodes[node] = _Folder()
        elif kind == "sync":
            _make_safe(nodes[node])
        elif kind in ("write", "resize", "name", "rename", "remove"):
            nodes[node].pending.append(event)
    return nodes


def _make_safe(node: _File | _Folder) -> None:
    for change in node.pending:
        _apply(node, change)
    node.pending.clear()


def _apply(node: _File | _Folder, change: Event) -> None:
    match change, node:
        case ("write", _, offset, content), _File(safe=safe):
            safe.extend(bytes(max(0, offset - len(safe))))
            safe[offset : offset + len(content)] = content
        case ("resize", _, size), _File(safe=safe):
            del safe[size:]
            safe.extend(bytes(size - len(safe)))
        case ("name", _, name, target), _Folder(safe=safe):
            safe[name] = target
        case ("rename", _, old, new), _Folder(safe=safe):
            if old in safe:  # its making may be lost while this is not
                safe[new] = safe.pop(old)
        case ("remove", _, name), _Folder(safe=safe):
            safe.pop(name, None)


def image(events: Sequence[Event], rng: random.Random) -> dict[str, bytes | None]:
    """What may be on the disk after a power loss that followed these events: contents by path, None for a folder."""
    nodes = replay(events)
    temper = rng.choice(("none", "all", "any", "any", "any"))
    for node in nodes.values():
        for change in _surviving(node, rng, temper):
            _apply(node, change)
    found: dict[str, bytes | None] = {}
    _walk(nodes, ROOT, "", found)
    return found


def _surviving(node: _File | _Folder, rng: random.Random, temper: str) -> list[Event]:
    """The unsafe changes of a file or folder that survive, some of them in part."""
    how = rng.choice(("none", "all", "first", "some")) if temper == "any" else temper
    if how == "none":
        return []
    if how == "all":
        return list(node.pending)
    if how == "first":
        count = rng.randrange(len(node.pending) + 1)
        torn = node.pending[count : count + 1]
        return [*node.pending[:count], *(piece for change in torn for piece in _pieces(change, rng)[:1])]
    share = rng.random()
    kept: list[Event] = []
    for change in node.pending:
        if rng.random() < share:
            kept.append(change)
        elif change[0] == "write":
            pieces = _pieces(change, rng)
            kept += [piece for piece in pieces if rng.random() < 0.5]
            if rng.random() < 0.3:  # the file has grown, its bytes have not come
                _, target, offset, content = change
                kept.append(("write", target, offset + len(content), b""))
    return kept


def _pieces(change: Event, rng: random.Random) -> list[Event]:
    """A write cut at up to three places; nothing of a change that is made at once."""
    if change[0] != "write":
        return []
    _, node, offset, content = change
    cuts = sorted({0, len(content), *(rng.randrange(len(content) + 1) for _ in range(rng.randint(1, 3)))})
    return [("write", node, offset + begin, content[begin:end]) for begin, end in pairwise(cuts)]


def _walk(nodes: dict[int, _File | _Folder], node: int, path: str, found: dict[str, bytes | None]) -> None:
    here = nodes[node]
    if isinstance(here, _File):
        found[path] = bytes(here.safe)
        return
    if path:
        found[path] = None
    for name, target in here.safe.items():
        _walk(nodes, target, f"{path}/{name}" if path else name, found)


def put_on_disk(root: Path, content: dict[str, bytes | None]) -> None:
    """Make the files and folders of an image."""
    root.mkdir()
    for path, raw in content.items():
        if raw is None:
            (root / path).mkdir(exist_ok=True)
        else:
            (root / path).write_bytes(raw)
