"""Flower's command ``flwr``: its path, its environment and its answers."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from clip2fl_cli.proxies import direct_here

ANSI = re.compile(r"\x1b\[[0-9;]*m")
NOISE = re.compile(
    r"Using SuperLink: "
    r"|Successfully installed \S+ to "
    r"|INFO :\s+(Starting (logstream|Flower Simulation)|Federation `)"
    r"|WARNING :\s+Since flwr 1\.32, default simulated SuperNodes"
    r"|INFO :\s+(To change federation size|flwr federation simulation-config)"
    r"|.*FutureWarning: Tip: In future versions of Ray, Ray will no longer override"
    r"|  warnings\.warn\($"
    r"|\(ClientAppActor pid=\d+\) .*Manually terminating ClientAppActor"
)
"""Lines of a run's log about Flower's and Ray's own housekeeping."""

FORCED_COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")
"""Variables that colour outputs which are read here, even JSON. Jupyter sets some."""

WAITING_FLWR = """
import json, sys
from importlib.metadata import entry_points
(flwr,) = entry_points(group="console_scripts", name="flwr")
command = flwr.load()
sys.argv = ["flwr", *json.loads(sys.stdin.readline())]
sys.exit(command())
"""
"""A program that imports ``flwr``, and runs it with the arguments that it then gets."""


class SimulationError(RuntimeError):
    """A run could not be started, or did not complete."""


def executable(name: str) -> str:
    """Return the path of one of Flower's commands, beside this Python's.

    Raises
    ------
    SimulationError
        If this Python has no Flower.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise SimulationError(
            f"{path} does not exist: {sys.executable} has no Flower. Use the Python "
            "into which clip2fl was installed, and call it by its path."
        )
    return str(path)


def environment(home: Path) -> dict[str, str]:
    """Return the environment of this process with Flower's settings for one run.

    Parameters
    ----------
    home : Path
        Flower's folder for this run, in which `write_connection` wrote ``config.toml``.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in FORCED_COLOURS}
    return {
        **inherited,
        **direct_here(inherited),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def write_connection(home: Path, name: str, **settings: str | bool) -> None:
    """Write the configuration of the only SuperLink that ``flwr`` may use.

    Parameters
    ----------
    home : Path
        The ``FLWR_HOME``.
    name : str
        Name of the SuperLink for ``flwr``.
    **settings : str or bool
        Keys of Flower's documentation, with ``_`` for ``-``.
    """
    # JSON writes strings and booleans as TOML does.
    lines = [
        f"{key.replace('_', '-')} = {json.dumps(value)}\n"
        for key, value in settings.items()
    ]
    (home / "config.toml").write_text(f"[superlink.{name}]\n{''.join(lines)}", "utf-8")


def parsed(answer: str) -> dict[str, Any]:
    """Return the JSON output of ``flwr ... --format json``; empty if it is not JSON."""
    try:
        content = json.loads(answer)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def started_run(answer: str) -> str:
    """Return the id of the run that ``flwr run --format json`` started.

    Raises
    ------
    SimulationError
        If Flower refused the run; gives Flower's reason.
    """
    content = parsed(answer)
    run = content.get("run-id")
    if run is None:
        reason = str(content.get("error-message", answer))
        raise SimulationError(f"the run was not started: {reason.strip()}")
    return str(run)


def listed_run(answer: str) -> tuple[str, str] | None:
    """Return status and details of the run that ``flwr ls --format json`` lists.

    Returns
    -------
    tuple of str or None
        Flower's status and details; the details may be empty. None if the SuperLink
        did not answer.
    """
    try:
        (run,) = parsed(answer)["runs"]
        details = str(run["status-details"])
        return str(run["status"]), "" if details == "N/A" else details
    except (KeyError, TypeError, ValueError):
        return None
