"""The notebook of the examples runs as it stands, and is stored without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.defaults import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# The number of rounds, which a short run replaces.
ROUNDS, SHORT = '"rounds": 12', '"rounds": 2'


def cells() -> list[dict[str, Any]]:
    """Return the notebook's cells."""
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return found


def program() -> str:
    """Return all code of the notebook as one program."""
    code = ["".join(c["source"]) for c in cells() if c["cell_type"] == "code"]
    return "\n\n".join(code)


def test_notebook_has_the_form_that_applications_read() -> None:
    """Version 4.5: each cell has an id of its own and the fields of its kind."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    common = {"cell_type", "id", "metadata", "source"}
    for cell in notebook["cells"]:
        own = {"code": {"execution_count", "outputs"}, "markdown": set()}
        assert cell.keys() == common | own[cell["cell_type"]]
        assert all(isinstance(line, str) for line in cell["source"])
    assert len({cell["id"] for cell in cells()}) == len(cells())


def test_notebook_is_stored_without_outputs() -> None:
    """Outputs hold paths and times of one machine, and each run would change them."""
    assert cells()
    for cell in cells():
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert cell["metadata"] == {}


def test_links_lead_to_files() -> None:
    text = "".join(line for cell in cells() for line in cell["source"])
    linked = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert linked
    for target in linked:
        assert (NOTEBOOK.parent / target.partition("#")[0]).is_file(), target


def test_notebook_runs_in_this_process(
    asked: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All cells, with two rounds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert program().count(ROUNDS) == 1
    seen: dict[str, Any] = {}
    exec(compile(program().replace(ROUNDS, SHORT), NOTEBOOK.name, "exec"), seen)
    assert len(asked) == 2
    check(tmp_path / "quickstart", capsys.readouterr().out, 2)
    assert [line["round"] for line in seen["run"].metrics] == [1, 2]
    # Each image was predicted, and the plots had the runs' numbers.
    assert {file.parent.name for file in seen["files"]} == set(seen["held"].class_names)


@pytest.mark.slow
def test_notebook_runs_with_flower(tmp_path: Path) -> None:
    """All cells as they stand, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program()],
        cwd=tmp_path,
        env={
            # Ray starts its workers with bash.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "MPLBACKEND": "agg",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check(tmp_path / "quickstart", done.stdout, 12)


def check(folder: Path, printed: str, rounds: int) -> None:
    """Look at what the notebook has left and printed."""
    runs = sorted((folder / "runs").iterdir())
    assert [run.name.partition("-")[0] for run in runs] == ["clip2fl", "fedavg"]
    for run in runs:
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == rounds
    page = (runs[0] / "report.html").read_text("utf-8")
    assert "CLIP2FL" in page and "baseline FedAvg" in page
    assert (runs[0] / "report.html").as_uri() in printed
    assert (folder / "partition.png").stat().st_size > 0
    # The table of classes, from the most frequent one to the rarest.
    table = [line.split()[:2] for line in printed.splitlines() if line.endswith("%")]
    assert table[-4:] == [
        ["ring", "400"],
        ["arrow", "136"],
        ["heart", "46"],
        ["cross", "16"],
    ]
