"""Rows go inside the current folder, or where the command line admits them; nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsweep.errors import ConfigError, StateError
from fedsweep.manager import ExperimentManager
from fedsweep.manager.output_roots import check_known_dirs

TEXT = "defaults:\n  num_clients: 2\n  output_dir: {}\na: {{combinations: [{{depth: [1, 2]}}]}}\n"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project folder, current, with links out of it and back into it."""
    project = tmp_path / "project"
    (project / "inside").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "project-2").mkdir()
    (project / "link").symlink_to(tmp_path / "elsewhere")
    (project / "back").symlink_to(project / "inside")
    (project / "loop").symlink_to("loop")
    monkeypatch.chdir(project)
    return project


def grid(folder: str, roots=()):
    Path("a.yaml").write_text(TEXT.format(json.dumps(folder)))
    with ExperimentManager(["a.yaml"], port=0, output_roots=roots) as manager:
        return manager.generate_experiments()


@pytest.mark.parametrize("folder", [".", "out", "./a/../b", "inside/../out", "back/x", "{phase}/{depth}", "loop/x"])
def test_folders_inside_the_project_are_taken(project, folder):
    assert grid(folder).unique == 2


@pytest.mark.parametrize(
    ("folder", "where"),
    [
        ("..", ""),
        ("../project-2", ""),
        ("out/../../elsewhere", ""),
        ("/", ""),
        ("/tmp/{phase}", ""),
        ("link", "by a link"),
        ("link/{phase}", "by a link"),
        ("link/../x", ""),
    ],
)
def test_folders_outside_are_refused_with_their_line_and_nothing_is_stored(project, folder, where):
    if folder == "link/../x":  # normalised as a text first, so it lies inside
        assert grid(folder).unique == 2
        return
    with pytest.raises(ConfigError) as caught:
        grid(folder)
    [problem] = caught.value.problems
    assert (problem.file, problem.line, problem.path) == ("a.yaml", 3, "defaults.output_dir")
    assert " lies outside" in problem.message
    assert where in problem.message
    assert problem.message.endswith("inside the current folder, or in one that --allow-output-root names")
    assert not Path(".fedsweep").exists()


def test_an_absolute_path_into_the_project_is_inside(project):
    assert grid(str(project / "out")).unique == 2


@pytest.mark.parametrize("folder", ["../elsewhere", "link/x", "{root}/elsewhere/{{phase}}"])
@pytest.mark.parametrize("root", ["../elsewhere", "link"])
def test_an_admitted_folder_is_taken_however_it_is_named(project, tmp_path, folder, root):
    assert grid(folder.format(root=tmp_path) if "root" in folder else folder, [root]).unique == 2
    with pytest.raises(ConfigError):
        grid("../project-2", [root])


def test_every_setting_that_leads_outside_is_named_once(project):
    Path("a.yaml").write_text(
        "defaults: {output_dir: ../x}\n"
        "a: {combinations: [{depth: [1, 2]}]}\n"
        "b: {combinations: [{depth: [1, 2]}]}\n"
        "c:\n  defaults: {output_dir: /y}\n  combinations: [{depth: [1]}]\n"
    )
    with ExperimentManager(["a.yaml"], port=0) as manager, pytest.raises(ConfigError) as caught:
        manager.generate_experiments()
    assert [(each.line, each.path) for each in caught.value.problems] == [
        (1, "defaults.output_dir"),
        (5, "c.defaults.output_dir"),
    ]


def test_a_sweep_that_goes_on_is_looked_at_again(project):
    """The plan is not made anew when nothing changed; a folder may have become a link meanwhile."""
    Path("a.yaml").write_text(TEXT.format("out"))
    with ExperimentManager(["a.yaml"], port=0) as manager:
        manager.generate_all_tasks()
    Path("out").symlink_to("../elsewhere")
    with pytest.raises(StateError, match='output_dir: "out" lies outside, by a link'):
        ExperimentManager(["a.yaml"], port=0).start()
    assert list(Path("../elsewhere").iterdir()) == []


def test_the_folders_of_a_state_that_is_taken_over_are_looked_at(project):
    config = {"dataset": "digits", "model_type": "lr", "depth": 1, "seed": 1}
    task = {"task_id": "a_0_1", "phase": "a", "config": config, "seed": 1, "output_dir": "/etc/x", "status": "pending"}
    Path("state.json").write_text(json.dumps({"tasks": {"a_0_1": task}}))
    with ExperimentManager(port=0) as manager, pytest.raises(StateError, match='"/etc/x" lies outside'):
        manager.load_state("state.json")


def test_nothing_is_said_of_folders_that_are_fine(project):
    check_known_dirs(["out", "back"], [], ".fedsweep")
