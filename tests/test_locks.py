"""The three locks: what they have, that they agree, and that imports are listed."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.install import CUDA
from tests.defaults import ROOT

DEVELOPER, USER, NODE = LOCKS = (
    "requirements.lock",
    "requirements-user.lock",
    "requirements-node.lock",
)
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
HERE = {key: str(value) for key, value in default_environment().items()}
OWN = {"client_app", "server_app", "strategy", "clip2fl_common", "clip2fl_cli"}
# Imported where they are installed; docs/install.md says how to add them.
OPTIONAL = {
    *("tensorboard", "mlflow", "wandb", "pillow-heif", "datasets", "pyarrow"),
    # Shares local training between the variants of a comparison: never at a node.
    "joblib",
}
MACHINES = [
    {
        "python_version": python,
        "python_full_version": f"{python}.6",
        "sys_platform": system,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "platform_machine": machine,
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for python in ("3.11", "3.12", "3.13")
    for system, machine in (
        ("linux", "x86_64"),
        ("linux", "aarch64"),
        ("darwin", "arm64"),
    )
]


def entries(lock: str) -> dict[Requirement, set[str]]:
    """Return a lock's pins with their hashes."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / lock).read_text("utf-8"), flags=re.M)
    found = {}
    for entry in text.replace("\\\n", " ").splitlines():
        pin, *hashes = entry.split("--hash=")
        found[Requirement(pin)] = {digest.strip() for digest in hashes}
    return found


def versions(lock: str, machine: dict[str, str] | None = None) -> dict[str, str]:
    """Return what a lock installs on a machine: versions by name."""
    installed: dict[str, str] = {}
    for requirement in entries(lock):
        if requirement.marker is None or requirement.marker.evaluate(machine):
            assert requirement.name not in installed, "two versions on one machine"
            installed[requirement.name] = str(requirement.specifier)
    return installed


@pytest.mark.parametrize(
    "machine", MACHINES, ids=lambda m: f"{m['python_version']}-{m['platform_machine']}"
)
def test_locks_agree_and_each_is_a_part_of_the_larger_one(
    machine: dict[str, str],
) -> None:
    developer, user, node = (versions(lock, machine) for lock in LOCKS)
    assert node.items() < user.items() < developer.items()
    assert {"flwr", "torch", "open-clip-torch"} <= set(node)


@pytest.mark.parametrize("lock", LOCKS)
def test_pins_have_hashes_and_no_index(lock: str) -> None:
    text = (ROOT / lock).read_text("utf-8")
    assert "://" not in text
    assert re.findall(r"^-.*", text, flags=re.M) == []
    all_hashes = {
        (pin.name, str(pin.specifier)): hashes
        for pin, hashes in entries(DEVELOPER).items()
    }
    for pin, hashes in entries(lock).items():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        assert hashes and hashes == all_hashes[pin.name, str(pin.specifier)]
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes)


def needed(roots: Iterable[str]) -> set[str]:
    """Return what packages need on this machine, by their metadata, themselves too."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        found.add(name)
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in importlib.metadata.requires(name) or []:
                child = Requirement(text)
                here = {**HERE, "extra": extra}
                if child.marker is None or child.marker.evaluate(here):
                    waiting.append(child)
    return found


def roots(lock: str) -> list[str]:
    """Return what pyproject.toml lists for a lock."""
    project = PROJECT["project"]
    groups = PROJECT["dependency-groups"]
    extras = project["optional-dependencies"]
    listed: dict[str, list[str]] = {
        DEVELOPER: project["dependencies"] + sum(extras.values(), []),
        USER: project["dependencies"]
        + extras["tensorboard"]
        + extras["heif"]
        + groups["command"],
        NODE: groups["node"],
    }
    return listed[lock]


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_has_what_pyproject_lists_and_what_that_needs(lock: str) -> None:
    """`make lock` was called after the last change, and no package is superfluous."""
    installed = versions(lock)
    if "+" in importlib.metadata.version("torch"):  # of an index without CUDA
        installed = {k: v for k, v in installed.items() if not CUDA.fullmatch(k)}
    assert set(installed) == needed(roots(lock))
    for root in map(Requirement, roots(lock)):
        version = installed[canonicalize_name(root.name)].removeprefix("==")
        assert root.specifier.contains(version), root


def test_groups_name_no_package_that_the_project_does_not() -> None:
    """So that a bound stands in one place."""
    project = PROJECT["project"]
    names = {
        canonicalize_name(Requirement(text).name)
        for text in [
            *project["dependencies"],
            *project["optional-dependencies"]["heif"],
            *project["optional-dependencies"]["dev"],
        ]
    }
    for group in PROJECT["dependency-groups"].values():
        for text in group:
            assert re.fullmatch(r"[\w-]+", text)
            assert canonicalize_name(text) in names


def test_node_has_neither_tools_nor_what_only_a_server_uses() -> None:
    unwanted = {"ray", "pytest", "mypy", "ruff", "hypothesis", "mkdocs", "hatchling"}
    unwanted |= {
        "matplotlib",
        "scipy",
        "onnx",
        "onnxruntime",
        "pandas",
        "dp-accounting",
    }
    assert unwanted <= set(versions(DEVELOPER))
    assert not unwanted & set(versions(NODE))
    tools = {"pytest", "mypy", "ruff", "mkdocs", "scipy-stubs", "types-psutil"}
    assert tools <= set(versions(DEVELOPER)) and not tools & set(versions(USER))


def imported(places: Iterable[Path]) -> set[str]:
    """Return the packages that files import, as they are called in the registry."""
    named: set[str] = set()
    for place in places:
        for file in place.rglob("*.py") if place.is_dir() else [place]:
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    named.update(alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    named.add(node.module.split(".")[0])
    packages = importlib.metadata.packages_distributions()
    others = named - OWN - set(sys.stdlib_module_names) - {"clip2fl", "deploy"}
    return {
        canonicalize_name(packages[name][0]) if name in packages else name
        for name in others
    }


def test_what_a_node_imports_is_listed_for_it() -> None:
    found = imported(
        [
            *(ROOT / "client_app", ROOT / "clip2fl_common"),
            ROOT / "clip2fl_cli" / "sites",
            ROOT / "clip2fl_cli" / "site_commands.py",
            ROOT / "clip2fl_cli" / "console.py",
        ]
    )
    listed = {canonicalize_name(name) for name in PROJECT["dependency-groups"]["node"]}
    # pydantic pins pydantic-core; pillow-heif is imported by its name.
    assert found - OPTIONAL - {"pydantic-core"} == listed - {"pillow-heif"}


def test_what_the_program_imports_is_listed() -> None:
    places = [ROOT / name for name in [*sorted(OWN), "clip2fl", "deploy"]]
    listed = {
        canonicalize_name(Requirement(text).name)
        for text in PROJECT["project"]["dependencies"]
    }
    found = imported(places)
    assert {"click", "flwr", "sqlalchemy"} <= found
    assert found - OPTIONAL - {"pydantic-core"} <= listed
