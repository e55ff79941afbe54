"""Test the re-training of the classifier against a plain torch loop."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from strategy.retraining import (
    _Recorded,
    new_classifier,
    retrain_classifier,
    retraining_device,
)
from tests.recording import StandInCapture


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator."""
    return torch.Generator().manual_seed(seed)


def slow_retraining(
    features: torch.Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    initial: nn.Linear | None = None,
) -> nn.Linear:
    """Return a classifier trained with torch's own layer, loss and optimiser.

    Re-training for zero epochs returns the initial classifier, and leaves the generator
    where the shuffling starts.
    """
    num_classes, per_class, dim = features.shape
    classifier = retrain_classifier(
        features,
        epochs=0,
        batch_size=batch_size,
        learning_rate=learning_rate,
        generator=generator,
    )
    if initial is not None:
        classifier = copy.deepcopy(initial)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=learning_rate)
    criterion = nn.CrossEntropyLoss()
    samples = features.reshape(-1, dim)
    labels = torch.tensor([c for c in range(num_classes) for _ in range(per_class)])
    for _ in range(epochs):
        order = torch.randperm(len(samples), generator=generator)
        for start in range(0, len(samples), batch_size):
            batch = order[start : start + batch_size]
            optimizer.zero_grad()
            torch.autograd.backward(
                criterion(classifier(samples[batch]), labels[batch])
            )
            optimizer.step()
    return classifier


@pytest.mark.parametrize(
    ("num_classes", "per_class", "dim", "batch_size"),
    # 60 samples in batches of 32 and 28; 40 in batches of 8; 15 in one; 9 one by one.
    [(10, 6, 512, 32), (4, 10, 16, 8), (3, 5, 7, 100), (3, 3, 4, 1)],
)
@pytest.mark.parametrize("warm", [False, True])
def test_equals_a_plain_loop(
    num_classes: int, per_class: int, dim: int, batch_size: int, warm: bool
) -> None:
    """The same initial weights and batches give the same classifier."""
    features = torch.randn(num_classes, per_class, dim, generator=seeded(0))
    before = features.clone()
    initial = nn.Linear(dim, num_classes) if warm else None
    initial_state = copy.deepcopy(initial.state_dict()) if initial else {}
    result = retrain_classifier(
        features,
        epochs=10,
        batch_size=batch_size,
        learning_rate=0.05,
        generator=seeded(3),
        initial=initial,
    )
    expected = slow_retraining(features, 10, batch_size, 0.05, seeded(3), initial)
    torch.testing.assert_close(result.weight, expected.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.bias, expected.bias, atol=1e-5, rtol=0)
    assert torch.equal(features, before)
    for name, value in initial_state.items():
        assert initial is not None and torch.equal(initial.state_dict()[name], value)


def test_the_generator_decides() -> None:
    """The same seed gives identical classifiers; torch's global state is not used."""
    features = torch.randn(3, 5, 4, generator=seeded(0))
    results = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(global_seed)
        state = torch.random.get_rng_state()
        results.append(
            retrain_classifier(
                features,
                epochs=2,
                batch_size=4,
                learning_rate=0.1,
                generator=seeded(seed),
            )
        )
        assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(results[0].weight, results[1].weight)
    assert torch.equal(results[0].bias, results[1].bias)
    assert not torch.equal(results[0].weight, results[2].weight)


def test_shapes() -> None:
    """The result is a linear layer from d features to C classes, trainable further."""
    classifier = retrain_classifier(
        torch.zeros(5, 2, 3),
        epochs=1,
        batch_size=4,
        learning_rate=0.1,
        generator=seeded(0),
    )
    assert isinstance(classifier, nn.Linear)
    assert classifier.weight.shape == (5, 3)
    assert classifier.bias.shape == (5,)
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_initial_values_are_those_of_a_linear_layer() -> None:
    """Uniform in +-1/sqrt(d), as nn.Linear draws them."""
    classifier = retrain_classifier(
        torch.zeros(100, 1, 400),
        epochs=0,
        batch_size=1,
        learning_rate=0.1,
        generator=seeded(0),
    )
    torch.manual_seed(0)
    expected = nn.Linear(400, 100)
    for own, theirs in (
        (classifier.weight, expected.weight),
        (classifier.bias, expected.bias),
    ):
        assert own.abs().max() <= 1 / 20
        assert own.abs().max() > 0.9 / 20
        assert own.std().item() == pytest.approx(theirs.std().item(), rel=0.2)
    assert abs(classifier.weight.mean().item()) < 1e-3


def test_classes_without_features_are_trained_against() -> None:
    """Equal to a plain loop over the features of some classes, and all C outputs."""
    features = torch.randn(2, 6, 4, generator=seeded(0))
    classes = torch.tensor([3, 1])
    result = retrain_classifier(
        features,
        epochs=10,
        batch_size=5,
        learning_rate=0.1,
        generator=seeded(3),
        classes=classes,
        num_classes=5,
    )
    plain_generator = seeded(3)
    expected = new_classifier(4, 5, plain_generator)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    labels = classes.repeat_interleave(6)
    for _ in range(10):
        for batch in torch.randperm(12, generator=plain_generator).split(5):
            loss = nn.functional.cross_entropy(
                expected(features.flatten(0, 1)[batch]), labels[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert result.weight.shape == (5, 4)
    torch.testing.assert_close(result.weight, expected.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.bias, expected.bias, atol=1e-5, rtol=0)


def test_learns_separable_features() -> None:
    """Features around distinct corners are classified without error."""
    noise = 0.1 * torch.randn(6, 20, 8, generator=seeded(1))
    features = noise + torch.eye(8)[:6, None, :]
    classifier = retrain_classifier(
        features,
        epochs=200,
        batch_size=32,
        learning_rate=0.1,
        generator=seeded(0),
    )
    predictions = classifier(features).argmax(dim=2)
    assert torch.equal(predictions, torch.arange(6)[:, None].expand(6, 20))


@pytest.mark.parametrize(
    ("num_classes", "per_class", "batch_size"),
    # 60 samples: in one recording with a last batch of 28; in two of four batches of 5
    # and a rest of four; in batches of one.
    [(10, 6, 32), (10, 6, 5), (3, 3, 1)],
)
def test_recorded_steps_equal_direct_ones(
    num_classes: int,
    per_class: int,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in a second call, which records nothing. Sums may be rounded otherwise."""
    monkeypatch.setattr("strategy.retraining.STEPS_AT_ONCE", 4)
    capture = StandInCapture()
    recordings = []
    for seed in range(2):
        features = torch.randn(num_classes, per_class, 16, generator=seeded(seed))
        initial = nn.Linear(16, num_classes) if seed else None
        results = [
            retrain_classifier(
                features,
                epochs=3,
                batch_size=batch_size,
                learning_rate=0.05,
                generator=seeded(3),
                initial=initial,
                capture=how,
            )
            for how in (capture, None)
        ]
        for one, other in zip(
            results[0].parameters(), results[1].parameters(), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        recordings.append(capture.recordings)
    assert recordings[0] == recordings[1] > 0


def test_recorded_steps_know_the_classes_that_have_features() -> None:
    """Features of classes 4 and 1 of 5."""
    features = torch.randn(2, 6, 8, generator=seeded(0))
    results = [
        retrain_classifier(
            features,
            epochs=2,
            batch_size=4,
            learning_rate=0.05,
            generator=seeded(3),
            classes=torch.tensor([4, 1]),
            num_classes=5,
            capture=how,
        )
        for how in (StandInCapture(), None)
    ]
    torch.testing.assert_close(results[0].weight, results[1].weight)


def test_recording_ends_with_its_last_user() -> None:
    """A GPU's memory must not wait for Python's collector of cycles."""
    recorded = _Recorded(torch.ones(4, 3), torch.ones(2, 3), 2, 0.1, StandInCapture())
    recorded.run_epoch(torch.arange(4), torch.tensor([0, 0, 1, 1]))
    gone = weakref.ref(recorded)
    gc.disable()
    try:
        del recorded
        assert gone() is None
    finally:
        gc.enable()


def test_device_follows_from_the_size() -> None:
    """The published settings go to the GPU, a demo's few small steps to the CPU."""
    gpu, cpu = torch.device("cuda:1"), torch.device("cpu")

    def chosen(num_classes: int, per_class: int, epochs: int, dim: int) -> torch.device:
        steps = epochs * -(-num_classes * per_class // 32)
        return retraining_device(gpu, steps, 32 * dim * num_classes)

    assert [chosen(c, 100, 300, 512) for c in (10, 100, 1000)] == [gpu] * 3
    assert chosen(10, 20, 30, 64) == cpu
    assert chosen(10, 100, 0, 512) == cpu
    # More work never goes back to the CPU.
    steps = [retraining_device(gpu, 2**n, 164_000) == gpu for n in range(20)]
    sizes = [retraining_device(gpu, 2000, 2**n) == gpu for n in range(30)]
    for places in (steps, sizes):
        assert places == sorted(places) and len(set(places)) == 2
    assert retraining_device(cpu, 10**6, 10**9) == cpu
