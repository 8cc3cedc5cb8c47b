"""The layout of one configuration file: from a tree of YAML to phases, with everything that is wrong on the way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fedsweep.errors import Problem
from fedsweep.plan import advice, document
from fedsweep.plan.document import UNREADABLE, Node, join
from fedsweep.plan.experiment import PARAMETERS, check_value, is_scientific
from fedsweep.plan.output_dirs import check_template
from fedsweep.plan.words import kind, nearest, shown

PHASE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Setting:
    """A checked value (`UNREADABLE` where it was refused) and where it was given."""

    value: Any
    file: str
    line: int
    path: str


@dataclass(frozen=True)
class PhaseDraft:
    """A phase as its file has it, before the command line has its say."""

    name: str
    file: str
    line: int
    settings: dict[str, Setting]  # the file's defaults, then the phase's; without the seed
    varied: dict[str, list[Setting]]  # the lists of its combinations, in order; without the seed
    seeds: list[Setting]  # empty where the file names none
    varied_seed: Setting | None  # the first seed, where the seeds stand in the combinations


class LayoutReader:
    """Reads what belongs to one file: its phases, or single settings. Problems are collected, and reading goes on."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def phases(self, text: str) -> list[PhaseDraft]:
        """The phases of a configuration file."""
        root, problems = document.read(self.file, text)
        self.problems += problems
        if isinstance(root.value, dict):
            return self._phases(root)
        if root.value is None:
            self.report(0, "", f"the file is empty; it needs a phase at least, as in {advice.EXAMPLE_PHASE}")
        else:
            found = kind(root.plain())
            self._refuse(root, "", f"the file is {found}, but a configuration is a mapping: defaults, seeds and phases")
        return []

    def setting(self, name: str, node: Node, path: str, *, alone: bool = True) -> Setting:
        """The value of a parameter, checked.

        Args:
            name: the parameter.
            node: the value as it stands in the file.
            path: where it stands.
            alone: whether it is the parameter's one value, and not an item of a list.
        """
        value = node.plain()
        try:
            if node.value is not UNREADABLE:
                value = check_value(name, value)
                if name == "output_dir":
                    check_template(value)
                return Setting(value, self.file, node.line, path)
        except ValueError as refusal:
            self._refuse(node, path, f"{refusal}{advice.on_setting(name, value) if alone else ''}")
        return Setting(UNREADABLE, self.file, node.line, path)

    def values(self, name: str, node: Node, path: str, form: str) -> list[Setting]:
        """A list of values of one parameter; `form` is how it is written, with {} for the list."""
        if isinstance(node.value, list) and node.value:
            items = enumerate(node.value)
            return [self.setting(name, item, f"{path}[{index}]", alone=False) for index, item in items]
        self._refuse(node, path, advice.why_no_values(name, node.plain(), form))
        return [Setting(UNREADABLE, self.file, node.line, path)]

    def report(self, line: int, path: str, message: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(self.file, line, path, message))

    def _refuse(self, node: Node, path: str, message: str) -> None:
        """Report a node, unless it is a problem already."""
        if node.value is not UNREADABLE:
            self.report(node.line, path, message)

    def _phases(self, root: Node) -> list[PhaseDraft]:
        entries, lines = root.value, root.key_lines
        defaults = self._settings(entries["defaults"], "defaults") if "defaults" in entries else {}
        seeds = self._seeds(entries["seeds"], "seeds") if "seeds" in entries else []
        if seeds and "seed" in defaults:
            self._refuse_seed(defaults["seed"], lines["seeds"], in_phase=False)
        drafts = []
        for name, node in entries.items():
            if name in advice.FILE_KEYS:
                continue
            if isinstance(node.value, dict) and any(nearest(key, ["combinations"]) for key in node.value):
                drafts.append(self._phase(name, lines[name], node, defaults, seeds))
            elif node.value is not UNREADABLE:
                self.report(lines[name], join("", name), advice.why_no_phase(name, node.plain()))
        if not entries.keys() - set(advice.FILE_KEYS):
            self.report(0, "", f"there is no phase, so nothing would run; add one, as in {advice.EXAMPLE_PHASE}")
        return drafts

    def _phase(
        self, name: str, line: int, node: Node, file_defaults: dict[str, Setting], file_seeds: list[Setting]
    ) -> PhaseDraft:
        entries, lines, path = node.value, node.key_lines, join("", name)
        if not PHASE_NAME.fullmatch(name):
            self.report(line, path, advice.why_no_phase_name(name))
        for key in entries.keys() - set(advice.PHASE_KEYS):
            self.report(lines[key], join(path, key), advice.why_no_phase_key(key, path))
        own = self._settings(entries["defaults"], f"{path}.defaults") if "defaults" in entries else {}
        varied = self._combinations(entries.get("combinations"), f"{path}.combinations")
        own_seeds = self._seeds(entries["seeds"], f"{path}.seeds") if "seeds" in entries else []
        varied_seeds = varied.pop("seed", [])
        if varied_seeds and own_seeds:
            message = f"seeds stand here, and in the combinations on line {varied_seeds[0].line}; keep one of them"
            self.report(lines["seeds"], f"{path}.seeds", message)
        if "seed" in own and (own_seeds or file_seeds) and not varied_seeds:
            self._refuse_seed(own["seed"], (own_seeds or file_seeds)[0].line, in_phase=not own_seeds)
        own_seed = [own["seed"]] if "seed" in own else []
        default_seed = [file_defaults["seed"]] if "seed" in file_defaults else []
        return PhaseDraft(
            name=name,
            file=self.file,
            line=line,
            settings={key: setting for key, setting in (file_defaults | own).items() if key != "seed"},
            varied=varied,
            seeds=varied_seeds or own_seeds or own_seed or file_seeds or default_seed,
            varied_seed=varied_seeds[0] if varied_seeds else None,
        )

    def _refuse_seed(self, seed: Setting, seeds_line: int, *, in_phase: bool) -> None:
        if seed.value is not UNREADABLE:
            message = advice.two_kinds_of_seeds(seed.value, seeds_line, in_phase=in_phase)
            self.report(seed.line, seed.path, message)

    def _seeds(self, node: Node, path: str) -> list[Setting]:
        return self.values("seed", node, path, "seeds: {}")

    def _settings(self, node: Node, path: str) -> dict[str, Setting]:
        """The parameters of a `defaults` mapping, which may be empty."""
        if node.value is None:
            return {}
        if not isinstance(node.value, dict):
            found = node.plain()
            message = f"{shown(found)} is {kind(found)}, but defaults is a mapping, as in defaults: {{depth: 2}}"
            self._refuse(node, path, message)
            return {}
        settings = {}
        for name, value in node.value.items():
            place = join(path, name)
            if name in PARAMETERS:
                settings[name] = self.setting(name, value, place)
                continue
            self.report(node.key_lines[name], place, advice.why_no_parameter(name))
            if meant := nearest(name, PARAMETERS):  # it is not missing: do not complain of that too
                settings.setdefault(meant, Setting(UNREADABLE, self.file, value.line, place))
        return settings

    def _combinations(self, node: Node | None, path: str) -> dict[str, list[Setting]]:
        """The lists of a phase's combinations, by parameter, in order; `node` is None where their key is misspelled."""
        if node is None:
            return {}
        if not isinstance(node.value, list) or not node.value:
            self._refuse(node, path, advice.why_no_combinations(node.plain()))
            return {}
        varied: dict[str, list[Setting]] = {}
        first_lines: dict[str, int] = {}
        for index, item in enumerate(node.value):
            place = f"{path}[{index}]"
            entries = item.value if isinstance(item.value, dict) else {}
            if len(entries) != 1:
                self._refuse(item, place, advice.why_no_item(item.plain()))
            for name, values in entries.items():
                line, spot = item.key_lines[name], join(place, name)
                if name not in PARAMETERS:
                    self.report(line, spot, advice.why_no_parameter(name))
                elif not is_scientific(name):
                    self.report(line, spot, advice.why_not_varied(name))
                elif name in first_lines:
                    self.report(line, spot, f"{name} is varied on line {first_lines[name]} already; join the two lists")
                else:
                    first_lines[name] = line
                    varied[name] = self.values(name, values, spot, f"{name}: {{}}")
        return varied
