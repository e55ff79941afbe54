"""Install the packages of a lock into a virtual environment.

    python deploy/install.py [--clear] [--torch-index URL] LOCK VENV

Every package must have a hash of the lock. With ``--torch-index``, torch and
torchvision come from that index instead, in the lock's versions. The lock has no hashes
of these files, so for these two the index is trusted. The CUDA libraries are left out.

Only the standard library is imported: nothing else is installed yet.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH = ("torch", "torchvision")
# What torch needs for CUDA on Linux, and torch's compiler for GPUs.
CUDA = re.compile(r"(nvidia|cuda)-.+|triton")
# Variables by which uv would look for torch elsewhere, too.
OTHER_SOURCES = (
    "UV_INDEX",
    "UV_EXTRA_INDEX_URL",
    "UV_FIND_LINKS",
    "UV_TORCH_BACKEND",
)


@dataclass(frozen=True)
class Pin:
    """One entry of a lock.

    Attributes
    ----------
    name : str
        The package.
    lines : tuple of str
        The version with its marker, and the hashes.
    """

    name: str
    lines: tuple[str, ...]

    @property
    def version(self) -> str:
        """``NAME==VERSION``, with a marker if there is one, and without hashes."""
        return self.lines[0].rstrip("\\").rstrip()


def read_lock(text: str) -> list[Pin]:
    """Return the entries of a lock.

    Parameters
    ----------
    text : str
        The lock: a version starts a line, its hashes are indented below it.

    Returns
    -------
    list of Pin

    Raises
    ------
    ValueError
        If a line is none that `make lock` writes, such as an option.
    """
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not line.strip():
            continue
        if line.startswith("    --hash=") and found:
            found[-1].append(line)
        elif re.match(r"[A-Za-z0-9][\w.-]*==", line):
            found.append([line])
        else:
            raise ValueError(f"the lock has the line {line!r}: run 'make lock'")
    return [Pin(lines[0].partition("==")[0], tuple(lines)) for lines in found]


def split(pins: Iterable[Pin]) -> tuple[list[Pin], list[Pin]]:
    """Separate what another index replaces.

    Parameters
    ----------
    pins : iterable of Pin
        The lock.

    Returns
    -------
    torch, rest : list of Pin
        torch and torchvision, and all others without the CUDA libraries.
    """
    torch: list[Pin] = []
    rest: list[Pin] = []
    for pin in pins:
        if pin.name in TORCH:
            torch.append(pin)
        elif not CUDA.fullmatch(pin.name):
            rest.append(pin)
    return torch, rest


def install(uv: Path, python: Path, pins: Sequence[Pin], torch_index: str = "") -> None:
    """Install a lock's packages.

    Parameters
    ----------
    uv, python : Path
        The program that installs, and the environment's Python.
    pins : sequence of Pin
        The lock.
    torch_index : str
        Address or folder of a package index; empty: all packages are the lock's.

    Raises
    ------
    subprocess.CalledProcessError
        If a package cannot be had, has another hash, or needs one that is not there.
    """
    pip: list[str | Path] = [uv, "pip", "install", "--compile-bytecode"]
    pip += ["--python", python]
    checked = ["--require-hashes", "--requirement"]
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "requirements.txt"
        if not torch_index:
            _write(file, pins)
            _run([*pip, *checked, file])
            return
        torch, rest = split(pins)
        # First, as a wrong index then ends it at once. Without dependencies, as these
        # would come from the index, too.
        file.write_text("".join(f"{pin.version}\n" for pin in torch), "utf-8")
        pip_torch = [*pip, "--no-deps", "--default-index", torch_index]
        _run([*pip_torch, "--requirement", file], without=OTHER_SOURCES)
        # The lock names all dependencies; uv would miss torch among them.
        _write(file, rest)
        _run([*pip, "--no-deps", *checked, file])
    # A torch for CUDA lacks its libraries now, and says so here.
    _run([uv, "pip", "check", "--python", python])


def install_uv(python: Path, pins: Iterable[Pin]) -> Path:
    """Install the lock's uv by pip, and return the program."""
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "uv.txt"
        _write(file, (pin for pin in pins if pin.name == "uv"))
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
        _run([*pip, "--no-deps", "--require-hashes", "--requirement", file])
    return python.with_name("uv")


def _write(file: Path, pins: Iterable[Pin]) -> None:
    file.write_text("".join(f"{line}\n" for pin in pins for line in pin.lines), "utf-8")


def _run(command: Sequence[str | Path], without: Sequence[str] = ()) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in without}
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    """Make the environment and install the lock's packages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("lock", type=Path, help="requirements.lock or a smaller one")
    parser.add_argument("venv", type=Path, help="folder of the environment")
    parser.add_argument(
        "--clear", action="store_true", help="empty the environment first"
    )
    parser.add_argument(
        "--torch-index",
        default="",
        metavar="URL",
        help="index with torch and torchvision; the CUDA libraries are left out",
    )
    given = parser.parse_args()
    pins = read_lock(given.lock.read_text("utf-8"))
    clear = ["--clear"] if given.clear else []
    _run([sys.executable, "-m", "venv", *clear, given.venv])
    python = given.venv / "bin" / "python"
    install(install_uv(python, pins), python, pins, given.torch_index)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as problem:
        sys.exit(f"install.py: {problem}")
    except subprocess.CalledProcessError as problem:
        # Its own message is above.
        sys.exit(problem.returncode)
