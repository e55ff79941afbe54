"""Test that replies of extreme size are dropped, and honest ones are kept."""

from statistics import median_low

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.gradients import class_gradients
from clip2fl_common.class_gradients import ClassGradient
from strategy.outliers import (
    TYPICAL_FEATURES,
    LengthRule,
    ReplySize,
    feature_scale,
    impossible_gradient,
    reply_size,
)
from strategy.robust import Arrays

SENT: Arrays = {"weight": np.full((2, 8), 1.0, np.float32), "running_var": np.ones(4)}


def sizes(*updates: float, images: int = 100) -> dict[int, ReplySize]:
    return {n: ReplySize(images, update, 2.0) for n, update in enumerate(updates)}


def test_length_is_that_of_weights_and_statistics_apart() -> None:
    local = {"weight": SENT["weight"] + 3, "running_var": np.full(4, 5.0)}
    size = reply_size(local, SENT, 7)
    assert size.images == 7 and size.features is None
    assert (size.update, size.statistics) == pytest.approx((12.0, 10.0))


@pytest.mark.parametrize("factor", [1e3, 1e6, 1e12])
def test_one_far_out_is_dropped_among_three(factor: float) -> None:
    rule = LengthRule(10)
    dropped = rule.too_long(sizes(2.0, 2 * factor, 3.0), SENT)
    assert list(dropped) == [1]
    assert "aggregation.max-length-ratio = 10 allows 30 in this round" in dropped[1]


@pytest.mark.parametrize("clients", [1, 2])
def test_without_a_majority_the_model_itself_is_the_measure(clients: int) -> None:
    """The model's norm is 4; neither the long nor the short update judges the other."""
    rule = LengthRule(10)
    long = {0: ReplySize(100, 41.0, 2.0), 1: ReplySize(100, 1e-9, 2.0)}
    found = {c: long[c] for c in range(clients)}
    assert list(rule.too_long(found, SENT)) == [0]
    found[0] = ReplySize(100, 39.0, 2.0)
    assert rule.too_long(found, SENT) == {}


def test_earlier_rounds_stand_in_for_a_majority() -> None:
    rule = LengthRule(10)
    for _ in range(3):
        rule.remember(list(sizes(0.1).values()))
    assert list(rule.too_long(sizes(2.0), SENT)) == [0]
    other = LengthRule(10)
    other.load_state(rule.state())
    assert list(other.too_long(sizes(2.0), SENT)) == [0]
    assert LengthRule(10).too_long(sizes(2.0), SENT) == {}


def test_medians_of_the_last_five_rounds_count() -> None:
    """The lower median of 1 to 5 and the long update is 3; with 50 it would be 4."""
    rule = LengthRule(10)
    for typical in (50.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        rule.remember(list(sizes(typical).values()))
    assert rule.too_long(sizes(29.9), SENT) == {}
    assert list(rule.too_long(sizes(30.1), SENT)) == [0]


def test_more_images_may_move_further_and_a_claim_helps_to_ten_times_at_most() -> None:
    rule = LengthRule(10)
    others = sizes(1.0, 1.0, 1.0, 1.0)
    for images, longest in ((100, 10.0), (2500, 50.0), (10**9, 100.0)):
        below = others | {9: ReplySize(images, longest * 0.999, 2.0)}
        above = others | {9: ReplySize(images, longest * 1.001, 2.0)}
        assert rule.too_long(below, SENT) == {}
        assert list(rule.too_long(above, SENT)) == [9]


def test_statistics_have_a_bound_ten_times_as_wide() -> None:
    """The median of their norms is 2, so the bound is 10 * 10 * 2."""
    for norm, dropped in ((199.9, []), (200.1, [3])):
        found = sizes(1.0, 1.0, 1.0) | {3: ReplySize(100, 1.0, norm)}
        assert list(LengthRule(10).too_long(found, SENT)) == dropped


def test_ratio_of_zero_switches_it_off() -> None:
    assert LengthRule(0).too_long(sizes(1.0, 1.0, 1e12), SENT) == {}


@given(
    honest=st.lists(st.floats(0.5, 4.0), min_size=3, max_size=9),
    hostile=st.lists(st.floats(1e-6, 1e12), max_size=4),
)
def test_a_minority_neither_gets_far_nor_has_honest_ones_dropped(
    honest: list[float], hostile: list[float]
) -> None:
    hostile = hostile[: (len(honest) - 1) // 2]
    found = sizes(*honest, *hostile)
    dropped = LengthRule(10).too_long(found, SENT)
    assert not set(dropped) & set(range(len(honest)))
    used = [size.update for c, size in found.items() if c not in dropped]
    # The median is one of the honest lengths, which are at most 4.
    assert max(used) <= 40
    assert median_low(used) <= 4


@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    clip=st.sampled_from([0.0, 0.1]),
)
def test_gradients_of_any_features_are_possible(
    seed: int, scale: float, clip: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(12, 6, generator=generator)
    labels = torch.randint(0, 3, (12,), generator=generator)
    weight, bias = 3 * torch.randn(3, 6, generator=generator), torch.zeros(3)
    gradients = class_gradients(features, labels, weight, bias, max_norm=clip)
    assert impossible_gradient(gradients) == ""
    assert feature_scale(gradients) <= float(features.norm(dim=1).max()) * (1 + 1e-5)


def test_gradients_that_no_features_have() -> None:
    weight, bias = torch.ones(3, 6), torch.tensor([0.9, -1.8, 0.9])
    reason = impossible_gradient({4: ClassGradient(weight, bias)})
    assert reason.startswith("the bias gradient of class 4 has the norm 2.2")
    assert feature_scale({0: ClassGradient(weight, 0 * bias)}) == np.inf
    assert feature_scale({0: ClassGradient(0 * weight, 0 * bias)}) == 0.0


def test_earlier_rounds_judge_features_where_too_few_clients_send_them() -> None:
    def with_features(*features: float) -> dict[int, ReplySize]:
        return {n: ReplySize(100, 1.0, 2.0, scale) for n, scale in enumerate(features)}

    rule = LengthRule(10)
    assert rule.too_long(with_features(1.0, 1e9), SENT) == {}  # nothing is known
    rule.remember([*with_features(1.0, 1.2).values(), ReplySize(100, 1.0, 2.0)])
    later = LengthRule(10)
    later.load_state(rule.state())
    for one in (rule, later):
        dropped = one.too_long(with_features(11.0, 9.0), SENT)
        assert list(dropped) == [0] and "imply features with" in dropped[0]
    # A checkpoint of an earlier release knows lengths of updates only.
    state = rule.state()
    del state[TYPICAL_FEATURES]
    later.load_state(state)
    assert later.too_long(with_features(11.0, 9.0), SENT) == {}
