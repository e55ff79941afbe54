"""Time each stage of a round against the published code's loops, without Flower.

    python -m benchmarks.stages

Needs only torch and torchvision. ``--device cuda`` runs on a GPU.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn
from torch.nn import functional
from torchvision.models import vit_b_32

from benchmarks import published_loops
from benchmarks.measure import (
    RESULTS,
    Comparison,
    compare,
    comparison_table,
    interleaved,
    median_and_spread,
    write_results,
)
from client_app.gradients import class_gradients
from client_app.training import (
    LocalObjective,
    augmented_features,
    train_locally,
)
from clip2fl_common.class_gradients import ClassGradient
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.parallel import single_threaded_kernels
from strategy.gradient_mean import mean_class_gradients
from strategy.retraining import new_classifier, retrain_classifier
from strategy.synthesis import synthesize

# The paper's settings (PAPER, "Settings").
PER_CLASS, DIM = 100, 512
BATCH_SIZE, TEMPERATURE = 32, 3.0
DRAWS, SAMPLES_PER_CLASS = 10, 32
# The paper's model for CIFAR, and the model of the demo and of quick experiments.
STUDENTS = ("resnet8", "resnet8-slim")
FORWARD_BATCH = {"cpu": 32, "cuda": 512}

Logits = Callable[[torch.Tensor], torch.Tensor]
SynthesisProblem = tuple[
    torch.Tensor, dict[int, ClassGradient], torch.Tensor, torch.Tensor, torch.Tensor
]
TeacherFactory = Callable[[int, torch.device], Logits]


class EpochSettings(TypedDict):
    """Settings of a local epoch."""

    batch_size: int
    learning_rate: float
    crop_padding: int


class SynthesisSettings(TypedDict):
    """Settings of the synthesis."""

    learning_rate: float
    contrast_weight: float
    temperature: float


class RetrainingSettings(TypedDict):
    """Settings of re-training."""

    batch_size: int
    learning_rate: float


EPOCH: EpochSettings = {
    "batch_size": BATCH_SIZE,
    "learning_rate": 0.1,
    "crop_padding": 4,
}
SYNTHESIS: SynthesisSettings = {
    "learning_rate": 0.1,
    "contrast_weight": 0.001,
    "temperature": 0.1,
}
RETRAINING: RetrainingSettings = {"batch_size": BATCH_SIZE, "learning_rate": 0.01}


@dataclass(frozen=True)
class Sizes:
    """The amount of work in each stage.

    Attributes
    ----------
    images : mapping of int to int
        Images of a client, by number of classes.
    epoch_images : int
        Images of the local epoch.
    steps : mapping of int to tuple of int
        By number of classes: descent steps of the published synthesis (0 if it cannot
        run) and of ours, and steps after which the two are compared. Ours has a whole
        round's steps, since all steps share the preparation.
    epochs : mapping of int to tuple of int
        By number of classes: epochs of the published re-training (0 if it takes too
        long) and of ours.
    per_class : int
        Federated features of each class.
    round_steps, round_epochs : int
        Descent steps and re-training epochs of the whole round.
    """

    images: Mapping[int, int]
    epoch_images: int
    steps: Mapping[int, tuple[int, int, int]]
    epochs: Mapping[int, tuple[int, int]]
    per_class: int
    round_steps: int
    round_epochs: int


# Numbers of images are those of one of 20 clients of CIFAR-10/100-LT at imbalance
# factor 100.
FULL = Sizes(
    images={10: 620, 100: 542},
    epoch_images=256,
    # The published loss's [C*m, C*m] matrices take 40 GB each at C = 1000.
    steps={10: (5, 100, 100), 100: (1, 100, 20), 1000: (0, 2, 0)},
    epochs={10: (10, 100), 100: (2, 10), 1000: (0, 1)},
    per_class=PER_CLASS,
    round_steps=100,
    round_epochs=300,
)
TINY = Sizes(
    images={4: 20},
    epoch_images=16,
    steps={4: (2, 2, 2), 6: (0, 1, 0)},
    epochs={4: (2, 2)},
    per_class=5,
    round_steps=2,
    round_epochs=2,
)


def random_images(
    number: int, num_classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 pixels [N, 3, 32, 32] and long-tailed labels [N]."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        256, (number, 3, 32, 32), generator=generator, dtype=torch.uint8
    )
    tail = 0.01 ** (torch.arange(num_classes) / max(1, num_classes - 1))
    labels = torch.multinomial(tail, number, replacement=True, generator=generator)
    return pixels.to(device), labels.to(device)


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """Return float images with a variance of about one."""
    return (pixels.float() - 127.5) / 64


def seeded(seed: int = 1) -> torch.Generator:
    """Return a CPU generator with a seed."""
    return torch.Generator().manual_seed(seed)


def student(
    num_classes: int, device: torch.device, name: str = "resnet8"
) -> ImageClassifier:
    """Return a student with seeded weights, by default the paper's for CIFAR."""
    torch.manual_seed(0)
    return build_model(name, num_classes, DIM).to(device)


def as_published(model: ImageClassifier) -> ImageClassifier:
    """Return a copy in torch's default memory layout, which the published code uses.

    The layout of our models is part of what is measured.
    """
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


@torch.no_grad()
def largest_difference(a: object, b: object) -> float:
    """Return the largest absolute difference of tensors, or mappings of tuples."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return float((a - b).abs().max())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        assert set(a) == set(b)
        return max(largest_difference(a[key], b[key]) for key in a)
    assert isinstance(a, tuple) and isinstance(b, tuple)
    return max(largest_difference(x, y) for x, y in zip(a, b, strict=True))


def class_gradient_stage(
    name: str, num_classes: int, number: int, device: torch.device, repeats: int
) -> Comparison:
    """Time a client's class gradients: features of augmented draws, and residuals."""
    pixels, labels = random_images(number, num_classes, device)
    model = student(num_classes, device, name)
    plain = as_published(model)
    difference = largest_difference(
        published_gradients(plain, pixels, labels), our_gradients(model, pixels, labels)
    )
    held = len(labels.unique())
    return compare(
        "class gradients of a client",
        f"{name}, C = {num_classes}, {number} images, {held} classes held",
        lambda: published_gradients(plain, pixels, labels),
        lambda: our_gradients(model, pixels, labels),
        repeats=repeats,
        device=device,
        difference=difference,
    )


def server_classifier(
    num_classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight [C, d] and bias [C] of the re-trained classifier."""
    head = new_classifier(DIM, num_classes, seeded()).to(device)
    return head.weight.detach(), head.bias.detach()


def published_gradients(
    model: ImageClassifier, pixels: torch.Tensor, labels: torch.Tensor
) -> dict[int, ClassGradient]:
    """Return a client's class gradients, computed by the published loops."""
    return published_loops.class_gradients(
        model,
        normalized(pixels),
        labels,
        *server_classifier(model.classifier.out_features, pixels.device),
        draws=DRAWS,
        samples_per_class=SAMPLES_PER_CLASS,
        generator=seeded(),
    )


def our_gradients(
    model: ImageClassifier, pixels: torch.Tensor, labels: torch.Tensor
) -> dict[int, ClassGradient]:
    """Return a client's class gradients, computed by our code."""
    return class_gradients(
        *augmented_features(
            model,
            normalized(pixels),
            labels,
            draws=DRAWS,
            samples_per_class=SAMPLES_PER_CLASS,
            augment=True,
            batch_size=FORWARD_BATCH[pixels.device.type],
            generator=seeded(),
        ),
        *server_classifier(model.classifier.out_features, pixels.device),
    )


def teacher_of_clips_size(num_classes: int, device: torch.device) -> Logits:
    """Return a ViT-B/32 at 224 pixels, CLIP's image tower in size, random weights."""
    torch.manual_seed(0)
    tower = vit_b_32(num_classes=DIM).to(device).eval()
    prototypes = torch.randn(DIM, num_classes, generator=seeded()).to(device)

    @torch.no_grad()
    def logits(pixels: torch.Tensor) -> torch.Tensor:
        resized = functional.interpolate(
            normalized(pixels), size=224, mode="bicubic", antialias=True
        )
        features = functional.normalize(tower(resized), dim=1)
        scaled: torch.Tensor = 100 * features @ functional.normalize(prototypes, dim=0)
        return scaled

    return logits


def published_epoch(
    start: ImageClassifier,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    teacher: Logits,
) -> nn.Module:
    """Return the model after one local epoch of the published loops."""
    model = as_published(start)
    published_loops.train_epoch(
        model,
        normalized(pixels).to(next(model.parameters())),
        pixels,
        labels,
        teacher,
        temperature=TEMPERATURE,
        generator=seeded(),
        **EPOCH,
    )
    return model


def our_epoch(
    start: ImageClassifier,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None,
) -> nn.Module:
    """Return the model after one local epoch of our code; distils if given logits."""
    model = copy.deepcopy(start)
    train_locally(
        model,
        normalized(pixels).to(next(model.parameters())),
        labels,
        teacher_logits,
        LocalObjective(float(teacher_logits is not None), TEMPERATURE),
        epochs=1,
        generator=seeded(),
        **EPOCH,
    )
    return model


def local_epoch_stage(
    num_classes: int,
    number: int,
    device: torch.device,
    repeats: int,
    teacher: Logits,
) -> tuple[Comparison, str]:
    """Time a local epoch: with distillation, without, and with the teacher inside.

    Returns
    -------
    tuple
        The comparison, and a paragraph about the cost of distillation.
    """
    pixels, labels = random_images(number, num_classes, device)
    start = student(num_classes, device)

    def first_pass() -> torch.Tensor:
        return torch.cat([teacher(part) for part in pixels.split(BATCH_SIZE)])

    logits = first_pass()
    # From random weights, eight steps of size 0.1 enlarge single precision's rounding
    # errors a thousand times, in either code.
    double, double_logits = copy.deepcopy(start).double(), logits.double()
    comparison = compare(
        "local epoch with distillation",
        f"{number} images, ResNet-8 4x, teacher ViT-B/32",
        lambda: published_epoch(start, pixels, labels, teacher),
        lambda: our_epoch(start, pixels, labels, logits),
        repeats=repeats,
        device=device,
        difference=largest_difference(
            dict(
                published_epoch(
                    double, pixels, labels, lambda part: teacher(part).double()
                ).named_parameters()
            ),
            dict(our_epoch(double, pixels, labels, double_logits).named_parameters()),
        ),
    )
    seconds = interleaved(
        {
            "with": lambda: our_epoch(start, pixels, labels, logits),
            "without": lambda: our_epoch(start, pixels, labels, None),
        },
        repeats=4 * repeats,
        device=device,
    )
    first = interleaved({"first": first_pass}, repeats=2, device=device)["first"]
    cost = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    inside = statistics.median(comparison.slow) / statistics.median(seconds["without"])
    text = (
        f"A local epoch with distillation costs {median_and_spread(cost)} times the "
        "same epoch without, the teacher's features being cached; with the teacher "
        f"inside, as published, {inside:.1f} times. The first pass, in which the "
        f"teacher sees each image once, takes {statistics.median(first):.1f} s for "
        f"these {number} images, once for all rounds and runs. Parameters are compared "
        "in double precision, as are synthesised features: in single precision the "
        "published epoch differs from itself by some 1e-4 if it runs on another number "
        "of threads."
    )
    print(text, flush=True)
    return comparison, text


def in_double(problem: SynthesisProblem) -> SynthesisProblem:
    """Return the problem in double precision."""
    features, gradients, *rest = problem
    double = {
        c: ClassGradient(gradient.weight.double(), gradient.bias.double())
        for c, gradient in gradients.items()
    }
    weight, bias, text_features = (tensor.double() for tensor in rest)
    return features.double(), double, weight, bias, text_features


def synthesis_problem(
    num_classes: int, per_class: int, device: torch.device
) -> SynthesisProblem:
    """Return features, gradients, classifier weight and bias, and unit prototypes."""
    generator = seeded(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    gradients = {
        c: ClassGradient(normal(num_classes, DIM), normal(num_classes))
        for c in range(num_classes)
    }
    return (
        normal(num_classes, per_class, DIM),
        gradients,
        *server_classifier(num_classes, device),
        functional.normalize(normal(num_classes, DIM), dim=1),
    )


def synthesis_stage(
    num_classes: int,
    per_class: int,
    steps: tuple[int, int, int],
    device: torch.device,
    repeats: int,
) -> Comparison:
    """Time a descent step on the federated features of all classes."""
    problem = synthesis_problem(num_classes, per_class, device)
    # In single precision, the published loops are about 2e-5 from the exact result
    # after a hundred steps, and ours half as far.
    exact = in_double(problem) if steps[2] else problem
    published, ours, compared = steps
    return compare(
        "synthesis step",
        f"C = {num_classes}, m = {per_class}, d = {DIM}",
        (lambda: published_loops.synthesize(*problem, steps=published, **SYNTHESIS))
        if published
        else None,
        lambda: synthesize(*problem, steps=ours, **SYNTHESIS),
        repeats=repeats,
        device=device,
        difference=largest_difference(
            published_loops.synthesize(*exact, steps=compared, **SYNTHESIS),
            synthesize(*exact, steps=compared, **SYNTHESIS),
        )
        if published
        else None,
        units=(published, ours),
    )


def published_retraining(features: torch.Tensor, epochs: int) -> nn.Linear:
    """Return the classifier re-trained by the published loops."""
    shuffling = seeded(4)
    initial = new_classifier(DIM, len(features), shuffling)
    return published_loops.retrain_classifier(
        features, initial, epochs=epochs, generator=shuffling, **RETRAINING
    )


def our_retraining(features: torch.Tensor, epochs: int) -> nn.Linear:
    """Return the classifier re-trained by our code."""
    return retrain_classifier(
        features, epochs=epochs, generator=seeded(4), **RETRAINING
    )


def retraining_stage(
    num_classes: int,
    per_class: int,
    epochs: tuple[int, int],
    device: torch.device,
    repeats: int,
) -> Comparison:
    """Time an epoch of re-training."""
    features = torch.randn(num_classes, per_class, DIM, generator=seeded(3))
    features = features.to(device)
    published, ours = epochs
    return compare(
        "re-training epoch",
        f"C = {num_classes}, m = {per_class}, d = {DIM}",
        (lambda: published_retraining(features, published)) if published else None,
        lambda: our_retraining(features, ours),
        repeats=repeats,
        device=device,
        difference=largest_difference(
            published_retraining(features, published).weight.detach(),
            our_retraining(features, published).weight.detach(),
        )
        if published
        else None,
        units=epochs,
    )


def round_stage(
    num_classes: int,
    sizes: Sizes,
    device: torch.device,
    repeats: int,
    teacher: Logits,
) -> Comparison:
    """Time a whole round of two clients, from class gradients to a new classifier.

    The teacher's features are cached, as in every round but a client's first.
    """
    pixels, labels = random_images(sizes.epoch_images, num_classes, device)
    half = len(labels) // 2
    clients = [(pixels[:half], labels[:half]), (pixels[half:], labels[half:])]
    logits = [teacher(own) for own, _ in clients]
    model = student(num_classes, device)
    plain = as_published(model)
    features, _, weight, bias, prototypes = synthesis_problem(
        num_classes, sizes.per_class, device
    )

    def published() -> nn.Linear:
        gradients = [published_gradients(plain, *client) for client in clients]
        average([published_epoch(model, *client, teacher) for client in clients])
        mean = {
            c: ClassGradient(*(torch.stack(t).mean(0) for t in zip(*held, strict=True)))
            for c in sorted({c for reply in gradients for c in reply})
            if (held := [reply[c] for reply in gradients if c in reply])
        }
        moved = published_loops.synthesize(
            features,
            mean,
            weight,
            bias,
            prototypes,
            steps=sizes.round_steps,
            **SYNTHESIS,
        )
        return published_retraining(moved, sizes.round_epochs)

    def ours() -> nn.Linear:
        gradients = [our_gradients(model, *client) for client in clients]
        average(
            [
                our_epoch(model, *client, known)
                for client, known in zip(clients, logits, strict=True)
            ]
        )
        moved = synthesize(
            features,
            mean_class_gradients(gradients),
            weight,
            bias,
            prototypes,
            steps=sizes.round_steps,
            **SYNTHESIS,
        )
        return our_retraining(moved, sizes.round_epochs)

    return compare(
        "whole round, without Flower",
        f"C = {num_classes}, 2 clients of {half} images, 1 epoch",
        published,
        ours,
        repeats=repeats,
        device=device,
        difference=largest_difference(
            published().weight.detach(), ours().weight.detach()
        ),
    )


def average(models: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Return the mean of the models' floating-point state."""
    states = [model.state_dict() for model in models]
    return {
        name: torch.stack([state[name] for state in states]).mean(0)
        for name, tensor in states[0].items()
        if tensor.is_floating_point()
    }


def class_gradient_stages(
    sizes: Sizes, device: torch.device, repeats: int
) -> list[Comparison]:
    """Time a client's class gradients with both students."""
    return [
        class_gradient_stage(name, num_classes, number, device, repeats)
        for name in STUDENTS
        for num_classes, number in sizes.images.items()
    ]


def run_stages(
    sizes: Sizes, device: torch.device, repeats: int, teacher_of: TeacherFactory
) -> tuple[list[Comparison], str]:
    """Time every stage.

    Parameters
    ----------
    sizes : Sizes
        The amount of work in each stage.
    device : torch.device
        Device on which all stages compute.
    repeats : int
        Number of timed runs of each contender.
    teacher_of : callable
        Returns the teacher, given the number of classes and the device.

    Returns
    -------
    tuple
        Comparisons, and paragraphs about distillation and threads.
    """
    smallest = min(sizes.images)
    teacher = teacher_of(smallest, device)
    comparisons = class_gradient_stages(sizes, device, repeats)
    epoch, text = local_epoch_stage(
        smallest, sizes.epoch_images, device, repeats, teacher
    )
    comparisons.append(epoch)
    for num_classes, steps in sizes.steps.items():
        comparisons.append(
            synthesis_stage(num_classes, sizes.per_class, steps, device, repeats)
        )
    for num_classes, epochs in sizes.epochs.items():
        comparisons.append(
            retraining_stage(num_classes, sizes.per_class, epochs, device, repeats)
        )
    if device.type == "cpu" and torch.get_num_threads() > 1:
        with single_threaded_kernels():
            alone = [
                retraining_stage(num_classes, sizes.per_class, epochs, device, repeats)
                for num_classes, epochs in sizes.epochs.items()
                if epochs[0]
            ]
        ratios = "; ".join(
            f"{stage.size}: {median_and_spread(stage.ratios)}" for stage in alone
        )
        text += (
            "\n\nThe published re-training is faster on one thread, as its operations "
            "are small. Against that, ours on one thread too, the ratio is "
            f"({ratios})."
        )
    comparisons.append(round_stage(smallest, sizes, device, repeats, teacher))
    return comparisons, text


def main() -> None:
    """Time every stage at full size and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--class-gradients", action="store_true", help="time this stage alone"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.class_gradients:
        comparisons, text = class_gradient_stages(FULL, device, arguments.repeats), ""
    else:
        comparisons, text = run_stages(
            FULL, device, arguments.repeats, teacher_of_clips_size
        )
    threads = torch.get_num_threads()
    write_results(
        "class-gradients" if arguments.class_gradients else "stages",
        "Stages of a round against the published loops",
        f"Median (least-most) of {arguments.repeats} runs each, in one process, in "
        f"turn, {threads} threads; the ratio is taken pair by pair. Synthesis and "
        "re-training are given per step and epoch.\n\n"
        f"{comparison_table(comparisons)}\n\n{text}",
        device,
        arguments.results,
    )


if __name__ == "__main__":
    main()
