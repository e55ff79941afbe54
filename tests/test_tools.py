"""A missing program skips a test on a person's machine and fails it under CI."""

import os
from pathlib import Path

import pytest

from tests.tools import cannot_run, needed_tool


@pytest.mark.parametrize("value", [None, "", "false"])
def test_missing_program_skips(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("CI", raising=False)
    if value is not None:
        monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.skip.Exception, match="no-such-tool is not installed"):
        needed_tool("no-such-tool")


def test_missing_program_fails_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool is not installed"):
        needed_tool("no-such-tool")
    with pytest.raises(pytest.fail.Exception, match="only root can"):
        cannot_run("only root can fly")


def test_program_is_found_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "some-tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert needed_tool("some-tool") == str(tool)


def test_environment_forces_no_colours_and_no_proxy_for_this_machine() -> None:
    assert not {"FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS"} & set(os.environ)
    for name in ("NO_PROXY", "no_proxy"):
        assert {"127.0.0.1", "localhost"} <= set(os.environ[name].split(","))
