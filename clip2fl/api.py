"""The functions of `clip2fl`: a thin layer on the code of the command.

Each function imports its modules when it is called, since torch takes seconds.
"""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from clip2fl_cli.holdings import Holdings
    from clip2fl_cli.prediction import Model
    from clip2fl_cli.run_schema import Images
    from clip2fl_cli.runs import FinishedRun
    from clip2fl_cli.summary import Failure
    from clip2fl_common.config import RunConfig, Scalar

PathLike: TypeAlias = "str | os.PathLike[str]"
Config: TypeAlias = "PathLike | Mapping[str, object] | RunConfig"
"""A TOML file or the name of an experiment that comes with the program; or keys with
values, dotted or nested, as in docs/configuration.md; or a checked configuration."""


class Run:
    """A complete run, whose files are read on first use.

    Parameters
    ----------
    folder : path
        Folder of the run's results.

    Attributes
    ----------
    folder : Path
        The folder.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        """Return the expression that opens this run again."""
        return f"clip2fl.Run({str(self.folder)!r})"

    @cached_property
    def _read(self) -> FinishedRun:
        from clip2fl_cli.runs import FinishedRun

        return FinishedRun.read(self.folder)

    @property
    def config(self) -> dict[str, Any]:
        """Every key of the run's configuration with its value."""
        return self._read.config

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry per round, as in ``metrics.jsonl``; accuracies in percent."""
        return self._read.rounds

    @cached_property
    def model(self) -> Model:
        """The delivered model."""
        return load_model(self.folder)

    def report(self, against: Run | None = None) -> Path:
        """Write ``report.html``, and its pictures as PNG and SVG in ``figures``.

        With ``evaluation.tuning-share`` it shows the held-out test images.

        Parameters
        ----------
        against : Run or None
            A run, for example of FedAvg, with which to compare the accuracy by class.

        Returns
        -------
        Path
            Path of the page, in the run's folder.

        Raises
        ------
        RunError
            If the two runs have different classes, groups of classes or test images, or
            a file of a run is damaged.
        OutputError
            If the report cannot be written.
        """
        from clip2fl_cli.report import write_run_report
        from clip2fl_cli.runs import chosen_images

        runs = [run._read for run in (self, against) if run is not None]
        chosen = chosen_images(runs)
        return write_run_report(*(run.on(chosen) for run in runs))


@dataclass(frozen=True)
class Compared:
    """The results of a comparison.

    Attributes
    ----------
    folder : Path
        Folder of the runs and results.
    table : str
        One row per variant, in Markdown.
    summary : dict
        The same numbers and more: the content of ``comparison.json``.
    report : Path
        Path of the report.
    failed : list of Failure
        Runs that did not complete, with the reasons.
    """

    folder: Path
    table: str
    summary: dict[str, Any]
    report: Path
    failed: list[Failure]


def run(
    config: Config | None = None,
    /,
    *,
    supernodes: int | None = None,
    cpus_per_client: int = 1,
    gpus_per_client: float | None = None,
    timeout: float | None = None,
    quiet: bool = False,
    **settings: object,
) -> Run:
    """Train: run a federation in a simulation on this machine.

    Call it from the main thread. When it returns, or when Ctrl-C ends it, all processes
    of the simulation have ended.

    Parameters
    ----------
    config : path, mapping, RunConfig or None
        A TOML file, the name of an experiment that comes with the program, or keys
        with values. Other keys have their defaults, which train on drawn shapes
        (``"shapes"``).
    supernodes : int or None
        Number of simulated nodes; None: one per CPU core, at least 2.
    cpus_per_client : int
        CPU cores that a client occupies, and its number of threads.
    gpus_per_client : float or None
        GPUs, or the share of one, that a client occupies; None shares all GPUs.
    timeout : float or None
        Seconds after which the run is stopped.
    quiet : bool
        Do not print the progress.
    **settings
        Keys that take precedence over ``config``: ``method="fedavg"``, and groups as
        mappings: ``federation={"rounds": 3, "clients_per_round": 2}``. Write an
        underscore for a key's hyphen. A `Path` may be relative, a string may not.
        Another method or data set has its own defaults, also if ``config`` is the
        complete configuration of a run.

    Returns
    -------
    Run

    Raises
    ------
    ConfigError
        If a key does not exist or comes twice, or a value is not allowed; names each
        key.
    SimulationError
        If the run did not complete; gives the reason.
    KeyboardInterrupt
        If a signal ended the run; raised after all processes were stopped.
    """
    from rich.console import Console

    from clip2fl_cli.configuration import as_file
    from clip2fl_cli.flower_command import SimulationError
    from clip2fl_cli.progress import RunProgress
    from clip2fl_cli.simulation import simulate
    from server_app.run_folder import folder_of

    resolved = _resolved(config, settings)
    progress = None if quiet else RunProgress(Console())
    with as_file(resolved) as file, progress or nullcontext():
        result = simulate(
            run_config=file,
            supernodes=supernodes,
            cpus_per_client=cpus_per_client,
            gpus_per_client=gpus_per_client,
            timeout=timeout,
            output=None if progress is None else progress.output,
        )
    if not result.completed or result.run_id is None:
        raise SimulationError(
            f"the run did not complete ({result.status}): {result.details}"
        )
    return Run(folder_of(resolved, result.run_id))


def compare(
    file: PathLike,
    runs: PathLike = "runs",
    *,
    seeds: Sequence[int] = (),
    variants: Sequence[str] = (),
    images: Literal["all", "held-out", "tuning"] | None = None,
    quiet: bool = False,
    **settings: object,
) -> Compared:
    """Run variants over seeds; write their table and report.

    Complete runs are not repeated; a warning names those that other code has made.
    Call it from the main thread.

    Parameters
    ----------
    file : path
        TOML file of a comparison, or the name of one that comes with the program.
    runs : path
        Folder in which the comparison gets its own folder.
    seeds : sequence of int
        Seeds that replace the file's.
    variants : sequence of str
        The only variants to run, the baseline among them; all by default.
    images : str or None
        Test images on which accuracy is shown, with ``evaluation.tuning-share``:
        "tuning" while you choose settings; None: "held-out" if there are any.
    quiet : bool
        Do not print the progress.
    **settings
        Keys for all variants, as in `run`.

    Returns
    -------
    Compared

    Raises
    ------
    ComparisonError, ConfigError
        If the file or a setting is not allowed.
    SimulationError
        If no run has completed.
    KeyboardInterrupt
        If a signal ended the comparison; the same call continues it.
    """
    from rich.console import Console

    from clip2fl_cli.comparison import Comparison, complete
    from clip2fl_cli.flower_command import SimulationError
    from clip2fl_cli.progress import ComparisonProgress
    from clip2fl_common.config.files import toml_pair
    from clip2fl_common.project import experiment

    own = _flat(settings)
    shown_images = _images(images)
    compared = Comparison.read(
        experiment(Path(file)), Path(runs), (), seeds, variants, own
    )
    compared.refuse_absent(shown_images)
    # torch is imported from here on, after the checks of the settings.
    from clip2fl_cli.results import write_results

    missing = compared.missing()
    if warning := compared.other_code():
        warnings.warn(warning, stacklevel=2)
    there = len(compared.plan) - len(missing)
    with ComparisonProgress(missing, there, Console(stderr=True, quiet=quiet)) as shown:
        failed = list(complete(compared, shown))
    finished = compared.finished()
    if not finished:
        reasons = "; ".join(sorted({failure.reason for failure in failed}))
        raise SimulationError(f"no run of {compared.name} has completed: {reasons}")
    command = ["clip2fl", "compare", str(file), "--runs", str(runs)]
    command += [word for seed in seeds for word in ("--seed", str(seed))]
    command += [word for name in variants for word in ("--variant", name)]
    pairs = " ".join(toml_pair(key, value) for key, value in own.items())
    command += ["--set", pairs] if pairs else []
    command += ["--images", shown_images] if shown_images else []
    written = write_results(
        compared, finished, shlex.join(command), failed, shown_images
    )
    return Compared(
        compared.folder,
        written.results.markdown,
        json.loads(written.results.json),
        written.report,
        failed,
    )


def partition(config: Config | None = None, /, **settings: object) -> Holdings:
    """Return how many images of which class each client would hold.

    Parameters
    ----------
    config, **settings
        As in `run`.

    Returns
    -------
    Holdings
        ``class_names`` of the C classes and ``counts``, an int64 array [K, C] with one
        row per client; ``draw(file)`` writes a heat map.

    Raises
    ------
    ConfigError
        As in `run`.
    """
    resolved = _resolved(config, settings)
    # torch is imported from here on, after the checks of the settings.
    from clip2fl_cli.holdings import Holdings

    return Holdings.of(resolved)


def load_model(path: PathLike, public_key: PathLike | None = None) -> Model:
    """Load a delivered model; the file may come from an untrusted source.

    Parameters
    ----------
    path : path
        A ``model.safetensors``, the folder of a complete run, or a folder that
        ``clip2fl site fetch`` has written.
    public_key : path or None
        The server's ``signing.key.pub`` or the key's 64 hexadecimal digits. It must
        have signed the folder. None: a signed folder must be signed by a key that
        ``clip2fl site fetch`` has used.

    Returns
    -------
    Model
        ``predict(images)`` classifies image files, Pillow's images, arrays [H, W, 3]
        and tensors [3, H, W] of uint8.

    Raises
    ------
    RunError, ForeignFileError
        If the file is missing, or is not a delivered model; names the fault.
    SignatureError
        If a signed folder is not exactly what the server signed.
    """
    from clip2fl_cli.prediction import Model

    return Model.load(Path(path), None if public_key is None else str(public_key))


def _images(name: str | None) -> Images | None:
    from clip2fl_cli.run_schema import Images
    from clip2fl_common.config import ConfigError
    from clip2fl_common.shown import short

    if name is None:
        return None
    try:
        return Images(str(name).replace("_", "-"))
    except ValueError:
        raise ConfigError(
            f"images = {short(name)}, but it must be one of {', '.join(Images)}"
        ) from None


def _resolved(config: Config | None, settings: Mapping[str, object]) -> RunConfig:
    """Return the checked configuration for the arguments of `run`."""
    from clip2fl_cli.configuration import resolve
    from clip2fl_common.config import RunConfig

    changed = _flat(settings)
    file: Path | None = None
    own: dict[str, Scalar] = {}
    if isinstance(config, RunConfig):
        own = _without_defaults(config.to_flat(), changed)
    elif isinstance(config, Mapping):
        own = _without_defaults(_flat(config), changed)
    elif config is not None:
        file = Path(config)
    return resolve(file, (), {**own, **changed})


def _without_defaults(
    own: dict[str, Scalar], changed: Mapping[str, Scalar]
) -> dict[str, Scalar]:
    """Return a configuration that takes the defaults of a changed method or data set.

    A checked configuration, such as the one of a run, has each default as a value like
    others. A mapping that lacks some of these keys is written by hand: all of it
    counts.
    """
    from clip2fl_common.config import KEYS
    from clip2fl_common.config.checks import known_classes
    from clip2fl_common.config.keys import AUTO, FEW_CLASSES

    chosen = [key for key in KEYS.values() if key.chosen]
    if not all(key.name in own for key in chosen):
        return own
    new = {key for key, value in changed.items() if own.get(key) != value}
    other_method = "method" in new
    other_images = any(key.startswith("dataset.") for key in new)
    known = known_classes(own)
    sizes = (FEW_CLASSES, FEW_CLASSES + 1) if known is None else (known,)
    found = dict(own)
    for key in chosen:
        concerned = (other_method and key.by_method) or (
            other_images and key.many_classes is not None
        )
        if concerned and own[key.name] in (
            key.default_of(own.get("method"), classes) for classes in sizes
        ):
            found[key.name] = AUTO
    return found


def _flat(table: Mapping[str, object]) -> dict[str, Scalar]:
    """Return the dotted keys of nested mappings; the values are checked later.

    Raises
    ------
    ConfigError
        If a key has two values, as "a.b" and as "b" of the group "a".
    """
    from clip2fl_common.config import ConfigError
    from clip2fl_common.shown import short, shown

    found: dict[str, Any] = {}
    for key, value in _pairs(table):
        if key in found and repr(found[key]) != repr(value):
            raise ConfigError(
                f"{shown(key)} is given twice, as {short(found[key])} and as "
                f"{short(value)}: leave one out"
            )
        found[key] = value
    return found


def _pairs(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Any]]:
    import numpy as np

    for part, value in table.items():
        key = f"{prefix}{part}".replace("_", "-")
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{key}.")
        elif isinstance(value, os.PathLike):
            yield key, os.path.abspath(value)
        elif isinstance(value, np.generic):
            yield key, value.item()
        else:
            yield key, value
