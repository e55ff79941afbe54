"""The application under real Flower: simulation with Ray, and the bundle."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from clip2fl_cli.processes import run_processes
from clip2fl_cli.simulation import RunResult, simulate
from clip2fl_common.teacher.demo import DATA_PATH, weight_paths
from tests.checkout import copy_of_checkout
from tests.defaults import ROOT
from tests.federation import metrics

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


def test_simulation_completes(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    assert result.completed, result.log
    assert "clip2fl, re-trained head" in result.log
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        ".lock",
        "artifacts.safetensors",
        "checkpoints",
        "config.json",
        "events.jsonl",
        "metrics.jsonl",
        "model-best.safetensors",
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


def rounds_written(folder: Path) -> int:
    """Return how many rounds' metrics a living run has written."""
    return (folder / "metrics.jsonl").read_text("utf-8").count("\n")


@contextmanager
def started(
    arguments: Sequence[str], temporary: Path
) -> Iterator[subprocess.Popen[str]]:
    """Start ``clip2fl run``; at the end nothing of it is left."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "clip2fl_cli.app", "run", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            kill_tree(process, temporary)


def kill_tree(process: subprocess.Popen[str], temporary: Path) -> None:
    """Kill a simulation and all that it started, at once; they can do nothing more."""
    sessions: set[int] = set()
    for directory in temporary.glob("clip2fl-*"):
        while own := run_processes(directory / "home", sessions):
            process.kill()
            for one in own:
                with suppress(psutil.Error):
                    one.kill()
            time.sleep(0.1)
        shutil.rmtree(directory, ignore_errors=True)
    process.kill()
    process.wait()


def kill_server_app(process: subprocess.Popen[str], temporary: Path) -> None:
    """Kill only the process in which the ServerApp runs; the rest ends by itself."""
    (directory,) = temporary.glob("clip2fl-*")
    for one in run_processes(directory / "home", set()):
        with suppress(psutil.Error):
            if "flwr-simulation" in " ".join(one.cmdline()):
                one.kill()
    assert process.wait(timeout=200) == 1


def terminate(process: subprocess.Popen[str], temporary: Path) -> None:
    """End a simulation as a service manager would."""
    process.terminate()
    assert process.wait(timeout=200) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_killed_run_ends_as_the_uninterrupted(tmp_path: Path) -> None:
    """Killed at ten random moments, whole or in part; asked to end at another."""
    rounds = "federation.rounds=26"
    assert run(tmp_path / "whole", rounds).completed
    folder = tmp_path / "run"
    place = f'{TINY} {rounds} run.dir="{tmp_path}" run.name="run"'
    arguments = ["--set", place, "--supernodes", "2"]
    moment = random.Random(11)
    ends = [*[kill_tree] * 8, *[kill_server_app] * 2, terminate]
    moment.shuffle(ends)
    # Ray's socket paths leave no room for pytest's long names.
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as temporary:
        for end in ends:
            with started(arguments, Path(temporary)) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("run folder:"):
                        break
                else:
                    raise AssertionError("the run did not begin")
                wanted = rounds_written(folder) + moment.choice([1, 1, 2])
                while rounds_written(folder) < wanted and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(moment.uniform(0, 0.4))
                end(process, Path(temporary))
            arguments = ["--resume", str(folder), "--supernodes", "2"]
    resumed = simulate(resume=folder, supernodes=3, timeout=400)
    assert resumed.completed, resumed.details + resumed.log
    assert "resumed after round" in resumed.log
    facts = json.loads((folder / "config.json").read_text("utf-8"))
    assert len(facts["resumed_after_rounds"]) == len(ends)
    assert metrics(folder) == metrics(tmp_path / "whole")
    for name in ("model.safetensors", "model-best.safetensors"):
        whole = tmp_path / "whole" / name
        assert (folder / name).read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    assert run(tmp_path / "run").completed
    refused = simulate(resume=tmp_path / "run", overrides=["seed=8"], timeout=400)
    assert not refused.completed
    assert "seed: the run has 7, now it is 8" in refused.details + refused.log


def test_bundle_is_small_and_holds_the_application_only(tmp_path: Path) -> None:
    app = copy_of_checkout(tmp_path)
    flwr = Path(sys.executable).with_name("flwr")
    built = subprocess.run([flwr, "build"], cwd=app, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (bundle,) = app.glob("*.fab")
    assert bundle.stat().st_size < 3_000_000
    with zipfile.ZipFile(bundle) as archive:
        names = archive.namelist()
    modules = {
        str(file.relative_to(app))
        for package in ("client_app", "server_app", "strategy", "clip2fl_common")
        for file in (app / package).rglob("*.py")
    }
    teacher = {str(file.relative_to(ROOT)) for file in (DATA_PATH, *weight_paths())}
    files = {"LICENSE", "README.md", "pyproject.toml", ".info/CONTENT"}
    assert sorted(names) == sorted(modules | teacher | files)
