"""The commands as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fedsweep.cli import app

pytestmark = pytest.mark.acceptance

TINY = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 0, num_clients: 2, global_rounds: 1}
seeds: [1, 2]
tiny:
  combinations:
    - poison_ratio: [0.0, 0.5]
    - poison_type: [label_flip, random_noise]
"""


COMMANDS = typer.main.get_group(app).commands


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_help_teaches(fedsweep):
    done = fedsweep("--help")
    assert done.returncode == 0
    assert "fedsweep run configs/quickstart.yaml" in done.stdout


def test_help_loads_nothing_heavy():
    """What makes `fedsweep --help` answer at once; benchmarks/startup.py measures it."""
    code = "from fedsweep.cli import app\ntry: app(['--help'])\nfinally: import sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert "typer" in modules
    assert not {"torch", "numpy", "pandas", "pydantic", "matplotlib", "ruamel", "sqlite3", "asyncio"} & set(modules)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(fedsweep, command):
    done = fedsweep(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"Usage: .*fedsweep {command} ", done.stdout)
    first_words = " ".join(str(COMMANDS[command].help).split()[:3])
    assert first_words in done.stdout


def test_help_lists_every_command(fedsweep):
    listed = re.findall(r"^\W*(\w+)  +[A-Z]", fedsweep("--help").stdout, re.MULTILINE)
    assert listed == [*COMMANDS]


def test_version(fedsweep):
    from fedsweep import __version__

    assert fedsweep("--version").stdout == f"fedsweep {__version__}\n"


@pytest.mark.parametrize("module", ["fedsweep.manager", "fedsweep.cli", "fedsweep.worker"])
def test_importing_does_not_load_torch(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_plan_counts_as_json_and_runs_nothing(fedsweep, tiny, tmp_path):
    done = fedsweep("plan", tiny, "--json", "--no-probe")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["total"], plan["unique"], plan["duplicates"], plan["complete"]) == (8, 6, 2, 0)
    assert plan["phases"]["tiny"] | {"duplicate_of": None} == {
        "experiments": 8,
        "duplicates": 2,
        "duplicate_of": None,
        "complete": 0,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


def test_plan_estimates_time_from_a_probe(fedsweep, tiny):
    plan = json.loads(fedsweep("plan", tiny, "--json", "--device", "cpu").stdout)
    assert 0 < plan["estimate"]["seconds"] < 600


def test_run_ends_with_rows_table_and_plots_and_the_second_run_does_nothing(fedsweep, tiny, tmp_path):
    done = fedsweep("run", tiny, "--device", "cpu")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "6 experiments" in done.stdout
    rows = (tmp_path / "results_tiny" / "final_results.csv").read_text()
    assert len(rows.splitlines()) == 1 + 8  # both attacks of a clean experiment get their row
    assert "results_tiny" in done.stdout
    assert list((tmp_path / "results_tiny" / "plots").glob("*.png"))
    assert list((tmp_path / "results_tiny" / "plots").glob("*.pdf"))

    again = fedsweep("run", tiny, "--device", "cpu")
    assert again.returncode == 0
    assert (tmp_path / "results_tiny" / "final_results.csv").read_text() == rows
    plan = json.loads(fedsweep("plan", tiny, "--json", "--no-probe").stdout)
    assert plan["complete"] == 6


def test_run_as_json_is_json_lines_only(fedsweep, tiny):
    done = fedsweep("run", tiny, "--device", "cpu", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "end"
    assert events[-1]["complete"] == 6
    assert events[-1]["exit_code"] == done.returncode == 0


def test_quiet_prints_nothing(fedsweep, tiny):
    done = fedsweep("run", tiny, "--device", "cpu", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_wrong_configuration_names_every_error_and_starts_nothing(fedsweep, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        TINY.replace("label_flip", "label_flop").replace("dataset: digits", "dataset: 3")
    )
    done = fedsweep("run", "bad.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "bad.yaml:1: defaults.dataset: 3 is a number; dataset is digits, mnist, fashion_mnist, kmnist, cifar10, "
        "cifar100, parquet:PATH\n"
        'bad.yaml:6: tiny.combinations[1].poison_type[0]: "label_flop" is not a poison type; did you mean '
        '"label_flip"? (label_flip, random_noise)\n'
        "2 problems in the configuration; nothing was started.\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml"]


def test_status_without_a_manager_says_what_to_do(fedsweep):
    done = fedsweep("status")
    assert done.returncode == 1
    assert done.stderr == (
        "fedsweep: no manager is running on .fedsweep; "
        "name another --state-dir, or its address by --manager HOST:PORT\n"
    )


def test_failed_experiments_end_with_status_1_and_their_reason(fedsweep, tmp_path):
    (tmp_path / "impossible.yaml").write_text(TINY.replace("num_clients: 2", "num_clients: 1000"))
    done = fedsweep("run", "impossible.yaml", "--device", "cpu", "poison_level=sample")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "results_tiny has no results; of its 8 runs: 8 failed\n" in done.stdout
    assert "6 experiments failed for good" in done.stderr
    (cause,) = (line for line in done.stderr.splitlines() if "min_client_size" in line)
    assert cause.startswith("  6, such as tiny_0_1: PartitionError: ")
    quiet = fedsweep("run", "impossible.yaml", "--device", "cpu", "poison_level=sample", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (1, "", done.stderr)


def test_a_study_that_was_edited_shows_what_it_is_now(fedsweep, tiny):
    assert fedsweep("run", "tiny.yaml", "--device", "cpu", "num_clients=3").returncode == 0
    left_out = "8 rows of an earlier configuration are left out (`fedsweep report --all` shows them)"
    run = fedsweep("run", "tiny.yaml", "--device", "cpu")
    for done in (run, fedsweep("report", "results_tiny")):
        assert done.returncode == 0
        assert f"results_tiny: {left_out}" in done.stdout
        assert "tiny: 4 cells, 2 seeds each" in done.stdout
        assert "num_clients 2, global_rounds 1" in done.stdout
    every = fedsweep("report", "results_tiny", "--all").stdout
    assert "tiny: 8 cells, 2 seeds each" in every
    assert "left out" not in every


def test_a_report_names_the_cells_that_failed(fedsweep, tmp_path):
    (tmp_path / "half.yaml").write_text(TINY.replace("poison_ratio: [0.0, 0.5]", "num_clients: [2, 1000]"))
    assert fedsweep("run", "half.yaml", "--device", "cpu").returncode == 1
    done = fedsweep("report", "results_tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 of 8 runs have no result (4 failed): all with num_clients 1000. `fedsweep failures` says" in done.stdout
    assert done.stdout.count("2 failed") == 2
    alone = fedsweep("report", "results_tiny", "--state-dir", "elsewhere")
    assert alone.returncode == 0
    assert "in all rows: dataset digits" in alone.stdout
    assert "results_tiny: which cells have no result is not known: no sweep in elsewhere writes there" in alone.stdout
