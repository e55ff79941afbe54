"""The application under real Flower: simulation with Ray, and the bundle."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from scripts.simulate import RunResult, simulate
from tests.defaults import ROOT

TINY = (
    "federation.rounds=2 partition.clients=3 federation.clients-per-round=2 "
    "dataset.demo-train-per-class=20 dataset.demo-test-per-class=5 "
    "dataset.imbalance-factor=10.0 client.epochs=1 class-gradients.draws=2 "
    "synthesis.steps=5 retraining.epochs=10"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep teacher features out of the user's cache."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(tmp_path / "cache"))


def run(folder: Path, *settings: str, supernodes: int = 2) -> RunResult:
    """Run the application in a simulation of its own."""
    place = f'run.dir="{folder.parent}" run.name="{folder.name}"'
    return simulate(
        overrides=[TINY, place, *settings], supernodes=supernodes, timeout=400
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without its timings."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    for line in rounds:
        del line["seconds"]
    return rounds


def test_simulation_completes(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    assert result.completed, result.log
    assert "clip2fl, retrained head" in result.log
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "artifacts.safetensors",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    }


@pytest.mark.slow
def test_metrics_repeat_whatever_the_number_of_nodes(tmp_path: Path) -> None:
    for name, supernodes in (("a", 2), ("b", 2), ("c", 5)):
        assert run(tmp_path / name, supernodes=supernodes).completed
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "c")


@pytest.mark.slow
def test_failed_run_says_why(tmp_path: Path) -> None:
    result = run(tmp_path / "run", "model.feature-dim=256")
    assert not result.completed
    assert "model.feature-dim = 256, but the teacher's embedding has 512" in (
        result.details + result.log
    )


def test_bundle_is_small_and_holds_the_application_only(tmp_path: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    app = tmp_path / "app"  # Flower takes only names of letters, digits and hyphens
    for name in names:
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, app / name)
    flwr = Path(sys.executable).with_name("flwr")
    built = subprocess.run([flwr, "build"], cwd=app, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (bundle,) = app.glob("*.fab")
    assert bundle.stat().st_size < 3_000_000
    with zipfile.ZipFile(bundle) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    packages = {"client_app", "server_app", "strategy", "clip2fl_common"}
    files = {"LICENSE", "README.md", "pyproject.toml", ".info"}
    assert packages <= tops <= packages | files
