"""Recorded local training equals training step by step."""

import copy
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from client_app import local_step
from client_app.batches import Batches
from client_app.optimizers import PLAIN_SGD, OptimizerSettings
from client_app.training import (
    LocalObjective,
    TrainingLosses,
    logit_offsets,
    train_locally,
)
from clip2fl_common.choices import OptimizerName
from clip2fl_common.graphs import Capture, run_directly
from clip2fl_common.models import ImageClassifier, build_model
from tests.recording import StandInCapture

NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)
CLASSES = 3
FULL = LocalObjective(0.7, 2.0, proximal_mu=0.1, label_weight=0.5)


class MadeUpViews:
    """Views that depend on epoch and image, mixed with the next image or not."""

    def __init__(self, images: torch.Tensor, mixed: bool) -> None:
        self.images, self.mixed = images, mixed

    def batch(
        self, epoch: int, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pictures and logits."""
        pictures = self.images[indices] * (1 + epoch)
        return pictures, pictures.mean(dim=(2, 3))

    def mixture(
        self, epoch: int, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the next images and shares."""
        if not self.mixed:
            return None
        shares = 0.5 + (indices % 4) / 8
        return (indices + 1) % len(self.images), shares


def client(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images, labels and the teacher's logits of a client."""
    drawing = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, 8, 8, generator=drawing)
    labels = torch.arange(number) % CLASSES
    return images, labels, 3 * torch.randn(number, CLASSES, generator=drawing)


def rounds(
    capture: Capture | None,
    objective: LocalObjective = FULL,
    optimizer: OptimizerSettings = PLAIN_SGD,
    *,
    views: str = "",
    offset: bool = True,
    per_image: bool = False,
    padding: int = 2,
    epochs: int = 2,
) -> tuple[list[dict[str, torch.Tensor]], list[TrainingLosses]]:
    """Train clients of 10, 7 and 10 images, each from another model and step size."""
    models, losses = [], []
    for place, number in enumerate((10, 7, 10)):
        torch.manual_seed(place)
        model = build_model("resnet8-slim", CLASSES, 16)
        images, labels, logits = client(number, place)
        rate = 0.02 / (1 + place)
        losses.append(
            train_locally(
                model,
                images,
                labels,
                logits if objective.distillation_weight else None,
                objective,
                epochs=epochs,
                batch_size=4,
                learning_rate=rate,
                crop_padding=padding,
                generator=torch.Generator().manual_seed(10 + place),
                offsets=logit_offsets(labels, CLASSES, 1.0) if offset else None,
                augment_per_image=per_image,
                optimizer=replace(optimizer, other_learning_rate=2 * rate),
                views=MadeUpViews(images, views == "mixed") if views else None,
                capture=capture,
            )
        )
        models.append(model.state_dict())
    return models, losses


CASES: list[dict[str, Any]] = [
    *({"optimizer": OptimizerSettings(name, 0.8, 0.01)} for name in NAMES),
    {"objective": LocalObjective(), "offset": False},
    {"objective": LocalObjective(1.0, 3.0), "per_image": True},
    {"views": "plain", "optimizer": OptimizerSettings("muon")},
    {"views": "mixed"},
    {"padding": 0, "objective": LocalObjective(proximal_mu=0.1)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recorded_training_equals_direct_steps(case: dict[str, Any]) -> None:
    """Bit by bit on the same operations, and near the steps that a CPU takes."""
    capture = StandInCapture()
    models, losses = rounds(capture, **case)
    same, same_losses = rounds(run_directly, **case)
    usual, usual_losses = rounds(None, **case)
    assert losses == same_losses
    for found, direct, near in zip(models, same, usual, strict=True):
        for name, tensor in found.items():
            assert torch.equal(tensor, direct[name]), name
            torch.testing.assert_close(
                tensor, near[name], atol=2e-5, rtol=1e-4, msg=name
            )
    for one, other in zip(losses, usual_losses, strict=True):
        assert one.total == pytest.approx(other.total, rel=1e-4)
        assert one.distillation == pytest.approx(other.distillation, rel=1e-4, abs=1e-9)
    # Batches of 4, of 2 and of 3, each recorded once for all clients and epochs.
    assert capture.recordings == 3
    assert capture.replays == 2 * (3 + 2 + 3)


def test_a_recording_is_kept_for_its_kind_only() -> None:
    """Another objective, optimizer or use of offsets is recorded anew."""
    capture = StandInCapture(warm_ups=0)
    for _ in range(2):
        rounds(capture, epochs=1)
    assert capture.recordings == 3
    rounds(capture, replace(FULL, distillation_temperature=3.0), epochs=1)
    rounds(capture, optimizer=OptimizerSettings("momentum"), epochs=1)
    rounds(capture, offset=False, epochs=1)
    assert capture.recordings == 12


def test_the_model_that_is_given_is_trained_and_no_other() -> None:
    """The next client's training does not reach back into the last one's model."""
    (first, second, third), _ = rounds(StandInCapture())
    for one, other in ((first, second), (first, third)):
        assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
        assert one["conv1.weight"].data_ptr() != other["conv1.weight"].data_ptr()
    assert first["bn1.num_batches_tracked"] == 2 * 3
    assert second["bn1.num_batches_tracked"] == 2 * 2


def test_divergence_is_an_error() -> None:
    model: ImageClassifier = build_model("resnet8-slim", CLASSES, 16)
    images, labels, _ = client(8, 0)
    with pytest.raises(FloatingPointError, match="learning-rate"):
        train_locally(
            model,
            images,
            labels,
            None,
            LocalObjective(),
            epochs=4,
            batch_size=4,
            learning_rate=1e9,
            crop_padding=0,
            generator=torch.Generator(),
            capture=StandInCapture(),
        )


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("views", [None, False, True])
def test_batches_made_at_once_are_those_made_one_by_one(
    per_image: bool, views: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 11 images in batches of 3, two batches at a time."""
    images, labels, logits = client(11, 0)
    monkeypatch.setattr("client_app.batches.AT_ONCE_BYTES", 6 * images[0].nbytes)
    made = [
        Batches(
            images,
            labels,
            logits,
            None if views is None else MadeUpViews(images, views),
            epochs=3,
            batch_size=3,
            padding=2,
            generator=torch.Generator().manual_seed(1),
            per_image=per_image,
        )
        for _ in range(2)
    ]
    for epoch, many in enumerate(made[0].many_at_once()):
        one_by_one = list(made[1].one_by_one(epoch))
        at_once = list(many)
        assert [len(batch.labels) for batch in at_once] == [3, 3, 3, 2]
        for a, b in zip(at_once, one_by_one, strict=True):
            for one, other in zip(a, b, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert torch.equal(one, other)


def test_training_leaves_a_copy_of_the_model_alone() -> None:
    """The kept model of a recording is a copy of the first model that was given."""
    model = build_model("resnet8-slim", CLASSES, 16)
    before = copy.deepcopy(model.state_dict())
    recorded = local_step.RecordedTraining(
        model, FULL, PLAIN_SGD, None, torch.float32, StandInCapture()
    )
    images, labels, logits = client(4, 0)
    recorded.start(model, 0.1, 0.1, None)
    recorded.take_step(images, labels, logits)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    recorded.finish(model)
    assert not torch.equal(model.state_dict()["conv1.weight"], before["conv1.weight"])
