"""Noise that hides images: normal, and from the operating system alone."""

import os

import pytest
import torch

from clip2fl_common.randomness import secret_noise


def test_noise_is_normal() -> None:
    """Kolmogorov's and Smirnov's distance, of which 1.95 has a chance of 1 in 1,000."""
    number = 100_000
    drawn = secret_noise((number // 2, 2))
    assert drawn.shape == (number // 2, 2) and drawn.dtype == torch.float64
    expected = torch.special.ndtr(drawn.flatten().sort().values)
    steps = torch.arange(number) / number
    assert (expected - steps).abs().max() * number**0.5 < 3
    assert secret_noise(()).shape == () and secret_noise((3, 0)).shape == (3, 0)


@pytest.mark.parametrize("seed", [0, 7])
def test_no_seed_repeats_it(seed: int) -> None:
    torch.manual_seed(seed)
    first = secret_noise((4,))
    torch.manual_seed(seed)
    assert not torch.equal(first, secret_noise((4,)))


def test_each_number_has_random_bytes_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """52 bits of them count; the extremes are finite, and opposite."""
    monkeypatch.setattr(os, "urandom", lambda size: bytes(range(256)) * (size // 256))
    assert len(set(secret_noise((32,)).tolist())) == 32
    ends = []
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr(os, "urandom", lambda size, byte=byte: byte * size)
        ends.append(float(secret_noise((1,))))
    assert ends[0] == pytest.approx(-ends[1], rel=1e-3)
    assert 8.1 < ends[1] < 8.3
