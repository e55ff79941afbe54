"""Start, follow and stop a run on a SuperLink, and tell how it ended.

``flwr run --stream`` ends with status 0 even if the ServerApp failed. It also ends when
the SuperLink restarts, although the run continues. This module follows the run itself.
Use it at the server: Flower's Control API must not be reachable from other machines.
"""

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
# A ServerApp that is stopped ends after the message that it waits for.
STOP_SECONDS = 60.0


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

    Attributes
    ----------
    folder : Path
        The same folder.
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
        self.folder = folder
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

    def active(self) -> list[str]:
        """Return the ids of the runs that have not ended; none without an answer."""
        answer = parsed(self._ask("ls", CONNECTION, "--format", "json"))
        runs = answer.get("runs", [])
        return [
            str(run["run-id"])
            for run in runs
            if not str(run["status"]).startswith("finished")
        ]

    def known(self, run: str | None) -> str:
        """Return a run's id, after finding out that the SuperLink knows it.

        Parameters
        ----------
        run : str or None
            The id; None: the only run that has not ended.

        Raises
        ------
        SimulationError
            If there is no such run, or more than one.
        """
        active = self.active()
        there = ", ".join(active) or "none"
        if run is None:
            if len(active) != 1:
                raise SimulationError(
                    f"name the run: {len(active)} runs have not ended ({there})"
                )
            return active[0]
        answer = self._ask("ls", CONNECTION, "--run-id", run, "--format", "json")
        if listed_run(answer) is None:
            reason = str(parsed(answer).get("error-message", answer)).strip()
            raise SimulationError(
                f"run {run} is not found: {reason} (runs that have not ended: {there})"
            )
        return run

    def stop(self, run: str) -> tuple[str, str]:
        """Stop a run; return its status and details, which Flower may tell late.

        Raises
        ------
        SimulationError
            If Flower does not stop it, and it has not ended by itself.
        """
        answer = self._ask("stop", run, CONNECTION, "--format", "json")
        end = time.monotonic() + STOP_SECONDS
        while True:
            found = listed_run(
                self._ask("ls", CONNECTION, "--run-id", run, "--format", "json")
            )
            if found is not None and found[0].startswith("finished"):
                return found
            if parsed(answer).get("success") is not True:
                reason = str(parsed(answer).get("error-message", answer)).strip()
                raise SimulationError(f"run {run} was not stopped: {reason}")
            if time.monotonic() > end:
                return "unknown", f"no end within {STOP_SECONDS:.0f} s"
            time.sleep(RETRY_SECONDS)

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


@contextmanager
def connected(
    address: str, certificates: Path, patience: float
) -> Iterator[Federation]:
    """Return a connection to a SuperLink, in a folder that is removed afterwards.

    Parameters
    ----------
    address, certificates, patience
        As in `Federation`.
    """
    with tempfile.TemporaryDirectory(prefix="clip2fl-") as directory:
        yield Federation(address, certificates, Path(directory), patience)


def begin(
    federation: Federation,
    run_config: Path | None,
    overrides: Sequence[str],
    output: TextIO,
) -> str:
    """Start this program's app on a SuperLink.

    Parameters
    ----------
    federation : Federation
        The connection.
    run_config, overrides
        As in `clip2fl_cli.simulation.simulate`.
    output : TextIO
        Stream for the log, which begins with the run's id.

    Returns
    -------
    str
        The run's id.

    Raises
    ------
    ConfigError
        If a run would refuse the configuration.
    SimulationError
        If the SuperLink refuses the run or stays unreachable.
    """
    text = checked_run_config(PROJECT, run_config, overrides)
    others = federation.active()
    (federation.folder / "run-config.toml").write_text(text, "utf-8")
    write_app_folder(PROJECT, federation.folder / "app")
    run = federation.start(
        federation.folder / "app", federation.folder / "run-config.toml"
    )
    output.write(begun(run))
    if others:
        output.write(
            f"WARNING :   {len(others)} other runs have not ended on this SuperLink: "
            f"{', '.join(others)}. All runs share the nodes, which compute for each of "
            "them; clip2fl stop ends a run\n"
        )
    return run


def begun(run: str) -> str:
    """Return the first line of a run's log, by which `RunLog` knows the run again."""
    return f"run {run}\n"
