"""The benchmarks for a GPU run on a CPU, and read what the runs leave."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.federations import GpuWatch, summary, unpacked
from benchmarks.recorded import TINY, run_all, table
from tests.defaults import ROOT


def test_single_steps_equal_the_recorded_ones() -> None:
    """On a CPU both contenders are the same; it shows that they can run."""
    comparisons = run_all(TINY, torch.device("cpu"), 1)
    assert {c.stage for c in comparisons} == {
        "local step",
        "re-training epoch",
        "synthesis step",
    }
    assert all(c.difference == 0 and len(c.ratios) == 1 for c in comparisons)
    assert table(comparisons).count("\n") == 1 + len(comparisons)


def test_row_of_a_run_comes_from_its_metrics(tmp_path: Path) -> None:
    """Clients' seconds are sums, so they are left out; the first round is apart."""

    def line(number: int) -> dict[str, Any]:
        seconds = {"clients": 2.0 * number, "evaluation": 1, "clients-training": 99}
        return {
            "seconds": seconds,
            "accuracy": {"fedavg": {"balanced": 10.0 * number}},
        }

    rounds = "".join(json.dumps(line(n)) + "\n" for n in range(1, 8))
    (tmp_path / "metrics.jsonl").write_text(rounds, "utf-8")
    watch = GpuWatch([100, 300, 200], [50, 70, 90])
    assert summary(tmp_path, 60.4, watch) == [
        "7",
        "60",
        "3.00",
        "10.00",
        "fedavg 50.0",
        "300",
        "70",
    ]
    assert summary(tmp_path / "none", 1.0, GpuWatch()) == ["0", "1", *["-"] * 5]


def test_photographs_are_found_in_a_tar_file_and_in_a_folder(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / "half" / part / "cat").mkdir(parents=True)
    with tarfile.open(tmp_path / "half.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "half", "half")
    found = unpacked(tmp_path / "half.tar.xz", tmp_path / "there")
    assert found == tmp_path / "there" / "half"
    assert (found / "train" / "cat").is_dir() and (found / "test").is_dir()
    assert unpacked(tmp_path / "half", tmp_path) == tmp_path / "half"


def test_carried_packages_are_all_in_the_lock() -> None:
    script = (ROOT / "benchmarks" / "carry.sh").read_text("utf-8")
    names = " ".join(re.findall(r"^\w+=\(([^)]+)\)", script, re.MULTILINE)).split()
    assert {"flwr", "pydantic", "open-clip-torch"} <= set(names)
    locked = (ROOT / "requirements.lock").read_text("utf-8")
    assert all(f"\n{name}==" in locked for name in names)
    # The folder is for wheels that a person has fetched, never for the repository.
    assert "/.wheels/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


@pytest.mark.slow
def test_script_runs_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        ["benchmarks/gpu.sh", "--smoke", str(tmp_path)],
        cwd=ROOT,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (page,) = tmp_path.glob("*-federations.md")
    assert re.search(r"drawn images, tiny \| 2 \| ", page.read_text("utf-8"))
    assert len(list(tmp_path.glob("*-recorded.md"))) == 1
