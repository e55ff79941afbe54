"""Run the Flower app in a simulation of its own and tell whether it completed.

``flwr run`` alone leaves two traps. Its local SuperLink stays alive, and the
simulated clients import code from the directory in which that SuperLink was first
started, so a second checkout may silently run the first one's clients. And it exits 0
even when the ServerApp failed. A simulation here starts a SuperLink for one run, from
an empty directory, asks it for the run's final status and stops everything again.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clip2fl_cli.app_folder import checked_run_config, write_app_folder
from clip2fl_cli.flower_command import SimulationError
from clip2fl_cli.signals import Interrupted, NotedSignals
from clip2fl_cli.superlink import own_superlink, private_directory
from clip2fl_common.project import PROJECT

CLIENTS_PER_GPU = 4
"""More training at the same time on one GPU wait for each other and fill its memory."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes
    ----------
    status : str
        Flower's words: "finished:completed", "finished:failed", "finished:stopped";
        or "not-started" when Flower refused the app or its configuration.
    details : str
        The reason when the run did not complete, else empty.
    log : str
        Everything the run printed, without colours.
    run_id : int or None
        Flower's number of it, unless it was not started.
    """

    status: str
    details: str
    log: str
    run_id: int | None = None

    @property
    def completed(self) -> bool:
        """Whether the run came to its end without an error."""
        return self.status == "finished:completed"


def simulate(
    app: Path = PROJECT,
    *,
    run_config: Path | None = None,
    overrides: Sequence[str] = (),
    resume: Path | None = None,
    supernodes: int | None = None,
    cpus_per_client: int = 1,
    gpus_per_client: float | None = None,
    ray_address: str | None = None,
    timeout: float | None = None,
    output: TextIO | None = None,
) -> RunResult:
    """Run a Flower app in a simulation of its own.

    Call it from the main thread: it handles signals while it runs.

    Parameters
    ----------
    app : Path
        Folder of the app, with its ``pyproject.toml``.
    run_config : Path | None
        A TOML file of run configuration keys, or the name of an experiment that comes
        with the program.
    overrides : Sequence[str]
        ``key=value`` pairs that win over the file.
    resume : Path | None
        Folder of an interrupted run to go on with; None begins a new one.
    supernodes : int | None
        Number of simulated nodes; None takes one per CPU core, at least 2.
    cpus_per_client : int
        CPU cores a client occupies, and threads it computes with; decides how many
        train at the same time.
    gpus_per_client : float | None
        GPUs, or the share of one, a client occupies; with 0 Ray hides them from it.
        None shares this machine's GPUs among the clients that train at the same
        time, but each one among `CLIENTS_PER_GPU` at most.
    ray_address : str | None
        ``HOST:PORT`` of a running Ray cluster to use; None starts a private one.
    timeout : float | None
        Seconds after which the run is stopped.
    output : TextIO | None
        Where the log goes as it appears, without Flower's housekeeping.

    Returns
    -------
    RunResult
        The status Flower recorded, the reason and the log.

    Raises
    ------
    ConfigError
        If the run configuration cannot be read or has an unknown key; this program's
        own, whatever is wrong with it.
    SimulationError
        If the SuperLink does not start.
    Interrupted
        If SIGINT, SIGTERM or SIGHUP arrived, after all was stopped.
    """
    config_text = checked_run_config(app, run_config, overrides, resume)
    if gpus_per_client is None:
        gpus_per_client = shared_gpus(cpus_per_client)
    federation_config = (
        f"num-supernodes={supernodes or max(2, os.cpu_count() or 1)}"
        f" client-resources-num-cpus={cpus_per_client}"
        f" client-resources-num-gpus={gpus_per_client:g}"
    )
    deadline = None if timeout is None else time.monotonic() + timeout
    result = RunResult("not-started", "", "")
    with NotedSignals() as signals, private_directory() as directory:
        config_file = directory / "run-config.toml"
        config_file.write_text(config_text, "utf-8")
        write_app_folder(app, directory / "app")
        with own_superlink(directory, signals, ray_address) as link:
            try:
                run = link.start(directory / "app", config_file, federation_config)
            except SimulationError as error:
                result = RunResult("not-started", str(error), "")
            else:
                if run is not None:
                    log = link.follow(run, output, deadline)
                    status, details = link.outcome(run)
                    if status == "finished:stopped" and timeout is not None:
                        details = f"stopped after {timeout:g} s"
                    result = RunResult(status, details, log, int(run))
    if signals.first is not None:
        raise Interrupted(signals.first)
    return result


def shared_gpus(cpus_per_client: int) -> float:
    """Return the share of a GPU for each of the clients that train at the same time.

    Parameters
    ----------
    cpus_per_client : int
        CPU cores a client occupies.

    Returns
    -------
    float
        0 where there is no GPU.
    """
    import torch  # takes a second or two, and only this asks it

    gpus = torch.cuda.device_count()
    together = max(1, (os.cpu_count() or 1) // cpus_per_client)
    return min(1.0, max(gpus / together, 1 / CLIENTS_PER_GPU)) if gpus else 0.0
