"""The README's Python runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.defaults import ROOT


def readme_code() -> str:
    """Return the block under "From Python", at most twenty lines."""
    text = (ROOT / "README.md").read_text("utf-8")
    section = text.split("\n### From Python\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(str(code).splitlines()) <= 20
    return str(code)


def check(capsys: pytest.CaptureFixture[str]) -> None:
    """Run the code and look at what it says."""
    seen: dict[str, Any] = {}
    exec(compile(readme_code(), "README.md", "exec"), seen)
    printed = capsys.readouterr().out
    assert re.search(r"^round 2: \d+\.\d % balanced$", printed, flags=re.MULTILINE)
    assert re.search(r"^\w+ [01]\.\d\d$", printed, flags=re.MULTILINE)
    assert seen["run"].metrics[-1]["round"] == 2


def test_readme_code_runs(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    check(capsys)
    assert len(asked) == 1


@pytest.mark.slow
def test_readme_code_runs_with_flower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    check(capsys)
