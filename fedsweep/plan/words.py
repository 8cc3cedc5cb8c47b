"""How values and near misses read in a message to a person."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable

MAX_SHOWN = 80  # characters of a value that a message repeats

# Names that other tools use, where no likeness of spelling leads to ours.
OTHER_NAMES = {"learning_rate": "lr", "attack": "poison_type", "attack_type": "poison_type"}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word` (or of which it is one part, as in "patience"), or None where none is close."""
    by_lower = {name.lower(): name for name in known}
    lowered = word[:MAX_SHOWN].lower().replace("-", "_").replace(" ", "_")
    if OTHER_NAMES.get(lowered) in by_lower:
        return OTHER_NAMES[lowered]
    if matches := difflib.get_close_matches(lowered, by_lower, n=1, cutoff=0.6):
        return by_lower[matches[0]]
    holders = [name for lower, name in by_lower.items() if lowered in lower.split("_")]
    return holders[0] if len(holders) == 1 else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean "…"?` with the known word most like `word`, or nothing where none is close."""
    match = nearest(word, known)
    return f'; did you mean "{match}"?' if match else ""


def shown(value: object) -> str:
    """A value as it may stand in YAML, on one line, unprintable characters escaped, cut at 80 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else "-.inf" if value < 0 else ".inf"
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return f"a whole number of more than {MAX_SHOWN} digits"
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def shown_key(key: str) -> str:
    """A key as it may stand in YAML: as it is, or in quotes where it holds anything unusual."""
    return key if re.fullmatch(r"[\w.-]{1,80}|<<", key) else shown(key)


def kind(value: object) -> str:
    """What a value is, in words: "a list", "a number"."""
    kinds: dict[type, str] = {
        type(None): "no value",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a string",
        dict: "a mapping",
        list: "a list",
    }
    return next((words for type_, words in kinds.items() if isinstance(value, type_)), type(value).__name__)


def number_in(text: str) -> str | None:
    """The number that a string spells, as it is to be written (`1_000` is 1000), or None where it spells none."""
    plain = text.strip().replace("_", "")
    try:
        return plain if math.isfinite(float(plain)) else None
    except ValueError:
        return None
