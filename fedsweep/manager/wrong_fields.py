"""What is wrong with a field of a message, in words: where it stands, what was found, what is expected."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from fedsweep.plan.words import did_you_mean

SHOWN = 80  # characters of a wrong value that a message repeats

# By the type of a pydantic error; the names in braces are those of its context.
_EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "greater_than_equal": "at least {ge:,}",
    "less_than_equal": "at most {le:,}",
    "less_than": "less than {lt:,}",
    "string_too_short": "at least {min_length:,} character",
    "string_too_long": "at most {max_length:,} characters",
    "too_short": "at least {min_length:,} item",
    "too_long": "at most {max_length:,} items, found more",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
}


def shown(value: object) -> str:
    """A value for an error message: as JSON in ASCII, cut at 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except ValueError:
        text = json.dumps(str(value))
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def wrong_fields(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Every field of a message that is wrong, one by one.

    Args:
        error: what `model` raised.
        model: the type of the message, whose fields are named where one is unknown.

    Yields:
        Where it stands, as in `history.0.round`, and what is wrong with it.
    """
    for problem in error.errors(include_url=False):
        yield _path(problem["loc"]), _what(problem, model)


def _path(place: tuple[int | str, ...]) -> str:
    path = ".".join(map(str, place))
    return shown(path)[1:-1] or '""'  # whoever sent it may have made up the names


def _what(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    kind, name = problem["type"], str(problem["loc"][-1])
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        if len(problem["loc"]) > 1:
            return "is not a field here"
        fields = [known for known in model.model_fields if known != "token"]
        return f"is not a field of this message{did_you_mean(name, fields)} (it has {', '.join(fields)})"
    found = "not shown" if name == "token" else shown(problem["input"])
    if kind == "value_error":
        return f"is {found}; {problem['ctx']['error']}"
    if kind not in _EXPECTED:
        return f"is {found}; {problem['msg'][0].lower()}{problem['msg'][1:]}"
    limits = {name: _whole(limit) for name, limit in problem.get("ctx", {}).items()}
    return f"is {found}; expected {_EXPECTED[kind].format(**limits)}"


def _whole(limit: object) -> object:
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit
