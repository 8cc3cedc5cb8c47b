"""Which files a command line names, and reading them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedsweep.errors import ConfigError, UsageError
from fedsweep.manager import sources
from fedsweep.manager.sources import read_sources, split_arguments


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes = "x") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def names(*paths: str | Path) -> list[str]:
    return [source.name for source in read_sources(paths)]


def errors(*paths: str | Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_sources(paths)
    return str(caught.value).split("\n")


def test_a_file_is_read_as_it_is_whatever_it_is_called():
    write("study.txt", "seeds: [1]\n# für später\n")
    (source,) = read_sources(["study.txt"])
    assert (source.name, source.text) == ("study.txt", "seeds: [1]\n# für später\n")


def test_a_path_object_is_as_good_as_a_string():
    assert names(write("a.yaml").absolute()) == [str(Path("a.yaml").absolute())]


def test_a_folder_gives_config_exp_first_and_then_the_other_yaml_files():
    for name in ("b.yaml", "a.yml", "config_exp2.yaml", "config_exp10.yaml", "config.yaml", "notes.md", ".hidden.yaml"):
        write(f"configs/{name}")
    write("configs/sub.yaml/inside.yaml")
    assert names("configs") == [
        "configs/config_exp10.yaml",
        "configs/config_exp2.yaml",
        "configs/a.yml",
        "configs/b.yaml",
        "configs/config.yaml",
    ]


def test_a_glob_gives_what_it_matches_in_order():
    for name in ("c/b.yaml", "c/a.yaml", "c/d/e.yaml", "c/x.md"):
        write(name)
    assert names("c/*.yaml") == ["c/a.yaml", "c/b.yaml"]
    assert names("**/e*") == ["c/d/e.yaml"]


def test_a_file_whose_name_looks_like_a_glob_is_itself():
    write("a[1].yaml")
    write("a1.yaml")
    assert names("a[1].yaml") == ["a[1].yaml"]


def test_a_file_that_is_named_in_several_ways_is_read_once():
    write("c/a.yaml")
    Path("link.yaml").symlink_to("c/a.yaml")
    assert names("c/a.yaml", "c", "./c/*.yaml", "link.yaml", Path("c/a.yaml").absolute()) == ["c/a.yaml"]


def test_no_paths_are_no_sources():
    assert read_sources([]) == []


def test_a_byte_order_mark_is_left_out():
    write("a.yaml", b"\xef\xbb\xbfseeds: [1]")
    assert read_sources(["a.yaml"])[0].text == "seeds: [1]"


def test_everything_that_cannot_be_read_is_named_at_once():
    write("quickstart.yaml")
    write("latin.yaml", b"a: 1\nb: caf\xe9\n")
    write("utf16.yaml", "a: 1".encode("utf-16"))
    Path("empty").mkdir()
    Path("gone.yaml").symlink_to("nowhere")
    os.mkfifo("pipe.yaml")
    named = ["quickstart.yml", "conf/a.yaml", "zzz", "empty", "*.json", "latin.yaml", "utf16.yaml", "gone.yaml"]
    assert errors(*named, "pipe.yaml", "a\0b") == [
        "*.json: no file matches this pattern",
        "a\0b: no such file",
        "conf/a.yaml: no such file: there is no folder conf",
        "empty: the folder holds no *.yaml or *.yml file",
        "gone.yaml: no such file: a link to nothing",
        "latin.yaml:2: the byte 0xe9 is not UTF-8; save the file as UTF-8",
        "pipe.yaml: not a regular file; a configuration is a text file",
        'quickstart.yml: no such file; did you mean "quickstart.yaml"?',
        "utf16.yaml:1: the file is UTF-16; save it as UTF-8",
        "zzz: no such file",
    ]


def test_a_file_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 10)
    write("a.yaml", "0123456789")
    write("b.yaml", "01234567890")
    assert names("a.yaml") == ["a.yaml"]
    assert errors("b.yaml") == ["b.yaml: 11 bytes; a configuration has at most 10"]


def test_a_file_that_may_not_be_read_is_named(monkeypatch):
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    write("a.yaml")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert errors("a.yaml") == ["a.yaml: cannot be read: Permission denied"]


def test_configs_and_overrides_may_be_mixed():
    assert split_arguments(["a.yaml", "lr=0.1", "configs", "seeds=[1, 2]", "output_dir=./x=y/{phase}", "*.yaml"]) == (
        ["a.yaml", "configs", "*.yaml"],
        ["lr=0.1", "seeds=[1, 2]", "output_dir=./x=y/{phase}"],
    )


@pytest.mark.parametrize("argument", ["./a=b.yaml", "runs/a=b.yaml", "a?=*.yaml", "=3"])
def test_what_no_key_looks_like_is_a_config(argument):
    assert split_arguments([argument]) == ([argument], [])


@pytest.mark.parametrize("argument", ["depht=3", "exp1.depth=3", "lr=", "Learning-Rate=0.1"])
def test_a_misspelled_override_is_an_override_and_not_a_missing_file(argument):
    assert split_arguments(["a.yaml", argument])[1] == [argument]


def test_a_file_that_is_there_is_a_config_even_if_it_looks_like_an_override():
    write("alpha=1.yaml")
    assert split_arguments(["alpha=1.yaml"]) == (["alpha=1.yaml"], [])


def test_overrides_alone_are_wrong_usage():
    with pytest.raises(UsageError) as caught:
        split_arguments(["lr=0.1"])
    assert str(caught.value) == (
        "no configuration is named; name a YAML file, a folder or a glob: configs/quickstart.yaml"
    )
