"""Test class gradients against the reference and automatic differentiation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from client_app import gradients as gradients_module
from client_app.gradients import (
    ClassGradient,
    class_gradients,
    coded_class_gradients,
)
from clip2fl_common.class_gradients import encode_gradients
from tests import reference


def slow_class_gradients(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> dict[int, ClassGradient]:
    """Return gradients by differentiating the mean cross-entropy, class by class."""
    result = {}
    for c in range(len(weight)):
        chosen = features[labels == c]
        if len(chosen):
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            towards = torch.full((len(chosen),), c)
            loss = functional.cross_entropy(functional.linear(chosen, w, b), towards)
            result[c] = ClassGradient(*torch.autograd.grad(loss, (w, b)))
    return result


def test_equals_the_reference() -> None:
    """With our network every class held has the released code's gradient."""
    model = reference.resnet8()
    labels = reference.tensor("gradients/labels")
    with torch.no_grad():
        features = model.features(reference.tensor("gradients/images"))
    gradients = class_gradients(
        features, labels, model.classifier.weight, model.classifier.bias
    )
    expected = reference.class_gradients("gradients")
    assert set(expected) == {0, 2, 3, 4, 5, 7, 8, 9}
    assert set(gradients) == set(expected)
    for c, (weight, bias) in expected.items():
        reference.assert_close(gradients[c].weight, weight)
        reference.assert_close(gradients[c].bias, bias)
        assert not gradients[c].weight.requires_grad


@given(data=st.data())
def test_equals_automatic_differentiation(data: st.DataObject) -> None:
    """Holds for every shape and every set of labels."""
    num_classes = data.draw(st.integers(2, 6), label="classes")
    dim = data.draw(st.integers(1, 8), label="dim")
    held = data.draw(
        st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=20),
        label="labels",
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    labels = torch.tensor(held)
    double = torch.float64
    features = torch.randn(len(held), dim, generator=generator, dtype=double) * 3
    weight = torch.randn(num_classes, dim, generator=generator, dtype=double)
    bias = torch.randn(num_classes, generator=generator, dtype=double)

    gradients = class_gradients(features, labels, weight, bias)

    expected = slow_class_gradients(features, labels, weight, bias)
    assert list(gradients) == sorted(set(held))
    for c, gradient in gradients.items():
        assert gradient.weight.shape == (num_classes, dim)
        assert gradient.bias.shape == (num_classes,)
        torch.testing.assert_close(gradient.weight, expected[c].weight)
        torch.testing.assert_close(gradient.bias, expected[c].bias)


def test_large_logits_stay_finite() -> None:
    """A softmax of logits in the thousands must not overflow."""
    features = torch.full((3, 4), 1000.0)
    weight = torch.tensor([[1.0] * 4, [-1.0] * 4])
    gradients = class_gradients(
        features, torch.tensor([0, 1, 1]), weight, torch.zeros(2)
    )
    # Class 0 is certain and right: no gradient. Class 1 is certain and wrong.
    assert torch.equal(gradients[0].weight, torch.zeros(2, 4))
    assert torch.equal(gradients[1].bias, torch.tensor([1.0, -1.0]))
    assert torch.equal(gradients[1].weight[0], features[0])


@pytest.mark.parametrize("at_once", [0, 1, 3, 100])
def test_coded_gradients_do_not_depend_on_how_many_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Groups of any size (at least one class) give each class the same code."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 12, generator=generator)
    labels = torch.randint(0, 9, (60,), generator=generator)
    labels[labels == 4] = 5  # not every class is held
    weight = torch.randn(9, 12, generator=generator)
    bias = torch.randn(9, generator=generator)
    monkeypatch.setattr(gradients_module, "CHUNK_BYTES", at_once * weight.nbytes)

    coded = coded_class_gradients(
        features, labels, weight, bias, min_cosine=0.9, precision="full"
    )

    expected = encode_gradients(
        slow_class_gradients(features, labels, weight, bias),
        min_cosine=0.9,
        precision="full",
    )
    assert list(coded) == list(expected) == [0, 1, 2, 3, 5, 6, 7, 8]
    for c, gradient in coded.items():
        assert type(gradient) is type(expected[c])
        torch.testing.assert_close(gradient.weight, expected[c].weight)
        torch.testing.assert_close(gradient.bias, expected[c].bias)
