"""Values computed by the released CLIP2FL code (see data/README.md)."""

import json
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from clip2fl_common.class_gradients import ClassGradient
from clip2fl_common.models import ImageClassifier, build_model

DATA = Path(__file__).parent / "data"
# Tolerance seen between two correct float32 implementations (absolute).
TOLERANCE = 1e-5


class PartitionCase(TypedDict):
    """One long-tailed Dirichlet partition."""

    num_classes: int
    samples_per_class: int
    imbalance: float
    num_clients: int
    dirichlet_alpha: float
    seed: int
    label_order_seed: int
    class_counts: list[int]
    client_indices: list[list[int]]


class SynthesisCase(TypedDict):
    """Settings of one synthesis of federated features."""

    num_classes: int
    features_per_class: int
    dim: int
    steps: int
    contrast_alpha: float
    lr: float
    temperature: float


def partition_cases() -> list[PartitionCase]:
    """Return all partition cases."""
    cases: list[PartitionCase] = json.loads((DATA / "partition.json").read_text())
    return cases


def synthesis_cases() -> dict[str, SynthesisCase]:
    """Return the settings of the synthesis cases by their prefix."""
    cases: dict[str, SynthesisCase] = json.loads(
        (DATA / "synthesis_meta.json").read_text()
    )
    return cases


@cache
def _arrays() -> dict[str, npt.NDArray[Any]]:
    with np.load(DATA / "reference.npz") as archive:
        return {name: archive[name] for name in archive.files}


def tensor(name: str) -> torch.Tensor:
    """Return a copy of one array of reference.npz."""
    return torch.from_numpy(_arrays()[name].copy())


def class_gradients(prefix: str) -> dict[int, ClassGradient]:
    """Return the class gradients stored under ``<prefix>/class<c>/``."""
    start = f"{prefix}/class"
    classes = sorted(
        int(name.removeprefix(start).split("/")[0])
        for name in _arrays()
        if name.startswith(start) and name.endswith("/weight")
    )
    return {
        c: ClassGradient(tensor(f"{start}{c}/weight"), tensor(f"{start}{c}/bias"))
        for c in classes
    }


def resnet8() -> ImageClassifier:
    """Return our ResNet-8 with the reference state, in evaluation mode."""
    start = "gradients/state/"
    state = {
        name.removeprefix(start).replace("add_mlp", "projection"): tensor(name)
        for name in _arrays()
        if name.startswith(start)
    }
    model = build_model("resnet8", num_classes=10)
    model.load_state_dict(state)
    return model.eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that two tensors differ by no more than the tolerance anywhere."""
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0.0)
