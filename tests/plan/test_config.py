"""What configuration files may say, and what hostile ones cannot do."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsweep.errors import ConfigError
from fedsweep.plan.config import Phase, Source, SweepConfig, parse
from fedsweep.plan.experiment import defaults

ROOT = Path(__file__).resolve().parents[2]
PHASE = "exp1:\n  combinations:\n    - width_factor: [1, 4]\n"


def read(text: str, *overrides: str) -> SweepConfig:
    return parse([Source("a.yaml", dedent(text))], overrides)


def only(text: str, *overrides: str) -> Phase:
    (phase,) = read(text, *overrides).phases
    return phase


def test_everything_that_a_file_can_say():
    wide, deep = read(
        """\
        defaults:
          dataset: mnist
          num_clients: 20
          lr: 5e-4
          output_dir: "./results_{dataset}_{phase}"
          target_class: null
        seeds: [42, 101]

        wide:
          defaults: {num_clients: 5, local_epochs: 2}
          combinations:
            - width_factor: [1, 4.0]
            - num_clients: [7, 8]
        deep:
          seeds: [1]
          combinations:
            - depth: [1, 2, 3]
        """
    ).phases
    built_in = {name: value for name, value in defaults().items() if name != "seed"}
    shared = {"dataset": "mnist", "lr": 5e-4, "output_dir": "./results_{dataset}_{phase}"}
    assert wide == Phase(
        name="wide",
        file="a.yaml",
        line=9,
        base=built_in | shared | {"num_clients": 5, "local_epochs": 2},
        varied={"width_factor": (1, 4), "num_clients": (7, 8)},
        seeds=(42, 101),
    )
    assert deep.base == built_in | shared | {"num_clients": 20}
    assert (deep.varied, deep.seeds, deep.line) == ({"depth": (1, 2, 3)}, (1,), 14)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        (PHASE, (42,)),
        ("seeds: [1, 2]\n" + PHASE, (1, 2)),
        ("defaults: {seed: 7}\n" + PHASE, (7,)),
        ("seeds: [1, 2]\n" + PHASE + "  seeds: [3]\n", (3,)),
        ("seeds: [1, 2]\n" + PHASE + "    - seed: [4, 5]\n", (4, 5)),
        ("defaults: {seed: 7}\n" + PHASE + "    - seed: [4, 5]\n", (4, 5)),
        ("defaults: {seed: 7}\n" + PHASE + "  defaults: {seed: 8}\n", (8,)),
        ("defaults: {seed: 7}\n" + PHASE + "  seeds: [9]\n", (9,)),
        ("seeds: [1, 1.0]\n" + PHASE, (1, 1)),
    ],
)
def test_which_seeds_hold(text, seeds):
    phase = only(text)
    assert phase.seeds == seeds
    assert "seed" not in phase.varied
    assert "seed" not in phase.base


def test_an_override_replaces_the_defaults_of_files_and_phases():
    phase = only("defaults: {lr: 0.1}\n" + PHASE + "  defaults: {lr: 0.2, depth: 3}\n", "lr=5e-3", "alpha=2")
    assert (phase.base["lr"], phase.base["alpha"], phase.base["depth"]) == (5e-3, 2.0, 3)


@pytest.mark.parametrize("override", ["seeds=[1, 2]", "seeds=[1,2.0]"])
@pytest.mark.parametrize("before", ["", "seeds: [7, 8, 9]\n", "defaults: {seed: 7}\n"])
def test_seeds_on_the_command_line_replace_all_others(before, override):
    assert only(before + PHASE, override).seeds == (1, 2)
    assert only(before + PHASE + "  seeds: [5]\n", override).seeds == (1, 2)
    assert only(before + PHASE, "seed=3").seeds == (3,)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("output_dir=./results/{phase}", "output_dir", "./results/{phase}"),
        ("output_dir='{phase}'", "output_dir", "{phase}"),
        ("project_name=no", "project_name", "no"),
        ("max_grad_norm=null", "max_grad_norm", None),
        ("max_grad_norm=~", "max_grad_norm", None),
        ("dataset=parquet:../shared/x", "dataset", "parquet:../shared/x"),
        ("load_to_memory=false", "load_to_memory", False),
    ],
)
def test_the_value_of_an_override_is_yaml(override, name, value):
    assert only(PHASE, override).base[name] == value


def test_two_files_keep_their_defaults_and_seeds_to_themselves():
    first = Source("a.yaml", "defaults: {depth: 1}\nseeds: [1]\n" + PHASE)
    second = Source("b.yaml", PHASE)
    one, other = parse([first, second]).phases
    assert (one.name, one.file, one.base["depth"], one.seeds) == ("exp1", "a.yaml", 1, (1,))
    assert (other.name, other.file, other.base["depth"], other.seeds) == ("exp1", "b.yaml", 2, (42,))


def test_anchors_aliases_and_merge_keys_work():
    one, two = read(
        """\
        defaults: &base
          lr: 0.1
          depth: 3
        one: &one
          defaults: {<<: *base, depth: 4}
          combinations: &grid
            - width_factor: &widths [1, 4]
        two:
          defaults:
            <<: [{alpha: 9}, *base]
          combinations:
            - width_factor: *widths
        """
    ).phases
    assert (one.base["lr"], one.base["depth"]) == (0.1, 4)
    assert (two.base["lr"], two.base["depth"], two.base["alpha"]) == (0.1, 3, 9.0)
    assert one.varied == two.varied == {"width_factor": (1, 4)}


@pytest.mark.parametrize(
    ("spelled", "value"),
    [
        ("project_name: no", "no"),
        ("project_name: 'null'", "null"),
        ("project_name: 2024-01-31", "2024-01-31"),
        ("project_name: 1:30", "1:30"),
        ("project_name: |-\n    wide", "wide"),
        ("lr: 5e-4", 5e-4),
        ("lr: .5", 0.5),
        ("lr: +1.", 1.0),
        ("depth: 010", 10),
        ("depth: 0x10", 16),
        ("depth: 0o10", 8),
        ("max_grad_norm: ~", None),
        ("max_grad_norm:", None),
        ("max_grad_norm: NULL", None),
        ("load_to_memory: False", False),
    ],
)
def test_values_are_yaml_1_2(spelled, value):
    assert only(f"defaults:\n  {spelled}\n" + PHASE).base[spelled.partition(":")[0]] == value


@pytest.mark.parametrize("text", [PHASE.replace("\n", "\r\n"), "\ufeff" + PHASE, "%YAML 1.2\n---\n" + PHASE + "...\n"])
def test_line_ends_byte_order_marks_and_document_marks_do_not_matter(text):
    assert only(text).varied == {"width_factor": (1, 4)}


def test_empty_defaults_change_nothing():
    phase = only("defaults:\n" + PHASE + "  defaults: {}\n")
    assert (phase.base, phase.varied) == (only(PHASE).base, only(PHASE).varied)


def test_values_that_clash_in_no_combination_are_right():
    phase = only("exp1:\n  combinations:\n    - dataset: [cifar100]\n    - target_class: [98, 99]\n", "poison_label=3")
    assert phase.varied["target_class"] == (98, 99)


def test_a_problem_has_its_parts():
    with pytest.raises(ConfigError) as caught:
        read("exp1:\n  combinations:\n    - depth: [1]\n    - poison_ratio: [0, 2]\n")
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.path) == ("a.yaml", 4, "exp1.combinations[1].poison_ratio[1]")


def test_what_clashes_in_a_large_grid_is_found_without_going_through_it():
    """Only the parameters that are checked together are combined, not the million combinations of the others."""
    lists = [
        f"    - {name}: [{', '.join(map(str, range(2, 102)))}]\n" for name in ("width_factor", "batch_size", "depth")
    ]
    text = "exp1:\n  combinations:\n" + "".join(lists) + "    - target_class: [1, 10]\n    - poison_label: [2, 3]\n"
    with pytest.raises(ConfigError, match=r"^a.yaml:6: exp1.combinations\[3\].target_class\[1\]: target_class is 10,"):
        read(text)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configurations_that_come_along_are_right(path):
    assert read(path.read_text(encoding="utf-8")).phases


# Texts made of the words and marks of configurations, most of them wrong.
FRAGMENTS = st.sampled_from(
    [
        *("defaults", "seeds", "combinations", "exp1", "depth", "lr", "dataset", "output_dir", "seed", "target_class"),
        *("mnist", "{phase}", "5e-4", "-1", "0", ".nan", "~", "null", "'", '"', "\\", "#", "|", ">", "%", "@"),
        *(":", ": ", "- ", ", ", "[", "]", "{", "}", "&a", "*a", "<<: ", "!", "!!int ", "?", "---\n", "\t", "\ufeff"),
        *("\n", "\n  ", "\n    ", "\n    - ", "exp1:\n  combinations:\n    - ", "depth: [1, 2]", '"\\UFFFFFFFF"', "\0"),
        *('"a\\nb"', '"a\\nb": {x: 1}', '"a\\nb":\n', "- |\n      width\n      wide\n"),
    ]
)


@given(st.lists(FRAGMENTS, max_size=30).map("".join), st.lists(FRAGMENTS, max_size=4).map("".join))
@settings(max_examples=400, deadline=None)
def test_no_text_does_anything_but_parse_or_be_refused(text, override):
    try:
        sweep = parse([Source("a.yaml", text)], [override] if override else [])
    except ConfigError as error:
        assert len(str(error).splitlines()) == len(error.problems) > 0
        assert all(problem.message and str(problem).isprintable() for problem in error.problems)
    else:
        assert all(phase.seeds and all(phase.varied.values()) for phase in sweep.phases)
