"""Independent random generators by purpose, round and client, from one seed."""

import hashlib
import secrets

import numpy as np
import torch

# A purpose's index in this list is part of its random stream: append, never reorder.
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
    """Return a CPU generator whose stream depends only on the arguments.

    Parameters
    ----------
    seed : int
        The run's seed.
    purpose : str
        Purpose of the numbers; each name has its own streams.
    server_round : int
        Round, from 1; 0 for numbers drawn once per run.
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
    # 31 bits, above the list's indices, so that no other name has one of these numbers.
    digest = hashlib.blake2b(purpose.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") | 1 << 31


def secret_generator() -> torch.Generator:
    """Return a CPU generator that the run's seed does not determine."""
    return torch.Generator().manual_seed(secrets.randbits(63))
