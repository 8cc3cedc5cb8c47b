"""Which trainer is chosen, how often it is timed, what becomes of the file. Only trainers move the clock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsweep.datasets import load_global_dataset
from fedsweep.fl import candidates
from fedsweep.fl.data import ImageData
from fedsweep.fl.lanes import Trained
from fedsweep.fl.loop import LoopTrainer
from fedsweep.plan.experiment import Experiment
from fedsweep.worker import kernels, plans, timing
from fedsweep.worker.plans import choose_trainer, sharing
from fedsweep.worker.timing import Amounts, affordable_piece, piece_of

TINY = Experiment(model_type="lr", width_factor=2, depth=0, num_clients=2, global_rounds=1)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_global_dataset("digits")


class Watch:
    """A clock that stands still but for what trainers say they take; in the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


class Sleeper(LoopTrainer):
    """A trainer that takes so many seconds and gives the weights back."""

    def __init__(self, plan: str, seconds: float, data: ImageData, watch: Watch) -> None:
        super().__init__(TINY, data)
        self.plan, self.seconds, self.times, self.watch = plan, seconds, 0, watch

    def train(self, inputs: Any, works: Sequence[Any], num_slots: int) -> Trained:
        self.times += 1
        if self.seconds < 0:
            raise RuntimeError("this processor lacks something")
        self.watch.now += self.seconds
        return inputs.weights[:, None].repeat(1, num_slots, 1)

    def logits(self, weights: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(weights), len(images), 10)


class World:
    """Candidates as a test wants them, and what was made and asked."""

    def __init__(self, data: ImageData, folder: Path) -> None:
        self.data = data
        self.folder = folder
        self.seconds = {"fast": 0.001, "slow": 0.03, "loop": 0.01}
        self.watch = Watch()
        self.made: list[Sleeper] = []
        self.lanes: list[int] = []

    def candidates(self, example: Experiment, data: ImageData, threads: int, lanes: int, library: Any) -> Any:
        self.lanes.append(lanes)
        return {plan: lambda plan=plan: self.make(plan) for plan in self.seconds}

    def make(self, plan: str) -> Sleeper:
        if self.seconds[plan] == -2:
            raise OSError("no such kernel")
        self.made.append(Sleeper(plan, self.seconds[plan], self.data, self.watch))
        return self.made[-1]

    def choose(self, *experiments: Experiment, threads: int = 1, **options: Any) -> str:
        self.made.clear()
        chosen = choose_trainer(experiments or [TINY], self.data, threads, cache_dir=self.folder, **options)
        return chosen.plan

    @property
    def was_timed(self) -> bool:
        return any(each.times for each in self.made)

    @property
    def file(self) -> Path:
        return self.folder / "plans.json"


@pytest.fixture
def world(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(digits, tmp_path / "cache")
    monkeypatch.setattr(candidates, "candidates", made.candidates)
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)
    for module in (plans, timing):
        monkeypatch.setattr(module, "time", made.watch)
    return made


# ---- the choice


def test_noise_does_not_decide_between_the_kernels_and_the_loop() -> None:
    assert plans.fastest({"native x4": 1.1, "native x1": 1.3, "loop": 1.0}) == "native x4"
    assert plans.fastest({"native x4": 1.3, "native x1": 1.25, "loop": 1.0}) == "loop"
    assert plans.fastest({"native x4": 0.9, "loop": 1.0}) == "native x4"
    assert plans.fastest({"stacked grouped x4": 1.1, "loop": 1.0}) == "loop"


def test_the_fastest_wins_and_is_remembered_with_the_times(world):
    assert world.choose() == "fast"
    assert world.was_timed
    ((key, entry),) = json.loads(world.file.read_text()).items()
    assert entry["plan"] == "fast"
    assert entry["seconds"] == pytest.approx(world.seconds)
    assert '"cpu"' in key
    assert world.choose() == "fast"
    assert not world.was_timed
    assert [each.plan for each in world.made] == ["fast"]


def test_the_loop_is_one_of_them(world):
    world.seconds = {"slow": 0.03, "loop": 0.001}
    assert world.choose() == "loop"


def test_a_single_candidate_is_not_timed(world):
    world.seconds = {"loop": 0.001}
    assert world.choose() == "loop"
    assert not world.was_timed
    assert not world.file.exists()


def test_one_that_is_far_behind_is_timed_once(world):
    world.choose()
    times = {each.plan: each.times for each in world.made}
    assert times["slow"] == times["fast"] - plans.SAMPLES + 1 == 2  # warm-up, and one time


@pytest.mark.parametrize("how", [-1, -2])
def test_one_that_raises_is_left_out(world, how, caplog):
    world.seconds["fast"] = how
    assert world.choose() == "loop"
    assert "the plan fast is left out: " in caplog.text
    assert json.loads(world.file.read_text()).popitem()[1]["seconds"].keys() == {"slow", "loop"}


def test_where_all_raise_the_loop_is_taken_and_shows_why_in_training(world):
    world.seconds = dict.fromkeys(world.seconds, -1.0)
    assert world.choose() == "loop"
    assert not world.file.exists()


def test_no_other_is_tried_when_the_time_is_up(world, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setattr(plans, "CHOICE_S", 0.0)
    assert world.choose() == "loop"
    (told,) = (record for record in caplog.records if "no time was left to try fast" in record.getMessage())
    assert told.levelname == "DEBUG"  # nobody has to know


OTHERS = [{"width_factor": 3, "depth": 1}, {"batch_size": 16}, {"model_type": "cnn"}]


@pytest.mark.parametrize("update", OTHERS)
def test_another_shape_is_timed_anew(world, update):
    world.choose()
    assert world.choose(TINY.model_copy(update=update)) == "fast"
    assert world.was_timed


def test_other_versions_threads_and_sharing_are_timed_anew_and_nothing_else(world, monkeypatch):
    world.choose()
    world.choose(TINY.model_copy(update={"seed": 7, "lr": 0.5, "aggregator": "median", "global_rounds": 9}))
    assert not world.was_timed
    world.choose(threads=2)
    assert world.was_timed
    world.choose(*(TINY.model_copy(update={"lr": lr}) for lr in (0.1, 0.2)))
    assert world.was_timed
    monkeypatch.setattr(kernels, "kernel_version", lambda: "another")
    world.choose()
    assert world.was_timed
    monkeypatch.setattr(torch, "__version__", "another")
    world.choose()
    assert world.was_timed
    assert len(json.loads(world.file.read_text())) == 5


def test_the_plan_under_which_experiments_were_begun_comes_first(world):
    assert world.choose(prefer=["gone", "slow"]) == "slow"
    assert 16 in world.lanes  # also where so few are left that it would not be tried
    assert not world.was_timed
    assert world.choose(prefer=["gone"]) == "fast"


def test_how_many_share_images():
    def group(count: int, **update: Any) -> list[Experiment]:
        return [TINY.model_copy(update={"lr": 0.01 * (1 + place), **update}) for place in range(count)]

    assert sharing(group(1)) == 1
    assert sharing(group(3)) == 2
    assert sharing(group(40)) == 16
    assert sharing([*group(1, seed=1), *group(1, seed=2), *group(1, seed=3)]) == 1
    assert sharing([*group(12, seed=1), *group(1, seed=2)]) == 8  # most experiments are in the large group


def test_real_candidates_are_timed_and_one_of_them_is_chosen(digits, tmp_path):
    """The choice may be any; it trains."""
    trainer = choose_trainer([TINY], digits, 2, cache_dir=tmp_path)
    piece = piece_of(TINY, digits, lanes=1, clients=2, images=64)
    assert trainer.train(piece.inputs, piece.works, 2).weights.shape == (1, 2, 650)


# ---- what is timed


def test_a_piece_is_of_real_images_and_no_larger_than_a_round(digits):
    experiment = TINY.model_copy(update={"local_epochs": 2, "num_clients": 5, "fraction_fit": 0.4})
    amounts = Amounts.of(experiment, digits)
    assert (amounts.clients, amounts.images, amounts.validation) == (2, (1437 - 144) // 5, 144)
    piece = affordable_piece(LoopTrainer(experiment, digits), experiment, digits, lanes=4, threads=2, seconds=1e6)
    assert piece.lanes == 4
    assert len(piece.works) == 2
    assert {work.order.shape for work in piece.works} == {(2, amounts.images)}
    assert len(piece.validation) == amounts.validation
    assert {tuple(work.lanes) for work in piece.works} == {(0, 1, 2, 3)}
    small = affordable_piece(LoopTrainer(experiment, digits), experiment, digits, lanes=4, threads=2, seconds=1e-9)
    assert (small.lanes, len(small.works), small.works[0].order.shape) == (1, 2, (1, 16))  # one client a thread


# ---- the file


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\xff\xfe", b"[1]", b"null", b'{"a": 1}', b"[" * 100_000, b'{"plan": "fast"'],
)
def test_garbage_is_timed_anew(world, content):
    world.folder.mkdir()
    world.file.write_bytes(content)
    assert world.choose() == "fast"
    assert world.was_timed
    assert world.choose() == "fast"
    assert not world.was_timed


@pytest.mark.parametrize("entry", [None, 3, {}, {"plan": 3}, {"plan": "unheard of"}, {"plan": "broken"}])
def test_an_entry_that_means_nothing_here_is_timed_anew(world, entry):
    world.choose()
    key = next(iter(json.loads(world.file.read_text())))
    world.seconds["broken"] = -2.0
    world.file.write_text(json.dumps({key: entry, "other": {"plan": "kept"}}))
    assert world.choose() == "fast"
    assert world.was_timed
    assert json.loads(world.file.read_text())["other"] == {"plan": "kept"}


def test_a_folder_that_cannot_be_written_costs_the_memory_only(world, caplog):
    world.folder.write_text("a file where the folder should be")
    assert world.choose() == "fast"
    assert "cannot be kept" in caplog.text


REMEMBER = """
import pathlib, sys
from fedsweep.worker.plans import Choices
for number in range(30):
    Choices(pathlib.Path(sys.argv[1])).remember(f"{sys.argv[2]}{number}", "fast", {"fast": 1.0})
"""


def test_processes_that_choose_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "plans.json"
    processes = [subprocess.Popen([sys.executable, "-c", REMEMBER, path, name]) for name in "abc"]
    while any(process.poll() is None for process in processes):
        if path.exists():
            json.loads(path.read_bytes())  # never half of it
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(json.loads(path.read_text())) == 90
    assert sorted(each.name for each in tmp_path.iterdir()) == ["plans.json", "plans.lock"]
