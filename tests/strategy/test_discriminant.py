"""The balanced discriminant against direct computations, and what it withstands."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common import messages
from clip2fl_common.class_moments import ClassMoments
from clip2fl_common.config import Scalar
from clip2fl_common.models import build_model
from strategy.discriminant import (
    RIDGE,
    Discriminant,
    balanced_discriminant,
    combined_moments,
    on_features,
)
from strategy.fedlda import FedLDA
from strategy.outliers import impossible_moments
from tests.defaults import run_config
from tests.flower_private import act_as_flower_process
from tests.strategy.messages import (
    client_plan,
    configure,
    global_model,
    made,
    random_model,
    safeguards,
    train_reply,
)

Sample = tuple[torch.Tensor, torch.Tensor]


def sample(seed: int, classes: int = 3, width: int = 4, images: int = 40) -> Sample:
    """Return statistics around class means, and labels with every class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    means = 2 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    spread = torch.randn(images, width, generator=generator, dtype=torch.float64)
    return means[labels] + spread, labels


def moments_of(seed: int, **shape: int) -> ClassMoments:
    return ClassMoments.of(*sample(seed, **shape), shape.get("classes", 3))


def log_densities(statistics: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Return Gaussian log densities [N, C] of one covariance, image by image."""
    z, y = statistics.numpy(), labels.numpy()
    classes = sorted(set(y.tolist()))
    means = [
        np.mean([x for x, c in zip(z, y, strict=True) if c == k], 0) for k in classes
    ]
    within = np.mean(
        [np.outer(x - means[c], x - means[c]) for x, c in zip(z, y, strict=True)], 0
    )
    within = within + RIDGE * np.trace(within) / len(within) * np.eye(len(within))
    inverse = np.linalg.inv(within)
    return np.array([[-0.5 * (x - m) @ inverse @ (x - m) for m in means] for x in z])


def logits(head: tuple[torch.Tensor, torch.Tensor] | None, z: torch.Tensor) -> Any:
    assert head is not None
    return (z @ head[0].T + head[1]).numpy()


@given(seed=st.integers(0, 1000), classes=st.integers(2, 5), width=st.integers(1, 6))
def test_logits_are_gaussian_log_densities_up_to_a_constant_of_the_image(
    seed: int, classes: int, width: int
) -> None:
    z, labels = sample(seed, classes, width)
    found = logits(balanced_discriminant(ClassMoments.of(z, labels, classes)), z)
    expected = log_densities(z, labels)
    difference = found - expected
    np.testing.assert_allclose(
        difference, difference[:, :1].repeat(classes, 1), rtol=1e-6, atol=1e-6
    )


def test_copies_of_one_class_do_not_favour_it() -> None:
    """The spread is the same in all classes, so it does not change either."""
    z, labels = sample(3, images=30)
    means = torch.stack([z[labels == c].mean(0) for c in range(3)])
    spread = (z - means[labels])[labels == 0]
    z = torch.cat([means[c] + spread for c in range(3)])
    labels = torch.arange(3).repeat_interleave(10)
    plain = balanced_discriminant(ClassMoments.of(z, labels, 3))
    copies = torch.cat([z, *[z[labels == 1]] * 20])
    copied = balanced_discriminant(
        ClassMoments.of(copies, torch.cat([labels, torch.ones(200).long()]), 3)
    )
    np.testing.assert_allclose(logits(copied, z), logits(plain, z), atol=1e-8)


@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted),
)
def test_sums_over_clients_are_the_sums_of_all_images(
    seed: int, cuts: list[int]
) -> None:
    z, labels = sample(seed)
    parts = [
        ClassMoments.of(z[a:b], labels[a:b], 3)
        for a, b in zip([0, *cuts], [*cuts, 40], strict=True)
    ]
    summed = combined_moments(parts, run_config().aggregation)
    whole = ClassMoments.of(z, labels, 3)
    for name, tensor in whole.named().items():
        torch.testing.assert_close(summed.named()[name], tensor)


@given(seed=st.integers(0, 1000), wide=st.integers(4, 9))
def test_head_on_features_equals_the_head_on_the_pooled_output(
    seed: int, wide: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    projection, offset, z = normal(wide, 3), normal(wide), normal(20, 3)
    head = normal(5, 3), normal(5)
    found = on_features(head, projection, offset)
    features = z @ projection.T + offset
    scale = float(torch.linalg.cond(projection))
    np.testing.assert_allclose(
        logits(found, features), logits(head, z), atol=1e-10 * scale**2
    )


@pytest.mark.parametrize("dim", [32, 100])  # narrower and wider than the pooled 64
def test_delivered_head_is_the_discriminant_of_the_model_it_is_delivered_with(
    dim: int,
) -> None:
    torch.manual_seed(0)
    model = build_model("resnet8-slim", 3, dim).eval()
    images, labels = torch.randn(60, 3, 32, 32), torch.arange(60) % 3
    with torch.no_grad():
        pooled, features = model.pooled(images), model.features(images)
    statistics = (pooled if dim == 100 else features).double()
    closed = Discriminant(run_config(model__feature_dim=dim), 3)
    closed.moments = ClassMoments.of(statistics, labels, 3)
    head = closed.head(model.state_dict())
    expected = logits(balanced_discriminant(closed.moments), statistics)
    found = head(features).detach().numpy()
    assert (head.in_features, head.out_features) == (dim, 3)
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=0.1)
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.98


def test_class_without_statistics_is_never_predicted() -> None:
    z, labels = sample(1, classes=2)
    head = balanced_discriminant(ClassMoments.of(z, labels, 4))
    far = 1e3 * torch.randn(500, 4, dtype=torch.float64)
    assert head is not None
    assert all(tensor.isfinite().all() for tensor in head)
    assert logits(head, torch.cat([z, far])).argmax(1).max() == 1


def test_model_keeps_its_own_head_until_there_are_statistics() -> None:
    model = build_model("resnet8-slim", 3, 16)
    closed = Discriminant(run_config(model__feature_dim=16), 3)
    for nothing in (
        closed.moments,
        ClassMoments.of(torch.zeros(4, 16), torch.ones(4).long(), 3),
    ):
        closed.moments = nothing
        head = closed.head(model.state_dict())
        assert torch.equal(head.weight, model.classifier.weight)
        assert torch.equal(head.bias, model.classifier.bias)


@given(seed=st.integers(0, 500), images=st.integers(1, 4))
def test_noise_never_makes_an_infinite_head(seed: int, images: int) -> None:
    """Noise larger than the scatter makes negative eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    exact = moments_of(seed, images=3 * images)
    deviations = 0.1, 3.0, 9.0
    noisy = ClassMoments(
        *(
            tensor + s * torch.randn(tensor.shape, generator=generator)
            for tensor, s in zip(exact.named().values(), deviations, strict=True)
        )
    )
    head = balanced_discriminant(noisy, deviations)
    assert head is not None
    assert all(tensor.isfinite().all() and tensor.abs().max() < 1e4 for tensor in head)


def test_noisy_moments_give_the_head_of_a_computation_in_numpy() -> None:
    """Class 3 has fewer images than two deviations of the noise on its count.

    Of the covariance's eigenvalues, one is negative, and one is positive but below the
    spectral radius of the noise on the scatter.
    """
    deviations = 0.6, 1.0, 9.0
    random, width = np.random.default_rng(5), 5
    count, seen = np.array([40.0, 25.0, 9.0, 1.1]), [0, 1, 2]
    total = count[:, None] * random.normal(0, 3, (4, width))
    means = total[seen] / count[seen, None]
    turn = np.linalg.qr(random.normal(size=(width, width)))[0]
    within = turn @ np.diag([3.0, 1.5, 0.7, 0.1, -0.4]) @ turn.T
    lopsided = random.normal(size=(width, width))
    scatter = 74 * within + total[seen].T @ means + lopsided - lopsided.T
    v, u = np.linalg.eigh(within)
    v = np.maximum(v, 9 * np.sqrt(2 * width) / 74)
    assert len(set(v)) == 4  # two of five are raised to the same value
    v = v + 1e-3 * v.mean()
    rows = means @ (u / v) @ u.T
    moments = ClassMoments(*map(torch.from_numpy, (count, total, scatter)))
    head = balanced_discriminant(moments, deviations)
    assert head is not None
    weight, bias = (tensor.numpy() for tensor in head)
    np.testing.assert_allclose(weight[seen], rows, rtol=1e-8)
    np.testing.assert_allclose(bias[seen], -(rows * means).sum(1) / 2, rtol=1e-8)
    np.testing.assert_allclose(weight[3], rows.mean(0), rtol=1e-8)
    np.testing.assert_allclose(bias[3], bias[seen].mean() - 10, rtol=1e-8)
    everywhere = torch.from_numpy(random.normal(0, 100, (1000, width)))
    assert set(logits(head, everywhere).argmax(1)) == {0, 1, 2}
    # At two deviations exactly 1.1 is more than enough.
    lower = balanced_discriminant(moments, (0.5, 1.0, 9.0))
    assert 3 in logits(lower, everywhere).argmax(1)


def test_no_image_has_these_moments() -> None:
    good = moments_of(0)
    assert impossible_moments(good, 40) == ""
    half = ClassMoments(*(tensor / 2.5 for tensor in good.named().values()))
    assert impossible_moments(half, 40) == ""  # counts need not be integers
    assert "count 40 images" in impossible_moments(good, 30)
    skew = good.scatter.clone()
    skew[0, 1] += 1
    none = torch.tensor([0.0, 13.0, 13.0], dtype=torch.float64)
    damaged = {
        "not symmetric": ClassMoments(good.count, good.total, skew),
        "without images": ClassMoments(none, good.total, good.scatter),
        "of its means": ClassMoments(good.count, good.total, good.scatter / 100),
        "a scatter without images": ClassMoments(
            0 * good.count, 0 * good.total, good.scatter
        ),
        "least of a class -": ClassMoments(-good.count, good.total, good.scatter),
    }
    for words, moments in damaged.items():
        assert words in impossible_moments(moments, 40)


@pytest.mark.parametrize("scale", [1.0, 5.0, 100.0, 1e6, 1e12])
@pytest.mark.parametrize("with_images", [True, False])
def test_no_scatter_spoils_the_head_for_the_rounds_to_come(
    scale: float, with_images: bool
) -> None:
    """One client in four spreads features along the differences of the class means."""
    images, labels = sample(0, images=160)
    clients = [ClassMoments.of(images[n::4], labels[n::4], 3) for n in range(4)]
    means = clients[0].total / clients[0].count[:, None]
    along = torch.linalg.qr((means - means.mean(0)).T).Q
    spread = scale * float(clients[3].scatter.trace()) * along @ along.T
    hostile = ClassMoments(
        with_images * clients[3].count,
        with_images * clients[3].total,
        clients[3].scatter + spread,
    )
    strategy = fedlda(head__decay=0.9)
    round_of(strategy, clients)
    round_of(strategy, [*clients[:3], hostile], 2)
    assert strategy.discriminant is not None
    head = balanced_discriminant(strategy.discriminant.moments)
    assert head is not None
    found = (images @ head[0].T + head[1]).argmax(1)
    assert float((found == labels).double().mean()) > 0.9


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_robust_rules_withstand_one_client(rule: str) -> None:
    """Four honest clients with the same data, and one whose features point away."""
    settings: dict[str, Scalar] = {"aggregation__rule": rule, "aggregation__trim": 0.3}
    aggregation = run_config(**settings).aggregation
    honest = moments_of(5)
    liar = ClassMoments(honest.count, -9 * honest.total, 81 * honest.scatter)
    found = combined_moments([honest, liar, honest, honest, honest], aggregation)
    expected = balanced_discriminant(honest)
    for one, other in zip(
        balanced_discriminant(found) or (), expected or (), strict=True
    ):
        torch.testing.assert_close(one, other)


def round_of(
    strategy: FedLDA, clients: list[ClassMoments], server_round: int = 1
) -> None:
    """Run a round with these replies."""
    arrays = global_model()
    declared = strategy.fields[0]
    assert isinstance(declared, messages.ArrayFields)
    replies = []
    for number, request in enumerate(configure(strategy, arrays, server_round)):
        reply = train_reply(request, random_model(arrays, number), 40)
        reply.content[messages.MOMENTS] = declared.encode(clients[number].named())
        replies.append(reply)
    assert strategy.aggregate_train(server_round, replies)[0] is not None


def fedlda(**changes: Scalar) -> FedLDA:
    settings = {"method": "fedlda", **safeguards(), **changes}
    return made(FedLDA, client_plan(4, 4), (3, 4), None, **settings)


@pytest.fixture(autouse=True)
def flower_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be what Flower takes for one of its processes, which messages ask for."""
    act_as_flower_process(monkeypatch.setattr)


def test_earlier_rounds_count_less_and_state_continues_them() -> None:
    strategy = fedlda(head__decay=0.25)
    first, second = ([moments_of(10 * r + i) for i in range(4)] for r in (1, 2))
    round_of(strategy, first)
    again = fedlda(head__decay=0.25)
    again.load_state(strategy.state())
    for one in (strategy, again):
        round_of(one, second, 2)
    assert strategy.discriminant is not None and again.discriminant is not None
    for name in ("count", "total", "scatter"):
        old, new = (
            sum(own.named()[name] for own in clients) for clients in (first, second)
        )
        found = strategy.discriminant.moments.named()[name]
        torch.testing.assert_close(found, 0.25 * old + new, rtol=1e-5, atol=1e-4)
        assert torch.equal(found, again.discriminant.moments.named()[name])


def test_client_with_far_too_long_features_is_left_out(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    strategy = fedlda(head__decay=0.0)
    clients = [moments_of(i) for i in range(4)]
    long = [*clients[:3]]
    liar = ClassMoments(
        clients[3].count, 100 * clients[3].total, 1e4 * clients[3].scatter
    )
    round_of(strategy, [*long, liar])
    assert strategy.discriminant is not None
    assert float(strategy.discriminant.moments.count.sum()) == 3 * 40
    assert any("left out the class moments" in m for m in flower_log.messages)


def test_impossible_reply_is_dropped_and_the_round_goes_on() -> None:
    strategy = fedlda()
    clients = [moments_of(i) for i in range(4)]
    clients[2] = ClassMoments(
        2 * clients[2].count, clients[2].total, clients[2].scatter
    )
    round_of(strategy, clients)
    assert strategy.round.clients == [0, 1, 3]
