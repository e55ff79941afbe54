"""A run's folder, and how all its files but checkpoints are written.

``config.json``, ``metrics.jsonl``, ``events.jsonl``, ``checkpoints`` and
``tensorboard`` exist from the first rounds on, ``model-best.safetensors`` from the
first round with an accuracy, ``artifacts.safetensors`` from the last round on. The
delivered ``model.safetensors`` is written last, so that it marks a complete run.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import platformdirs
import torch
from filelock import FileLock, Timeout
from pydantic import Field, RootModel

from clip2fl_common.config import RunConfig
from clip2fl_common.files import replacing
from server_app.file_names import ARTIFACTS as ARTIFACTS
from server_app.file_names import BEST_MODEL as BEST_MODEL
from server_app.file_names import CHECKPOINTS as CHECKPOINTS
from server_app.file_names import CONFIG as CONFIG
from server_app.file_names import LOCK as LOCK
from server_app.file_names import METRICS as METRICS
from server_app.file_names import MODEL as MODEL
from server_app.file_names import REQUESTS as REQUESTS
from server_app.file_names import TENSORBOARD as TENSORBOARD
from server_app.folder_lock import LOOK_S
from server_app.foreign_files import MEGABYTE, read_json
from server_app.tensor_files import save_tensors

# Names of tensors in the artifacts; a confusion matrix's name ends with its classifier.
CLIENTS = "clients_by_class"
CONFUSION = "confusion."
FEATURES = "features"

# The names that `checkpoint_path` gives, and no other: people may keep copies there.
_CHECKPOINT = re.compile("round-([0-9]{6}|[1-9][0-9]{6,})")


class _Requests(RootModel[dict[Annotated[str, Field(pattern="^[0-9]{1,20}$")], int]]):
    """Content of ``requests.json``."""


# Largest number of federated features, over all classes, that a run saves for reports.
SHOWN_FEATURES = 2000


def checkpoint_path(run_folder: Path, server_round: int) -> Path:
    """Return the path of a round's checkpoint."""
    return run_folder / CHECKPOINTS / f"round-{server_round:06d}"


def rounds_with_checkpoint(run_folder: Path) -> list[int]:
    """Return the rounds that have a checkpoint, complete or damaged, ascending."""
    found = (
        _CHECKPOINT.fullmatch(path.name)
        for path in (run_folder / CHECKPOINTS).glob("round-*")
    )
    return sorted(int(name[1]) for name in found if name)


class RunInUseError(RuntimeError):
    """Another run uses the folder."""


class RunFolder:
    """A run's folder, reserved for this run until `release`.

    Parameters
    ----------
    config : RunConfig
        Determines the folder's place and name.
    run_id : int
        Flower's id of the run, which makes the name of a new folder unique.

    Raises
    ------
    RunInUseError
        If another run uses the folder.
    FileExistsError
        If a new run would overwrite another one.
    FileNotFoundError
        If there is no run to resume in the folder.
    """

    def __init__(self, config: RunConfig, run_id: int) -> None:
        self.path = folder_of(config, run_id)
        if not config.run.resume:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not self.path.is_dir():
            raise FileNotFoundError(
                f"run.resume = {config.run.resume!r} is no folder: give the run's "
                f"folder, which contains {CONFIG}"
            )
        self._metrics = ""
        # The system releases the lock when the process ends, even after a crash.
        self._lock = FileLock(self.path / LOCK, timeout=LOOK_S)
        try:
            self._lock.acquire()
        except Timeout:
            raise RunInUseError(
                f"another run works in {self.path}: wait until it ends or stop it, or "
                "choose another run.name or run.dir"
            ) from None
        holds_run = bool(rounds_with_checkpoint(self.path)) or any(
            (self.path / name).exists() for name in (METRICS, MODEL)
        )
        if holds_run and not config.run.resume:
            self.release()
            raise FileExistsError(
                f"{self.path} already holds a run; go on with it by run.resume, choose "
                "another run.name or run.dir, or remove that folder"
            )

    def release(self) -> None:
        """Release the folder for other runs."""
        self._lock.release()

    def write_config(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write the resolved configuration and the facts that the run found."""
        content = {"config": config.to_flat(), **facts}
        self._write(CONFIG, json.dumps(content, indent=2) + "\n")

    @property
    def metrics(self) -> str:
        """Return the content of ``metrics.jsonl``."""
        return self._metrics

    def begin_metrics(self, content: str) -> None:
        """Replace ``metrics.jsonl``: empty for a new run, else a checkpoint's lines."""
        self._write(METRICS, content)
        self._metrics = content

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; it is on disk when this returns."""
        text = json.dumps(line, allow_nan=False) + "\n"
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._metrics += text

    def write_requests(self, asked: Mapping[int, int]) -> None:
        """Write how often each client was asked; it is on disk when this returns."""
        self._write(REQUESTS, json.dumps({str(c): n for c, n in asked.items()}) + "\n")

    def requests(self) -> dict[int, int]:
        """Return how often each client was asked; empty if that was not written.

        Raises
        ------
        ForeignFileError
            If the file is damaged.
        """
        path = self.path / REQUESTS
        if not path.exists():
            return {}
        content = read_json(path, _Requests, MEGABYTE)
        return {int(client): times for client, times in content.items()}

    def write_artifacts(
        self,
        method: Mapping[str, torch.Tensor],
        confusion: Mapping[str, npt.NDArray[np.int64]],
        held: npt.NDArray[np.int64] | None,
    ) -> None:
        """Write ``artifacts.safetensors``.

        Parameters
        ----------
        method : mapping of str to Tensor
            Artifacts. Of ``features`` [C, m, d] at most `SHOWN_FEATURES` are
            saved, equally many of each class, in half precision: enough for a figure.
        confusion : mapping of str to ndarray of int64, shape [C, C]
            Test images by true and predicted class, for each head.
        held : ndarray of int64, shape [K, C], or None
            Training images by client and class; None if the server does not know them.
        """
        tensors = {
            **({} if held is None else {CLIENTS: torch.from_numpy(held)}),
            **{f"{CONFUSION}{n}": torch.from_numpy(c) for n, c in confusion.items()},
            **method,
        }
        if FEATURES in tensors:
            features = tensors[FEATURES]
            shown = max(1, SHOWN_FEATURES // len(features))
            tensors[FEATURES] = features[:, :shown].bfloat16()
        save_tensors(self.path / ARTIFACTS, tensors)

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name, only_writer=True) as file:
            file.write(text.encode())


def folder_of(config: RunConfig, run_id: int) -> Path:
    """Return the path of a run's folder; its name may contain Flower's ``run_id``."""
    if config.run.resume:
        return Path(config.run.resume).expanduser()
    parent = (
        Path(config.run.dir).expanduser()
        if config.run.dir
        else Path(platformdirs.user_data_dir("clip2fl")) / "runs"
    )
    return parent / (
        config.run.name
        or f"{config.method}-{config.dataset.name}-seed{config.seed}-{run_id}"
    )
