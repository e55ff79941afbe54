"""Test fixed-point numbers against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.secure.fixed_point import Ring

RINGS = [Ring(64, 2.0**40), Ring(32, 2.0**7), Ring(32, 2.0**-3)]


@pytest.mark.parametrize("ring", RINGS, ids=str)
@given(data=st.data(), parties=st.integers(1, 1000))
def test_sum_is_exact_up_to_half_a_step_for_each_party(
    ring: Ring, data: st.DataObject, parties: int
) -> None:
    """The extreme values, for which a sum would overflow first, are drawn often."""
    extreme = st.sampled_from([ring.bound, -ring.bound, 0.0])
    within = st.floats(-ring.bound, ring.bound)
    values = data.draw(st.lists(extreme | within, min_size=1, max_size=min(parties, 9)))
    values += [values[0]] * (parties - len(values))
    total = np.zeros(1, ring.dtype)
    for value in values:
        total += ring.encode(np.array([value]), parties)
    found = Fraction(float(ring.decode(total, parties)[0]))
    # A decoded number has the 53 bits of float64.
    rounding = abs(found) / 2**53
    allowed = parties * Fraction(ring.step(parties)) / 2 + rounding
    assert abs(found - sum(map(Fraction, values))) <= allowed


def test_steps_are_those_that_the_page_states() -> None:
    assert Ring(64, 2.0**40).step(3) == 2.0**-21
    assert Ring(64, 2.0**40).step(20) == 2.0**-18
    assert Ring(32, 2.0**7).step(3) == 2.0**-22


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**7 + 1e-4])
def test_value_that_does_not_fit_is_refused(value: float) -> None:
    with pytest.raises(FloatingPointError, match="not finite, or its absolute value"):
        Ring(32, 2.0**7).encode(np.array([0.0, value]), 3)
