"""Start a run on a SuperLink, follow it to its end and return its status.

``flwr run --stream`` ends with status 0 even if the ServerApp failed. It also ends when
the SuperLink restarts, although the run continues. This module follows the run itself.
Use it at the server: Flower's Control API must not be reachable from other machines.
"""

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from clip2fl_cli.app_folder import checked_run_config, write_app_folder
from clip2fl_cli.flower_command import (
    ANSI,
    SimulationError,
    environment,
    executable,
    listed_run,
    parsed,
    started_run,
    write_connection,
)
from clip2fl_common.project import PROJECT

CONNECTION = "server"
RETRY_SECONDS = 3.0
# Each status request starts two processes of about a second; a round takes longer.
LOOK_SECONDS = 15.0


class Federation:
    """Connection to a SuperLink.

    Parameters
    ----------
    address : str
        ``HOST:PORT`` of the SuperLink's Control API.
    certificates : Path
        The federation's ca.crt.
    folder : Path
        Folder for Flower's settings of this connection.
    patience : float
        Seconds for which the SuperLink may be unreachable.
    """

    def __init__(
        self, address: str, certificates: Path, folder: Path, patience: float
    ) -> None:
        write_connection(
            folder,
            CONNECTION,
            address=address,
            root_certificates=str(certificates.resolve()),
        )
        self._environment = environment(folder)
        self._patience = patience

    def start(self, app: Path, run_config: Path) -> str:
        """Start a run and return its id.

        Raises
        ------
        SimulationError
            If the SuperLink refuses the run or stays unreachable.
        """
        deadline = time.monotonic() + self._patience
        while True:
            answer = self._ask(
                *("run", str(app), CONNECTION, "--format", "json"),
                *("--run-config", str(run_config)),
            )
            try:
                return started_run(answer)
            except SimulationError:
                # A reachable SuperLink has refused the run, and would refuse it again.
                if self._is_there() or time.monotonic() > deadline:
                    raise
            time.sleep(RETRY_SECONDS)

    def follow(self, run: str, output: TextIO) -> tuple[str, str]:
        """Write the run's log to a stream, to its end; return status and details."""
        shown = 0
        last_seen = time.monotonic()
        while True:
            answer = self._ask("ls", CONNECTION, "--run-id", run, "--format", "json")
            status = listed_run(answer)
            if status is not None:
                last_seen = time.monotonic()
                # The log ends in empty lines, where the next lines will appear.
                log = self._ask("log", run, CONNECTION, "--show")
                lines = log.rstrip().splitlines()
                for line in lines[shown:]:
                    output.write(f"{line}\n")
                shown = max(shown, len(lines))
                if status[0].startswith("finished"):
                    return status
            elif time.monotonic() - last_seen > self._patience:
                return "unknown", f"no SuperLink for {self._patience:.0f} s"
            time.sleep(LOOK_SECONDS)

    def _is_there(self) -> bool:
        answer = self._ask("ls", CONNECTION, "--limit", "1", "--format", "json")
        return parsed(answer).get("success") is True

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run(
            [executable("flwr"), *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        return ANSI.sub("", done.stdout or done.stderr)


def federate(
    address: str,
    certificates: Path,
    run_config: Path | None,
    overrides: Sequence[str],
    patience: float,
    output: TextIO,
) -> tuple[str, str]:
    """Run this program's app on a SuperLink and pass on its log.

    Parameters
    ----------
    address, certificates, patience
        As in `Federation`.
    run_config, overrides
        As in `clip2fl_cli.simulation.simulate`.
    output : TextIO
        Stream for the log, without colours.

    Returns
    -------
    tuple of str
        The status that Flower recorded and its details.

    Raises
    ------
    ConfigError
        If a run would refuse the configuration.
    SimulationError
        If the SuperLink refuses the run or stays unreachable.
    """
    text = checked_run_config(PROJECT, run_config, overrides)
    with tempfile.TemporaryDirectory(prefix="clip2fl-") as directory:
        folder = Path(directory)
        (folder / "run-config.toml").write_text(text, "utf-8")
        write_app_folder(PROJECT, folder / "app")
        federation = Federation(address, certificates, folder, patience)
        run = federation.start(folder / "app", folder / "run-config.toml")
        output.write(f"run {run}\n")
        return federation.follow(run, output)
