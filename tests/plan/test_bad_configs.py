"""Wrong configurations and what is said of them, word for word."""
# ruff: noqa: E501

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest

from fedsweep import cli
from fedsweep.errors import ConfigError
from fedsweep.plan.config import Source, parse

PHASE = """\
exp1:
  combinations:
    - width_factor: [1, 4]
"""
NESTED_20 = "[" * 20 + "]" * 20
ALIAS_BOMB = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@dataclass(frozen=True)
class Bad:
    """A wrong file (a.yaml), perhaps with a second one (b.yaml) and overrides, and every line of what is said."""

    text: str
    errors: list[str]
    overrides: list[str] = field(default_factory=list)
    second: str | None = None

    def sources(self) -> list[Source]:
        second = [] if self.second is None else [Source("b.yaml", self.second)]
        return [Source("a.yaml", self.text), *second]


CASES = {
    "an empty file": Bad(
        "",
        [
            "a.yaml: the file is empty; it needs a phase at least, as in exp1: {combinations: [{width_factor: [1, 4]}]}",
        ],
    ),
    "only comments": Bad(
        """\
# exp1:
#   combinations: []
""",
        [
            "a.yaml: the file is empty; it needs a phase at least, as in exp1: {combinations: [{width_factor: [1, 4]}]}",
        ],
    ),
    "a list": Bad(
        "- exp1\n",
        [
            "a.yaml:1: the file is a list, but a configuration is a mapping: defaults, seeds and phases",
        ],
    ),
    "a word": Bad(
        "exp1\n",
        [
            "a.yaml:1: the file is a string, but a configuration is a mapping: defaults, seeds and phases",
        ],
    ),
    "no phase": Bad(
        """\
defaults: {dataset: mnist}
seeds: [1]
""",
        [
            "a.yaml: there is no phase, so nothing would run; add one, as in exp1: {combinations: [{width_factor: [1, 4]}]}",
        ],
    ),
    "a parameter at the top": Bad(
        "dataset: mnist\n" + PHASE,
        [
            "a.yaml:1: dataset: this is a parameter; put it under defaults",
        ],
    ),
    "a parameter of another tool at the top": Bad(
        "learning_rate: 0.1\n" + PHASE,
        [
            'a.yaml:1: learning_rate: unknown key; did you mean the parameter "lr", under defaults?',
        ],
    ),
    "misspelled defaults": Bad(
        "default: {lr: 0.1}\n" + PHASE,
        [
            'a.yaml:1: default: there are no combinations in it, so it is no phase; did you mean "defaults"?',
        ],
    ),
    "misspelled seeds": Bad(
        "sedes: [1, 2]\n" + PHASE,
        [
            'a.yaml:1: sedes: unknown key; did you mean "seeds"? (a file has defaults, seeds, and phases: mappings with combinations)',
        ],
    ),
    "combinations without a phase": Bad(
        """\
combinations:
  - depth: [1]
""",
        [
            "a.yaml:1: combinations: combinations stands in a phase, as in exp1: {combinations: [{width_factor: [1, 4]}]}",
        ],
    ),
    "a phase without content": Bad(
        "exp1:\n",
        [
            "a.yaml:1: exp1: nothing stands under it; a phase is written exp1: {combinations: [{width_factor: [1, 4]}]}",
        ],
    ),
    "a phase without combinations": Bad(
        """\
exp1:
  width_factor: [1, 4]
""",
        [
            "a.yaml:1: exp1: there are no combinations in it, so it is no phase; a phase is written exp1: {combinations: [{width_factor: [1, 4]}]}",
        ],
    ),
    "a phase with a name that is no file name": Bad(
        """\
exp 1/2:
  combinations:
    - depth: [1]
""",
        [
            'a.yaml:1: "exp 1/2": a phase cannot have this name, because files are named after it; use at most 100 letters (a-z, A-Z), digits, "_", "." and "-", and a letter, digit or "_" first, as in "exp_1_2"',
        ],
    ),
    "a phase that would hide its files": Bad(
        """\
'..':
  combinations:
    - depth: [1]
""",
        [
            'a.yaml:1: ..: a phase cannot have this name, because files are named after it; use at most 100 letters (a-z, A-Z), digits, "_", "." and "-", and a letter, digit or "_" first',
        ],
    ),
    "keys of a phase": Bad(
        """\
exp1:
  local_epochs: 2
  combination:
    - depth: [1]
  grid: 1
""",
        [
            "a.yaml:2: exp1.local_epochs: this is a parameter; put it under exp1.defaults, or under exp1.combinations to vary it",
            'a.yaml:3: exp1.combination: unknown key; did you mean "combinations"? (a phase has defaults, combinations, seeds)',
            "a.yaml:5: exp1.grid: unknown key (a phase has defaults, combinations, seeds)",
        ],
    ),
    "combinations as a mapping": Bad(
        """\
exp1:
  combinations:
    width_factor: [1, 4]
    depth: 2
""",
        [
            'a.yaml:3: exp1.combinations: this is a mapping, not a list; write "- " before each parameter, as in - width_factor: [1, 4]',
        ],
    ),
    "no combinations": Bad(
        """\
exp1:
  combinations: []
exp2:
  combinations:
""",
        [
            "a.yaml:2: exp1.combinations: there are no combinations; write at least one parameter with its values, as in - width_factor: [1, 4]",
            "a.yaml:4: exp2.combinations: there are no combinations; write at least one parameter with its values, as in - width_factor: [1, 4]",
        ],
    ),
    "combinations as a number": Bad(
        """\
exp1:
  combinations: 3
""",
        [
            "a.yaml:2: exp1.combinations: 3 is a number, but combinations is a list, as in - width_factor: [1, 4]",
        ],
    ),
    "items of combinations": Bad(
        PHASE
        + """\
      depth: [1, 2]
    - poison_ratio:[0, 0.5]
    - aggregator
    - {}
    -
    - [alpha, 0.1]
""",
        [
            'a.yaml:3: exp1.combinations[0]: "width_factor", "depth" stand in one item; begin each with a "- " of its own',
            'a.yaml:5: exp1.combinations[1]: "poison_ratio:[0, 0.5]" is a string, because ":" with a space after it is missing; write - poison_ratio: [0, 0.5]',
            'a.yaml:6: exp1.combinations[2]: "aggregator" is a string, because ":" with a space after it is missing; write - aggregator: ["fedavg"]',
            "a.yaml:7: exp1.combinations[3]: there is nothing in this item; it needs one parameter with its values, as in - width_factor: [1, 4]",
            "a.yaml:8: exp1.combinations[4]: there is nothing in this item; it needs one parameter with its values, as in - width_factor: [1, 4]",
            'a.yaml:9: exp1.combinations[5]: ["alpha", 0.1] is a list, but an item is one parameter with its values, as in - width_factor: [1, 4]',
        ],
    ),
    "values of combinations": Bad(
        """\
exp1:
  combinations:
    - depth: []
    - width_factor: 4
    - lr: 0.1, 0.2
    - alpha:
    - dataset: {a: 1}
""",
        [
            "a.yaml:3: exp1.combinations[0].depth: there are no values; write at least one, as in depth: [2]",
            "a.yaml:4: exp1.combinations[1].width_factor: 4 is not a list; write width_factor: [4]",
            'a.yaml:5: exp1.combinations[2].lr: "0.1, 0.2" is not a list; write lr: [0.1, 0.2]',
            "a.yaml:6: exp1.combinations[3].alpha: there are no values; write at least one, as in alpha: [1.0]",
            'a.yaml:7: exp1.combinations[4].dataset: {"a": 1} is a mapping; write a list, as in dataset: ["digits"]',
        ],
    ),
    "a parameter varied twice": Bad(
        """\
exp1:
  combinations:
    - depth: [1]
    - lr: [0.1]
    - depth: [2]
""",
        [
            "a.yaml:5: exp1.combinations[2].depth: depth is varied on line 3 already; join the two lists",
        ],
    ),
    "what cannot be varied": Bad(
        """\
exp1:
  combinations:
    - output_dir: [a, b]
    - device: [cpu]
""",
        [
            "a.yaml:3: exp1.combinations[0].output_dir: output_dir cannot be varied, because it changes nothing that is computed; put it under defaults, with placeholders such as {phase} or {depth}",
            "a.yaml:4: exp1.combinations[1].device: device cannot be varied, because it changes nothing that is computed; put it under defaults",
        ],
    ),
    "unknown parameters": Bad(
        """\
defaults:
  poison_rate: 0.5
  Learning-Rate: 0.1
exp1:
  defaults:
    patience: 3
    seeds: [1]
  combinations:
    - agregator: [median]
    - combinations: [1]
""",
        [
            'a.yaml:2: defaults.poison_rate: unknown parameter; did you mean "poison_ratio"?',
            'a.yaml:3: defaults.Learning-Rate: unknown parameter; did you mean "lr"?',
            'a.yaml:6: exp1.defaults.patience: unknown parameter; did you mean "early_stopping_patience"?',
            "a.yaml:7: exp1.defaults.seeds: seeds is not a parameter; it belongs to the top of the file or to a phase",
            'a.yaml:9: exp1.combinations[0].agregator: unknown parameter; did you mean "aggregator"?',
            "a.yaml:10: exp1.combinations[1].combinations: combinations is not a parameter; it belongs to a phase",
        ],
    ),
    "an unknown parameter like no other": Bad(
        "defaults: {zzz: 1}\n" + PHASE,
        [
            "a.yaml:1: defaults.zzz: unknown parameter (known: dataset, model_type, width_factor, depth, poison_ratio, poison_type, poison_level, target_class, poison_label, alpha, partition, min_client_size, data_ordering, aggregator, batch_size, num_clients, fraction_fit, global_rounds, local_epochs, lr, momentum, weight_decay, max_grad_norm, validation_split, early_stopping_patience, min_delta, partition_seed, split_seed, seed, output_dir, project_name, num_parallel_workers, engine, optimizer, device, load_to_memory)",
        ],
    ),
    "defaults that are no mapping": Bad(
        """\
defaults:
  - lr: 0.1
exp1:
  defaults: 3
  combinations:
    - depth: [1]
""",
        [
            'a.yaml:2: defaults: [{"lr": 0.1}] is a list, but defaults is a mapping, as in defaults: {depth: 2}',
            "a.yaml:4: exp1.defaults: 3 is a number, but defaults is a mapping, as in defaults: {depth: 2}",
        ],
    ),
    "words": Bad(
        """\
defaults:
  dataset: MNIST
  model_type: resnet
  aggregator: mediann
  optimizer: adam
  engine: batch
  partition: 3
exp1:
  combinations:
    - poison_type: [label_flip, label_flop]
    - dataset: [cifar-10, 'parquet:', imagenet]
""",
        [
            'a.yaml:2: defaults.dataset: "MNIST" is not a dataset; did you mean "mnist"? (digits, mnist, fashion_mnist, kmnist, cifar10, cifar100, parquet:PATH)',
            'a.yaml:3: defaults.model_type: "resnet" is not a model type (allowed: cnn, lr)',
            'a.yaml:4: defaults.aggregator: "mediann" is not an aggregator; did you mean "median"? (fedavg, fedavg_uniform, median)',
            'a.yaml:5: defaults.optimizer: "adam" is not an optimizer (allowed: sgd)',
            'a.yaml:6: defaults.engine: "batch" is not an engine; did you mean "batched"? (batched, reference)',
            "a.yaml:7: defaults.partition: 3 is a number; partition is dirichlet_class, dirichlet_client, iid",
            'a.yaml:10: exp1.combinations[0].poison_type[1]: "label_flop" is not a poison type; did you mean "label_flip"? (label_flip, random_noise)',
            'a.yaml:11: exp1.combinations[1].dataset[0]: "cifar-10" is not a dataset; did you mean "cifar10"? (digits, mnist, fashion_mnist, kmnist, cifar10, cifar100, parquet:PATH)',
            'a.yaml:11: exp1.combinations[1].dataset[1]: "parquet:" names no path; write parquet:PATH, as in parquet:data/cifar10',
            'a.yaml:11: exp1.combinations[1].dataset[2]: "imagenet" is not a dataset (allowed: digits, mnist, fashion_mnist, kmnist, cifar10, cifar100, parquet:PATH)',
        ],
    ),
    "numbers": Bad(
        """\
defaults:
  depth: 2.5
  lr: fast
  alpha: 0
  batch_size: true
  momentum: 1
  weight_decay: "5e-4"
  num_clients: 1_000
  global_rounds:
exp1:
  combinations:
    - poison_ratio: [0, 30, -0.1, .nan, .inf, [0.1], '0.5']
    - width_factor: [4, 5000, 999999999999999999999999999999999999999999999999999999999999999999999999999999999]
""",
        [
            "a.yaml:2: defaults.depth: 2.5 is not allowed; depth is a whole number from 0 to 1,024",
            'a.yaml:3: defaults.lr: "fast" is a string; lr is a number above 0',
            "a.yaml:4: defaults.alpha: 0 is not allowed; alpha is a number above 0, at most 1,000,000,000",
            "a.yaml:5: defaults.batch_size: true is a truth value; batch_size is a whole number from 2 to 1,000,000,000",
            "a.yaml:6: defaults.momentum: 1 is not allowed; momentum is a number from 0, below 1",
            'a.yaml:7: defaults.weight_decay: "5e-4" is a string; write 5e-4, without quotes (weight_decay is a number from 0 up)',
            'a.yaml:8: defaults.num_clients: "1_000" is a string; write 1000, without quotes (num_clients is a whole number from 1 to 100,000)',
            "a.yaml:9: defaults.global_rounds: null (no value) is not allowed; global_rounds is a whole number from 1 to 1,000,000,000",
            "a.yaml:12: exp1.combinations[0].poison_ratio[1]: 30 is not allowed; poison_ratio is a number from 0 to 1 (30 % is 0.3)",
            "a.yaml:12: exp1.combinations[0].poison_ratio[2]: -0.1 is not allowed; poison_ratio is a number from 0 to 1",
            "a.yaml:12: exp1.combinations[0].poison_ratio[3]: .nan is not allowed; poison_ratio is a number from 0 to 1",
            "a.yaml:12: exp1.combinations[0].poison_ratio[4]: .inf is not allowed; poison_ratio is a number from 0 to 1",
            "a.yaml:12: exp1.combinations[0].poison_ratio[5]: [0.1] is a list; poison_ratio is a number from 0 to 1",
            'a.yaml:12: exp1.combinations[0].poison_ratio[6]: "0.5" is a string; write 0.5, without quotes (poison_ratio is a number from 0 to 1)',
            "a.yaml:13: exp1.combinations[1].width_factor[1]: 5000 is not allowed; width_factor is a whole number from 1 to 4,096",
            "a.yaml:13: exp1.combinations[1].width_factor[2]: a whole number of more than 80 digits is not allowed; width_factor is a whole number from 1 to 4,096",
        ],
    ),
    "null by another name": Bad(
        """\
defaults:
  target_class: None
  max_grad_norm: 'null'
"""
        + PHASE,
        [
            'a.yaml:2: defaults.target_class: "None" is a string; write null (target_class is a whole number from 0 to 1,000,000,000, or null)',
            'a.yaml:3: defaults.max_grad_norm: "null" is a string; write null (max_grad_norm is a number above 0, or null)',
        ],
    ),
    "truth values and strings": Bad(
        """\
defaults:
  load_to_memory: yes
  project_name: 3
  device: 0
"""
        + PHASE,
        [
            'a.yaml:2: defaults.load_to_memory: "yes" is a string; load_to_memory is true or false',
            "a.yaml:3: defaults.project_name: 3 is a number; project_name is a string",
            "a.yaml:4: defaults.device: 0 is a number; device is a string",
        ],
    ),
    "a list where one value belongs": Bad(
        """\
defaults:
  width_factor: [1, 4]
"""
        + PHASE,
        [
            "a.yaml:2: defaults.width_factor: [1, 4] is a list; width_factor is a whole number from 1 to 4,096; to vary it, put the list under a phase's combinations",
        ],
    ),
    "a character that cannot be printed": Bad(
        'defaults:\n  project_name: "a\\x07b"\n  output_dir: "a\\0b"\n' + PHASE,
        [
            'a.yaml:2: defaults.project_name: "a\\u0007b" holds a character that cannot be printed; project_name is a string',
            'a.yaml:3: defaults.output_dir: "a\\u0000b" holds a character that cannot be printed; output_dir is the path of a folder',
        ],
    ),
    "output folders": Bad(
        """\
defaults:
  output_dir: ./results_{datset}
exp1:
  defaults: {output_dir: "./{zzz}"}
  combinations: &two
    - depth: [1, 2]
exp2:
  defaults: {output_dir: {phase}}
  combinations: *two
exp3:
  defaults: {output_dir: "./results_{phase"}
  combinations: *two
exp4:
  defaults: {output_dir: ~/results}
  combinations: *two
exp5:
  defaults: {output_dir: ""}
  combinations: *two
""",
        [
            'a.yaml:2: defaults.output_dir: {datset} in "./results_{datset}" is neither a parameter nor {phase}; did you mean "dataset"?',
            'a.yaml:4: exp1.defaults.output_dir: {zzz} in "./{zzz}" is neither a parameter nor {phase} (allowed: phase, and every parameter but output_dir)',
            'a.yaml:8: exp2.defaults.output_dir: {"phase": null} is a mapping; output_dir is the path of a folder; put it in quotes: "{phase}"',
            'a.yaml:11: exp3.defaults.output_dir: "./results_{phase" has a brace without its partner; write placeholders as {phase}',
            'a.yaml:14: exp4.defaults.output_dir: "~/results" begins with "~", which is not expanded; write the whole path',
            "a.yaml:17: exp5.defaults.output_dir: the string is empty; output_dir is the path of a folder",
        ],
    ),
    "a seed that is no list": Bad(
        "seeds: 42\n" + PHASE,
        [
            "a.yaml:1: seeds: 42 is not a list; write seeds: [42]",
        ],
    ),
    "no seeds": Bad(
        "seeds: []\n" + PHASE,
        [
            "a.yaml:1: seeds: there are no values; write at least one, as in seeds: [42]",
        ],
    ),
    "wrong seeds": Bad(
        "seeds: [a, -1, 1.5]\n" + PHASE,
        [
            'a.yaml:1: seeds[0]: "a" is a string; seed is a whole number from 0 to 9,223,372,036,854,775,807',
            "a.yaml:1: seeds[1]: -1 is not allowed; seed is a whole number from 0 to 9,223,372,036,854,775,807",
            "a.yaml:1: seeds[2]: 1.5 is not allowed; seed is a whole number from 0 to 9,223,372,036,854,775,807",
        ],
    ),
    "seed and seeds": Bad(
        """\
defaults: {seed: 7}
seeds: [1, 2]
"""
        + PHASE,
        [
            "a.yaml:1: defaults.seed: seed is 7, but seeds on line 2 say which seeds to run; keep one of them",
        ],
    ),
    "seeds of a phase": Bad(
        """\
seeds: [1, 2]
exp1:
  defaults: {seed: 7}
  combinations:
    - depth: [1]
exp2:
  seeds: [3]
  defaults: {seed: 7}
  combinations:
    - depth: [1]
exp3:
  seeds: [3]
  combinations:
    - depth: [1]
    - seed: [4]
""",
        [
            "a.yaml:3: exp1.defaults.seed: seed is 7, but seeds on line 1 say which seeds to run; write seeds: [7] in the phase instead",
            "a.yaml:8: exp2.defaults.seed: seed is 7, but seeds on line 7 say which seeds to run; keep one of them",
            "a.yaml:12: exp3.seeds: seeds stand here, and in the combinations on line 15; keep one of them",
        ],
    ),
    "half a target": Bad(
        """\
defaults: {target_class: 1}
exp1:
  combinations:
    - width_factor: [1, 4]
exp2:
  combinations:
    - poison_label: [1, 2]
""",
        [
            "a.yaml:1: defaults.target_class: target_class is 1 but poison_label is not set; a targeted attack needs both (in exp1)",
            "a.yaml:7: exp2.combinations[0].poison_label[0]: poison_label and target_class are both 1; the attack would change nothing",
        ],
    ),
    "a target that is its own label": Bad(
        """\
exp1:
  defaults: {poison_label: 3}
  combinations:
    - target_class: [1, 2, 3]
""",
        [
            "a.yaml:2: exp1.defaults.poison_label: poison_label and target_class are both 3; the attack would change nothing",
        ],
    ),
    "half a target that is misspelled": Bad(
        "defaults: {targt_class: 1, poison_label: 2}\n" + PHASE,
        [
            'a.yaml:1: defaults.targt_class: unknown parameter; did you mean "target_class"?',
        ],
    ),
    "a target for every label": Bad(
        """\
exp1:
  combinations:
    - target_class: [0, 1, 2]
    - poison_label: [2, 1, 0]
""",
        [
            "a.yaml:4: exp1.combinations[1].poison_label[2]: poison_label and target_class are both 0; the attack would change nothing",
        ],
    ),
    "a class that the data do not have": Bad(
        """\
defaults: {target_class: 12, poison_label: 3}
exp1:
  combinations: &both
    - dataset: [cifar100, mnist]
exp2:
  combinations: *both
exp3:
  defaults: {dataset: cifar100, poison_label: 100}
  combinations:
    - depth: [1]
""",
        [
            "a.yaml:1: defaults.target_class: target_class is 12, but mnist has the classes 0 to 9 (in exp1, exp2)",
            "a.yaml:8: exp3.defaults.poison_label: poison_label is 100, but cifar100 has the classes 0 to 99",
        ],
    ),
    "unknown overrides": Bad(
        PHASE,
        [
            'command line: depht: unknown parameter; did you mean "depth"?',
            "command line: exp1.depth: an override counts for every phase; write depth=VALUE",
            'command line: learning_rate: unknown parameter; did you mean "lr"?',
            "command line: zzz: an override is KEY=VALUE, as in global_rounds=5",
        ],
        overrides=["depht=2", "exp1.depth=2", "zzz", "learning_rate=0.1"],
    ),
    "wrong overrides": Bad(
        PHASE,
        [
            "command line: alpha: [0.1, 1] is a list; alpha is a number above 0, at most 1,000,000,000; to vary it, put the list under a phase's combinations",
            'command line: depth: "two" is a string; depth is a whole number from 0 to 1,024',
            "command line: lr: null (no value) is not allowed; lr is a number above 0",
            'command line: momentum: not valid YAML: the file ends before a "[" or "{" is closed',
            'command line: output_dir: {"phase": null} is a mapping; output_dir is the path of a folder; put it in quotes: "{phase}"',
            "command line: seeds: 3 is not a list; write seeds=[3]",
        ],
        overrides=["depth=two", "lr=", "seeds=3", "alpha=[0.1, 1]", "momentum=[", "output_dir={phase}"],
    ),
    "overrides of what is varied": Bad(
        PHASE
        + """\
exp2:
  combinations:
    - seed: [1, 2]
""",
        [
            "command line: seed: cannot be overridden, because seed is varied in exp2 (a.yaml:6); edit the lists there",
            "command line: width_factor: cannot be overridden, because width_factor is varied in exp1 (a.yaml:3); edit the lists there",
        ],
        overrides=["width_factor=4", "seed=7"],
    ),
    "overrides twice": Bad(
        PHASE,
        [
            "command line: lr: is set twice; keep one",
            "command line: seeds: seed is set too; keep one of them",
        ],
        overrides=["lr=0.1", "lr=0.2", "seed=1", "seeds=[1, 2]"],
    ),
    "an override that clashes": Bad(
        PHASE,
        [
            "command line: target_class: target_class is 1 but poison_label is not set; a targeted attack needs both (in exp1)",
        ],
        overrides=["target_class=1"],
    ),
    "keys twice": Bad(
        """\
defaults:
  lr: 0.1
  depth: 1
  lr: 0.2
exp1:
  combinations:
    - depth: [1]
exp1:
  combinations:
    - depth: [2]
""",
        [
            "a.yaml:4: defaults.lr: stands here a second time (first on line 2); keep one",
            "a.yaml:8: exp1: stands here a second time (first on line 5); keep one",
        ],
    ),
    "keys that are no strings": Bad(
        """\
1: {}
true: 1
? [a]
: 1
: 2
"""
        + PHASE,
        [
            'a.yaml:1: the key 1 is a number; a key is a string; write it in quotes: "1"',
            'a.yaml:2: the key true is a truth value; a key is a string; write it in quotes: "true"',
            'a.yaml:3: the key ["a"] is a list; a key is a string',
            'a.yaml:5: there is no key before this ":"',
        ],
    ),
    "tags": Bad(
        """\
defaults:
  lr: !!float 0.1
  dataset: !!python/object/apply:os.system [id]
exp1: !phase
  combinations: []
""",
        [
            "a.yaml:2: defaults.lr: the tag !!float is not supported; write the value without it",
            "a.yaml:3: defaults.dataset: the tag !!python/object/apply:os.system is not supported; write the value without it",
            "a.yaml:4: exp1: the tag !phase is not supported; write the value without it",
        ],
    ),
    "a tab": Bad(
        "defaults:\n\tlr: 0.1\n" + PHASE,
        [
            "a.yaml:2: not valid YAML: a tab; indent with spaces",
        ],
    ),
    "no colon": Bad(
        """\
defaults
  lr: 0.1
"""
        + PHASE,
        [
            'a.yaml:2: not valid YAML: there is no ":" after the key on line 1',
        ],
    ),
    "no colon after a key": Bad(
        """\
defaults:
  lr 0.1
  depth: 2
"""
        + PHASE,
        [
            'a.yaml:3: not valid YAML: there is no ":" after the key on line 2',
        ],
    ),
    "two colons": Bad(
        """\
defaults:
  project_name: width: wide
"""
        + PHASE,
        [
            'a.yaml:2: not valid YAML: a second ":" on this line; put a value that has ": " in it in quotes',
        ],
    ),
    "indentation too deep": Bad(
        """\
defaults:
  lr: 0.1
    depth: 2
"""
        + PHASE,
        [
            "a.yaml:3: not valid YAML: this line is indented deeper than the one before it, which has a value already; correct its indentation",
        ],
    ),
    "indentation that does not line up": Bad(
        """\
exp1:
  combinations:
    - depth: [1]
   - lr: [0.1]
""",
        [
            "a.yaml:4: not valid YAML: this line does not line up with the lines above it; correct its indentation",
        ],
    ),
    "no space after a dash": Bad(
        """\
exp1:
  combinations:
    -depth: [1]
    - lr: [0.1]
""",
        [
            'a.yaml:4: not valid YAML: a space is missing after the "-" on line 3',
        ],
    ),
    "a list behind its key": Bad(
        "seeds: - 1\n" + PHASE,
        [
            'a.yaml:1: not valid YAML: a list of "- " items begins on a line of its own; or write it as [a, b]',
        ],
    ),
    "a bracket that is not closed": Bad(
        """\
exp1:
  combinations:
    - depth: [1, 2
    - lr: [0.1]
""",
        [
            'a.yaml:3: not valid YAML: the "[" that opens here is not closed: on line 4, ":" where "," or "]" should be',
        ],
    ),
    "a bracket that is never closed": Bad(
        """\
exp1:
  combinations:
    - depth: [1, 2
""",
        [
            'a.yaml:3: not valid YAML: the "[" that opens here is never closed',
        ],
    ),
    "a bracket too many": Bad(
        """\
exp1:
  combinations:
    - depth: [1, 2]]
""",
        [
            'a.yaml:3: not valid YAML: a "]" that closes nothing, or stands where a value is missing',
        ],
    ),
    "a quote that is never closed": Bad(
        """\
defaults:
  project_name: 'wide
"""
        + PHASE,
        [
            "a.yaml:2: not valid YAML: the quote that opens here is never closed",
        ],
    ),
    "a quote inside quotes": Bad(
        """\
defaults:
  project_name: 'it's'
"""
        + PHASE,
        [
            "a.yaml:2: not valid YAML: text after the end of a value; put the whole value in quotes, and write a ' inside '…' twice",
        ],
    ),
    "a backslash in double quotes": Bad(
        'defaults:\n  output_dir: "C:\\data"\n' + PHASE,
        [
            'a.yaml:2: not valid YAML: a "\\" in double quotes has a meaning of its own; use single quotes',
        ],
    ),
    "braces without quotes": Bad(
        """\
defaults:
  output_dir: {phase}_results
"""
        + PHASE,
        [
            "a.yaml:2: not valid YAML: text after the end of a value; put the whole value in quotes, and write a ' inside '…' twice",
        ],
    ),
    "a percent sign first": Bad(
        """\
defaults:
  project_name: %x
"""
        + PHASE,
        [
            'a.yaml:2: not valid YAML: a value cannot begin with "%"; put it in quotes',
        ],
    ),
    "a missing value in a list": Bad(
        "seeds: [1, , 2]\n" + PHASE,
        [
            'a.yaml:1: not valid YAML: a "," where a value should be',
        ],
    ),
    "a NUL": Bad(
        "defaults: {lr: 0.1}\n# \x00\n" + PHASE,
        [
            "a.yaml:2: not valid YAML: the character U+0000 is not allowed",
        ],
    ),
    "an escape beyond Unicode": Bad(
        'defaults: {project_name: "\\UFFFFFFFF"}\n' + PHASE,
        [
            "a.yaml:1: not valid YAML: the text cannot be read (Python int too large to convert to C int)",
        ],
    ),
    "another version": Bad(
        """\
%YAML 1.1
---
"""
        + PHASE,
        [
            "a.yaml:1: %YAML 1.1 is not supported; remove the line: files are YAML 1.2",
        ],
    ),
    "two documents": Bad(
        PHASE + "---\n",
        [
            "a.yaml:4: a second YAML document begins here; make it a file of its own",
        ],
    ),
    "an alias of nothing": Bad(
        """\
defaults: *base
exp1:
  combinations:
    - depth: *depths
""",
        [
            "a.yaml:1: defaults: *base stands for nothing: there is no &base above it",
            "a.yaml:4: exp1.combinations[0].depth: *depths stands for nothing: there is no &depths above it",
        ],
    ),
    "an alias of itself": Bad(
        """\
exp1: &exp1
  combinations:
    - depth: *exp1
""",
        [
            "a.yaml:3: exp1.combinations[0].depth: *exp1 stands inside &exp1, so it would hold itself without end",
        ],
    ),
    "a merge of no mapping": Bad(
        """\
defaults:
  <<: [1]
  lr: 0.1
"""
        + PHASE,
        [
            "a.yaml:2: defaults.<<: 1 is a number; << takes a mapping, as in <<: *name",
        ],
    ),
    "an alias bomb": Bad(
        ALIAS_BOMB + PHASE,
        [
            "a.yaml:5: aliases such as *d stand for more than 100,000 values",
        ],
    ),
    "nesting": Bad(
        "defaults: " + "[" * 1000 + "\n" + PHASE,
        [
            "a.yaml:1: nested more than 32 levels deep",
        ],
    ),
    "nesting through aliases": Bad(
        f"a: &a {NESTED_20}\nb: {'[' * 20}*a{']' * 20}\n" + PHASE,
        [
            "a.yaml:2: nested more than 32 levels deep, through *a",
        ],
    ),
    "an endless number": Bad(
        "defaults: {lr: 0." + "1" * 5000 + "}\n" + PHASE,
        [
            "a.yaml:1: defaults.lr: a number of 5,002 characters; at most 100 are read",
        ],
    ),
    "two files at once": Bad(
        """\
defaults: {lr: fast}
seeds: 1
"""
        + PHASE,
        [
            'a.yaml:1: defaults.lr: "fast" is a string; lr is a number above 0',
            "a.yaml:2: seeds: 1 is not a list; write seeds: [1]",
            'b.yaml:4: not valid YAML: the "[" that opens here is never closed',
            'command line: depht: unknown parameter; did you mean "depth"?',
        ],
        overrides=["depht=2"],
        second="""\
exp2:
  combinations:
    - aggregator: [krum]
    - depth: [1
""",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_error_of_a_wrong_configuration_is_named(case):
    with pytest.raises(ConfigError) as caught:
        parse(case.sources(), case.overrides)
    assert str(caught.value).split("\n") == case.errors
    assert caught.value.exit_code == 2


ON_THE_COMMAND_LINE = {name: case for name, case in CASES.items() if all("=" in each for each in case.overrides)}


@pytest.mark.parametrize("command", [["plan"], ["plan", "--json"], ["run"]], ids=" ".join)
@pytest.mark.parametrize("case", ON_THE_COMMAND_LINE.values(), ids=ON_THE_COMMAND_LINE.keys())
def test_a_wrong_configuration_ends_a_command_with_2_and_nothing_is_written(
    case, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    written = {source.name: source.text.encode() for source in case.sources()}
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["fedsweep", *command, *written, *case.overrides])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    count = f"{len(case.errors)} problem{'s' * (len(case.errors) > 1)}"
    said = capsys.readouterr()
    assert said.err.split("\n") == [*case.errors, f"{count} in the configuration; nothing was started.", ""]
    assert said.out == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
