"""Independent random generators by purpose, round and client, from one seed."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence

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


Noise = Callable[[Sequence[int]], torch.Tensor]
"""Returns standard normal numbers of a shape, in double precision on the CPU."""


def seeded_noise(source: torch.Generator) -> Noise:
    """Return noise that a generator determines, for simulations."""
    return lambda shape: torch.randn(
        tuple(shape), generator=source, dtype=torch.float64
    )


def secret_noise(shape: Sequence[int]) -> torch.Tensor:
    """Return standard normal numbers that nobody can compute again.

    They come from the operating system. torch's generator on a CPU has a seed of 32
    bits, which can be tried out in hours, and its later numbers follow from earlier
    ones.

    Parameters
    ----------
    shape : sequence of int
        Shape of the result.

    Returns
    -------
    Tensor of float64
        On the CPU. The largest possible size is 8.2: a float32 would end at 5.8, beyond
        which a value tells for sure what it was made from.
    """
    number = math.prod(shape)
    # With 53 bits the largest would round to 1, whose quantile is infinite.
    bits = np.frombuffer(os.urandom(8 * number), dtype=np.uint64) >> np.uint64(12)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-52
    normal: torch.Tensor = torch.special.ndtri(torch.from_numpy(uniform))
    return normal.reshape(tuple(shape))
