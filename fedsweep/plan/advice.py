"""What to say of keys and values that stand in the wrong place of a configuration file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fedsweep.plan.experiment import PARAMETERS
from fedsweep.plan.words import did_you_mean, kind, nearest, shown, shown_key

FILE_KEYS = ("defaults", "seeds")
PHASE_KEYS = ("defaults", "combinations", "seeds")
EXAMPLE_ITEM = "- width_factor: [1, 4]"
EXAMPLE_BODY = "{combinations: [{width_factor: [1, 4]}]}"
EXAMPLE_PHASE = f"exp1: {EXAMPLE_BODY}"


def why_no_phase(name: str, value: object) -> str:
    """Why a top-level entry is neither `defaults`, nor `seeds`, nor a phase."""
    if name in PARAMETERS:
        return "this is a parameter; put it under defaults"
    if name == "combinations":
        return f"combinations stands in a phase, as in {EXAMPLE_PHASE}"
    if isinstance(value, dict):
        advice = did_you_mean(name, FILE_KEYS) or f"; a phase is written {shown_key(name)}: {EXAMPLE_BODY}"
        return f"there are no combinations in it, so it is no phase{advice}"
    if value is None and not nearest(name, [*FILE_KEYS, *PARAMETERS]):
        return f"nothing stands under it; a phase is written {shown_key(name)}: {EXAMPLE_BODY}"
    match = nearest(name, [*FILE_KEYS, *PARAMETERS])
    if match in PARAMETERS:
        return f'unknown key; did you mean the parameter "{match}", under defaults?'
    hint = did_you_mean(name, FILE_KEYS)
    return f"unknown key{hint} (a file has defaults, seeds, and phases: mappings with combinations)"


def why_no_phase_name(name: str) -> str:
    """Why a phase cannot be called so."""
    better = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._-")[:100]
    advice = f', as in "{better}"' if better else ""
    rule = 'at most 100 letters (a-z, A-Z), digits, "_", "." and "-", and a letter, digit or "_" first'
    return f"a phase cannot have this name, because files are named after it; use {rule}{advice}"


def why_no_phase_key(key: str, phase: str) -> str:
    """Why a phase has no such key."""
    if key in PARAMETERS:
        return f"this is a parameter; put it under {phase}.defaults, or under {phase}.combinations to vary it"
    return f"unknown key{did_you_mean(key, PHASE_KEYS)} (a phase has {', '.join(PHASE_KEYS)})"


def why_no_parameter(name: str) -> str:
    """Why a key is not the name of a parameter."""
    if name in ("seeds", "defaults", "combinations"):
        home = "to a phase" if name == "combinations" else "to the top of the file or to a phase"
        return f"{name} is not a parameter; it belongs {home}"
    known = ", ".join(PARAMETERS)
    return f"unknown parameter{did_you_mean(name, PARAMETERS) or f' (known: {known})'}"


def why_not_varied(name: str) -> str:
    """Why a parameter cannot stand in combinations."""
    advice = ", with placeholders such as {phase} or {depth}" if name == "output_dir" else ""
    return f"{name} cannot be varied, because it changes nothing that is computed; put it under defaults{advice}"


def why_no_combinations(value: object) -> str:
    """Why the value of `combinations` is not a list of parameters."""
    if value is None or value == []:
        return f"there are no combinations; write at least one parameter with its values, as in {EXAMPLE_ITEM}"
    if isinstance(value, dict) and value:
        name, values = next(iter(value.items()))
        listed = values if isinstance(values, list) else [values]
        item = f"{shown_key(name)}: {shown(listed)}"
        return f'this is a mapping, not a list; write "- " before each parameter, as in - {item}'
    return f"{shown(value)} is {kind(value)}, but combinations is a list, as in {EXAMPLE_ITEM}"


def why_no_item(value: object) -> str:
    """Why an item of `combinations` is not one parameter with its values."""
    if isinstance(value, dict) and value:
        return f'{", ".join(map(shown, value))} stand in one item; begin each with a "- " of its own'
    if not value:
        return f"there is nothing in this item; it needs one parameter with its values, as in {EXAMPLE_ITEM}"
    if isinstance(value, str) and (match := re.fullmatch(r"(\w+) *:?(\[.{,60}\])?", value)) and match[1] in PARAMETERS:
        advice = f"write - {match[1]}: {match[2] or one_value(match[1])}"
        return f'{shown(value)} is a string, because ":" with a space after it is missing; {advice}'
    return f"{shown(value)} is {kind(value)}, but an item is one parameter with its values, as in {EXAMPLE_ITEM}"


def why_no_values(name: str, value: object, form: str) -> str:
    """Why a value is not the list of values of a parameter; `form` is how to write it, with {} for the list."""
    if value is None or value == []:
        return f"there are no values; write at least one, as in {form.format(one_value(name))}"
    if isinstance(value, dict):
        return f"{shown(value)} is a mapping; write a list, as in {form.format(one_value(name))}"
    inner = shown(value).strip('"')
    return f"{shown(value)} is not a list; write {form.format(f'[{inner}]')}"


def one_value(name: str) -> str:
    """A list with one value of a parameter, as an example."""
    return f"[{shown(PARAMETERS[name].get_default())}]"


def on_setting(name: str, value: object) -> str:
    """What to add where one value of a parameter is refused."""
    if isinstance(value, list):
        return "; to vary it, put the list under a phase's combinations"
    if isinstance(value, dict) and len(value) == 1 and next(iter(value.values())) is None:
        return f'; put it in quotes: "{{{shown_key(next(iter(value)))}}}"'
    return ""


def two_kinds_of_seeds(seed: Any, line: int, *, in_phase: bool) -> str:
    """Why a `seed` among defaults and a list of `seeds` exclude each other."""
    advice = f"write seeds: [{seed}] in the phase instead" if in_phase else "keep one of them"
    return f"seed is {seed}, but seeds on line {line} say which seeds to run; {advice}"


def clash_in(phases: Iterable[str], path: str) -> str:
    """In which phases a clash of parameters arises, where the path does not say so."""
    names = [shown_key(name) for name in phases if not path.startswith(f"{name}.")]
    return f" (in {', '.join(names)})" if names else ""


def why_no_override(key: str) -> str:
    """Why a key on the command line names no parameter."""
    last = key.rpartition(".")[2]
    if last in PARAMETERS:
        return f"an override counts for every phase; write {last}=VALUE"
    return why_no_parameter(key)
