"""One seed for everything: independent generators by purpose, round and client."""

import secrets
from typing import Literal

import numpy as np
import torch

# A purpose's place in this list is part of its random stream: append, never reorder.
_PURPOSES = (
    "model",
    "sampling",
    "batches",
    "augmentation",
    "features",
    "retraining",
    "classifier",
    "evaluation",
    "privacy",
)
Purpose = Literal[
    "model",
    "sampling",
    "batches",
    "augmentation",
    "features",
    "retraining",
    "classifier",
    "evaluation",
    "privacy",
]


def generator(
    seed: int, purpose: Purpose, server_round: int = 0, client: int = 0
) -> torch.Generator:
    """Return a CPU generator whose stream depends on its arguments only.

    Parameters
    ----------
    seed : int
        The run's seed.
    purpose : str
        What the numbers are for.
    server_round : int
        Round, from 1; 0 for what is drawn once a run.
    client : int
        Partition number of the client.

    Returns
    -------
    torch.Generator
    """
    sequence = np.random.SeedSequence(
        [seed, _PURPOSES.index(purpose), server_round, client]
    )
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def secret_generator() -> torch.Generator:
    """Return a CPU generator that nobody who knows the run's seed can repeat."""
    return torch.Generator().manual_seed(secrets.randbits(63))
