"""The configuration reference in Markdown, made from the definitions of the parameters."""

from __future__ import annotations

from collections.abc import Iterable

from fedsweep.plan.experiment import PARAMETERS, allowed, is_scientific, unit
from fedsweep.plan.words import shown

INTRODUCTION = """\
# Configuration

<!-- Made by docs/make_configuration.py from fedsweep/plan; change it there, then `make docs`. -->

A configuration is a YAML file with `defaults`, `seeds`, and phases. A phase is any other top-level key with
`combinations` in it; its name is yours (letters, digits, `_`, `.`, `-`; files are named after it).

```yaml
defaults:                                # for every phase of this file
  dataset: mnist
  num_clients: 10
  output_dir: ./results/{phase}          # {phase} and {any parameter} are filled in
seeds: [42, 101, 2024]                   # every combination runs once for each

width_and_poison:                        # a phase
  defaults:                              # for this phase only
    local_epochs: 2
  combinations:                          # every value of the one with every value of the other
    - width_factor: [1, 4, 16, 64]
    - poison_ratio: [0.0, 0.25, 0.5]

depth_alone:                             # another phase
  combinations:
    - depth: [1, 2, 4]
```

The first phase asks for 4 × 3 × 3 = 36 experiments, the second for 3 × 3 = 9. `fedsweep plan FILE` counts them
without running anything.

**Which value holds.** Built-in default < `defaults` of the file < `defaults` of the phase < `combinations`. On the
command line, `KEY=VALUE` replaces a parameter in all `defaults`: `fedsweep run study.yaml global_rounds=5 'seeds=[1,
2]'`. What a phase varies cannot be overridden.

**Files.** A command takes files, folders (`config_exp*.yaml`, then the other YAML files) and globs, and reads each
file once. `defaults` and `seeds` hold in their own file. Phases of the same name in two files are one phase.

**Combinations.** Each item is one parameter with the list of its values; the grid is the product of all lists. More
than 1,000,000 experiments have to be allowed by `--max-tasks`. Only parameters of the experiment can be varied.

**Seeds.** `seeds` stands at the top of the file or in a phase, which then uses its own; without any, the seed is 42.
A single one may be written as `seed` in `defaults`. `seed` in `combinations` replaces the seeds for that phase.

**Output folders.** `{phase}` and the name of any parameter in braces are filled into `output_dir`; characters that do
not belong in a file name become `_`. Two phases may share a folder. Relative folders are relative to the current one.

**The same experiment twice** is run once, wherever it is asked for: in two phases, in two files, or as a clean
experiment (`poison_ratio: 0`) under each of two attacks. Every place that asks for it gets its row. What cannot
matter is left out of the comparison: the attack at `poison_ratio` 0, the target of anything but a targeted label
flip, `poison_level` at `poison_ratio` 1, `data_ordering` where no client has both clean and poisoned samples, `alpha`
with `partition: iid`, `min_client_size` with anything but `dirichlet_class`, `width_factor` at `depth` 0, and
patience that cannot run out.

**YAML.** Files are YAML 1.2 in UTF-8: `5e-4` is a number, `no` is a string. Anchors, aliases and merge keys (`<<`)
work; tags do not. A key given twice, an unknown key and a wrong value are errors. All errors of all files are shown
at once, each with its file, line and path, and nothing starts before they are corrected.
"""
SCIENCE = """\
## The experiment

These make an experiment what it is; all of them are in its signature. [science.md](science.md) says what they do.
"""
RUNNING = """\
## Where and how it runs

These change no result, are in no signature, and cannot be varied.
"""
HEAD = "| parameter | default | takes | unit | meaning |\n|---|---|---|---|---|\n"


def render() -> str:
    """The whole page."""
    science = [name for name in PARAMETERS if is_scientific(name)]
    running = [name for name in PARAMETERS if not is_scientific(name)]
    return "\n".join([INTRODUCTION, SCIENCE, _table(science), RUNNING, _table(running)])


def _table(names: Iterable[str]) -> str:
    return HEAD + "".join(_row(name) for name in names)


def _row(name: str) -> str:
    field = PARAMETERS[name]
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | `{shown(field.get_default())}` | {allowed(name)} | {unit(name)} | {meaning} |\n"
