"""Output folders: `{placeholders}` filled in, so that every grid point knows where its row goes."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any

from fedsweep.plan.experiment import PARAMETERS
from fedsweep.plan.words import did_you_mean, shown

PLACEHOLDERS = ("phase", *(name for name in PARAMETERS if name != "output_dir"))
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(template: str) -> list[str]:
    """The names in braces, in order."""
    return _PLACEHOLDER.findall(template)


def check_template(template: str) -> None:
    """Refuse an output folder that could not be filled in.

    Raises:
        ValueError: an unknown placeholder, a brace alone, or a `~`. The message says what to write instead.
    """
    for name in placeholders(template):
        if name not in PLACEHOLDERS:
            known = did_you_mean(name, PLACEHOLDERS) or " (allowed: phase, and every parameter but output_dir)"
            raise ValueError(f"{{{name}}} in {shown(template)} is neither a parameter nor {{phase}}{known}")
    if "{" in (rest := _PLACEHOLDER.sub("", template)) or "}" in rest:
        raise ValueError(f"{shown(template)} has a brace without its partner; write placeholders as {{phase}}")
    if template.startswith("~"):
        raise ValueError(f'{shown(template)} begins with "~", which is not expanded; write the whole path')


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The output folder of one grid point; relative where the template is.

    Args:
        template: a template that `check_template` has passed.
        values: the value of each placeholder in it.
    """
    return posixpath.normpath(_PLACEHOLDER.sub(lambda match: _component(values[match[1]]), template))


def _component(value: object) -> str:
    """A value as a part of a file name: no separator, no blank, never `..` alone."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # however it is spelled: 1.0, 1, 1e0
    text = re.sub(r"[^\w.+-]", "_", str(value))
    return text if text.strip(".") else "_"
