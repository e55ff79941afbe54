"""Nodes whose environment has requirements-node.lock and nothing else."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.install import CUDA, TORCH
from tests.checkout import copy_of_checkout
from tests.defaults import ROOT
from tests.deployment.conftest import COUNTS, TINY
from tests.deployment.stack import Machine, Stack, wait_for
from tests.deployment.test_install import Index
from tests.site_folders import write_site
from tests.test_locks import NODE, versions
from tests.tools import cannot_run, needed_tool

# Imports each module of the two packages that a node has.
IMPORTS = """
import importlib, pkgutil, client_app, clip2fl_common
for package in client_app, clip2fl_common:
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
        print(module.name)
"""


def variables() -> dict[str, str]:
    """Return this environment without what names another one, or other locks."""
    ours = ("PYTHON", "VIRTUAL_ENV", "MAKE", "MFLAGS", "LOCK", "TORCH_INDEX")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """Return a copy of the checkout, where packages can be installed."""
    uv = Path(sys.executable).with_name("uv")
    small = f"iterators{versions(NODE)['iterators']}"
    probe = ["pip", "install", "--dry-run", "--no-cache", "--no-deps", small]
    target: list[str | Path] = ["--target", tmp_path / "none"]
    if subprocess.run([uv, *probe, *target], capture_output=True).returncode:
        cannot_run("the package registry cannot be reached")
    made = copy_of_checkout(tmp_path)
    yield made
    # Gigabytes, with CUDA.
    shutil.rmtree(made / ".venv", ignore_errors=True)


def make_install(checkout: Path, *arguments: str) -> str:
    """Install a node's packages; return what make printed.

    Packages that uv has in its cache are not downloaded again.
    """
    done = subprocess.run(
        [needed_tool("make"), "install", f"PYTHON={sys.executable}", *arguments],
        cwd=checkout,
        env=variables(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def packages(programs: Path) -> dict[str, str]:
    """Return the versions that an environment has, without pip."""
    command: list[str | Path] = [programs / "python", "-m", "pip", "list"]
    command.append("--format=freeze")
    done = subprocess.run(command, env=variables(), capture_output=True, text=True)
    lines = done.stdout.replace("_", "-").lower().splitlines()
    found = dict(line.split("==") for line in lines)
    del found["pip"]
    return found


def locked() -> dict[str, str]:
    """Return the versions of the node's lock on this machine."""
    return {k: v.removeprefix("==") for k, v in versions(NODE).items()}


def running(node: Machine) -> list[str]:
    """Return the programs that run at a node, without their arguments."""
    found = subprocess.run(
        ["ip", "netns", "pids", node.namespace], capture_output=True, text=True
    )
    lines = [Path(f"/proc/{pid}/cmdline") for pid in found.stdout.split()]
    words = [line.read_bytes().split(b"\0") for line in lines if line.exists()]
    return [part[0].decode() for part in words]


@pytest.mark.slow
def test_node_lock_is_all_that_a_node_needs(checkout: Path, server: Stack) -> None:
    """The server has the developers' packages, each node only its own.

    Nodes end before their packages are removed, as fixtures close in reverse order.
    """
    make_install(checkout, f"LOCK={NODE}")
    programs = checkout / ".venv" / "bin"

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [programs / "python", *arguments],
            cwd=ROOT,
            env=variables(),
            capture_output=True,
            text=True,
        )

    assert packages(programs) == locked()
    assert not (programs / "clip2fl").exists()

    imported = python("-c", IMPORTS)
    assert imported.returncode == 0, imported.stderr
    modules = set(imported.stdout.split())
    assert {"client_app.app", "client_app.doctor", "clip2fl_common.teacher"} <= modules

    names = ["north", "east"]
    for name in names:
        node = server.add_node(name, programs=programs)
        write_site(node.folder / "images", COUNTS[name])
        server.start_node(name, node.folder / "images")
    for name in names:
        node = server.nodes[name]
        wait_for(name, lambda n=node: "SuperNode ID" in n.log("supernode"), 300)  # type: ignore[misc]
        assert "PROBLEM" not in node.log("supernode")
        ours = [program for program in running(node) if "python" in program]
        assert ours and all(Path(p).is_relative_to(programs) for p in ours), ours

    # The default method, CLIP2FL: the nodes compute the teacher's features, too.
    server.start_run(f"{TINY} federation.rounds=1 federation.clients-per-round=2")
    assert server.wait_for_run(600) == 0, server.server.log("run")
    (line,) = server.rounds()
    assert sorted(line["clients"]) == sorted(names) and line["dropped_replies"] == 0
    assert line["accuracy"].keys() == {"retrained", "fedavg"}


@pytest.mark.slow
def test_make_takes_torch_from_the_named_index(checkout: Path, tmp_path: Path) -> None:
    """The index has stubs; everything else is real, and of the lock."""
    index = Index(tmp_path / "cpu")
    expected = locked()
    for name in TORCH:
        expected[name] += "+cpu"
        index.add(name, expected[name], ["numpy", "setuptools"])
    index.add("numpy", expected["numpy"])
    expected = {k: v for k, v in expected.items() if not CUDA.fullmatch(k)}
    make_install(checkout, f"LOCK={NODE}", f"TORCH_INDEX={index.folder}")
    programs = checkout / ".venv" / "bin"
    assert packages(programs) == expected
    assert len(expected) < len(locked()) - 15
    code = "import torch, numpy; print(torch.origin, numpy.ones(2).sum())"
    done = subprocess.run([programs / "python", "-c", code], capture_output=True)
    assert done.stdout == b"cpu 2.0\n"
    # make remembers both choices, and what is there is not installed again.
    assert "deploy/install.py" not in make_install(checkout)
