"""Local training that several runs have in common, computed once.

What a client trains depends on the global model, its images, the local objective and
the seed; what the server does with class gradients is no part of it. Variants of a
comparison that differ at the server only (number of federated features, weight of the
prototypes, re-training) therefore train the same local models round after round, and so
do FedAvg and CReFF. Where a folder is named, each local model is kept there under a key
of all that it was computed from, and read back instead of being trained again: the same
to the last bit.
"""

import os
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from client_app.training import TrainingLosses
from clip2fl_common.provenance import code_fingerprint

# Set by `clip2fl compare` for its own simulations; no server can set it at a node.
FOLDER_VARIABLE = "CLIP2FL_SHARED_TRAINING"

Trained = tuple[dict[str, np.ndarray[Any, Any]], TrainingLosses]


def train_or_reuse(training: "partial[TrainingLosses]") -> TrainingLosses:
    """Train, or give the model what the same training has once made of it.

    Parameters
    ----------
    training : partial
        `training.train_locally` with all of its arguments, the model first. They are
        the key, with the code, torch's version and its number of threads, on which the
        last bits depend.

    Returns
    -------
    TrainingLosses
        Those of the training, whenever it took place.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return training()
    from joblib import Memory, hash  # part of the clip2fl command, as this is

    key = hash(
        [
            code_fingerprint(),
            torch.__version__,
            torch.get_num_threads(),
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
    """Return a value in types whose hash depends on their content alone."""
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
