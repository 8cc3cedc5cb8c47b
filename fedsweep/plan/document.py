"""YAML text to a tree whose every value knows its line.

Only the syntax is left to the YAML library; values follow the YAML 1.2 core schema (YAML 1.2.2, section 10.3) and
nothing else, so `5e-4` is a number, `no` is a string, and no text can make an object, run code, or grow without end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from fedsweep.errors import Problem
from fedsweep.plan.syntax import syntax_problem
from fedsweep.plan.words import kind, shown, shown_key

MAX_DEPTH = 32
MAX_ALIASED = 100_000  # values that aliases may add to those that stand in the text
MAX_NUMBER = 100  # characters of a number
MAX_NAME = 40  # characters of an anchor or a tag that a message repeats

UNREADABLE = object()  # the value of a node that is a problem already, so that nobody reports it twice

# YAML 1.2.2, section 10.3.2
_INT = re.compile(r"[-+]?[0-9]+")
_BASED_INT = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it stands.

    `value` is a scalar, a list of nodes, a dict of nodes by key, or `UNREADABLE`.
    """

    value: Any
    line: int  # counted from 1
    key_lines: dict[str, int] = field(default_factory=dict)  # of a mapping
    size: int = 1  # values in it, those that aliases stand for included
    height: int = 1  # levels in it, likewise

    def plain(self) -> Any:
        """The value without its lines."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return None if self.value is UNREADABLE else self.value


def read(file: str, text: str, path: str = "") -> tuple[Node, list[Problem]]:
    """The tree of one YAML document, and everything wrong with it as YAML.

    Args:
        file: name of the file in messages.
        text: its content.
        path: where in the configuration the document stands; the root as a rule.

    Returns:
        The root (`UNREADABLE` where the syntax is broken) and the problems.
    """
    builder = _Builder(file)
    try:
        root = builder.document(_events(text), path)
    except _GiveUp as reason:
        root = Node(UNREADABLE, 1)
        builder.problems.append(Problem(file, reason.line, path, reason.message))
    return root, builder.problems


def join(path: str, key: str) -> str:
    """The path of `key` in the mapping at `path`."""
    return f"{path}.{shown_key(key)}" if path else shown_key(key)


class _GiveUp(Exception):
    """The rest of the document cannot be read."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        self.message = message


def _events(text: str) -> Iterator[Event]:
    try:
        yield from YAML(typ="safe", pure=True).parse(text)
    except Exception as error:  # not only the library's own: it asserts and converts freely where input is very odd
        raise _GiveUp(*syntax_problem(error, text)) from None


class _Builder:
    """Makes nodes of events; goes on after a problem wherever the rest still has a meaning."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node | None] = {}  # None: its value is being read
        self.aliased = 0

    def document(self, events: Iterator[Event], path: str) -> Node:
        root = Node(None, 1)
        seen = 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                seen += 1
                if event.version not in (None, (1, 2)):
                    version = ".".join(map(str, event.version))
                    self._report(1, path, f"%YAML {version} is not supported; remove the line: files are YAML 1.2")
                if seen == 2:
                    self._report(_line(event), path, "a second YAML document begins here; make it a file of its own")
                    break
            elif isinstance(event, AliasEvent | ScalarEvent | SequenceStartEvent | MappingStartEvent):
                root = self._node(event, events, path, 1)
        return root

    def _report(self, line: int, path: str, message: str) -> None:
        self.problems.append(Problem(self.file, line, path, message))

    def _node(self, event: Any, events: Iterator[Event], path: str, depth: int) -> Node:
        """The node that begins with `event`; takes its further events from `events`."""
        if depth > MAX_DEPTH:
            raise _GiveUp(_line(event), f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, AliasEvent):
            return self._alias(event, path, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, SequenceStartEvent):
            node = self._sequence(event, events, path, depth)
        elif isinstance(event, MappingStartEvent):
            node = self._mapping(event, events, path, depth)
        else:
            node = self._scalar(event, path)
        if event.tag is not None:
            message = f"the tag {_short(event.tag)} is not supported; write the value without it"
            self._report(_line(event), path, message)
            node = Node(UNREADABLE, node.line)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _alias(self, event: AliasEvent, path: str, depth: int) -> Node:
        name, line = event.anchor[:MAX_NAME], _line(event)
        if event.anchor not in self.anchors:
            self._report(line, path, f"*{name} stands for nothing: there is no &{name} above it")
            return Node(UNREADABLE, line)
        node = self.anchors[event.anchor]
        if node is None:
            self._report(line, path, f"*{name} stands inside &{name}, so it would hold itself without end")
            return Node(UNREADABLE, line)
        self.aliased += node.size
        if self.aliased > MAX_ALIASED:
            raise _GiveUp(line, f"aliases such as *{name} stand for more than {MAX_ALIASED:,} values")
        if depth + node.height - 1 > MAX_DEPTH:
            raise _GiveUp(line, f"nested more than {MAX_DEPTH} levels deep, through *{name}")
        return node

    def _scalar(self, event: ScalarEvent, path: str) -> Node:
        line, text = _line(event), event.value
        if not event.implicit[0]:  # quoted, or a block of text
            return Node(text, line)
        if text in _WORDS:
            return Node(_WORDS[text], line)
        is_number = _INT.fullmatch(text) or _BASED_INT.fullmatch(text) or _FLOAT.fullmatch(text)
        if not is_number:
            return Node(text, line)
        if len(text) > MAX_NUMBER:
            self._report(line, path, f"a number of {len(text):,} characters; at most {MAX_NUMBER} are read")
            return Node(UNREADABLE, line)
        if _BASED_INT.fullmatch(text):
            return Node(int(text, 0), line)
        return Node(int(text) if _INT.fullmatch(text) else float(text), line)

    def _sequence(self, start: Event, events: Iterator[Event], path: str, depth: int) -> Node:
        items: list[Node] = []
        for event in events:
            if isinstance(event, SequenceEndEvent):
                break
            items.append(self._node(event, events, f"{path}[{len(items)}]", depth + 1))
        return _container(items, items, _line(start))

    def _mapping(self, start: Event, events: Iterator[Event], path: str, depth: int) -> Node:
        entries: dict[str, Node] = {}
        key_lines: dict[str, int] = {}
        merged: list[Node] = []
        problems_before = len(self.problems)
        for event in events:
            if isinstance(event, MappingEndEvent):
                break
            key_line = _line(event)
            is_merge = isinstance(event, ScalarEvent) and event.value == "<<" and event.implicit[0]
            key = self._key(event, events, path, depth)
            place = path if key is None else join(path, key)
            value_event = next(events)
            value = self._node(value_event, events, place, depth + 1)
            if isinstance(value_event, ScalarEvent) and not value_event.value:
                value = Node(value.value, key_line)  # an empty value has no place of its own
            if is_merge:
                merged += self._merge_sources(value, place)
            elif key in entries:
                self._report(key_line, place, f"stands here a second time (first on line {key_lines[key]}); keep one")
            elif key is not None:
                entries[key], key_lines[key] = value, key_line
        for source in merged:
            for key, value in source.value.items():
                entries.setdefault(key, value)
                key_lines.setdefault(key, source.key_lines[key])
        if not entries and len(self.problems) > problems_before:
            return Node(UNREADABLE, _line(start))
        return _container(entries, list(entries.values()), _line(start), key_lines)

    def _key(self, event: Event, events: Iterator[Event], path: str, depth: int) -> str | None:
        """The key that begins with `event`; None where it is none."""
        node = self._node(event, events, path, depth + 1)
        if isinstance(node.value, str):
            return node.value
        if node.value is None:
            self._report(node.line, path, 'there is no key before this ":"')
        elif node.value is not UNREADABLE:
            value = node.plain()
            advice = f'; write it in quotes: "{shown(value)}"' if isinstance(value, int | float) else ""
            self._report(node.line, path, f"the key {shown(value)} is {kind(value)}; a key is a string{advice}")
        return None

    def _merge_sources(self, node: Node, path: str) -> list[Node]:
        """The mappings that a merge key (`<<`) names."""
        sources = node.value if isinstance(node.value, list) else [node]
        for source in sources:
            if not isinstance(source.value, dict) and source.value is not UNREADABLE:
                found = source.plain()
                self._report(source.line, path, f"{shown(found)} is {kind(found)}; << takes a mapping, as in <<: *name")
        return [source for source in sources if isinstance(source.value, dict)]


def _container(value: Any, children: list[Node], line: int, key_lines: dict[str, int] | None = None) -> Node:
    size = 1 + sum(child.size for child in children)
    height = 1 + max((child.height for child in children), default=0)
    return Node(value, line, key_lines or {}, size, height)


def _line(event: Event) -> int:
    return int(event.start_mark.line) + 1


def _short(tag: str) -> str:
    """A tag as it is usually written: `!!name`."""
    standard = "tag:yaml.org,2002:"
    short = f"!!{tag.removeprefix(standard)}" if tag.startswith(standard) else tag
    return short[:MAX_NAME]
