"""The program finds its own files and its experiments."""

import tomllib
from pathlib import Path

import pytest

from clip2fl_common import project
from tests.defaults import ROOT


def test_checkout_is_its_own_project() -> None:
    assert project.PROJECT == ROOT
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert project.version() == tomllib.loads(text)["project"]["version"]


def test_experiment_is_found_by_its_name_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert project.experiment(Path("demo")) == ROOT / "conf" / "demo.toml"
    assert "paper-cifar10-lt" in project.experiments()
    for name in ("no-such", "demo.toml", "./../demo", "conf/demo", ""):
        assert project.experiment(Path(name)) == Path(name)
    Path("demo").mkdir()
    assert project.experiment(Path("demo")) == ROOT / "conf" / "demo.toml"
    Path("demo").rmdir()
    Path("demo").write_text("seed = 8\n")
    assert project.experiment(Path("demo")) == Path("demo")
