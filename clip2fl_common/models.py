"""Student networks: backbone, projection to the teacher's width, and classifier."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ImageClassifier(nn.Module):
    """Backbone, linear projection to d features and linear classifier.

    Subclasses provide ``pooled``. CLIP2FL's server works on the d-wide features, which
    are as wide as the teacher's embedding (PAPER: 512).

    Parameters
    ----------
    pooled_dim : int
        Width of the backbone's pooled output.
    num_classes : int
        Number of classes C.
    feature_dim : int
        Width d of the projected features.
    """

    def __init__(self, pooled_dim: int, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(pooled_dim, feature_dim)
        self.classifier = nn.Linear(feature_dim, num_classes)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Return the backbone's pooled output, shape [N, pooled_dim]."""
        raise NotImplementedError

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the projected features of normalised images.

        Parameters
        ----------
        images : Tensor, shape [N, 3, H, W]
            Normalised images.

        Returns
        -------
        Tensor, shape [N, d]
        """
        projected: torch.Tensor = self.projection(self.pooled(images))
        return projected

    def narrow(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pooled output or the projected features, whichever are narrower.

        The projection is linear, so mean and covariance of the projected features
        follow exactly from those of the pooled output.

        Parameters
        ----------
        images : Tensor, shape [N, 3, H, W]
            Normalised images.

        Returns
        -------
        Tensor, shape [N, D]
            D is the smaller of ``pooled_dim`` and ``feature_dim`` (`narrow_width`).
        """
        pooled = self.projection.in_features < self.projection.out_features
        return self.pooled(images) if pooled else self.features(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, shape [N, C], of images [N, 3, H, W]."""
        logits: torch.Tensor = self.classifier(self.features(images))
        return logits


class ResNet8(ImageClassifier):
    """The residual network of CReFF and CLIP2FL for 32x32 images.

    A 3x3 convolution and three stages of one basic block each (He et al. 2016),
    with 16, 32 and 64 channels times ``width``, then average pooling.

    Parameters
    ----------
    num_classes : int
        Number of classes C.
    feature_dim : int
        Width d of the projected features.
    width : int
        Channel multiplier: 4 in the paper, 1 for the slim variant.
    """

    def __init__(self, num_classes: int, feature_dim: int, width: int) -> None:
        first, second, third = 16 * width, 32 * width, 64 * width
        super().__init__(third, num_classes, feature_dim)
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, stride=1)
        self.layer2 = _stage(first, second, stride=2)
        self.layer3 = _stage(second, third, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu"
                )

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Return globally averaged activations, shape [N, 64 * width]."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        averaged: torch.Tensor = x.mean(dim=(2, 3))
        return averaged


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016).

    Like torchvision's block, with the same names of weights. Importing torchvision
    takes longer than all other imports of a client besides torch.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return activations, shape [N, outputs, H / stride, W / stride]."""
        # In place: writing a large activation twice takes as long as some convolutions.
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.bn2(self.conv2(x))
        x += images if self.downsample is None else self.downsample(images)
        return functional.relu(x, inplace=True)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_BasicBlock(inputs, outputs, stride))


class TorchvisionClassifier(ImageClassifier):
    """A torchvision ResNet whose last layer is replaced by projection and classifier.

    Parameters
    ----------
    resnet : callable
        torchvision's constructor, called without weights.
    num_classes : int
        Number of classes C.
    feature_dim : int
        Width d of the projected features.
    """

    def __init__(
        self, resnet: Callable[[], nn.Module], num_classes: int, feature_dim: int
    ) -> None:
        backbone = resnet()
        last = backbone.fc
        assert isinstance(last, nn.Linear)
        super().__init__(last.in_features, num_classes, feature_dim)
        backbone.fc = nn.Identity()
        self.backbone = backbone

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Return torchvision's pooled activations, shape [N, 512 or 2048]."""
        pooled: torch.Tensor = self.backbone(images)
        return pooled


def _torchvision(name: str, num_classes: int, feature_dim: int) -> ImageClassifier:
    from torchvision import models  # the import takes more than a second

    return TorchvisionClassifier(getattr(models, name), num_classes, feature_dim)


MODELS: dict[str, Callable[[int, int], ImageClassifier]] = {
    "resnet8": lambda classes, dim: ResNet8(classes, dim, width=4),
    "resnet8-slim": lambda classes, dim: ResNet8(classes, dim, width=1),
    "resnet18": partial(_torchvision, "resnet18"),
    "resnet50": partial(_torchvision, "resnet50"),
}


POOLED_WIDTH = {"resnet8": 256, "resnet8-slim": 64, "resnet18": 512, "resnet50": 2048}
"""Width of each backbone's pooled output, known without building the model."""


def narrow_width(name: str, feature_dim: int) -> int:
    """Return the width D of `ImageClassifier.narrow` for a model in `MODELS`."""
    return min(POOLED_WIDTH[name], feature_dim)


def build_model(name: str, num_classes: int, feature_dim: int = 512) -> ImageClassifier:
    """Return a student network with new weights from torch's global generator.

    Parameters
    ----------
    name : str
        ``"resnet8"`` (64/128/256 channels, the paper's CIFAR model),
        ``"resnet8-slim"`` (16/32/64), or torchvision's ``"resnet18"`` or
        ``"resnet50"``.
    num_classes : int
        Number of classes C.
    feature_dim : int
        Width d of the projected features; equals the teacher's embedding width.

    Returns
    -------
    ImageClassifier

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in MODELS:
        raise ValueError(
            f"model.name = {name!r} is not known; choose one of {', '.join(MODELS)}"
        )
    model = MODELS[name](num_classes, feature_dim)
    # Convolutions use their weights' memory layout: 1.2 to 1.5 times as fast on CPUs.
    return model.to(memory_format=torch.channels_last)


def folded(model: ImageClassifier) -> ImageClassifier:
    """Return a copy for inference with batch norms folded into the convolutions.

    With fixed statistics a batch norm is a factor and an offset per channel, which the
    convolution before it can apply at no cost. Features change only by rounding.

    Parameters
    ----------
    model : ImageClassifier
        Not changed. If a batch norm is defined after a convolution, it must take that
        convolution's output.

    Returns
    -------
    ImageClassifier
        In evaluation mode.
    """
    network = copy.deepcopy(model).eval()
    for module in list(network.modules()):
        for (name, first), (after, second) in pairwise(module.named_children()):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(first, second))
                setattr(module, after, nn.Identity())
    return network
