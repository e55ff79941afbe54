"""Test the optimizers of local training against torch's own."""

import copy
import subprocess
import sys
from typing import get_args

import pytest
import torch

from client_app.optimizers import (
    PLAIN_SGD,
    Muon,
    OptimizerSettings,
    make_optimizer,
    orthogonalised,
)
from clip2fl_common.choices import OptimizerName
from clip2fl_common.config import RunConfig
from clip2fl_common.models import ImageClassifier, build_model
from tests.client_app.torch_optimizers import expected_steps

NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)


def small_model() -> ImageClassifier:
    """Return a model in float64."""
    torch.manual_seed(0)
    return build_model("resnet8-slim", num_classes=3, feature_dim=48).double()


def random_matrices(*shape: int) -> torch.Tensor:
    """Return the same random matrices in float64 at each call."""
    drawing = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=drawing, dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_torchs(
    name: OptimizerName, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps along gradients of very different lengths."""
    # torch's Muon rounds to it.
    monkeypatch.setattr(torch, "bfloat16", torch.float64)
    settings = OptimizerSettings(name, 0.8, decay, other_learning_rate=0.07)
    model, expected = small_model(), small_model()
    start = copy.deepcopy(model)
    steps = (
        make_optimizer(settings, model, 0.05).step,
        expected_steps(settings, expected, 0.05),
    )
    drawing = torch.Generator().manual_seed(1)
    for power in (0, 1, -2, -1, 0, 1):
        for own, other in zip(model.parameters(), expected.parameters(), strict=True):
            gradient = torch.randn(own.shape, generator=drawing, dtype=torch.float64)
            own.grad = 10.0**power * gradient
            other.grad = own.grad.clone()
        for step in steps:
            step()
        for own, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(own.grad, other.grad)  # type: ignore[arg-type]
    for (key, own), other, first in zip(
        model.named_parameters(),
        expected.parameters(),
        start.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-9, rtol=1e-9, msg=key)
        assert not torch.equal(own, first)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_stay(name: OptimizerName) -> None:
    model = small_model()
    frozen = (model.projection.weight, model.projection.bias)
    before = [parameter.detach().clone() for parameter in frozen]
    moved = model.classifier.weight.detach().clone()
    for parameter in model.parameters():
        if all(parameter is not other for other in frozen):
            parameter.grad = torch.ones_like(parameter)
    make_optimizer(OptimizerSettings(name, weight_decay=0.1), model, 0.1).step()
    for stayed, value in zip(frozen, before, strict=True):
        assert torch.equal(stayed, value)
    assert not torch.equal(model.classifier.weight, moved)


def test_adam_equals_torchs_without_decay() -> None:
    """Without decay, AdamW is Adam."""
    model, expected = small_model(), small_model()
    optimizer = make_optimizer(OptimizerSettings("adam"), model, 0.01)
    torchs = torch.optim.Adam(expected.parameters(), 0.01)
    for scale in (1.0, -3.0, 0.01):
        for own, other in zip(model.parameters(), expected.parameters(), strict=True):
            own.grad = scale * own.detach() + 0.1
            other.grad = scale * other.detach() + 0.1
        optimizer.step()
        torchs.step()
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "shape", [(16, 27), (16, 144), (32, 16), (64, 576), (512, 64), (48, 48)]
)
def test_newton_schulz_acts_on_singular_values_alone(shape: tuple[int, int]) -> None:
    """The slow version iterates s <- a s + b s^3 + c s^5 on each of them."""
    (matrix,) = random_matrices(1, *shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = orthogonalised(matrix[None])[0]
    torch.testing.assert_close(found, left @ values.diag() @ right)


@pytest.mark.parametrize("shape", [(16, 144), (32, 288), (64, 576), (512, 64)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_newton_schulz_brings_singular_values_near_one(
    shape: tuple[int, int], scale: float
) -> None:
    matrices = (scale * random_matrices(5, *shape)).float()
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.68 and values.max() < 1.2


def test_matrices_of_one_shape_are_orthogonalised_as_each_alone() -> None:
    matrices = random_matrices(4, 16, 144) * torch.logspace(-3, 3, 4)[:, None, None]
    together = orthogonalised(matrices)
    for matrix, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalised(matrix[None])[0], found)


def test_zero_gradients_move_nothing() -> None:
    """A matrix of zeros has no direction; one beside it keeps its own."""
    zero, other = (torch.nn.Parameter(random_matrices(8, 9)) for _ in range(2))
    zero.grad, other.grad = torch.zeros_like(zero), random_matrices(8, 9)
    Muon([zero, other], 0.1).step()
    assert torch.equal(zero, random_matrices(8, 9))
    assert torch.isfinite(other).all() and not torch.equal(other, zero)


def test_defaults_of_the_configuration_are_plain_sgd() -> None:
    client = RunConfig().client
    assert PLAIN_SGD == OptimizerSettings(
        client.optimizer,
        client.momentum,
        client.weight_decay,
        client.learning_rate_other,
    )


def test_no_optimizer_imports_torchs_compiler() -> None:
    """It would take more than a second of each message."""
    code = f"""
import sys
import torch
from client_app.optimizers import OptimizerSettings, make_optimizer
from clip2fl_common.models import build_model
for name in {NAMES}:
    model = build_model("resnet8-slim", 3, 16)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    make_optimizer(OptimizerSettings(name), model, 0.1).step()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
