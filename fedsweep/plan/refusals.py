"""What a parameter takes, and why it does not take a value, in words."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fedsweep.plan.types import DATASETS, PARQUET_PREFIX
from fedsweep.plan.words import did_you_mean, kind, number_in, shown

# How a range reads, by the bounds that a field has; every field that is a number has one of these.
RANGES = {
    ("ge",): "from {ge} up",
    ("gt",): "above {gt}",
    ("ge", "le"): "from {ge} to {le}",
    ("gt", "le"): "above {gt}, at most {le}",
    ("ge", "lt"): "from {ge}, below {lt}",
    ("gt", "lt"): "above {gt}, below {lt}",
}


def allowed(name: str, field: FieldInfo) -> str:
    """What values a parameter takes."""
    if name == "dataset":
        return ", ".join(DATASETS) + f", {PARQUET_PREFIX}PATH"
    annotation, nullable = _plain_annotation(field)
    if get_origin(annotation) is Literal:
        words = ", ".join(get_args(annotation))
    elif annotation is bool:
        words = "true or false"
    elif annotation is str:
        words = "the path of a folder" if name == "output_dir" else "a string"
    else:
        bounds = _bounds(field)
        words = f"{'a whole number' if annotation is int else 'a number'} {RANGES[tuple(bounds)].format(**bounds)}"
    return f"{words}, or null" if nullable else words


def _plain_annotation(field: FieldInfo) -> tuple[Any, bool]:
    """The bare type of a field (int, float, str, bool or a Literal), and whether it takes null."""
    annotation, nullable = field.annotation, False
    if type(None) in get_args(annotation):
        nullable = True
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation, nullable


def _bounds(field: FieldInfo) -> dict[str, str]:
    """The bounds of a numeric field as they read: `{"ge": "0", "le": "1,000"}`."""
    keys = ("ge", "gt", "le", "lt")
    return {key: f"{getattr(each, key):,}" for key in keys for each in field.metadata if hasattr(each, key)}


def refusal(name: str, field: FieldInfo, value: object) -> str:
    """Why `value` is none of parameter `name`: what was found, what is allowed, the nearest match."""
    annotation, nullable = _plain_annotation(field)
    rule = f"{name} is {allowed(name, field)}"
    if value is None:
        return f"null (no value) is not allowed; {rule}"
    if isinstance(value, str):
        if nullable and value.lower() in ("none", "nil", "null", ""):
            return f"{shown(value)} is a string; write null ({rule})"
        return _refusal_of_string(name, field, value)
    if annotation in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        share = _bounds(field).get("le") == "1" and 1 < value <= 100 and value == int(value)
        hint = f" ({value:g} % is {value / 100:g})" if share else ""
        return f"{shown(value)} is not allowed; {rule}{hint}"
    return f"{shown(value)} is {kind(value)}; {rule}"


def _refusal_of_string(name: str, field: FieldInfo, value: str) -> str:
    annotation, _ = _plain_annotation(field)
    rule = f"{name} is {allowed(name, field)}"
    if not value.isprintable():
        return f"{shown(value)} holds a character that cannot be printed; {rule}"
    if name == "dataset" and value.startswith(PARQUET_PREFIX):
        return f"{shown(value)} names no path; write {PARQUET_PREFIX}PATH, as in {PARQUET_PREFIX}data/cifar10"
    if name == "dataset" or get_origin(annotation) is Literal:
        known = DATASETS if name == "dataset" else get_args(annotation)
        hint = did_you_mean(value, known)
        return f"{shown(value)} is not {_article(name)}{hint} ({'' if hint else 'allowed: '}{allowed(name, field)})"
    if annotation in (int, float) and (number := number_in(value)) is not None:
        return f"{shown(value)} is a string; write {number}, without quotes ({rule})"
    if value == "":
        return f"the string is empty; {rule}"
    return f"{shown(value)} is a string; {rule}"


def _article(name: str) -> str:
    words = name.replace("_", " ")
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"
