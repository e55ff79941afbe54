"""Start a run on a SuperLink, follow it to its end and tell whether it completed.

``flwr run --stream`` ends with status 0 even when the ServerApp failed, and with the
connection when the SuperLink restarts, while the run goes on. This follows the run
itself. Start it at the server: Flower's Control API must not be reachable from
elsewhere.
"""

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from clip2fl_cli.app_folder import checked_run_config, write_app_folder
from clip2fl_cli.flower_command import (
    ANSI,
    NOISE,
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
# Each look starts two processes of about a second; a round takes longer than this.
LOOK_SECONDS = 15.0


class Federation:
    """A SuperLink and the means to talk to it.

    Parameters
    ----------
    address : str
        ``HOST:PORT`` of its Control API.
    certificates : Path
        The federation's ca.crt.
    folder : Path
        Where Flower's settings for this connection go.
    patience : float
        Seconds for which the SuperLink may be away.
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
            If it is refused or the SuperLink stays away.
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
                # A SuperLink that is there has refused the run, and will again.
                if self._is_there() or time.monotonic() > deadline:
                    raise
            time.sleep(RETRY_SECONDS)

    def follow(self, run: str) -> tuple[str, str]:
        """Print the run's log to its end; return its status and details."""
        shown = 0
        last_seen = time.monotonic()
        while True:
            answer = self._ask("ls", CONNECTION, "--run-id", run, "--format", "json")
            status = listed_run(answer)
            if status is not None:
                last_seen = time.monotonic()
                # It ends in empty lines, where the next ones will stand.
                log = self._ask("log", run, CONNECTION, "--show")
                lines = log.rstrip().splitlines()
                for line in lines[shown:]:
                    if not NOISE.match(line):
                        print(line, flush=True)
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
) -> tuple[str, str]:
    """Run this program's app on a SuperLink and print its log.

    Parameters
    ----------
    address, certificates, patience
        As `Federation` takes them.
    run_config, overrides
        As `clip2fl_cli.simulation.simulate` takes them.

    Returns
    -------
    tuple of str
        The status that Flower recorded and its details.

    Raises
    ------
    ConfigError
        If a run would refuse the configuration.
    SimulationError
        If the run is refused or the SuperLink stays away.
    """
    text = checked_run_config(PROJECT, run_config, overrides)
    with tempfile.TemporaryDirectory(prefix="clip2fl-") as directory:
        folder = Path(directory)
        (folder / "run-config.toml").write_text(text, "utf-8")
        write_app_folder(PROJECT, folder / "app")
        federation = Federation(address, certificates, folder, patience)
        run = federation.start(folder / "app", folder / "run-config.toml")
        print(f"run {run}", flush=True)
        return federation.follow(run)
