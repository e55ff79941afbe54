"""Test local training against plain loops, and distillation against the reference."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from client_app.augmentation import random_crop_flip, siamese_augment
from client_app.gradients import class_gradients
from client_app.optimizers import PLAIN_SGD, OptimizerSettings
from client_app.training import (
    LocalObjective,
    PixelImages,
    augmented_features,
    distillation_loss,
    logit_offsets,
    train_locally,
)
from clip2fl_common.models import ImageClassifier, build_model
from tests import reference
from tests.client_app.torch_optimizers import expected_steps


def slow_distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> float:
    """Return the mean over samples of the sum over classes of T^2 p (log p - log q)."""

    def softmax(logits: list[float]) -> list[float]:
        largest = max(logits)
        powers = [math.exp((value - largest) / temperature) for value in logits]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        q, p = softmax(student_row.tolist()), softmax(teacher_row.tolist())
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def random_logits(seed: int, samples: int, classes: int) -> torch.Tensor:
    """Return logits in float64."""
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)


def test_distillation_equals_the_reference() -> None:
    """The released code's value at T = 3."""
    loss = distillation_loss(
        reference.tensor("losses/student"), reference.tensor("losses/teacher"), 3.0
    )
    assert loss.shape == ()
    reference.assert_close(loss, reference.tensor("losses/kd"))


@given(
    seed=st.integers(0, 1000),
    samples=st.integers(1, 6),
    classes=st.integers(2, 6),
    temperature=st.floats(0.5, 10.0),
)
def test_distillation_equals_the_slow_version(
    seed: int, samples: int, classes: int, temperature: float
) -> None:
    """Holds for every shape and temperature; the loss is never negative."""
    student = random_logits(seed, samples, classes)
    teacher = random_logits(seed + 1, samples, classes)
    loss = distillation_loss(student, teacher, temperature).item()
    expected = slow_distillation_loss(student, teacher, temperature)
    assert loss == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert loss >= 0


def test_distillation_of_equal_logits_is_zero() -> None:
    """The gradient is zero too; constants per sample do not count."""
    teacher = random_logits(0, 5, 4)
    student = (teacher + torch.arange(5)[:, None]).requires_grad_()
    loss = distillation_loss(student, teacher, 3.0)
    torch.autograd.backward(loss)
    assert abs(loss.item()) < 1e-12
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


def test_distillation_scales_with_the_square_of_the_temperature() -> None:
    """Logits and temperature T times as large give T^2 times the loss."""
    student, teacher = random_logits(0, 5, 4), random_logits(1, 5, 4)
    for temperature in (0.5, 3.0, 10.0):
        scaled = distillation_loss(
            temperature * student, temperature * teacher, temperature
        )
        plain = distillation_loss(student, teacher, 1.0)
        torch.testing.assert_close(scaled, temperature**2 * plain)


def test_distillation_survives_certain_teachers() -> None:
    """CLIP's logits reach 100 x cosine: probabilities underflow, the loss does not."""
    teacher = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    student = torch.zeros(2, 2, requires_grad=True)
    loss = distillation_loss(student, teacher, 1.0)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def small_problem() -> tuple[ImageClassifier, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a small network, 10 images, labels and teacher logits."""
    torch.manual_seed(0)
    model = build_model("resnet8-slim", num_classes=3, feature_dim=16)
    images = torch.randn(10, 3, 16, 16)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 0])
    return model, images, labels, 5 * torch.randn(10, 3)


def test_offsets_are_logs_of_the_clients_own_shares() -> None:
    """Six, three and one of ten images; the class without images has -infinity."""
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    offsets = logit_offsets(labels, 4, 2.0)
    expected = [2 * math.log(0.6), 2 * math.log(0.3), -math.inf, 2 * math.log(0.1)]
    assert offsets.tolist() == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 1000), strength=st.floats(0.1, 3.0))
def test_adjusted_loss_is_the_pairwise_form(seed: int, strength: float) -> None:
    """Menon et al., Eq. 11: log(1 + sum over others of (pi_k/pi_y)^tau e^(f_k-f_y))."""
    logits = random_logits(seed, 10, 3)
    counts = [6, 3, 1]
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    offsets = logit_offsets(labels, 3, strength).double()
    loss = functional.cross_entropy(logits + offsets, labels).item()
    slow = 0.0
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        others = sum(
            (counts[k] / counts[y]) ** strength * math.exp(row[k] - row[y])
            for k in range(3)
            if k != y
        )
        slow += math.log(1 + others) / 10
    assert loss == pytest.approx(slow, rel=1e-5)


OPTIMIZERS = (
    PLAIN_SGD,
    OptimizerSettings("momentum", 0.7),
    OptimizerSettings("adam", 0.8),
    OptimizerSettings("muon", 0.6, other_learning_rate=0.03),
)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: settings.name)
def test_classes_that_a_client_lacks_are_left_alone(
    optimizer: OptimizerSettings,
) -> None:
    """The classifier's rows of these classes do not move; the others are trained."""
    model, images, labels, _ = small_problem()
    labels = labels.clamp(max=1)
    before = copy.deepcopy(model.classifier)
    train_locally(
        model,
        images,
        labels,
        None,
        LocalObjective(),
        epochs=2,
        batch_size=4,
        learning_rate=0.05,
        crop_padding=0,
        generator=torch.Generator().manual_seed(5),
        offsets=logit_offsets(labels, 3, 1.0),
        optimizer=optimizer,
    )
    moved = (model.classifier.weight != before.weight).any(dim=1)
    assert moved.tolist() == [True, True, False]
    assert (model.classifier.bias != before.bias).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("alpha", "mu", "tau"),
    [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.5, 0.3, 0.0), (0.5, 0.0, 1.5)],
)
def test_training_equals_a_plain_loop(alpha: float, mu: float, tau: float) -> None:
    """CE + alpha * distillation + mu/2 * squared distance, by plain SGD.

    With tau, the cross-entropy alone sees logits + tau * log(class share).
    """
    model, images, labels, teacher = small_problem()
    shares = torch.tensor([0.5, 0.3, 0.2])  # of small_problem's ten labels
    slow = copy.deepcopy(model)
    start = copy.deepcopy(model)
    losses = train_locally(
        model.eval(),
        images,
        labels,
        teacher if alpha else None,
        LocalObjective(alpha, 3.0, mu),
        epochs=2,
        batch_size=4,
        learning_rate=0.05,
        crop_padding=2,
        generator=torch.Generator().manual_seed(5),
        offsets=logit_offsets(labels, 3, tau) if tau else None,
    )

    generator = torch.Generator().manual_seed(5)
    slow.train()
    for _ in range(2):
        totals = []
        for batch in torch.split(torch.randperm(10, generator=generator), 4):
            logits = slow(random_crop_flip(images[batch], 2, generator))
            adjusted = logits + tau * shares.log()
            loss = functional.cross_entropy(adjusted, labels[batch])
            soft = functional.softmax(teacher[batch] / 3, dim=1)
            log_student = functional.log_softmax(logits / 3, dim=1)
            divergence = (soft * (soft.log() - log_student)).sum(1).mean()
            loss = loss + alpha * 9 * divergence
            for now, then in zip(slow.parameters(), start.parameters(), strict=True):
                loss = loss + mu / 2 * ((now - then.detach()) ** 2).sum()
            parameters = list(slow.parameters())
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(0.05 * gradient)
            totals.append(loss.item() * len(batch))
    expected = slow.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)
    assert losses.total == pytest.approx(sum(totals) / 10, abs=1e-5)


@pytest.mark.parametrize(
    ("alpha", "mu", "hard"), [(0.5, 0.3, 1.0), (0.5, 0.0, 0.2), (1.0, 0.0, 0.0)]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: settings.name)
def test_training_with_an_optimizer_equals_a_plain_loop(
    optimizer: OptimizerSettings,
    alpha: float,
    mu: float,
    hard: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hard * CE + alpha * distillation + mu/2 * squared distance, by torch's steps."""
    monkeypatch.setattr(torch, "bfloat16", torch.float64)
    model, images, labels, teacher = small_problem()
    model, images, teacher = model.double(), images.double(), teacher.double()
    slow = copy.deepcopy(model)
    start = copy.deepcopy(model)
    losses = train_locally(
        model,
        images,
        labels,
        teacher,
        LocalObjective(alpha, 3.0, mu, hard),
        epochs=2,
        batch_size=4,
        learning_rate=0.01,
        crop_padding=2,
        generator=torch.Generator().manual_seed(5),
        optimizer=optimizer,
    )

    generator = torch.Generator().manual_seed(5)
    step = expected_steps(optimizer, slow.train(), 0.01)
    for _ in range(2):
        totals = []
        for batch in torch.split(torch.randperm(10, generator=generator), 4):
            logits = slow(random_crop_flip(images[batch], 2, generator))
            soft = functional.softmax(teacher[batch] / 3, dim=1)
            log_student = functional.log_softmax(logits / 3, dim=1)
            divergence = (soft * (soft.log() - log_student)).sum(1).mean()
            loss = hard * functional.cross_entropy(logits, labels[batch])
            loss = loss + alpha * 9 * divergence
            for now, then in zip(slow.parameters(), start.parameters(), strict=True):
                loss = loss + mu / 2 * ((now - then.detach()) ** 2).sum()
            slow.zero_grad()
            torch.autograd.backward(loss)
            step()
            totals.append(loss.item() * len(batch))
    expected = slow.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    assert losses.total == pytest.approx(sum(totals) / 10, abs=1e-6)


def test_training_that_diverges_names_the_learning_rate() -> None:
    """A NaN loss raises an error that names the key to change."""
    model, images, labels, _ = small_problem()
    with pytest.raises(FloatingPointError, match="client.learning-rate"):
        train_locally(
            model,
            images,
            labels,
            None,
            LocalObjective(),
            epochs=5,
            batch_size=4,
            learning_rate=1e20,
            crop_padding=0,
            generator=torch.Generator().manual_seed(5),
        )


@pytest.mark.parametrize("draws", [1, 3])
def test_class_gradients_of_images_equal_the_reference(draws: int) -> None:
    """Without augmentation and with all images, every draw matches the reference."""
    model = reference.resnet8()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = class_gradients(
        *augmented_features(
            model.train(),
            reference.tensor("gradients/images"),
            reference.tensor("gradients/labels"),
            draws=draws,
            samples_per_class=32,
            augment=False,
            batch_size=50,
            generator=torch.Generator().manual_seed(0),
        ),
        model.classifier.weight.detach(),
        model.classifier.bias.detach(),
    )
    expected = reference.class_gradients("gradients")
    assert set(gradients) == set(expected)
    for c, (weight, bias) in expected.items():
        reference.assert_close(gradients[c].weight, weight)
        reference.assert_close(gradients[c].bias, bias)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("augment", [False, True])
def test_class_gradients_follow_the_generator(augment: bool) -> None:
    """The seed decides which few samples of each class are drawn."""
    model, images, labels, _ = small_problem()
    results = [
        class_gradients(
            *augmented_features(
                model,
                images,
                labels,
                draws=2,
                samples_per_class=2,
                augment=augment,
                batch_size=3,
                generator=torch.Generator().manual_seed(seed),
            ),
            model.classifier.weight.detach(),
            model.classifier.bias.detach(),
        )
        for seed in (1, 1, 2)
    ]
    assert set(results[0]) == {0, 1, 2}
    assert torch.equal(results[0][0].weight, results[1][0].weight)
    assert not torch.equal(results[0][0].weight, results[2][0].weight)


def test_class_gradients_are_the_mean_over_augmented_draws() -> None:
    """The slow version follows the released code: class by class and draw by draw."""
    model, images, labels, _ = small_problem()
    weight, bias = model.classifier.weight, model.classifier.bias
    gradients = class_gradients(
        *augmented_features(
            model,
            images,
            labels,
            draws=3,
            samples_per_class=2,
            augment=True,
            batch_size=4,
            generator=torch.Generator().manual_seed(1),
        ),
        weight.detach(),
        bias.detach(),
    )
    generator = torch.Generator().manual_seed(1)
    classes = sorted(set(labels.tolist()))
    sums = {c: [torch.zeros_like(weight), torch.zeros_like(bias)] for c in classes}
    for _ in range(3):
        for c in classes:
            own = torch.nonzero(labels == c).flatten()
            picked = own[torch.randperm(len(own), generator=generator)[:2]]
            part = siamese_augment(images[picked], None, generator)
            loss = functional.cross_entropy(model.eval()(part), labels[picked])
            for total, g in zip(
                sums[c], torch.autograd.grad(loss, (weight, bias)), strict=True
            ):
                total += g / 3
    assert list(gradients) == classes
    for c, (expected_weight, expected_bias) in sums.items():
        torch.testing.assert_close(gradients[c].weight, expected_weight)
        torch.testing.assert_close(gradients[c].bias, expected_bias)


def test_pixels_train_as_normalised_images_do() -> None:
    """Normalising batch by batch changes nothing."""
    model, _, labels, teacher = small_problem()
    pixels = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)

    def normalize(images: torch.Tensor) -> torch.Tensor:
        return images.float() / 255 - 0.5

    results = []
    for images in (
        normalize(pixels),
        PixelImages(pixels, normalize, torch.device("cpu")),
    ):
        trained = copy.deepcopy(model)
        gradients = class_gradients(
            *augmented_features(
                trained,
                images,
                labels,
                draws=2,
                samples_per_class=2,
                augment=True,
                batch_size=4,
                generator=torch.Generator().manual_seed(1),
            ),
            model.classifier.weight.detach(),
            model.classifier.bias.detach(),
        )
        losses = train_locally(
            trained,
            images,
            labels,
            teacher,
            LocalObjective(1.0, 3.0),
            epochs=2,
            batch_size=4,
            learning_rate=0.05,
            crop_padding=2,
            generator=torch.Generator().manual_seed(5),
        )
        results.append((gradients[1].weight, losses, trained.state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    for name, value in results[0][2].items():
        assert torch.equal(value, results[1][2][name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: settings.name)
def test_mixed_precision_stays_near_single_precision(
    optimizer: OptimizerSettings,
) -> None:
    """bfloat16 keeps 8 bits: losses agree within 2 %, weights stay in float32."""
    model, images, labels, teacher = small_problem()
    losses = []
    for precision in (torch.float32, torch.bfloat16):
        trained = copy.deepcopy(model)
        result = train_locally(
            trained,
            images,
            labels,
            teacher,
            LocalObjective(1.0, 3.0),
            precision=precision,
            optimizer=optimizer,
            epochs=2,
            batch_size=4,
            learning_rate=0.05 if optimizer == PLAIN_SGD else 0.005,
            crop_padding=2,
            generator=torch.Generator().manual_seed(5),
        )
        losses.append(result.total)
        assert {v.dtype for v in trained.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_augmentation_per_image_differs_within_a_batch() -> None:
    """The option changes the crop, so the training takes another course."""
    model, images, labels, _ = small_problem()
    weights = []
    for per_image in (False, True):
        trained = copy.deepcopy(model)
        train_locally(
            trained,
            images,
            labels,
            None,
            LocalObjective(),
            augment_per_image=per_image,
            epochs=2,
            batch_size=4,
            learning_rate=0.05,
            crop_padding=2,
            generator=torch.Generator().manual_seed(5),
        )
        weights.append(trained.classifier.weight)
    assert not torch.equal(*weights)
