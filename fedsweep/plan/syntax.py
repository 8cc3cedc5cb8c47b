"""What a YAML syntax error means, in one clear line."""

from __future__ import annotations

import re

from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

BRACKETS = {"while parsing a flow sequence": "[]", "while parsing a flow mapping": "{}"}


def syntax_problem(error: Exception, text: str) -> tuple[int, str]:
    """The line where to look, and what is wrong there; `error` is what the YAML library raised for `text`."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"not valid YAML: the character U+{error.character:04X} is not allowed"
    if not isinstance(error, MarkedYAMLError):
        return 1, f"not valid YAML: the text cannot be read ({' '.join(str(error).split())[:100]})"
    line, reason = _reason(error, text)
    return line, f"not valid YAML: {reason}"


def _reason(error: MarkedYAMLError, text: str) -> tuple[int, str]:
    problem, context = str(error.problem), str(error.context or "")
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    opened = error.context_mark.line + 1 if error.context_mark else line
    match = re.search(r"(?:but (?:found|got)|found character) \(?'(.*?)'", problem)
    found = match[1] if match else ""
    if found == "\\t":
        return line, "a tab; indent with spaces"
    if problem.endswith("that cannot start any token"):
        return line, f'a value cannot begin with "{found}"; put it in quotes'
    if problem == "mapping values are not allowed here":
        return line, _why_no_mapping(text.splitlines(), line)
    if problem == "could not find expected ':'":
        return opened, 'there is no ":" after this key'
    if problem == "sequence entries are not allowed here":
        return line, 'a list of "- " items begins on a line of its own; or write it as [a, b]'
    if "quoted scalar" in context and "end of stream" in problem:
        return opened, "the quote that opens here is never closed"
    if "double-quoted" in context and "escape" in problem:
        return line, 'a "\\" in double quotes has a meaning of its own; use single quotes'
    if context in BRACKETS:
        return opened, _unclosed(BRACKETS[context], found, line)
    if " tag" in context + problem:
        return line, 'a tag ("!…"); tags are not supported, and a value that begins with "!" needs quotes'
    if found in ("]", "}"):
        return line, f'a "{found}" that closes nothing, or stands where a value is missing'
    if found == "<stream end>":
        return line, 'the file ends before a "[" or "{" is closed'
    if problem.startswith("expected the node content") and not found.startswith("<"):
        return line, f'a "{found}" where a value should be'
    if found == "<scalar>":
        return line, "text after the end of a value; put the whole value in quotes, and write a ' inside '…' twice"
    if problem.startswith(("expected <block end>", "expected '<document start>'")):
        return line, _why_misaligned(text.splitlines(), opened)
    return line, f"{context}, {problem}" if context else problem


def _unclosed(brackets: str, found: str, line: int) -> str:
    opening, closing = brackets[0], brackets[1]
    if found == "<stream end>":
        return f'the "{opening}" that opens here is never closed'
    what = "another value" if found.startswith("<") else f'"{found}"'
    return f'the "{opening}" that opens here is not closed: on line {line}, {what} where "," or "{closing}" should be'


def _why_no_mapping(lines: list[str], line: int) -> str:
    """Why the ":" on a line does not end a key there."""
    here = lines[line - 1] if line <= len(lines) else ""
    above = [number for number in range(1, line) if lines[number - 1].split("#")[0].strip()]
    if re.search(r":\s.*:(\s|$)", here):
        return 'a second ":" on this line; put a value that has ": " in it in quotes'
    if above and ":" not in lines[above[-1] - 1]:
        return f'there is no ":" after the key on line {above[-1]}'
    return "this line is indented deeper than the one before it, which has a value already; correct its indentation"


def _why_misaligned(lines: list[str], opened: int) -> str:
    """Why a line is no part of the block that begins on line `opened`."""
    first = lines[opened - 1] if opened <= len(lines) else ""
    if re.match(r"\s*-[^\s-]", first):
        return f'a space is missing after the "-" on line {opened}'
    return "this line does not line up with the lines above it; correct its indentation"
