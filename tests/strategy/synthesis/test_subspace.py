"""Coordinates in the span keep inner products, and with them the whole descent."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.class_gradients import ClassGradient, CodedGradient, LowRankGradient
from strategy.synthesis import descent, synthesize
from strategy.synthesis.subspace import SharedRows, Subspace
from tests.strategy import slow_synthesis as slow


@given(
    known=st.integers(1, 5),
    own=st.integers(1, 5),
    spare=st.integers(0, 4),
    classes=st.integers(1, 3),
    repeated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_coordinates_keep_inner_products(
    known: int, own: int, spare: int, classes: int, repeated: bool, seed: int
) -> None:
    """Also where rows are zero, repeated, or shared ones: the span is smaller then."""
    generator = torch.Generator().manual_seed(seed)
    dim = known + own + spare
    shared_rows = torch.randn(known, dim, generator=generator, dtype=torch.float64)
    rows = torch.randn(classes, own, dim, generator=generator, dtype=torch.float64)
    if repeated:
        rows[0] = shared_rows[0]
        rows[-1, -1] = 0
    shared = SharedRows.of(shared_rows)
    subspace = Subspace(shared, rows)
    coordinates = subspace.coordinates
    assert coordinates.shape == (classes, own, known + own)
    torch.testing.assert_close(coordinates @ coordinates.mT, rows @ rows.mT)
    torch.testing.assert_close(
        coordinates[..., :known] @ shared.coordinates.T, rows @ shared_rows.T
    )
    torch.testing.assert_close(subspace.out_of(coordinates), rows)
    mixed = torch.randn(classes, 2, own, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(subspace.out_of(mixed @ coordinates), mixed @ rows)


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_descent_in_coordinates_is_slow_descent(
    monkeypatch: pytest.MonkeyPatch, with_text: bool, rank: int
) -> None:
    """With dense and with low-rank targets, some of them zero."""
    features, dense, weight, bias, text = slow.random_problem(5, 4, 3, 40, {0, 1, 3})
    dense[1] = ClassGradient(torch.zeros_like(weight), dense[1].bias)
    gradients: dict[int, CodedGradient] = dict(dense)
    if rank:
        gradients = {
            c: LowRankGradient(g.weight[:, :rank].clone(), g.weight[:rank], g.bias)
            for c, g in dense.items()
        }
    made = []

    def noted(shared: SharedRows, own: torch.Tensor) -> Subspace:
        made.append(own.shape)
        return Subspace(shared, own)

    monkeypatch.setattr(descent, "Subspace", noted)
    monkeypatch.setattr(descent, "FACTORISATION_COST", 0)
    final = synthesize(
        features,
        gradients,
        weight,
        bias,
        text if with_text else None,
        steps=6,
        learning_rate=0.1,
        contrast_weight=0.5,
        temperature=0.5,
    )
    assert made == [(3, (rank or 4) + 3, 40)]
    expected = features
    for _ in range(6):
        expected = expected - 0.1 * slow.synthesis_gradient(
            expected,
            {c: ClassGradient(g.weight, g.bias) for c, g in gradients.items()},
            weight,
            bias,
            text if with_text else None,
            0.5,
            0.5,
        )
    torch.testing.assert_close(final, expected)


@pytest.mark.parametrize(
    ("num_classes", "steps", "used"),
    # The paper's sizes; few steps; more classes than the features are wide.
    [(10, 100, True), (100, 100, True), (10, 2, False), (200, 100, False)],
)
def test_coordinates_are_used_where_they_save(
    monkeypatch: pytest.MonkeyPatch, num_classes: int, steps: int, used: bool
) -> None:
    """At m = 100 and d = 512, as in the paper."""

    class MadeError(Exception):
        pass

    def refuse(*_: object) -> Subspace:
        raise MadeError

    monkeypatch.setattr(descent, "Subspace", refuse)
    monkeypatch.setattr(
        descent._Descent, "gradient", lambda _, features: torch.zeros_like(features)
    )
    features, gradients, weight, bias, text = slow.random_problem(
        0, num_classes, 100, 512, {0}
    )
    settings: dict[str, Any] = {
        "learning_rate": 0.1,
        "contrast_weight": 0.1,
        "temperature": 0.1,
    }
    if used:
        with pytest.raises(MadeError):
            synthesize(features, gradients, weight, bias, text, steps=steps, **settings)
    else:
        synthesize(features, gradients, weight, bias, text, steps=steps, **settings)
