"""Bad input as a user gives it: one line for each mistake, exit status 2, no traceback, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.acceptance

PHASE = "exp1:\n  combinations:\n    - width_factor: [1, 4]\n"
HUGE = "seeds: &v [0,1,2,3,4,5,6,7,8,9]\na:\n combinations:\n" + "".join(
    f" - {name}: [{','.join(map(str, range(2, 12)))}]\n"
    for name in ("depth", "batch_size", "lr", "num_clients", "width_factor", "local_epochs", "global_rounds")
)
MISTAKES = {
    "several at once": (
        b"defaults: {lr: fast, lr: 0.1}\nsedes: [1]\nexp1:\n  combinations:\n    - agregator: [median]\n",
        [
            'a.yaml:1: defaults.lr: "fast" is a string; lr is a number above 0',
            "a.yaml:1: defaults.lr: stands here a second time (first on line 1); keep one",
            'a.yaml:2: sedes: unknown key; did you mean "seeds"? (a file has defaults, seeds, and phases: mappings '
            "with combinations)",
            'a.yaml:5: exp1.combinations[0].agregator: unknown parameter; did you mean "aggregator"?',
        ],
    ),
    "a tag": (
        b"defaults:\n  dataset: !!python/object/apply:os.system [touch pwned]\n" + PHASE.encode(),
        [
            "a.yaml:2: defaults.dataset: the tag !!python/object/apply:os.system is not supported; write the value "
            "without it",
        ],
    ),
    "UTF-16": (PHASE.encode("utf-16"), ["a.yaml:1: the file is UTF-16; save it as UTF-8"]),
    "NaN": (
        b"defaults: {poison_ratio: .nan}\n" + PHASE.encode(),
        ["a.yaml:1: defaults.poison_ratio: .nan is not allowed; poison_ratio is a number from 0 to 1"],
    ),
    "rows outside the project": (
        b"defaults: {output_dir: ../elsewhere}\n" + PHASE.encode(),
        [
            'a.yaml:1: defaults.output_dir: "../elsewhere" lies outside; the rows of a sweep stay inside the current '
            "folder, or in one that --allow-output-root names",
        ],
    ),
    "a hundred million experiments": (
        HUGE.encode(),
        [
            "a.yaml:2: a.combinations: 10 depth × 10 batch_size × 10 lr × 10 num_clients × 10 width_factor × 10 "
            "local_epochs × 10 global_rounds × 10 seeds are 100,000,000 of 100,000,000 experiments in all, and more "
            "than 1,000,000 are refused; shorten the lists, or allow them by --max-tasks 100000000",
        ],
    ),
}


@pytest.mark.parametrize(("content", "errors"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_manager_with_a_wrong_configuration_does_not_start(
    fedsweep, tmp_path: Path, content: bytes, errors: list[str]
) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    done = fedsweep("manager", "a.yaml", "--port", "0")
    count = f"{len(errors)} problem{'s' * (len(errors) > 1)}"
    assert done.stderr.splitlines() == [*errors, f"{count} in the configuration; nothing was started."]
    assert (done.returncode, done.stdout) == (2, "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
    assert not (tmp_path.parent / "elsewhere").exists()
