"""The maths on a GPU against the CPU's; needs torch and torchvision only.

    python -m tests.cuda.checks

runs them without pytest, on a machine that holds nothing else.
"""

import copy
import sys
import traceback
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from client_app.augmentation import OPERATIONS, random_crop_flip, siamese_augment
from client_app.gradients import class_gradients, coded_class_gradients
from client_app.mixing import mix_views
from client_app.optimizers import OptimizerSettings
from client_app.training import (
    LocalObjective,
    PixelImages,
    augmented_features,
    logit_offsets,
    train_locally,
)
from client_app.views import ViewRecipe, make_views, view_numbers
from clip2fl_common.choices import OptimizerName
from clip2fl_common.class_gradients import (
    ClassGradient,
    CodedGradient,
    LowRankGradient,
    encode_gradients,
    row_cosines,
)
from clip2fl_common.devices import tensor_cores
from clip2fl_common.graphs import Capture, cuda_graph, run_directly
from clip2fl_common.models import build_model
from strategy.retraining import retrain_classifier
from strategy.synthesis import (
    gradient_matching_loss,
    prototype_contrastive_loss,
    synthesize,
)

CPU = torch.device("cpu")
# float32 sums in another order; convolutions may round to TF32, 10 bits.
EXACT, CONVOLVED = 1e-4, 2e-2
# Kernels may add in another order each time (cuDNN's backward passes do),
# and an optimizer that divides by a gradient's size makes more of it.
GRAPHED = 1e-2


def seeded(seed: int = 0) -> torch.Generator:
    """Return a CPU generator."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return seeded normal numbers."""
    return torch.randn(*shape, generator=seeded(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare a tensor from a GPU with the CPU's."""
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


def check_augmentation(device: torch.device) -> None:
    """Draw the same numbers, get the same images."""
    images = normal(6, 3, 32, 32)
    for operation in OPERATIONS:
        expected = siamese_augment(images, operation, seeded())
        result = siamese_augment(images.to(device), operation, seeded())
        assert result.device.type == device.type
        close(result, expected, EXACT)
    for per_image in (False, True):
        close(
            random_crop_flip(images.to(device), 4, seeded(), per_image=per_image),
            random_crop_flip(images, 4, seeded(), per_image=per_image),
            0.0,
        )


def check_views(device: torch.device) -> None:
    """Crops are the same pictures; interpolated levels may be rounded otherwise."""
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=seeded()).byte()
    keys = [bytes([n] * 16) for n in range(6)]
    crop = ViewRecipe(1, "crop-flip", 4)
    resized = ViewRecipe(1, "resized-crop", 4)
    for recipe, levels in ((crop, 0), (resized, 3)):
        numbers = view_numbers(keys, [0] * 6, recipe.kind)
        expected = make_views(pixels, numbers, recipe)
        found = make_views(pixels.to(device), numbers, recipe)
        assert found.device.type == device.type
        assert (found.cpu().int() - expected.int()).abs().max() <= levels
        alone = [
            make_views(pixels[n : n + 1].to(device), numbers[n : n + 1], recipe)
            for n in range(6)
        ]
        assert torch.equal(torch.cat(alone), found)
    mixes: tuple[Literal["mixup", "cutmix"], ...] = ("mixup", "cutmix")
    for mix in mixes:
        numbers = view_numbers(keys, [0] * 6, mix)
        expected = mix_views(pixels, pixels.flip(0), numbers, mix)
        there = pixels.to(device)
        found = mix_views(there, there.flip(0), numbers, mix)
        assert found.device.type == device.type
        assert torch.equal(found.cpu(), expected)


def check_class_gradients(device: torch.device) -> None:
    """Dense, and decoded from their codes."""
    features, weight, bias = normal(200, 64), normal(30, 64, seed=1), normal(30, seed=2)
    labels = torch.randint(0, 30, (200,), generator=seeded(3))
    here = [tensor.to(device) for tensor in (features, labels, weight, bias)]
    expected = class_gradients(features, labels, weight, bias)
    coded = coded_class_gradients(
        here[0], here[1], here[2], here[3], min_cosine=0.9, precision="full"
    )
    for c, gradient in class_gradients(here[0], here[1], here[2], here[3]).items():
        close(gradient.weight, expected[c].weight, EXACT)
        close(gradient.bias, expected[c].bias, EXACT)
        cosines = row_cosines(expected[c].weight, coded[c].weight.cpu())
        assert cosines.min() > 0.9 - 1e-5


def check_local_training(device: torch.device) -> None:
    """One epoch with distillation from pixels; in bfloat16 losses stay near."""
    model = build_model("resnet8-slim", 10, 64)
    pixels = torch.randint(0, 256, (48, 3, 32, 32), generator=seeded()).byte()
    labels = torch.randint(0, 10, (48,), generator=seeded(1))
    teacher = 5 * normal(48, 10, seed=2)
    losses = []
    for place, precision in (
        (CPU, torch.float32),
        (device, torch.float32),
        (device, torch.bfloat16),
    ):
        trained = copy.deepcopy(model).to(place)
        images = PixelImages(
            pixels.to(place), lambda batch: batch.float() / 128 - 1, place
        )
        result = train_locally(
            trained,
            images,
            labels.to(place),
            teacher.to(place),
            LocalObjective(1.0, 3.0),
            epochs=1,
            batch_size=16,
            learning_rate=0.02,
            crop_padding=4,
            generator=seeded(3),
            precision=precision,
        )
        losses.append(result.total)
        drawn, _ = augmented_features(
            trained,
            images,
            labels.to(place),
            draws=2,
            samples_per_class=4,
            augment=True,
            batch_size=16,
            generator=seeded(4),
            precision=precision,
        )
        assert drawn.dtype == torch.float32 and drawn.device.type == place.type
        assert torch.isfinite(drawn).all()
    assert abs(losses[1] / losses[0] - 1) < CONVOLVED
    assert abs(losses[2] / losses[0] - 1) < 2 * CONVOLVED


def check_synthesis(device: torch.device) -> None:
    """On dense and on low-rank gradients, with classes that nobody holds."""
    num_classes, per_class, dim = 60, 10, 64
    dense = {
        c: ClassGradient(
            normal(num_classes, dim, seed=c), normal(num_classes, seed=100 + c)
        )
        for c in range(num_classes - 3)
    }
    low_rank: dict[int, CodedGradient] = {
        c: LowRankGradient(g.weight[:, :2], g.weight[:2], g.bias)
        for c, g in dense.items()
    }
    features, weight = normal(num_classes, per_class, dim), normal(num_classes, dim)
    bias = normal(num_classes)
    text = functional.normalize(normal(num_classes, dim, seed=9), dim=1)
    kinds: list[dict[int, CodedGradient]] = [dict(dense), low_rank]
    for gradients in kinds:
        results = []
        for place in (CPU, device):
            moved = synthesize(
                features.to(place),
                gradients,
                weight.to(place),
                bias.to(place),
                text.to(place),
                steps=5,
                learning_rate=0.1,
                contrast_weight=0.01,
                temperature=0.1,
            )
            results.append(
                (
                    moved,
                    gradient_matching_loss(
                        moved, gradients, weight.to(place), bias.to(place)
                    ),
                    prototype_contrastive_loss(moved, text.to(place), 0.1),
                )
            )
        for actual, expected in zip(results[1], results[0], strict=True):
            assert actual.device.type == device.type
            close(actual, expected, EXACT)


def check_retraining(device: torch.device) -> None:
    """Shuffle alike and reach the same classifier, fresh and warm."""
    features = normal(10, 20, 64)

    def retrain(place: torch.device, initial: nn.Linear | None) -> nn.Linear:
        return retrain_classifier(
            features.to(place),
            epochs=5,
            batch_size=32,
            learning_rate=0.05,
            generator=seeded(),
            initial=initial,
        )

    for initial in (None, retrain(CPU, None)):
        results = [retrain(place, initial) for place in (CPU, device)]
        assert results[1].weight.device.type == device.type
        close(results[1].weight, results[0].weight, EXACT)
        close(results[1].bias, results[0].bias, EXACT)


def check_coding(device: torch.device) -> None:
    """Ranks found on the GPU are the CPU's."""
    left, right = normal(80, 3), normal(3, 64, seed=1)
    gradient = ClassGradient(left @ right, normal(80))
    ranks = []
    for place in (CPU, device):
        here = ClassGradient(*(tensor.to(place) for tensor in gradient))
        code = encode_gradients({0: here}, min_cosine=0.999, precision="half")[0]
        assert isinstance(code, LowRankGradient)
        ranks.append(code.rank)
    assert ranks == [3, 3]


def check_graphs(device: torch.device) -> None:
    """CUDA graphs are made, and compute what their operations do one by one.

    Three clients of 40, 21 and 40 images in batches of 16 share the recordings. All
    optimizers, with distillation, offsets, a proximal term and views' own layout.
    """
    names: tuple[OptimizerName, ...] = get_args(OptimizerName)
    for name in names:
        counted = Counted(cuda_graph(device))
        captures: tuple[Capture, ...] = (counted, run_directly)
        states: list[list[torch.Tensor]] = []
        for capture in captures:
            states.append([])
            for place, number in enumerate((40, 21, 40)):
                torch.manual_seed(place)
                model = build_model("resnet8-slim", 10, 64).to(device)
                labels = torch.arange(number) % 10
                with tensor_cores("off"):
                    train_locally(
                        model,
                        normal(number, 3, 32, 32, seed=place).to(device),
                        labels.to(device),
                        5 * normal(number, 10, seed=place).to(device),
                        LocalObjective(0.5, 3.0, 0.01, 0.9),
                        epochs=2,
                        batch_size=16,
                        learning_rate=0.01 / (1 + place),
                        crop_padding=4,
                        generator=seeded(place),
                        offsets=logit_offsets(labels.to(device), 10, 1.0),
                        augment_per_image=place == 1,
                        optimizer=OptimizerSettings(name, 0.9, 0.01),
                        capture=capture,
                    )
                states[-1] += [t.float() for t in model.state_dict().values()]
        for found, expected in zip(*states, strict=True):
            assert (found - expected).norm() <= GRAPHED * (1 + expected.norm())
        assert counted.recordings == 3  # batches of 16, 8 and 5
    features = normal(10, 20, 64).to(device)
    results = [
        retrain_classifier(
            features,
            epochs=3,
            batch_size=32,
            learning_rate=0.05,
            generator=seeded(),
            capture=capture,
        )
        for capture in (Counted(cuda_graph(device)), run_directly)
    ]
    close(results[0].weight, results[1].weight.cpu(), EXACT)
    gradients = {c: ClassGradient(normal(10, 64, seed=c), normal(10)) for c in range(7)}
    moved = [
        synthesize(
            features,
            dict(gradients),
            normal(10, 64).to(device),
            normal(10).to(device),
            functional.normalize(normal(10, 64, seed=9), dim=1).to(device),
            steps=30,
            learning_rate=0.1,
            contrast_weight=0.01,
            temperature=0.1,
            capture=capture,
        )
        for capture in (Counted(cuda_graph(device)), run_directly)
    ]
    close(moved[0], moved[1].cpu(), EXACT)


class Counted:
    """A way of recording that counts, and does not hide a failure."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.recordings = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record; raise another error than the one that makes steps run directly."""
        try:
            replay = self._capture(step)
        except RuntimeError as error:
            raise AssertionError("a CUDA graph cannot be made") from error
        self.recordings += 1
        return replay


CHECKS: tuple[Callable[[torch.device], None], ...] = (
    check_augmentation,
    check_views,
    check_class_gradients,
    check_local_training,
    check_synthesis,
    check_retraining,
    check_coding,
    check_graphs,
)


def main() -> None:
    """Run every check on the first CUDA device; exit with an error if any fails."""
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device))
    failed = 0
    for check in CHECKS:
        outcome = "ok"
        try:
            check(device)
        except Exception:
            # The machine may be lent for a short time: show all that is wrong.
            traceback.print_exc()
            outcome = "failed"
            failed += 1
        print(f"{check.__name__}: {outcome}", flush=True)
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
