"""Run the Flower app in a simulation of its own and return its status.

``flwr run`` alone has two problems. First, its local SuperLink keeps running, and
simulated clients import code from the folder in which that SuperLink was started, so a
second checkout may silently run the first one's clients. Second, it exits with 0 even
if the ServerApp failed. This module starts a SuperLink for one run, from an empty
folder, asks it for the run's final status and stops all processes again.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TextIO

from joblib import cpu_count

from clip2fl_cli.app_folder import checked_run_config, write_app_folder
from clip2fl_cli.flower_command import SimulationError
from clip2fl_cli.gpu_memory import free_gpu_bytes, memory_warning
from clip2fl_cli.options import MOST_NODES
from clip2fl_cli.signals import Interrupted, NotedSignals
from clip2fl_cli.superlink import own_superlink, private_directory
from clip2fl_common.config import ConfigError
from clip2fl_common.config.files import complete_config
from clip2fl_common.project import PROJECT
from clip2fl_common.shown import short

CLIENTS_PER_GPU = 4
"""More clients that train at once on a GPU slow each other down and fill its memory."""

GPU_DEVICES = ("nvidia*", "nvhost*", "nvgpu*", "dxg", "kfd")
"""Files of Linux in /dev, one of which exists where CUDA or ROCm finds a GPU."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes
    ----------
    status : str
        Flower's status: "finished:completed", "finished:failed", "finished:stopped";
        or "not-started" if Flower refused the app or its configuration.
    details : str
        The reason if the run did not complete, else empty.
    log : str
        The run's complete log, without colours.
    run_id : int or None
        Flower's id of the run; None if it was not started.
    """

    status: str
    details: str
    log: str
    run_id: int | None = None

    @property
    def completed(self) -> bool:
        """Whether the run completed without an error."""
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
        ``key=value`` pairs, which take precedence over the file.
    resume : Path | None
        Folder of an interrupted run to resume; None starts a new one.
    supernodes : int | None
        Number of simulated nodes; None: one per CPU core, at least 2.
    cpus_per_client : int
        CPU cores that a client occupies, and its number of threads; determines how many
        clients train at once.
    gpus_per_client : float | None
        GPUs, or the share of one, that a client occupies; with 0, Ray hides GPUs from
        it. None: the clients that train at once share this machine's GPUs, at most
        `CLIENTS_PER_GPU` on each.
    ray_address : str | None
        ``HOST:PORT`` of a running Ray cluster to use; None starts a private one.
    timeout : float | None
        Seconds after which the run is stopped.
    output : TextIO | None
        Stream that receives each line of the log immediately, without colours, such as
        `clip2fl_cli.progress.RunOutput`.

    Returns
    -------
    RunResult
        Flower's status, the reason and the log.

    Raises
    ------
    ConfigError
        If a number of nodes, cores, GPUs or seconds is not allowed, or the run
        configuration cannot be read or has an unknown key. For this program itself,
        also if a value is not allowed.
    SimulationError
        If the SuperLink does not start.
    Interrupted
        If SIGINT, SIGTERM or SIGHUP arrived; raised after all processes were stopped.
    """
    _refuse_odd_numbers(supernodes, cpus_per_client, gpus_per_client, timeout)
    config_text = checked_run_config(
        app, run_config, overrides, resume, images_here=True
    )
    own = complete_config(config_text) if app.resolve() == PROJECT else None
    if own and own.device.startswith("cuda:") and own.device != "cuda:0":
        number = own.device.partition(":")[2]
        raise ConfigError(
            f"device = {own.device!r} does not work in a simulation: its clients see "
            "only the GPUs that Ray assigns to them, and count these from 0. Use "
            f"device = 'auto' with CUDA_VISIBLE_DEVICES={number} in the environment"
        )
    if gpus_per_client is None:
        gpus_per_client = shared_gpus(cpus_per_client, own.device if own else "auto")
    if gpus_per_client and output is not None and own is not None:
        together = max(1, cpu_count() // cpus_per_client)
        warning = memory_warning(own, gpus_per_client, together, free_gpu_bytes())
        if warning:
            output.write(f"WARNING :   {warning}\n")
    federation_config = (
        f"num-supernodes={max(2, cpu_count()) if supernodes is None else supernodes}"
        f" client-resources-num-cpus={cpus_per_client}"
        f" client-resources-num-gpus={gpus_per_client:g}"
    )
    if ray_address is None:
        # Ray counts the cores of the machine, not those that this process may use, and
        # each process for clients takes some hundred MiB.
        useful = own.federation.clients_per_round * cpus_per_client if own else 2**31
        cores = max(cpus_per_client, min(cpu_count(), useful))
        federation_config += f" init-args-num-cpus={cores}"
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


def _refuse_odd_numbers(
    nodes: object, cores: object, gpus: object, timeout: object
) -> None:
    """Raise if Flower or Ray would misread a number, or fail without naming it."""
    count = f"a whole number from 1 to {MOST_NODES:,}"
    for name, value, is_sound, wanted in (
        ("supernodes", nodes, nodes is None or _is_count(nodes), count),
        ("cpus_per_client", cores, _is_count(cores), count),
        (
            "gpus_per_client",
            gpus,
            gpus is None or _is_finite(gpus),
            "a finite number, at least 0",
        ),
        (
            "timeout",
            timeout,
            timeout is None or (_is_finite(timeout) and timeout != 0),
            "a finite number above 0",
        ),
    ):
        if not is_sound:
            raise ConfigError(f"{name} = {short(value)}, but it must be {wanted}")


def _is_count(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return 1 <= int(value) <= MOST_NODES


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return 0 <= float(value) < math.inf


def shared_gpus(cpus_per_client: int, device: str = "auto") -> float:
    """Return the share of a GPU for each of the clients that train at once.

    Parameters
    ----------
    cpus_per_client : int
        CPU cores that a client occupies.
    device : str
        The run's ``device``.

    Returns
    -------
    float
        0 if there is no GPU, or if the run uses none: it would hold clients up.
    """
    if device == "cpu" or not _has_gpu_driver():
        return 0.0
    import torch  # takes a second or two

    gpus = torch.cuda.device_count()
    together = max(1, cpu_count() // cpus_per_client)
    return min(1.0, max(gpus / together, 1 / CLIENTS_PER_GPU)) if gpus else 0.0


def _has_gpu_driver() -> bool:
    """Return whether a GPU is possible; False spares the import of torch."""
    devices = Path("/dev")
    return any(any(devices.glob(name)) for name in GPU_DEVICES)
