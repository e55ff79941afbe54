"""Experiment trackers that record a run's metrics, if the configuration names any.

The program does not need a tracker, and installs none, except TensorBoard with the
extra ``tensorboard``. A tracker is imported when ``run.trackers`` names it.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from clip2fl_common.config import ConfigError, RunConfig
from server_app.run_folder import TENSORBOARD


class Tracker(Protocol):
    """Receives a run's numbers after each round."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record a round's numbers."""

    def close(self) -> None:
        """End the recording after the last round."""


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run's folder.

    Parameters
    ----------
    config : RunConfig
        Configuration, recorded as text.
    folder : Path
        The run's folder.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder / TENSORBOARD))
        lines = [f"    {key} = {value!r}" for key, value in config.to_flat().items()]
        self._writer.add_text("configuration", "\n".join(lines), 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a round's numbers; they are on disk when this returns."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class MLflow:
    """A run of MLflow, on the server at ``MLFLOW_TRACKING_URI``.

    Parameters
    ----------
    config : RunConfig
        Recorded as the run's parameters.
    folder : Path
        The run's folder; the MLflow run gets its name.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._mlflow = _import("mlflow", "mlflow")
        self._mlflow.start_run(run_name=folder.name)
        self._mlflow.log_params(config.to_flat())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a round's numbers."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class WeightsAndBiases:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine.

    Parameters
    ----------
    config : RunConfig
        Recorded as the run's configuration.
    folder : Path
        The run's folder; the W&B run gets its name.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._run: Any = _import("wandb", "wandb").init(
            name=folder.name, config=config.to_flat(), dir=str(folder)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a round's numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


TRACKERS: dict[str, Callable[[RunConfig, Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


def open_trackers(config: RunConfig, folder: Path) -> list[Tracker]:
    """Start the trackers that the configuration names.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    folder : Path
        The run's folder.

    Returns
    -------
    list of Tracker

    Raises
    ------
    ConfigError
        If a tracker is not installed.
    """
    return [TRACKERS[name](config, folder) for name in config.run.trackers.split()]


def scalars(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return a metrics line's numbers under names such as ``accuracy/fedavg/few``.

    Parameters
    ----------
    line : mapping
        A line of ``metrics.jsonl``, or a table in it.
    prefix : str
        Prefix of each name.

    Returns
    -------
    dict of str to float
        Without lists, null values and the round's number.
    """
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and prefix + name != "round":
            found[prefix + name] = float(value)
    return found


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"run.trackers names {package}, which is not installed ({error}): "
            f"'.venv/bin/uv pip install --python .venv/bin/python {package}', or leave "
            "it out"
        ) from error
