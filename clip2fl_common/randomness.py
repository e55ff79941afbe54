"""One seed for everything: independent generators by purpose, round and client."""

import hashlib
import secrets

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


def generator(
    seed: int, purpose: str, server_round: int = 0, client: int = 0
) -> torch.Generator:
    """Return a CPU generator whose stream depends on its arguments only.

    Parameters
    ----------
    seed : int
        The run's seed.
    purpose : str
        What the numbers are for; any name has streams of its own.
    server_round : int
        Round, from 1; 0 for what is drawn once a run.
    client : int
        Partition number of the client.

    Returns
    -------
    torch.Generator
    """
    sequence = np.random.SeedSequence([seed, _number(purpose), server_round, client])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def _number(purpose: str) -> int:
    if purpose in _PURPOSES:
        return _PURPOSES.index(purpose)
    # 31 bits above the list's places, so that no name meets one of them.
    digest = hashlib.blake2b(purpose.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") | 1 << 31


def secret_generator() -> torch.Generator:
    """Return a CPU generator that nobody who knows the run's seed can repeat."""
    return torch.Generator().manual_seed(secrets.randbits(63))
