"""Configuration files and overrides to a `SweepConfig`; every problem of all of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedsweep.errors import ConfigError, Problem
from fedsweep.plan import advice, document
from fedsweep.plan.document import UNREADABLE
from fedsweep.plan.experiment import CHECKED_TOGETHER, PARAMETERS, check_together, defaults
from fedsweep.plan.layout import LayoutReader, PhaseDraft, Setting
from fedsweep.plan.words import shown_key

COMMAND_LINE = "command line"
DEFAULT_SEED = 42
MAX_CHECKED = 100_000  # combinations of one phase that are looked at for values that clash


@dataclass(frozen=True)
class Source:
    """A configuration file: its name as the user knows it, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Phase:
    """One grid: the product of `varied`, once for each seed, over `base`."""

    name: str
    file: str
    line: int
    base: Mapping[str, Any]  # every parameter but the seed: built-in, then defaults, then the phase's, then overrides
    varied: Mapping[str, tuple[Any, ...]]  # in order; the first varies slowest
    seeds: tuple[int, ...]
    output_dir_place: tuple[str, int, str] = field(default=("", 0, ""), compare=False)  # file, line and path of it


@dataclass(frozen=True)
class SweepConfig:
    """All phases of all files, in order. Two with the same name are one phase, with the points of both."""

    phases: tuple[Phase, ...]


def parse(sources: Sequence[Source], overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep that the files ask for.

    Args:
        sources: the files.
        overrides: `KEY=VALUE`, the value in YAML; each replaces a parameter in the defaults of every file and phase.

    Raises:
        ConfigError: with every problem of every file and override.
    """
    problems: list[Problem] = []
    replaced, seeds = _read_overrides(overrides, problems)
    drafts: list[PhaseDraft] = []
    for source in sources:
        reader = LayoutReader(source.name)
        drafts += reader.phases(source.text)
        problems += reader.problems
    problems += _overridden_but_varied(drafts, replaced, seeds)
    drafts = [_override(draft, replaced, seeds) for draft in drafts]
    problems += _clashes(drafts)
    if problems:
        raise ConfigError(problems)
    return SweepConfig(tuple(_phase(draft) for draft in drafts))


def _phase(draft: PhaseDraft) -> Phase:
    given = {name: setting.value for name, setting in draft.settings.items()}
    base = {name: value for name, value in (defaults() | given).items() if name != "seed"}
    varied = {name: tuple(setting.value for setting in settings) for name, settings in draft.varied.items()}
    seeds = tuple(setting.value for setting in draft.seeds) or (DEFAULT_SEED,)
    output_dir = draft.settings.get("output_dir")
    place = (draft.file, draft.line, shown_key(draft.name))
    if output_dir is not None:
        place = (output_dir.file, output_dir.line, output_dir.path)
    return Phase(draft.name, draft.file, draft.line, base, varied, seeds, place)


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> tuple[dict[str, Setting], list[Setting]]:
    """The parameters that the command line sets, and its seeds (empty where it names none)."""
    reader = LayoutReader(COMMAND_LINE)
    replaced: dict[str, Setting] = {}
    seeds: list[Setting] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = document.join("", key)
        node, syntax_problems = document.read(COMMAND_LINE, text, path)
        if not equals:
            reader.report(0, path, "an override is KEY=VALUE, as in global_rounds=5")
        elif key not in PARAMETERS and key != "seeds":
            reader.report(0, path, advice.why_no_override(key))
        elif key in replaced or (key in ("seed", "seeds") and seeds):
            other = key if key in replaced else seeds[0].path.partition("[")[0]
            message = "is set twice; keep one" if other == key else f"{other} is set too; keep one of them"
            reader.report(0, path, message)
        elif syntax_problems:
            reader.problems += syntax_problems
        elif key == "seeds":
            seeds = reader.values("seed", node, key, "seeds={}")
        elif key == "seed":
            seeds = [reader.setting(key, node, key)]
        else:
            replaced[key] = reader.setting(key, node, key)
    problems += [replace(problem, line=0) for problem in reader.problems]
    replaced = {key: replace(setting, line=0) for key, setting in replaced.items()}
    return replaced, seeds


def _override(draft: PhaseDraft, replaced: dict[str, Setting], seeds: list[Setting]) -> PhaseDraft:
    return replace(draft, settings=draft.settings | replaced, seeds=seeds or draft.seeds)


def _overridden_but_varied(
    drafts: Sequence[PhaseDraft], replaced: Mapping[str, Setting], seeds: Sequence[Setting]
) -> Iterator[Problem]:
    """An override of what a phase varies: it could only be ignored, or spoil the phase."""
    for key in [*replaced, *(["seed"] if seeds else [])]:
        path = seeds[0].path.partition("[")[0] if key == "seed" else key
        varied = [draft.varied_seed if key == "seed" else draft.varied.get(key, [None])[0] for draft in drafts]
        pairs = zip(drafts, varied, strict=True)
        places = [f"{shown_key(draft.name)} ({first.file}:{first.line})" for draft, first in pairs if first]
        if places:
            message = f"cannot be overridden, because {key} is varied in {', '.join(places)}; edit the lists there"
            yield Problem(COMMAND_LINE, 0, path, message)


def _clashes(drafts: Sequence[PhaseDraft]) -> list[Problem]:
    """Values that are fine one by one and not together: each clash once, with the phases that have it."""
    phases_by_clash: dict[tuple[Setting, str], dict[str, None]] = {}
    for draft in drafts:
        at_fault: set[str] = set()
        for combination in _combinations_to_check(draft):
            clash = check_together({name: setting.value for name, setting in combination.items()})
            if clash and clash[0] not in at_fault:
                at_fault.add(clash[0])
                key = (combination[clash[0]], clash[1])
                phases_by_clash.setdefault(key, {})[draft.name] = None
    return [
        Problem(setting.file, setting.line, setting.path, message + advice.clash_in(phases, setting.path))
        for (setting, message), phases in phases_by_clash.items()
    ]


def _combinations_to_check(draft: PhaseDraft) -> Iterator[dict[str, Setting]]:
    """The distinct combinations of the parameters that are checked together; none where one of them is unreadable."""
    built_in = defaults()
    lists: list[list[Setting]] = []
    for name in CHECKED_TOGETHER:
        given = draft.varied.get(name) or [draft.settings.get(name) or Setting(built_in[name], "", 0, "")]
        lists.append(list({setting.value: setting for setting in given}.values()))
    if any(setting.value is UNREADABLE for settings in lists for setting in settings):
        return
    for values in itertools.islice(itertools.product(*lists), MAX_CHECKED):
        yield dict(zip(CHECKED_TOGETHER, values, strict=True))
