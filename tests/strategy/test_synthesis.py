"""Test the synthesis of federated features against the reference and slow versions."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from clip2fl_common.class_gradients import ClassGradient, CodedGradient, LowRankGradient
from strategy.synthesis import (
    Objective,
    class_chunks,
    descent,
    gradient_matching_loss,
    losses,
    mean_class_gradients,
    prototype_contrastive_loss,
    synthesis_gradient,
    synthesize,
)
from strategy.synthesis.descent import recording_pays
from strategy.synthesis.target import GradientTarget
from tests import reference
from tests.recording import StandInCapture
from tests.strategy import slow_synthesis as slow
from tests.strategy.slow_synthesis import Problem, random_problem


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw a problem of any small shape; some of the classes are held."""
    num_classes = draw(st.integers(2, 5))
    held = draw(st.sets(st.integers(0, num_classes - 1), min_size=1))
    return random_problem(
        draw(st.integers(0, 1000)),
        num_classes,
        draw(st.integers(1, 4)),
        draw(st.integers(2, 6)),
        held,
    )


def test_contrastive_loss_equals_the_reference() -> None:
    """Value and derivative match the released code's, from its [50, 50] matrices."""
    features = reference.tensor("losses/V").reshape(10, 5, 512).requires_grad_()
    text = reference.tensor("losses/text")
    loss = prototype_contrastive_loss(features, text, 0.1)
    assert loss.shape == ()
    reference.assert_close(loss, reference.tensor("losses/contrast"))
    (gradient,) = torch.autograd.grad(loss, features)
    expected = reference.tensor("losses/contrast_grad").reshape(10, 5, 512)
    reference.assert_close(gradient, expected)


@given(problem=problems(), temperature=st.floats(0.1, 2.0))
def test_contrastive_loss_equals_the_slow_version(
    problem: Problem, temperature: float
) -> None:
    """Includes one feature per class: its own class then has no other column."""
    features, _, _, _, text = problem
    torch.testing.assert_close(
        prototype_contrastive_loss(features, text, temperature),
        slow.contrastive_loss(features, text, temperature),
    )


def test_contrastive_loss_of_large_features_is_finite() -> None:
    """exp(100 * v.t / 0.1) overflows; the loss then is the largest difference."""
    features, _, _, _, text = random_problem(0, 4, 3, 8, set())
    large = (100 * features).float().requires_grad_()
    loss = prototype_contrastive_loss(large, text.float(), 0.1)
    (gradient,) = torch.autograd.grad(loss, large)
    assert torch.isfinite(gradient).all()
    # In the limit the log of a sum is its largest term. The sum includes the feature's
    # own prototype.
    logits = 100 * features @ text.T / 0.1
    own = torch.stack([logits[c, :, c] for c in range(4)])
    expected = (logits.amax(dim=2) - own).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=2)


@given(problem=problems())
def test_matching_loss_equals_the_slow_version(problem: Problem) -> None:
    """Rows are summed, the bias takes part, classes without a gradient do not."""
    features, gradients, weight, bias, _ = problem
    torch.testing.assert_close(
        gradient_matching_loss(features, gradients, weight, bias),
        slow.matching_loss(features, gradients, weight, bias).detach(),
    )


@given(problem=problems(), contrast_weight=st.sampled_from([0.0, 0.001, 0.5]))
def test_derivative_equals_automatic_differentiation(
    problem: Problem, contrast_weight: float
) -> None:
    """The closed form matches the derivative of the slow objective."""
    features, gradients, weight, bias, text = problem
    for texts in (text, None):
        objective = Objective(weight, bias, texts, contrast_weight, 0.5)
        expected = slow.synthesis_gradient(
            features, gradients, weight, bias, texts, contrast_weight, 0.5
        )
        held = list(gradients)
        torch.testing.assert_close(
            synthesis_gradient(
                features[held],
                held,
                GradientTarget.stack(gradients, held, features),
                objective,
            ),
            expected[held],
        )
        absent = [c for c in range(len(features)) if c not in gradients]
        torch.testing.assert_close(
            synthesis_gradient(features[absent], absent, None, objective),
            expected[absent],
        )


@given(
    num_classes=st.integers(2, 12),
    per_class=st.integers(1, 3),
    dim=st.integers(2, 12),
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    cheaper=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_derivative_is_the_same_by_rows_and_by_products(
    num_classes: int,
    per_class: int,
    dim: int,
    ranks: list[int],
    cheaper: bool,
    seed: int,
) -> None:
    """Both ways agree, for dense (rank 0) and low-rank targets."""
    held = list(range(num_classes))[: len(ranks)]
    features, dense, weight, bias, text = random_problem(
        seed, num_classes, per_class, dim, set(held)
    )
    generator = torch.Generator().manual_seed(seed)
    gradients: dict[int, CodedGradient] = {}
    for c, rank in zip(held, ranks, strict=False):
        left = torch.randn(num_classes, rank, generator=generator, dtype=torch.float64)
        right = torch.randn(rank, dim, generator=generator, dtype=torch.float64)
        gradients[c] = LowRankGradient(left, right, dense[c].bias) if rank else dense[c]
    expected = slow.synthesis_gradient(
        features,
        {c: ClassGradient(g.weight, g.bias) for c, g in gradients.items()},
        weight,
        bias,
        text,
        0.5,
        0.5,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            descent,
            "_products_pay",
            lambda *_: cheaper and 0 not in ranks[: len(held)],
        )
        derivative = synthesis_gradient(
            features[held],
            held,
            GradientTarget.stack(gradients, held, features),
            Objective(weight, bias, text, 0.5, 0.5),
        )
    torch.testing.assert_close(derivative, expected[held])


def test_many_classes_in_single_precision() -> None:
    """From inner products, a row's norm is exact within 1e-5."""
    num_classes, per_class, dim = 300, 20, 64
    features, dense, weight, bias, text = random_problem(
        0, num_classes, per_class, dim, {0, 1}
    )
    gradients = {
        c: LowRankGradient(g.weight[:, :3], dense[0].weight[:3], g.bias)
        for c, g in dense.items()
    }
    results = []
    for dtype in (torch.float64, torch.float32):
        like = features.to(dtype)
        target = GradientTarget.stack(gradients, [0, 1], like)
        assert descent._products_pay(per_class, num_classes, dim, target)
        objective = Objective(
            weight.to(dtype), bias.to(dtype), text.to(dtype), 0.001, 0.1
        )
        results.append(synthesis_gradient(like[:2], [0, 1], target, objective).double())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)


def test_products_are_chosen_where_they_take_fewer_multiplications() -> None:
    """By hand: rows need 6 m C d, products 4 m (m + r) (C + d), for low rank only."""
    for num_classes, per_class, dim, rank in (
        (10, 100, 512, 0),
        (100, 100, 512, 0),
        (100, 100, 512, 20),
        (50, 100, 512, 20),
        (1000, 100, 512, 0),
        (1000, 100, 512, 400),
        (1000, 100, 512, 410),
        (1000, 100, 512, 20),
    ):
        rows = 6 * per_class * num_classes * dim
        products = 4 * per_class * (per_class + rank) * (num_classes + dim)
        target = GradientTarget(
            torch.empty(1, num_classes, rank or dim),
            torch.empty(1, rank, dim) if rank else None,
            torch.empty(1, num_classes),
        )
        chosen = descent._products_pay(per_class, num_classes, dim, target)
        assert chosen == (rank > 0 and products < rows)


def test_derivative_is_finite_at_zero_gradients() -> None:
    """A zero gradient, synthetic or real, has no direction; it must not give NaN."""
    features, gradients, weight, bias, _ = random_problem(0, 3, 2, 4, {0, 1, 2})
    gradients[0] = ClassGradient(torch.zeros_like(weight), torch.zeros_like(bias))
    features[1] = 0
    derivative = synthesis_gradient(
        features,
        [0, 1, 2],
        GradientTarget.stack(gradients, [0, 1, 2], features),
        Objective(weight, bias, None, 0.0, 0.1),
    )
    assert torch.isfinite(derivative).all()
    assert torch.equal(derivative[0], torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("prefix", list(reference.synthesis_cases()))
def test_synthesis_equals_the_reference(prefix: str) -> None:
    """From the same start, the features match the released code's after all steps."""
    case = reference.synthesis_cases()[prefix]
    shape = (case["num_classes"], case["features_per_class"], case["dim"])
    replies = [reference.class_gradients(f"{prefix}/client{k}") for k in range(3)]
    start = reference.tensor(f"{prefix}/init").reshape(shape)
    before = start.clone()
    final = synthesize(
        start,
        mean_class_gradients(replies),
        reference.tensor(f"{prefix}/W"),
        reference.tensor(f"{prefix}/b"),
        reference.tensor(f"{prefix}/text"),
        steps=case["steps"],
        learning_rate=case["lr"],
        contrast_weight=case["contrast_alpha"],
        temperature=case["temperature"],
    )
    expected = reference.tensor(f"{prefix}/final").reshape(shape)
    assert torch.equal(start, before)
    assert (start - expected).abs().max() > 100 * reference.TOLERANCE
    reference.assert_close(final, expected)


@pytest.mark.parametrize("contrast_weight", [0.0, 0.5])
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("held", [set(), {0, 2}])
def test_synthesis_equals_slow_descent(
    contrast_weight: float, with_text: bool, held: set[int]
) -> None:
    """Only the contrastive term, if any, moves a class without a gradient."""
    features, gradients, weight, bias, text = random_problem(3, 4, 3, 5, held)
    texts = text if with_text else None
    final = synthesize(
        features,
        gradients,
        weight,
        bias,
        texts,
        steps=4,
        learning_rate=0.1,
        contrast_weight=contrast_weight,
        temperature=0.5,
    )
    expected = features
    for _ in range(4):
        expected = expected - 0.1 * slow.synthesis_gradient(
            expected, gradients, weight, bias, texts, contrast_weight, 0.5
        )
    torch.testing.assert_close(final, expected)
    moved = [not torch.equal(final[c], features[c]) for c in range(4)]
    contrast = with_text and contrast_weight > 0
    assert moved == [contrast or c in held for c in range(4)]


def test_synthesis_without_steps_returns_the_features() -> None:
    """The features do not move, and the result is a copy."""
    features, gradients, weight, bias, text = random_problem(0, 3, 2, 4, {1})
    settings: dict[str, Any] = {
        "learning_rate": 0.1,
        "contrast_weight": 0.1,
        "temperature": 0.1,
    }
    final = synthesize(features, gradients, weight, bias, text, steps=0, **settings)
    assert torch.equal(final, features)
    assert final.data_ptr() != features.data_ptr()


class LargestTensor(TorchFunctionMode):
    """Record the number of elements of the largest tensor that an operation makes."""

    largest = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and measure its result."""
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, torch.Tensor):
                self.largest = max(self.largest, output.numel())
        return result


@pytest.mark.parametrize(
    ("num_classes", "per_class"),
    # C*m = 2,000; then 50,000, where a [C*m, C*m] matrix of float32 takes 10 GB.
    [(20, 100), (100, 500)],
)
def test_memory_does_not_grow_with_the_square(
    monkeypatch: pytest.MonkeyPatch, num_classes: int, per_class: int
) -> None:
    """The largest tensor holds all features, or a few classes' logits."""
    # Torch's function mode sees only one thread.
    monkeypatch.setattr(
        descent, "map_pieces", lambda function, pieces, _: map(function, pieces)
    )
    problem = random_problem(0, num_classes, per_class, 8, set(range(num_classes)))
    features, gradients, weight, bias, text = problem
    with LargestTensor() as used:
        prototype_contrastive_loss(features, text, 0.1)
        synthesize(
            *problem, steps=1, learning_rate=0.1, contrast_weight=0.1, temperature=0.1
        )
    logits_of_a_chunk = 2 * num_classes * per_class * losses.CPU_CHUNK_CLASSES
    assert 0 < used.largest <= max(features.numel(), logits_of_a_chunk)


@pytest.mark.parametrize("threads", [2, 5])
def test_result_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    features, gradients, weight, bias, text = random_problem(
        0, 12, 3, 8, set(range(11))
    )
    settings: dict[str, Any] = {
        "learning_rate": 0.1,
        "contrast_weight": 0.1,
        "temperature": 0.1,
    }
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            results.append(
                synthesize(features, gradients, weight, bias, text, steps=3, **settings)
            )
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


def test_chunks_hold_every_class_once_within_the_budget() -> None:
    """A chunk has ten classes of small gradients, two of 2 MiB, or one larger one."""
    cpu = torch.device("cpu")
    classes = [3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97, 93, 23]
    for num_classes, size in ((10, 10), (1024, 2), (100_000, 1)):
        chunks = class_chunks(classes, num_classes, 512, cpu)
        assert [c for chunk in chunks for c in chunk] == classes
        assert max(map(len, chunks)) == size
    assert class_chunks([], 10, 512, cpu) == []


def test_mean_over_the_clients_that_hold_the_class() -> None:
    """The mean has no weights, and no entry for a class that no client holds."""

    def gradient(value: float) -> ClassGradient:
        return ClassGradient(torch.full((3, 2), value), torch.full((3,), -value))

    replies = [{2: gradient(1.0)}, {0: gradient(5.0), 2: gradient(4.0)}, {}]
    # An iterator, since replies need not be in memory at the same time.
    mean = mean_class_gradients(iter(replies))
    assert list(mean) == [0, 2]
    for c, value in ((0, 5.0), (2, 2.5)):
        torch.testing.assert_close(mean[c].weight, torch.full((3, 2), value))
        torch.testing.assert_close(mean[c].bias, torch.full((3,), -value))
    assert torch.equal(replies[0][2].weight, torch.ones(3, 2))
    assert mean_class_gradients([]) == {}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let one piece of work follow the other, as on a GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("contrast", [0.0, 0.01])
def test_recorded_steps_equal_direct_ones(low_rank: bool, contrast: float) -> None:
    """In rounds with other classes, ranks, classifiers and steps; some are recorded."""
    capture = StandInCapture()
    num_classes, per_class, dim = 9, 3, 7
    seen = []
    for place, held in enumerate(((0, 1, 2, 5, 8), (0, 1, 3, 4, 6, 7), (2, 3))):
        drawing = torch.Generator().manual_seed(place)

        def normal(*shape: int, drawing: torch.Generator = drawing) -> torch.Tensor:
            return torch.randn(*shape, generator=drawing)

        gradients: dict[int, CodedGradient] = {
            c: LowRankGradient(
                normal(num_classes, 1 + c % 3), normal(1 + c % 3, dim), normal(9)
            )
            if low_rank
            else ClassGradient(normal(num_classes, dim), normal(num_classes))
            for c in held
        }
        features = normal(num_classes, per_class, dim)
        weight, bias = normal(num_classes, dim), normal(num_classes)
        text = torch.nn.functional.normalize(normal(num_classes, dim), dim=1)
        before = [tensor.clone() for tensor in (features, weight, bias, text)]
        results = [
            synthesize(
                features,
                gradients,
                weight,
                bias,
                text,
                steps=4,
                learning_rate=0.1 / (1 + place),
                contrast_weight=contrast,
                temperature=0.1,
                capture=how,
            )
            for how in (capture, None)
        ]
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
        assert not torch.equal(results[0], features)
        # What a round was given is never written to, in no later round either.
        seen += [*zip((features, weight, bias, text), before, strict=True)]
    assert all(torch.equal(tensor, first) for tensor, first in seen)
    # 5 and 6 held classes are padded to 6, 4 and 3 absent ones to 4.
    assert capture.recordings == 4
    assert capture.replays == 3 * 2 * 4


def test_many_small_steps_are_recorded() -> None:
    """The published 100 steps at C = 10 and 100 are, large or few steps are not."""
    assert recording_pays(100, 10, 512, 10)
    assert recording_pays(100, 100, 512, 100)
    assert not recording_pays(100, 1000, 512, 524)
    assert not recording_pays(5, 10, 512, 10)
