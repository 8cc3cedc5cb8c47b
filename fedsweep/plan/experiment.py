"""One experiment, fully resolved: every parameter once, its canonical form and its signature.

Two experiments that compute the same thing have the same signature, however they are spelled. What cannot
matter (the kind of an attack that touches no sample, say) is normalised away in `Experiment.canonical`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter
from pydantic import ValidationError as PydanticError
from pydantic.fields import FieldInfo

from fedsweep.plan import refusals
from fedsweep.plan.types import DATASETS as DATASETS
from fedsweep.plan.types import MAX_COUNT, MAX_SEED, Dataset, Integer, Number, Text
from fedsweep.plan.types import PARQUET_PREFIX as PARQUET_PREFIX
from fedsweep.plan.words import nearest as nearest

# The columns that the first tools of this field wrote; a row without a digest is matched on them.
NAMED_COLUMNS = (
    "dataset",
    "model_type",
    "width_factor",
    "depth",
    "poison_ratio",
    "poison_type",
    "alpha",
    "data_ordering",
    "aggregator",
    "batch_size",
    "seed",
)


def _unit(unit: str) -> dict[str, Any]:
    return {"unit": unit}


class Experiment(BaseModel):
    """One experiment with every parameter that decides its result. Frozen; defaults are filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dataset: Dataset = "digits"
    """The images: a name, or `parquet:PATH` for a folder with train and test Parquet files (image bytes and label)."""
    model_type: Literal["cnn", "lr"] = "cnn"
    """`cnn`: convolution blocks and one linear layer. `lr`: linear blocks and one linear layer; with depth 0 logistic
    regression proper."""
    width_factor: Integer = Field(default=4, ge=1, le=4096, json_schema_extra=_unit("channels or units"))
    """Width of every hidden layer; with depth 0 there is none."""
    depth: Integer = Field(default=2, ge=0, le=1024, json_schema_extra=_unit("blocks"))
    """Number of hidden blocks."""
    poison_ratio: Number = Field(default=0.0, ge=0, le=1)
    """Share of the samples of each client (`poison_level: sample`) or of the clients (`client`) that is poisoned."""
    poison_type: Literal["label_flip", "random_noise"] = "label_flip"
    """`label_flip`: label y becomes L-1-y, L being the number of classes. `random_noise`: y becomes any other label,
    each as likely, drawn once for each sample."""
    poison_level: Literal["sample", "client"] = "sample"
    """`sample`: every client poisons that share of its own samples. `client`: that share of the clients is malicious
    and poisons all of its samples."""
    target_class: Integer | None = Field(default=None, ge=0, le=MAX_COUNT)
    """Poison samples of this class only (with `label_flip`; needs `poison_label`). `null`: samples of every class."""
    poison_label: Integer | None = Field(default=None, ge=0, le=MAX_COUNT)
    """The label that samples of `target_class` get."""
    alpha: Number = Field(default=1.0, gt=0, le=MAX_COUNT)
    """Concentration of the Dirichlet partition: 0.1 is very heterogeneous, 100 nearly the same mix for every client."""
    partition: Literal["dirichlet_class", "dirichlet_client", "iid"] = "dirichlet_class"
    """`dirichlet_class`: the samples of each class are cut among the clients by Dir(alpha) (Yurochkin et al. 2019).
    `dirichlet_client`: clients of the same size, each with its own class mix (Hsu et al. 2019). `iid`: equal shares at
    random."""
    min_client_size: Integer = Field(default=10, ge=1, le=MAX_COUNT, json_schema_extra=_unit("samples"))
    """`dirichlet_class` is drawn again until every client has at least this many samples; after 1,000 draws without
    success the experiment fails."""
    data_ordering: Literal["shuffle", "good_bad", "bad_good"] = "shuffle"
    """Order within a local epoch: all samples shuffled; clean ones first, then poisoned ones; or the reverse."""
    aggregator: Literal["fedavg", "fedavg_uniform", "median"] = "fedavg"
    """`fedavg`: mean of the clients' weights by their sample counts. `fedavg_uniform`: plain mean. `median`:
    coordinate-wise median."""
    batch_size: Integer = Field(default=32, ge=2, le=MAX_COUNT, json_schema_extra=_unit("samples"))
    """Samples in a training step. The last batch of an epoch may be smaller; a batch of one sample is left out."""
    num_clients: Integer = Field(default=10, ge=1, le=100_000, json_schema_extra=_unit("clients"))
    """Number of clients that the training set is divided among."""
    fraction_fit: Number = Field(default=1.0, gt=0, le=1)
    """Share of the clients that train in a round (at least one client)."""
    global_rounds: Integer = Field(default=10, ge=1, le=MAX_COUNT, json_schema_extra=_unit("rounds"))
    """Rounds of training and aggregation, at most."""
    local_epochs: Integer = Field(default=1, ge=1, le=MAX_COUNT, json_schema_extra=_unit("epochs"))
    """Passes over its own data that a client makes in a round."""
    lr: Number = Field(default=0.02, gt=0)
    """Learning rate of the clients' SGD."""
    momentum: Number = Field(default=0.9, ge=0, lt=1)
    """Momentum of the clients' SGD; each round starts with a fresh optimiser."""
    weight_decay: Number = Field(default=5e-4, ge=0)
    """Weight decay (L2) of the clients' SGD."""
    max_grad_norm: Number | None = Field(default=1.0, gt=0)
    """Gradients of a client's model are clipped to this norm in each step. `null`: not clipped."""
    validation_split: Number = Field(default=0.1, gt=0, lt=1)
    """Share of the training set that is held out for validation; never poisoned."""
    early_stopping_patience: Integer | None = Field(default=10, ge=1, le=MAX_COUNT, json_schema_extra=_unit("rounds"))
    """Stop after this many rounds in a row whose validation loss is not below the best by `min_delta`. `null`: do not
    stop early."""
    min_delta: Number = Field(default=0.0, ge=0)
    """The least fall of the validation loss that early stopping counts as progress."""
    partition_seed: Integer | None = Field(default=None, ge=0, le=MAX_SEED)
    """Seed of the partition. `null`: `seed`."""
    split_seed: Integer | None = Field(default=None, ge=0, le=MAX_SEED)
    """Seed of the validation split. `null`: `seed`."""
    seed: Integer = Field(default=42, ge=0, le=MAX_SEED)
    """Seed of every random draw. Listed under `seeds`, or as a parameter in `combinations`."""

    @property
    def is_targeted(self) -> bool:
        """Whether the attack relabels one class only."""
        return self.poison_type == "label_flip" and self.target_class is not None

    def canonical(self) -> dict[str, Any]:
        """Every parameter as the signature sees it: what cannot matter is None, spelling is gone. Sorted by name."""
        given = self.__dict__
        values = {name: given[name] for name in _SORTED_NAMES}
        if self.partition_seed is None:
            values["partition_seed"] = self.seed
        if self.split_seed is None:
            values["split_seed"] = self.seed
        if not self.is_targeted:
            values["target_class"] = values["poison_label"] = None
        if self.poison_ratio == 0:
            values["poison_type"] = values["poison_level"] = values["target_class"] = values["poison_label"] = None
        if self.poison_ratio == 1:  # every client poisons everything that it may: both levels are the same
            values["poison_level"] = None
        if self._each_client_has_one_kind:
            values["data_ordering"] = "shuffle"
        if self.depth == 0:  # no hidden layer, whose width it would be
            values["width_factor"] = None
        if self.partition == "iid":
            values["alpha"] = None
        if self.partition != "dirichlet_class":
            values["min_client_size"] = None
        if self.early_stopping_patience is None or self.early_stopping_patience >= self.global_rounds:
            values["early_stopping_patience"] = values["min_delta"] = None
        return values

    @property
    def _each_client_has_one_kind(self) -> bool:
        """Whether no client holds clean and poisoned samples at once, so that their order cannot matter."""
        if self.poison_ratio == 0:
            return True
        return not self.is_targeted and (self.poison_level == "client" or self.poison_ratio == 1)

    @cached_property
    def signature(self) -> str:
        """What identifies the computation: `dataset|model_type|…|seed|digest`."""
        values = self.canonical()
        named = [key_part(values[name]) for name in NAMED_COLUMNS]
        digest = hashlib.sha256(_CANONICAL_JSON.encode(values).encode()).hexdigest()[:12]
        return "|".join([*named, digest])


_SORTED_NAMES = tuple(sorted(Experiment.model_fields))
_CANONICAL_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def key_part(value: object) -> str:
    """A value as it stands in a signature, between bars."""
    if isinstance(value, str):
        return value.replace("%", "%25").replace("|", "%7C")
    return "none" if value is None else str(value)


class RunOptions(BaseModel):
    """Parameters that say where and how an experiment runs, and change nothing in its result."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    output_dir: Text = Field(default="./results_{phase}", min_length=1)
    """Where the rows go. `{phase}` and `{any parameter}` are filled in. Relative to the current folder."""
    project_name: Text = "fedsweep"
    """A name for people; decides nothing."""
    num_parallel_workers: Integer = Field(default=1, ge=1, le=256, json_schema_extra=_unit("processes"))
    """Processes that train the clients of a round side by side, on a CPU."""
    engine: Literal["batched", "reference"] = "batched"
    """`batched`: the clients of many experiments of one shape are trained as one program. `reference`: one client after
    another, slow and obvious; for checking."""
    optimizer: Literal["sgd"] = "sgd"
    """The clients' optimiser."""
    device: Text = "auto"
    """Accepted for older configurations; the worker's `--device` decides."""
    load_to_memory: Annotated[bool, Strict()] = True
    """Accepted for older configurations; data always lies in memory."""


CHECKED_TOGETHER = ("dataset", "target_class", "poison_label")  # what `check_together` looks at

PARAMETERS: dict[str, FieldInfo] = {**Experiment.model_fields, **RunOptions.model_fields}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]  # a type known at run time only
    for name, field in PARAMETERS.items()
}


def defaults() -> dict[str, Any]:
    """The built-in default of every parameter."""
    return {name: field.get_default() for name, field in PARAMETERS.items()}


def is_scientific(name: str) -> bool:
    """Whether the parameter can change a result (and so is part of an experiment's identity)."""
    return name in Experiment.model_fields


def unusual(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those parameters of an experiment that are not as built in; the seed is none of them."""
    usual = defaults()
    names = [name for name in usual if is_scientific(name) and name != "seed"]
    return {name: values[name] for name in names if name in values and values[name] != usual[name]}


def check_value(name: str, value: object) -> Any:
    """The value of parameter `name` in its own type.

    Raises:
        ValueError: the value is of another type or out of range. The message says what was found, what is
            allowed, and the nearest match.
    """
    try:
        return _ADAPTERS[name].validate_python(value)
    except PydanticError:
        raise ValueError(refusals.refusal(name, PARAMETERS[name], value)) from None


def check_together(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first thing wrong with parameters that are fine one by one, or None.

    Returns:
        The parameter at fault, and what is wrong with it. Only `CHECKED_TOGETHER` are looked at.
    """
    target, label = values["target_class"], values["poison_label"]
    if label is None and target is not None:
        return "target_class", f"target_class is {target} but poison_label is not set; a targeted attack needs both"
    if target is None and label is not None:
        return "poison_label", f"poison_label is {label} but target_class is not set; a targeted attack needs both"
    if target is None:
        return None
    if target == label:
        return "poison_label", f"poison_label and target_class are both {label}; the attack would change nothing"
    classes = _num_classes(values["dataset"])
    for name, found in (("target_class", target), ("poison_label", label)):
        if classes is not None and found >= classes:
            return name, f"{name} is {found}, but {values['dataset']} has the classes 0 to {classes - 1}"
    return None


def from_config(config: Mapping[str, Any]) -> Experiment:
    """The experiment of a task's flat `config`; run options in it are passed over."""
    return Experiment(**{name: value for name, value in config.items() if is_scientific(name)})


def allowed(name: str) -> str:
    """What values parameter `name` takes, in words."""
    return refusals.allowed(name, PARAMETERS[name])


def unit(name: str) -> str:
    """The unit of parameter `name`; empty where it has none."""
    extra = PARAMETERS[name].json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) else ""


def _num_classes(dataset: str) -> int | None:
    """Number of classes of a named data set; None where only the file knows."""
    if dataset.startswith(PARQUET_PREFIX):
        return None
    return 100 if dataset == "cifar100" else 10
