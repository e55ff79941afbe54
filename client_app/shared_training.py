"""Compute local training once if several runs have it in common.

A client's training depends on the global model, its images, the local objective and the
seed, but not on what the server does with class gradients. So variants of a comparison
that differ only at the server (number of federated features, weight of the prototypes,
re-training) train the same local models in every round, and so do FedAvg and CReFF. If
a folder is set, each local model is stored there under a key of all its inputs. A run
that needs it again reads it back; the result is identical to the last bit.
"""

import os
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from client_app.training import TrainingLosses
from clip2fl_common.devices import tf32_state
from clip2fl_common.provenance import SHARED_TRAINING_VARIABLE, code_fingerprint

Trained = tuple[dict[str, np.ndarray[Any, Any]], TrainingLosses]


def train_or_reuse(training: "partial[TrainingLosses]") -> TrainingLosses:
    """Return the losses of the training; train the model, or reuse a stored result.

    Parameters
    ----------
    training : partial
        `training.train_locally` with all of its arguments, the model first. The
        arguments are the key, with the code, torch's version, its number of threads and
        its use of TF32: these change the last bits.

    Returns
    -------
    TrainingLosses
        Losses of the training, new or stored.
    """
    folder = os.environ.get(SHARED_TRAINING_VARIABLE)
    if not folder:
        return training()
    from joblib import Memory, hash  # installed with the clip2fl command only

    key = hash(
        [
            code_fingerprint(),
            torch.__version__,
            torch.get_num_threads(),
            tf32_state(),
            _plain(training.args),
            _plain(training.keywords),
        ]
    )
    reuse = Memory(folder, verbose=0).cache(_train, ignore=["training"])
    trained: Trained = reuse(key, training)
    state, losses = trained
    model: torch.nn.Module = training.args[0]
    model.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
    return losses


def _train(key: str, training: "partial[TrainingLosses]") -> Trained:
    losses = training()
    return _plain(training.args[0]), losses


def _plain(value: Any) -> Any:
    """Return a value in types whose hash depends only on their content."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy()
    if isinstance(value, torch.nn.Module):
        return _plain(value.state_dict())
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return value
