"""Checkpoints of a run: everything that the next round needs, complete or absent.

A checkpoint is a folder ``checkpoints/round-000012`` in the run's folder:

- ``tensors.safetensors``: the global model (``model.*``) and the strategy's state
  (``strategy.*``: federated features, re-trained classifier);
- ``state.json``: format version, round, configuration, fingerprints of code, teacher
  and data, random state, best round so far;
- ``metrics.jsonl``: the lines of all rounds so far;
- ``SHA256SUMS``: checksums of the other files, in the format of ``sha256sum --check``.

Checkpoints contain no pickle, so loading one cannot run foreign code.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from clip2fl_common.config import Scalar
from clip2fl_common.config.same_run import NOTHING, differences
from clip2fl_common.files import remove, replacing_folder
from server_app.run_folder import (
    CHECKPOINTS,
    METRICS,
    checkpoint_path,
    rounds_with_checkpoint,
)

logger = getLogger(__name__)

FORMAT = 1

TENSORS = "tensors.safetensors"
STATE = "state.json"
SUMS = "SHA256SUMS"

MODEL_PREFIX = "model."
STRATEGY_PREFIX = "strategy."


class ResumeError(ValueError):
    """A run cannot continue from the files in its folder; says why and what to do."""


class DamagedCheckpointError(ValueError):
    """A checkpoint file differs from what was written; names the file."""


@dataclass(frozen=True)
class BestRound:
    """The best round among those with a checkpoint, by ``checkpoint.best-metric``.

    Attributes
    ----------
    round : int
        Number of the round.
    value : float
        The metric, in percent.
    """

    round: int
    value: float


@dataclass(frozen=True)
class Checkpoint:
    """All state of a run after one of its rounds.

    Attributes
    ----------
    round : int
        The last completed round; 0 before the first.
    config : Mapping
        The run configuration, dotted keys to values.
    made_with : Mapping
        Fingerprints that must be the same when the run continues: ``code``, ``data``
        and, if the method has a teacher, ``teacher``.
    environment : Mapping
        Must be the same for bit-identical results: ``device``, versions.
    best : BestRound or None
        The best round so far; None before any round.
    resumed_after : tuple of int
        Rounds after which the run was interrupted and continued.
    metrics : str
        Content of ``metrics.jsonl``.
    model : Mapping
        State of the global model.
    strategy : Mapping
        State of the strategy.
    """

    round: int
    config: Mapping[str, Scalar]
    made_with: Mapping[str, str]
    environment: Mapping[str, str]
    best: BestRound | None
    resumed_after: tuple[int, ...]
    metrics: str
    model: Mapping[str, torch.Tensor]
    strategy: Mapping[str, torch.Tensor]


def save_checkpoint(run_folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into a run's folder; it is on disk when this returns.

    Parameters
    ----------
    run_folder : Path
        The run's folder.
    checkpoint : Checkpoint
        State after a round.
    """
    state = {
        "format": FORMAT,
        "round": checkpoint.round,
        "config": checkpoint.config,
        "made_with": checkpoint.made_with,
        "environment": checkpoint.environment,
        "best": asdict(checkpoint.best) if checkpoint.best else None,
        "resumed_after": checkpoint.resumed_after,
        "random": {
            "seed": checkpoint.config["seed"],
            "next_round": checkpoint.round + 1,
            "note": "each generator comes from seed, purpose, round and client",
        },
    }
    named = {f"{MODEL_PREFIX}{n}": t for n, t in checkpoint.model.items()}
    named |= {f"{STRATEGY_PREFIX}{n}": t for n, t in checkpoint.strategy.items()}
    place = checkpoint_path(run_folder, checkpoint.round)
    place.parent.mkdir(exist_ok=True)
    with replacing_folder(place) as folder:
        save_file(
            {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in named.items()
            },
            folder / TENSORS,
        )
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", "utf-8")
        (folder / METRICS).write_text(checkpoint.metrics, "utf-8")
        sums = "".join(
            f"{_sha256(folder / name)}  {name}\n" for name in (TENSORS, STATE, METRICS)
        )
        (folder / SUMS).write_text(sums, "utf-8")


def load_checkpoint(run_folder: Path, server_round: int) -> Checkpoint:
    """Read one checkpoint.

    Parameters
    ----------
    run_folder : Path
        The run's folder.
    server_round : int
        Round of the checkpoint.

    Returns
    -------
    Checkpoint
        Tensors on the CPU.

    Raises
    ------
    DamagedCheckpointError
        If a file is missing or was changed.
    ResumeError
        If the checkpoint has another format.
    """
    folder = checkpoint_path(run_folder, server_round)
    _verify(folder)
    state: dict[str, Any] = json.loads((folder / STATE).read_text("utf-8"))
    if state["format"] != FORMAT:
        raise ResumeError(
            f"{folder} has the checkpoint format {state['format']}, this program reads "
            f"{FORMAT}: resume with the version of the program that began the run"
        )
    tensors = load_file(folder / TENSORS)
    return Checkpoint(
        round=state["round"],
        config=state["config"],
        made_with=state["made_with"],
        environment=state["environment"],
        best=BestRound(**state["best"]) if state["best"] else None,
        resumed_after=tuple(state["resumed_after"]),
        metrics=(folder / METRICS).read_text("utf-8"),
        model=_with_prefix(tensors, MODEL_PREFIX),
        strategy=_with_prefix(tensors, STRATEGY_PREFIX),
    )


def load_newest(run_folder: Path) -> Checkpoint:
    """Read the newest complete checkpoint, and rename damaged newer ones.

    A damaged checkpoint gets another name, so that it is never loaded.

    Parameters
    ----------
    run_folder : Path
        The run's folder.

    Returns
    -------
    Checkpoint

    Raises
    ------
    ResumeError
        If there is no complete checkpoint.
    """
    damaged: dict[int, str] = {}
    for server_round in reversed(rounds_with_checkpoint(run_folder)):
        try:
            checkpoint = load_checkpoint(run_folder, server_round)
        except DamagedCheckpointError as error:
            damaged[server_round] = str(error)
            continue
        for bad, reason in damaged.items():
            path = checkpoint_path(run_folder, bad)
            aside = path.with_name(f"{path.name}.damaged")
            logger.warning(
                "checkpoint %s is damaged (%s); it is kept as %s, and the run goes on "
                "from %s",
                path,
                reason,
                aside.name,
                checkpoint_path(run_folder, server_round),
            )
            remove(aside)
            path.rename(aside)
        return checkpoint
    if damaged:
        raise ResumeError(
            f"every checkpoint in {run_folder / CHECKPOINTS} is damaged ("
            + "; ".join(f"round {r}: {reason}" for r, reason in damaged.items())
            + "): restore one from a backup, or start the run anew in another folder"
        )
    raise ResumeError(
        f"{run_folder / CHECKPOINTS} holds no checkpoint, so there is nothing to "
        "resume: start the run without run.resume"
    )


def prune(run_folder: Path, keep: int) -> None:
    """Remove old checkpoints.

    The last ``keep`` checkpoints stay, at least two, and for each of them the best
    checkpoint up to its round: if the newest is damaged, the one before it still finds
    its best. At least two stay, because only the next round shows whether clients can
    train on the newest model.

    Parameters
    ----------
    run_folder : Path
        The run's folder.
    keep : int
        Number of the last checkpoints that stay, at least 1.
    """
    rounds = rounds_with_checkpoint(run_folder)
    last = rounds[-max(keep, 2) :]
    wanted = set(last)
    for server_round in last:
        place = checkpoint_path(run_folder, server_round)
        try:
            best = json.loads((place / STATE).read_text("utf-8"))["best"]
            wanted |= {best["round"]} if best else set()
        except (OSError, ValueError, KeyError, TypeError) as error:
            # The run's last round is saved, so an older checkpoint must not end it.
            logger.warning("checkpoint %s is damaged (%s)", place, error)
    for server_round in set(rounds) - wanted:
        remove(checkpoint_path(run_folder, server_round))


def refuse_differences(
    checkpoint: Checkpoint, config: Mapping[str, Scalar], made_with: Mapping[str, str]
) -> None:
    """Refuse to continue if a difference would make this another run.

    Parameters
    ----------
    checkpoint : Checkpoint
        The checkpoint from which the run would continue.
    config : Mapping
        The configuration with which it would continue.
    made_with : Mapping
        Fingerprints of the present code, data and teacher.

    Raises
    ------
    ResumeError
        Names every difference, with both values.
    """
    if found := differences(checkpoint.config, config):
        raise ResumeError(
            "the configuration is not the run's, so that it cannot go on from round "
            f"{checkpoint.round}:\n"
            + "\n".join(
                f"  - {key}: the run has {then!r}, now it is {now!r}"
                for key, then, now in found
            )
            + "\nTake the run's own values, or start another run."
        )
    remedies = {
        "code": "check out the code that began the run",
        "teacher": "install the weights that the run began with",
        "data": "restore the images that the run began with",
    }
    for name, remedy in remedies.items():
        then, now = (
            made.get(name, NOTHING) for made in (checkpoint.made_with, made_with)
        )
        if then != now:
            raise ResumeError(
                f"the {name} is not the run's: it began with {then[:16]}, here is "
                f"{now[:16]}. To go on from round {checkpoint.round}, {remedy}; or "
                "start another run."
            )


def _verify(folder: Path) -> None:
    try:
        sums: dict[str, str] = {}
        for line in (folder / SUMS).read_text("utf-8").splitlines():
            checksum, name = line.split("  ", 1)
            sums[name] = checksum
        if set(sums) != {TENSORS, STATE, METRICS}:
            raise DamagedCheckpointError(f"{SUMS} is not as it was written")
        for name, expected in sums.items():
            if _sha256(folder / name) != expected:
                raise DamagedCheckpointError(f"{name} does not have its checksum")
    except (OSError, ValueError) as error:
        if isinstance(error, DamagedCheckpointError):
            raise
        raise DamagedCheckpointError(str(error)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_prefix(
    tensors: Mapping[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
