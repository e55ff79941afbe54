"""Student networks, compared with the reference, known sizes and torchvision."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock

from clip2fl_common.config.checks import DEEP_MODELS, DEEP_STRIDE
from clip2fl_common.models import build_model, folded, narrow_width
from tests import reference

NAMES = ("resnet8", "resnet8-slim", "resnet18", "resnet50")


def test_resnet8_equals_the_reference() -> None:
    """Features and logits match the network of the released code."""
    model = reference.resnet8()
    images = reference.tensor("gradients/images")
    with torch.no_grad():
        reference.assert_close(
            model.features(images), reference.tensor("gradients/features")
        )
        reference.assert_close(model(images), reference.tensor("gradients/logits"))


def resnet8_parameters(first: int, num_classes: int, dim: int) -> int:
    """Count by hand: 3x3 convolutions without bias, two numbers a channel per BN."""

    def convolution(inputs: int, outputs: int, side: int) -> int:
        return inputs * outputs * side * side + 2 * outputs

    second, third = 2 * first, 4 * first
    count = convolution(3, first, 3)
    count += 2 * convolution(first, first, 3)
    for inputs, outputs in ((first, second), (second, third)):
        count += convolution(inputs, outputs, 3) + convolution(outputs, outputs, 3)
        count += convolution(inputs, outputs, 1)
    return count + (third + 1) * dim + (dim + 1) * num_classes


@pytest.mark.parametrize(
    ("name", "first", "total"),
    [("resnet8", 64, 1_361_738), ("resnet8-slim", 16, None)],
)
def test_resnet8_parameter_count(name: str, first: int, total: int | None) -> None:
    """1.36 million parameters at four times the width, as published."""
    expected = resnet8_parameters(first, num_classes=10, dim=512)
    assert total is None or expected == total
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet8", (64, 128, 256)), ("resnet8-slim", (16, 32, 64))],
)
def test_resnet8_stages(name: str, channels: tuple[int, int, int]) -> None:
    """Each stage has its channels; the second and third halve the side."""
    model = build_model(name, num_classes=7)
    assert (model.projection.in_features, model.projection.out_features) == (
        channels[2],
        512,
    )
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        shapes.append(tuple(output.shape))

    for stage in (model.layer1, model.layer2, model.layer3):
        assert isinstance(stage, nn.Module)
        stage.register_forward_hook(note)
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [
        (2, count, side, side)
        for count, side in zip(channels, (32, 16, 8), strict=True)
    ]


def test_stages_are_made_of_torchvisions_block() -> None:
    """Weights of the same names give the same activations, in training mode too."""
    torch.manual_seed(0)
    model = build_model("resnet8-slim", num_classes=7)
    x = torch.randn(4, 16, 32, 32)
    for stage, (inputs, outputs) in (
        (model.layer1, (16, 16)),
        (model.layer2, (16, 32)),
        (model.layer3, (32, 64)),
    ):
        assert isinstance(stage, nn.Sequential)
        shortcut = None
        if inputs != outputs:
            shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)
            )
        stride = outputs // inputs
        block = BasicBlock(inputs, outputs, stride, shortcut)
        block.load_state_dict(stage[0].state_dict())
        y = stage(x)
        torch.testing.assert_close(y, block(x))
        for name, buffer in block.named_buffers():
            torch.testing.assert_close(stage[0].get_buffer(name), buffer)
        x = y


@pytest.mark.parametrize(
    ("name", "constructor"), [("resnet18", resnet18), ("resnet50", resnet50)]
)
def test_large_networks_equal_torchvision(
    name: str, constructor: Callable[[], nn.Module]
) -> None:
    """Features are torchvision's network with the projection as its last layer."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, feature_dim=48).eval().double()
    expected = constructor().eval().double()
    expected.fc = nn.Identity()
    own = {
        key.removeprefix("backbone."): value
        for key, value in model.state_dict().items()
        if key.startswith("backbone.")
    }
    expected.load_state_dict(own)
    expected.fc = model.projection
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features = expected(images)
        torch.testing.assert_close(model.features(images), features)
        torch.testing.assert_close(model(images), model.classifier(features))


@pytest.mark.parametrize("name", NAMES[:3])
def test_forward_is_classifier_of_features(name: str) -> None:
    """Logits depend only on the features; shapes are as configured."""
    model = build_model(name, num_classes=5, feature_dim=24).eval()
    assert isinstance(model.classifier, nn.Linear)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = model.features(images)
        logits = model(images)
        assert features.shape == (3, 24)
        assert logits.shape == (3, 5)
        torch.testing.assert_close(logits, model.classifier(features))


@pytest.mark.parametrize("name", NAMES)
def test_classifier_keys(name: str) -> None:
    """The server replaces the classifier in a state by these two names."""
    with torch.device("meta"):
        state = build_model(name, num_classes=5, feature_dim=24).state_dict()
    assert state["classifier.weight"].shape == (5, 24)
    assert state["classifier.bias"].shape == (5,)
    assert state["projection.weight"].shape[0] == 24


def test_features_are_512_wide_unless_asked_otherwise() -> None:
    """The default is the embedding width of CLIP ViT-B/32."""
    assert build_model("resnet8-slim", num_classes=3).classifier.in_features == 512


def test_initialisation_follows_the_global_seed() -> None:
    """The same seed gives the same network, another seed another."""
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights.append(build_model("resnet8-slim", 3).projection.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_unknown_name_lists_the_known_ones() -> None:
    """The message names the key, the value and the choices."""
    with pytest.raises(ValueError, match="model.name") as caught:
        build_model("resnet9", num_classes=10)
    for word in ("resnet9", *NAMES):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_folded_network_has_the_same_features(name: str) -> None:
    """Features are equal for any statistics; the model itself is not changed."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, feature_dim=24).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for parameter in (module.weight, module.bias, module.running_mean):
                assert parameter is not None
                nn.init.normal_(parameter)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    network = folded(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert not network.training
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(
            network.features(images), model.eval().features(images)
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [48, 4096])
def test_narrow_features_are_the_pooled_or_the_projected_ones(
    name: str, dim: int
) -> None:
    with torch.device("meta"):
        model = build_model(name, 3, dim)
        narrow = model.eval().narrow(torch.zeros(2, 3, 32, 32))
    assert narrow.shape == (2, narrow_width(name, dim))
    assert narrow.shape[1] == min(model.projection.in_features, dim)


def test_projection_of_narrow_features_gives_the_features() -> None:
    model, images = build_model("resnet8-slim", 3).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.projection(model.narrow(images)), model.features(images)
        )


@pytest.mark.parametrize("name", DEEP_MODELS)
def test_deep_network_trains_on_one_image_if_it_is_large_enough(name: str) -> None:
    """As the last batch of an epoch may be."""
    model = build_model(name, num_classes=5, feature_dim=4).train()
    model(torch.randn(1, 3, DEEP_STRIDE + 1, DEEP_STRIDE + 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, DEEP_STRIDE, DEEP_STRIDE))


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(DEEP_MODELS)))
def test_other_networks_train_on_one_small_image(name: str) -> None:
    build_model(name, num_classes=5, feature_dim=4).train()(torch.randn(1, 3, 8, 8))
