"""What makes two experiments the same, and what a parameter takes."""

from __future__ import annotations

import hashlib
import json
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedsweep.plan.experiment import (
    DATASETS,
    NAMED_COLUMNS,
    PARAMETERS,
    Experiment,
    RunOptions,
    allowed,
    check_together,
    check_value,
    defaults,
    from_config,
    is_scientific,
    nearest,
    unit,
)

SCIENTIFIC = [name for name in PARAMETERS if is_scientific(name)]

# An experiment in which every parameter matters: a targeted attack leaves every client clean and poisoned samples.
TELLING = Experiment(
    poison_ratio=0.3,
    target_class=1,
    poison_label=2,
    early_stopping_patience=5,
    partition_seed=7,
    split_seed=8,
)


def another(name: str, value: object) -> object:
    """A valid value of the parameter that is not `value`."""
    annotation = PARAMETERS[name].annotation
    if name == "dataset":
        return next(dataset for dataset in DATASETS if dataset != value)
    if get_origin(annotation) is Literal:
        return next(word for word in get_args(annotation) if word != value)
    if isinstance(value, int):
        return value + 2
    assert isinstance(value, float)
    return value / 2 if value else 0.25


def changed(experiment: Experiment, **changes: object) -> Experiment:
    return Experiment(**experiment.model_dump() | changes)


@pytest.mark.parametrize("name", SCIENTIFIC)
def test_changing_any_parameter_that_matters_changes_the_signature(name):
    value = getattr(TELLING, name)
    assert value is not None, f"give {name} a value in TELLING, so that it can be changed"
    other = changed(TELLING, **{name: another(name, value)})
    assert getattr(other, name) != value
    assert other.signature != TELLING.signature


def test_all_changes_of_one_parameter_differ_from_each_other():
    others = [changed(TELLING, **{name: another(name, getattr(TELLING, name))}) for name in SCIENTIFIC]
    assert len({other.signature for other in others}) == len(SCIENTIFIC)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if not is_scientific(name)])
def test_run_options_are_in_no_signature(name):
    config = TELLING.model_dump() | RunOptions().model_dump()
    config[name] = {str: "elsewhere", bool: False, int: 3}.get(type(config[name]), config[name])
    assert from_config(config).signature == TELLING.signature


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"poison_ratio": 0}, {"poison_ratio": 0.0}),
        ({"poison_ratio": 0.0}, {"poison_ratio": -0.0}),
        ({"momentum": 0}, {"momentum": -0.0}),
        ({"weight_decay": -0.0}, {"weight_decay": 0}),
        ({"width_factor": 4}, {"width_factor": 4.0}),
        ({"seed": 101}, {"seed": 101.0}),
        ({"target_class": 1, "poison_label": 2}, {"target_class": 1.0, "poison_label": 2.0}),
        ({"alpha": 100}, {"alpha": 1e2}),
        ({"lr": 0.0005}, {"lr": 5e-4}),
        ({"dataset": "parquet:./data//x"}, {"dataset": "parquet:data/x"}),
    ],
)
def test_spelling_is_not_in_the_signature(one, other):
    one, other = changed(TELLING, **one), changed(TELLING, **other)
    assert one.signature == other.signature
    assert one == other


def test_the_order_of_keys_is_not_in_the_signature():
    values = TELLING.model_dump()
    assert Experiment(**dict(reversed(values.items()))).signature == TELLING.signature


def test_a_signature_survives_json():
    assert from_config(json.loads(json.dumps(TELLING.model_dump()))).signature == TELLING.signature


# What cannot matter: (the experiment, changes that compute the same).
CLEAN = Experiment(poison_ratio=0)
IRRELEVANT = [
    (CLEAN, {"poison_type": "random_noise"}),
    (CLEAN, {"poison_level": "client"}),
    (CLEAN, {"target_class": 1, "poison_label": 2}),
    (CLEAN, {"data_ordering": "good_bad"}),
    (Experiment(poison_ratio=0.3, poison_type="random_noise"), {"target_class": 1, "poison_label": 2}),
    (Experiment(poison_ratio=1.0), {"poison_level": "client"}),
    (Experiment(poison_ratio=1.0, target_class=1, poison_label=2), {"poison_level": "client"}),
    (Experiment(poison_ratio=1.0), {"data_ordering": "bad_good"}),
    (Experiment(poison_ratio=0.3, poison_level="client"), {"data_ordering": "good_bad"}),
    (Experiment(poison_ratio=0.3, poison_level="client"), {"data_ordering": "bad_good"}),
    (
        Experiment(poison_ratio=0.3, poison_level="client", poison_type="random_noise", target_class=1, poison_label=2),
        {"data_ordering": "bad_good"},
    ),
    (Experiment(depth=0), {"width_factor": 64}),
    (Experiment(depth=0, model_type="lr"), {"width_factor": 64}),
    (Experiment(partition="iid"), {"alpha": 0.1}),
    (Experiment(partition="iid"), {"min_client_size": 1}),
    (Experiment(partition="dirichlet_client"), {"min_client_size": 1}),
    (Experiment(early_stopping_patience=None), {"min_delta": 0.1}),
    (Experiment(early_stopping_patience=10, global_rounds=10), {"early_stopping_patience": None}),
    (Experiment(early_stopping_patience=11, global_rounds=10), {"early_stopping_patience": 10, "min_delta": 0.1}),
    (Experiment(seed=7), {"partition_seed": 7}),
    (Experiment(seed=7), {"split_seed": 7}),
]
# The same changes where they do matter.
RELEVANT = [
    (Experiment(poison_ratio=0.01), {"poison_type": "random_noise"}),
    (Experiment(poison_ratio=0.3), {"poison_level": "client"}),
    (Experiment(poison_ratio=0.99), {"poison_level": "client"}),
    (Experiment(poison_ratio=0.3), {"target_class": 1, "poison_label": 2}),
    (Experiment(poison_ratio=0.3), {"data_ordering": "good_bad"}),
    (Experiment(poison_ratio=0.3, data_ordering="good_bad"), {"data_ordering": "bad_good"}),
    (Experiment(poison_ratio=1.0, target_class=1, poison_label=2), {"data_ordering": "good_bad"}),
    (
        Experiment(poison_ratio=0.3, poison_level="client", target_class=1, poison_label=2),
        {"data_ordering": "good_bad"},
    ),
    (Experiment(depth=1), {"width_factor": 64}),
    (Experiment(depth=0), {"model_type": "lr"}),
    (Experiment(partition="dirichlet_client"), {"alpha": 0.1}),
    (Experiment(), {"min_client_size": 1}),
    (Experiment(early_stopping_patience=9, global_rounds=10), {"early_stopping_patience": None}),
    (Experiment(early_stopping_patience=9, global_rounds=10), {"min_delta": 0.1}),
    (Experiment(seed=7), {"partition_seed": 8}),
    (Experiment(seed=7, partition_seed=7, split_seed=7), {"seed": 8}),
]


@pytest.mark.parametrize(("experiment", "changes"), IRRELEVANT)
def test_what_cannot_matter_is_not_in_the_signature(experiment, changes):
    assert changed(experiment, **changes) != experiment
    assert changed(experiment, **changes).signature == experiment.signature


@pytest.mark.parametrize(("experiment", "changes"), RELEVANT)
def test_the_same_changes_are_in_the_signature_where_they_matter(experiment, changes):
    assert changed(experiment, **changes).signature != experiment.signature


def test_signatures_of_today_are_those_of_yesterday():
    """A change here makes every finished experiment run again; say so in the changelog."""
    assert Experiment().signature == "digits|cnn|4|2|0.0|none|1.0|shuffle|fedavg|32|42|bf5f8c25610c"
    noisy = Experiment(
        dataset="parquet:a|b%",
        model_type="lr",
        width_factor=64,
        depth=1,
        poison_ratio=0.25,
        poison_type="random_noise",
        alpha=0.1,
        data_ordering="bad_good",
        aggregator="median",
        batch_size=128,
        seed=101,
        lr=5e-4,
    )
    assert noisy.signature == "parquet:a%7Cb%25|lr|64|1|0.25|random_noise|0.1|bad_good|median|128|101|c80cf7b07c17"


def test_a_signature_is_the_eleven_named_columns_and_twelve_hex_digits():
    *named, digest = TELLING.signature.split("|")
    assert named == [str(getattr(TELLING, name)) for name in NAMED_COLUMNS]
    assert len(named) == 11
    canonical = (
        '{"aggregator":"fedavg","alpha":1.0,"batch_size":32,"data_ordering":"shuffle","dataset":"digits","depth":2,'
        '"early_stopping_patience":null,"fraction_fit":1.0,"global_rounds":10,"local_epochs":1,"lr":0.02,'
        '"max_grad_norm":1.0,"min_client_size":10,"min_delta":null,"model_type":"cnn","momentum":0.9,"num_clients":10,'
        '"partition":"dirichlet_class","partition_seed":42,"poison_label":null,"poison_level":null,"poison_ratio":0.0,'
        '"poison_type":null,"seed":42,"split_seed":42,"target_class":null,"validation_split":0.1,'
        '"weight_decay":0.0005,"width_factor":4}'
    )
    assert len(digest) == 12
    digest = Experiment().signature.rpartition("|")[2]
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()[:12]


def words(name: str) -> st.SearchStrategy[object]:
    annotation = PARAMETERS[name].annotation
    if name == "dataset":
        return st.sampled_from([*DATASETS, "parquet:a"])
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    default = PARAMETERS[name].get_default()
    near = another(name, default if default is not None else 3)
    return st.sampled_from([default, near, *{"poison_ratio": [0.0, 1.0], "depth": [0]}.get(name, [])])


EXPERIMENTS = st.fixed_dictionaries({name: words(name) for name in SCIENTIFIC}).map(lambda values: Experiment(**values))


@given(EXPERIMENTS, EXPERIMENTS)
@settings(max_examples=200, deadline=None)
def test_signatures_are_equal_exactly_where_canonical_forms_are(one, other):
    assert (one.signature == other.signature) == (one.canonical() == other.canonical())


@given(EXPERIMENTS)
@settings(max_examples=200, deadline=None)
def test_a_canonical_form_stands_for_its_experiment(experiment):
    """With the defaults in place of what cannot matter, it is the same computation."""
    filled = {
        name: PARAMETERS[name].get_default() if value is None and not allowed(name).endswith("or null") else value
        for name, value in experiment.canonical().items()
    }
    assert from_config(filled).signature == experiment.signature


def test_an_experiment_is_frozen():
    with pytest.raises(ValidationError):
        Experiment().seed = 1


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValidationError):
        Experiment(poison_rate=0.5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_is_documented_and_takes_its_default(name):
    assert PARAMETERS[name].description
    assert allowed(name)
    assert isinstance(unit(name), str)
    assert check_value(name, defaults()[name]) == defaults()[name]


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("depth", 4.0, 4),
        ("depth", -0.0, 0),
        ("lr", 1, 1.0),
        ("max_grad_norm", None, None),
        ("target_class", 3.0, 3),
        ("dataset", "parquet:x/../y", "parquet:y"),
        ("seed", 2**63 - 1, 2**63 - 1),
    ],
)
def test_a_value_comes_back_in_its_own_type(name, value, typed):
    checked = check_value(name, value)
    assert checked == typed
    assert type(checked) is type(typed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", True),
        ("depth", "4"),
        pytest.param("depth", 10**5000, id="huge whole number"),
        ("seed", 2**63),
        ("lr", float("nan")),
        pytest.param("lr", 10**400, id="huge number"),
        ("poison_ratio", 1.0000001),
        ("batch_size", 1),
        ("width_factor", None),
        ("model_type", "CNN"),
        ("dataset", "parquet:a\nb"),
        ("project_name", "\ud800"),
        ("load_to_memory", 1),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_in_one_line(name, value):
    with pytest.raises(ValueError) as caught:
        check_value(name, value)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert name.replace("_", " ") in message.replace("_", " ")


@pytest.mark.parametrize(
    ("changes", "at_fault"),
    [
        ({}, None),
        ({"target_class": 3, "poison_label": 4}, None),
        ({"target_class": 99, "poison_label": 4, "dataset": "cifar100"}, None),
        ({"target_class": 5000, "poison_label": 4, "dataset": "parquet:x"}, None),
        ({"target_class": 3}, "target_class"),
        ({"poison_label": 3}, "poison_label"),
        ({"target_class": 3, "poison_label": 3}, "poison_label"),
        ({"target_class": 10, "poison_label": 3}, "target_class"),
        ({"target_class": 3, "poison_label": 10}, "poison_label"),
        ({"target_class": 100, "poison_label": 3, "dataset": "cifar100"}, "target_class"),
    ],
)
def test_values_that_do_not_go_together(changes, at_fault):
    found = check_together(defaults() | changes)
    assert (found[0] if found else None) == at_fault


def test_the_nearest_word():
    assert nearest("mediann", ["fedavg", "median"]) == "median"
    assert nearest("Poison-Ratio", list(PARAMETERS)) == "poison_ratio"
    assert nearest("patience", list(PARAMETERS)) == "early_stopping_patience"
    assert nearest("learning_rate", list(PARAMETERS)) == "lr"
    assert nearest("readme.md", ["README.md"]) == "README.md"
    assert nearest("krum", ["fedavg", "median"]) is None
    assert nearest("", ["fedavg"]) is None
