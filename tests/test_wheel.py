"""The wheel works alone: its commands run where there is no checkout."""

import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from clip2fl_common import project
from tests.defaults import ROOT

TINY = (
    "federation.rounds=2 partition.clients=3 federation.clients-per-round=2 "
    "dataset.demo-train-per-class=20 dataset.demo-test-per-class=5 "
    "dataset.imbalance-factor=10.0 client.epochs=1 class-gradients.draws=2 "
    "synthesis.steps=5 retraining.epochs=10"
)
SCRIPT = """#!{python}
import sys
from {module} import {name}
sys.exit({name}())
"""


@dataclass(frozen=True)
class Installed:
    """An environment that has the wheel, and an empty folder to work in."""

    bin: Path
    work: Path
    variables: Mapping[str, str]

    def python(self, code: str) -> str:
        """Run Python code and return what it prints."""
        return self._done([str(self.bin / "python"), "-c", code])

    def clip2fl(self, *arguments: str | Path, status: int = 0) -> str:
        """Run the command and return what it prints."""
        return self._done([str(self.bin / "clip2fl"), *map(str, arguments)], status)

    def _done(self, command: list[str], status: int = 0) -> str:
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == status, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout or done.stderr


def make_environment(folder: Path, wheel: Path) -> Path:
    """Make an environment with the wheel; other packages are those of this Python.

    Their folders are on its path, but what an editable installation adds to a path is
    not: so the checkout cannot be found.
    """
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    others = {Path(file).parent.parent for file in (np.__file__, psutil.__file__)}
    (folder / packages / "others.pth").write_text("\n".join(map(str, others)), "utf-8")
    uv = str(Path(sys.executable).with_name("uv"))
    install = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python"]
    subprocess.run([*install, str(python), str(wheel)], check=True)
    # Flower starts its own commands, which must be this environment's.
    for entry in importlib.metadata.distribution("flwr").entry_points:
        if entry.group == "console_scripts":
            script = folder / "bin" / entry.name
            text = SCRIPT.format(python=python, module=entry.module, name=entry.attr)
            script.write_text(text, "utf-8")
            script.chmod(0o755)
    return folder / "bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d"]
    subprocess.run([*command, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Return an environment with the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    ours = ("PYTHON", "VIRTUAL_ENV", "FLWR_", "CLIP2FL_", "XDG_", "COV_")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    (folder / "work").mkdir()
    (folder / "home").mkdir()
    return Installed(
        make_environment(folder / "env", wheel),
        folder / "work",
        {**variables, "HOME": str(folder / "home")},
    )


def test_wheel_holds_the_program_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {
        *("client_app", "server_app", "strategy"),
        *("clip2fl_common", "clip2fl_cli", "clip2fl"),
    }
    shipped = {
        name.removeprefix("clip2fl_common/shipped/")
        for name in names
        if name.startswith("clip2fl_common/shipped/")
    }
    conf = {f"conf/{file.name}" for file in (ROOT / "conf").iterdir()}
    assert shipped == {"pyproject.toml", "LICENSE", "README.md", *conf}


def test_wheel_works_where_there_is_no_checkout(installed: Installed) -> None:
    found = installed.python(
        "import importlib.util, clip2fl, client_app, server_app, strategy\n"
        "import clip2fl_cli, clip2fl_common, sys\n"
        "print(clip2fl.__version__, importlib.util.find_spec('tests'))\n"
        "for package in (clip2fl, client_app, server_app, strategy, clip2fl_cli,\n"
        "                clip2fl_common):\n"
        "    print(package.__file__)\n"
    ).splitlines()
    version = project.version()
    assert found[0] == f"{version} None"
    assert all(file.startswith(str(installed.bin.parent)) for file in found[1:])
    assert installed.clip2fl("--version") == f"clip2fl {version}\n"
    answer = json.loads(installed.clip2fl("partition", "--set", TINY, "--json"))
    assert len(answer["images"]) == 3
    # An experiment that comes with the program, by its name.
    named = installed.clip2fl("partition", "--run-config", "photos", status=2)
    assert "dataset.root is empty" in named
    refused = installed.clip2fl("run", "--set", "client.epoch=2", status=2)
    assert "did you mean 'client.epochs'" in refused
    assert list(installed.work.iterdir()) == []


@pytest.mark.slow
def test_every_command_of_the_wheel_runs(installed: Installed) -> None:
    """From an empty folder, with real simulations."""
    log = installed.clip2fl("run", "--run-config", "demo", "--set", TINY)
    assert "round 2/2: " in log
    (folder,) = installed.work.parent.glob("home/**/clip2fl/runs/*")
    assert f"Results and model: {folder}" in log
    metrics = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    assert len(metrics) == 2

    page = installed.clip2fl("report", folder).strip()
    assert Path(page) == folder / "report.html"
    assert Path(page).stat().st_size > 10_000

    Image.new("RGB", (40, 30), "navy").save(installed.work / "navy.png")
    answer = installed.clip2fl("predict", "--model", folder, "--json", "navy.png")
    ((likeliest,),) = [entry["classes"] for entry in json.loads(answer)]
    assert 0.1 <= likeliest["probability"] <= 1

    installed.clip2fl("export", "--model", folder, "--output", "out", "--no-costs")
    names = {file.name for file in (installed.work / "out").iterdir()}
    assert names == {"model.safetensors", "model.onnx"}

    (installed.work / "tiny.toml").write_text(TINY.replace(" ", "\n"), "utf-8")
    (installed.work / "c.toml").write_text(
        'experiment = "tiny.toml"\nseeds = [1]\nbaseline = "fedavg"\n'
        '[variants.fedavg]\nmethod = "fedavg"\n',
        "utf-8",
    )
    assert "| fedavg | fedavg | 1 |" in installed.clip2fl("compare", "c.toml")
    assert (installed.work / "runs" / "c" / "report.html").is_file()

    for name in ("circle", "square"):
        place = installed.work / "images" / name
        place.mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (40, 30), (n, 0, 0)).save(place / f"{n}.png")
    checked = installed.clip2fl("doctor", "--data-path", "images")
    assert "PROBLEM" not in checked
