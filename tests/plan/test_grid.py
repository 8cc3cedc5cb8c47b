"""From a configuration to tasks: counting, numbering, and running everything once."""

from __future__ import annotations

import itertools
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsweep.errors import ConfigError
from fedsweep.plan.config import Source, SweepConfig, parse
from fedsweep.plan.experiment import Experiment, is_scientific
from fedsweep.plan.grid import Cell, Grid, PhaseCount, count, expand


def sweep(*texts: str) -> SweepConfig:
    return parse([Source(f"{name}.yaml", dedent(text)) for name, text in zip("abcdef", texts, strict=False)])


def grid(*texts: str) -> Grid:
    return expand(sweep(*texts))


def test_a_grid_is_the_product_of_its_lists_and_seeds_in_order():
    tasks = grid(
        """\
        seeds: [7, 3]
        exp1:
          combinations:
            - width_factor: [4, 1]
            - depth: [1, 2]
        """
    ).tasks
    found = [(t.number, t.experiment.width_factor, t.experiment.depth, t.experiment.seed) for t in tasks]
    assert found == [
        (0, 4, 1, 7),
        (0, 4, 1, 3),
        (1, 4, 2, 7),
        (1, 4, 2, 3),
        (2, 1, 1, 7),
        (2, 1, 1, 3),
        (3, 1, 2, 7),
        (3, 1, 2, 3),
    ]
    assert {task.phase for task in tasks} == {"exp1"}


def test_every_experiment_is_what_validation_would_have_made():
    (task,) = grid("defaults: {lr: 1, alpha: 3}\nexp1:\n  combinations:\n    - width_factor: [8.0]\n").tasks
    validated = Experiment(lr=1.0, alpha=3.0, width_factor=8)
    assert task.experiment == validated
    assert hash(task.experiment) == hash(validated)
    assert task.experiment.model_dump() == validated.model_dump()
    assert [type(value) for value in task.experiment.model_dump().values()] == [
        type(value) for value in validated.model_dump().values()
    ]
    assert task.signature == validated.signature


def test_the_config_of_a_task_is_flat_and_complete():
    (task,) = grid(
        """\
        defaults: {output_dir: "./r/{dataset}", project_name: mine}
        exp1:
          combinations:
            - depth: [3]
        """
    ).tasks
    assert task.config["depth"] == 3
    assert task.config["project_name"] == "mine"
    assert task.config["output_dir"] == task.output_dir == "r/digits"
    assert {name for name in task.config if is_scientific(name)} == set(Experiment.model_fields)


def test_a_clean_experiment_under_two_attacks_is_one_task_with_two_cells():
    made = grid(
        """\
        exp1:
          combinations:
            - poison_ratio: [0, 0.5]
            - poison_type: [label_flip, random_noise]
        """
    )
    clean, flipped, noisy = made.tasks
    assert [cell.experiment.poison_type for cell in clean.cells] == ["label_flip", "random_noise"]
    assert [len(task.cells) for task in (flipped, noisy)] == [1, 1]
    assert clean.output_dirs == ("results_exp1",)
    assert [task.number for task in made.tasks] == [0, 2, 3]
    assert (made.total, made.unique, made.duplicates) == (4, 3, 1)
    assert made.phases == {"exp1": PhaseCount(4, 1, {"exp1": 1})}


def test_two_phases_that_overlap_share_the_task_and_both_get_a_row():
    made = grid(
        """\
        exp1:
          combinations:
            - depth: [1, 2]
        exp2:
          combinations:
            - depth: [2, 3]
        """
    )
    assert [(task.experiment.depth, task.phase, task.output_dirs) for task in made.tasks] == [
        (1, "exp1", ("results_exp1",)),
        (2, "exp1", ("results_exp1", "results_exp2")),
        (3, "exp2", ("results_exp2",)),
    ]
    shared = made.tasks[1].experiment
    assert made.tasks[1].cells == (Cell("exp1", "results_exp1", shared), Cell("exp2", "results_exp2", shared))
    assert made.phases == {"exp1": PhaseCount(2, 0, {}), "exp2": PhaseCount(2, 1, {"exp1": 1})}


def test_the_same_value_twice_is_one_cell():
    made = grid("seeds: [1, 1]\nexp1:\n  combinations:\n    - poison_ratio: [0.5, 5e-1]\n")
    (task,) = made.tasks
    assert len(task.cells) == 1
    assert made.phases == {"exp1": PhaseCount(4, 3, {"exp1": 3})}


def test_a_phase_in_two_files_is_one_phase_that_goes_on_counting():
    text = "exp1:\n  combinations:\n    - depth: [{}]\n"
    made = grid("seeds: [1, 2]\n" + text.format("1, 2"), text.format("5, 1"))
    assert [(task.number, task.experiment.depth, task.experiment.seed) for task in made.tasks] == [
        (0, 1, 1),
        (0, 1, 2),
        (1, 2, 1),
        (1, 2, 2),
        (2, 5, 42),
        (3, 1, 42),
    ]
    assert made.phases == {"exp1": PhaseCount(6, 0, {})}


def test_phase_file_spelling_and_order_of_keys_do_not_make_another_task():
    made = grid(
        "defaults: {lr: 5e-4, momentum: 0}\nexp1:\n  combinations:\n    - depth: [1]\n    - width_factor: [4]\n",
        "b:\n  combinations:\n    - width_factor: [4.0]\n    - depth: [1]\n  defaults: {momentum: -0.0, lr: 0.0005}\n",
    )
    assert (made.total, made.unique) == (2, 1)


@pytest.mark.parametrize(
    ("template", "folder"),
    [
        ("./results_{phase}", "results_exp1"),
        ("results//{phase}/", "results/exp1"),
        ("../elsewhere/./x", "../elsewhere/x"),
        ("/abs/{phase}/..", "/abs"),
        ("r_{dataset}", "r_parquet_.._data_my_images"),
        ("r_{poison_ratio}_{alpha}_{lr}", "r_0.25_100_0.0005"),
        ("r_{target_class}_{load_to_memory}_{seed}", "r_none_true_42"),
        ("r/{project_name}/x", "r/_/x"),
        ("{depth}{depth}", "22"),
    ],
)
def test_placeholders_are_filled_in(template, folder):
    (task,) = grid(
        f"""\
        defaults:
          output_dir: "{template}"
          dataset: "parquet:../data/my images"
          alpha: 1e2
          lr: 5e-4
          project_name: ..
        exp1:
          combinations:
            - poison_ratio: [0.25]
        """
    ).tasks
    assert task.output_dir == folder


def test_placeholders_take_the_values_of_the_combination():
    made = grid(
        'defaults: {output_dir: "{phase}/{depth}/{seed}"}\nseeds: [1, 2]\nexp1:\n  combinations:\n    - depth: [3, 4]\n'
    )
    assert [task.output_dir for task in made.tasks] == ["exp1/3/1", "exp1/3/2", "exp1/4/1", "exp1/4/2"]


HUGE = """\
a:
 combinations:
 - depth: &v [2,2,2,2,2,2,2,2,2,2]
""" + "".join(
    f" - {name}: *v\n"
    for name in (
        *("lr", "alpha", "seed", "batch_size", "min_delta", "num_clients", "weight_decay", "width_factor"),
        *("local_epochs", "global_rounds", "max_grad_norm"),
    )
)


def test_a_million_million_experiments_are_counted_and_refused_before_they_are_expanded(monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the grid is being expanded")

    monkeypatch.setattr(Experiment, "model_construct", never)
    config = sweep(HUGE + "b:\n combinations:\n  - depth: [1]\n")
    assert len(HUGE) < 300
    assert count(config) == 10**12 + 1
    with pytest.raises(ConfigError) as caught:
        expand(config)
    assert str(caught.value) == (
        "a.yaml:1: a.combinations: 10 depth × 10 lr × 10 alpha × 10 batch_size × 10 min_delta × 10 num_clients × 10 "
        "weight_decay × 10 width_factor × 10 local_epochs × 10 global_rounds × 10 max_grad_norm × 10 seeds are "
        "1,000,000,000,000 of 1,000,000,000,001 experiments in all, and more than 1,000,000 are refused; shorten the "
        "lists, or allow them by --max-tasks 1000000000001"
    )


def test_as_many_experiments_as_are_allowed_are_expanded():
    config = sweep("exp1:\n  combinations:\n    - depth: [1, 2, 3]\n")
    assert expand(config, max_tasks=3).total == 3
    with pytest.raises(ConfigError, match=r"--max-tasks 3$"):
        expand(config, max_tasks=2)


LISTS = {
    "poison_ratio": st.lists(st.sampled_from([0, 0.0, 0.5, 1]), min_size=1, max_size=3),
    "poison_type": st.lists(st.sampled_from(["label_flip", "random_noise"]), min_size=1, max_size=3),
    "poison_level": st.lists(st.sampled_from(["sample", "client"]), min_size=1, max_size=2),
    "data_ordering": st.lists(st.sampled_from(["shuffle", "good_bad"]), min_size=1, max_size=2),
    "depth": st.lists(st.integers(0, 1), min_size=1, max_size=2),
}
PHASES = st.fixed_dictionaries({}, optional=LISTS).filter(bool)


@given(st.lists(st.tuples(PHASES, st.lists(st.integers(0, 1), min_size=1, max_size=2)), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_grid_is_what_a_plain_loop_makes(phases):
    """The slow twin: every point validated by itself, kept in a dict by signature."""
    text = "".join(
        f"p{index}:\n  seeds: {seeds}\n  combinations:\n" + "".join(f"    - {name}: {lists[name]}\n" for name in lists)
        for index, (lists, seeds) in enumerate(phases)
    ).replace("'", "")
    made = grid(text)

    expected: dict[str, list[tuple[str, Experiment]]] = {}
    points = 0
    for index, (lists, seeds) in enumerate(phases):
        for values in itertools.product(*lists.values()):
            for seed in seeds:
                points += 1
                experiment = Experiment(**dict(zip(lists, values, strict=True)), seed=seed)
                cells = expected.setdefault(experiment.signature, [])
                if (f"p{index}", experiment) not in cells:
                    cells.append((f"p{index}", experiment))

    assert made.total == count(sweep(text)) == points
    assert [task.signature for task in made.tasks] == list(expected)
    assert [[(cell.phase, cell.experiment) for cell in task.cells] for task in made.tasks] == list(expected.values())
    assert made.duplicates == points - len(expected) == sum(phase.duplicates for phase in made.phases.values())
    assert all(phase.duplicates == sum(phase.duplicate_of.values()) for phase in made.phases.values())
    identities = [(task.phase, task.number, task.experiment.seed) for task in made.tasks]
    assert len(set(identities)) == len(identities)
