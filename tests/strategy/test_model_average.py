"""Test the average over rounds against its formula in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from strategy.model_average import ModelAverage

finite = st.floats(-1e3, 1e3, width=32)


@given(
    st.lists(st.tuples(finite, finite), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
)
def test_mean_is_the_weighted_mean_of_all_rounds(
    rounds: list[tuple[float, float]], decay: float
) -> None:
    average = ModelAverage(decay)
    for values in rounds:
        average.add({"a": torch.tensor(values), "other": torch.ones(1)})
    weights = decay ** np.arange(len(rounds) - 1, -1, -1.0)
    expected = weights @ np.array(rounds) / weights.sum()
    found = average.mean("a")[""].double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-2)
    assert average.rounds == len(rounds)


def test_equal_weights_stay_as_they_are() -> None:
    average = ModelAverage(0.8)
    weights = {"w": torch.linspace(-1, 1, 7)}
    for _ in range(3):
        average.add(weights)
    assert torch.equal(average.mean("")["w"], weights["w"])


def test_state_taken_back_goes_on_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    rounds = [{"w": torch.randn(5, generator=generator)} for _ in range(6)]
    whole, first = ModelAverage(0.7), ModelAverage(0.7)
    for weights in rounds:
        whole.add(weights)
    for weights in rounds[:3]:
        first.add(weights)
    second = ModelAverage(0.7)
    second.load_state(first.state())
    for weights in rounds[3:]:
        second.add(weights)
    assert torch.equal(whole.mean("")["w"], second.mean("")["w"])
    assert whole.rounds == second.rounds == 6


def test_module_with_the_mean_is_a_copy_and_keeps_what_is_not_averaged() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module(torch.randn(8, 2))  # counts one batch
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    average = ModelAverage(0.5)
    assert average.applied_to(module, "m.") is module
    average.add({f"m.{n}": torch.zeros_like(t) for n, t in module.named_parameters()})
    averaged = average.applied_to(module, "m.").state_dict()
    for name, tensor in before.items():
        assert torch.equal(module.state_dict()[name], tensor)
        learnt = name.endswith(("weight", "bias"))
        assert torch.equal(
            averaged[name], torch.zeros_like(tensor) if learnt else tensor
        )


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_state_is_empty_only_without_averaging(decay: float) -> None:
    average = ModelAverage(decay)
    assert bool(average.state()) == (decay > 0)
    average.load_state(average.state())
    assert average.rounds == 0
