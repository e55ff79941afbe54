"""Time CUDA graphs against the same steps one by one.

    python -m benchmarks.recorded --device cuda

Needs only torch and torchvision. On a CPU nothing is recorded: both contenders are the
same there, which only shows that the benchmark runs.
"""

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from benchmarks.measure import (
    RESULTS,
    Comparison,
    compare,
    markdown,
    median_and_spread,
    write_results,
)
from benchmarks.stages import (
    BATCH_SIZE,
    DIM,
    PER_CLASS,
    RETRAINING,
    STUDENTS,
    SYNTHESIS,
    TEMPERATURE,
    largest_difference,
    normalized,
    random_images,
    seeded,
    server_classifier,
    student,
)
from client_app.optimizers import OptimizerSettings
from client_app.training import LocalObjective, train_locally
from clip2fl_common.choices import OptimizerName
from clip2fl_common.class_gradients import ClassGradient
from clip2fl_common.graphs import Capture, capture_for, run_directly
from strategy.retraining import retrain_classifier
from strategy.synthesis import synthesize


@dataclass(frozen=True)
class Sizes:
    """The amount of work: a client's images and epochs, and each C with its work.

    Attributes
    ----------
    images, epochs : int
        Of local training.
    retraining, synthesis : dict of int to int
        By number of classes: epochs of re-training, and descent steps.
    per_class : int
        Federated features of each class.
    students : tuple of str
        Models of local training.
    """

    images: int
    epochs: int
    retraining: dict[int, int]
    synthesis: dict[int, int]
    per_class: int = PER_CLASS
    students: tuple[str, ...] = STUDENTS


FULL = Sizes(310, 5, {10: 300, 100: 30, 1000: 2}, {10: 100, 100: 100})
TINY = Sizes(9, 1, {4: 2}, {4: 2}, 3, ("resnet8-slim",))


def training_stage(
    name: str,
    optimizer: OptimizerName,
    sizes: Sizes,
    device: torch.device,
    repeats: int,
) -> Comparison:
    """Time a step of a client's local training with distillation."""
    pixels, labels = random_images(sizes.images, 10, device)
    images = normalized(pixels)
    logits = 5 * torch.randn(sizes.images, 10, generator=seeded()).to(device)
    start = student(10, device, name)

    def train(capture: Capture) -> torch.Tensor:
        model = copy.deepcopy(start)
        train_locally(
            model,
            images,
            labels,
            logits,
            LocalObjective(1.0, TEMPERATURE),
            epochs=sizes.epochs,
            batch_size=BATCH_SIZE,
            learning_rate=0.01,
            crop_padding=4,
            generator=seeded(),
            optimizer=OptimizerSettings(optimizer),
            capture=capture,
        )
        return model.classifier.weight.detach()

    steps = sizes.epochs * -(-sizes.images // BATCH_SIZE)
    recorded = capture_for(device) or run_directly
    return compare(
        "local step",
        f"{name}, {optimizer}, {sizes.images} images, {sizes.epochs} epochs",
        lambda: train(run_directly),
        lambda: train(recorded),
        repeats=repeats,
        device=device,
        difference=largest_difference(train(run_directly), train(recorded)),
        units=(steps, steps),
    )


def retraining_stage(
    num_classes: int, epochs: int, sizes: Sizes, device: torch.device, repeats: int
) -> Comparison:
    """Time an epoch of re-training."""
    shape = (num_classes, sizes.per_class, DIM)
    features = torch.randn(*shape, generator=seeded()).to(device)

    def retrain(capture: Capture) -> torch.Tensor:
        return retrain_classifier(
            features,
            epochs=epochs,
            generator=seeded(),
            capture=capture,
            **RETRAINING,
        ).weight

    recorded = capture_for(device) or run_directly
    return compare(
        "re-training epoch",
        f"C = {num_classes}, m = {sizes.per_class}, d = {DIM}, of {epochs} epochs",
        lambda: retrain(run_directly),
        lambda: retrain(recorded),
        repeats=repeats,
        device=device,
        difference=largest_difference(retrain(run_directly), retrain(recorded)),
        units=(epochs, epochs),
    )


def synthesis_stage(
    num_classes: int, steps: int, sizes: Sizes, device: torch.device, repeats: int
) -> Comparison:
    """Time a descent step of the federated features."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=seeded()).to(device)

    features = normal(num_classes, sizes.per_class, DIM)
    gradients = {
        c: ClassGradient(normal(num_classes, DIM), normal(num_classes))
        for c in range(num_classes)
    }
    weight, bias = server_classifier(num_classes, device)
    text = torch.nn.functional.normalize(normal(num_classes, DIM), dim=1)

    def move(capture: Capture) -> torch.Tensor:
        return synthesize(
            features,
            gradients,
            weight,
            bias,
            text,
            steps=steps,
            capture=capture,
            **SYNTHESIS,
        )

    recorded = capture_for(device) or run_directly
    return compare(
        "synthesis step",
        f"C = {num_classes}, m = {sizes.per_class}, d = {DIM}, of {steps} steps",
        lambda: move(run_directly),
        lambda: move(recorded),
        repeats=repeats,
        device=device,
        difference=largest_difference(move(run_directly), move(recorded)),
        units=(steps, steps),
    )


def run_all(sizes: Sizes, device: torch.device, repeats: int) -> list[Comparison]:
    """Time all stages."""
    optimizers: tuple[OptimizerName, ...] = get_args(OptimizerName)
    found = [
        training_stage(name, optimizer, sizes, device, repeats)
        for name in sizes.students
        for optimizer in optimizers
    ]
    for num_classes, epochs in sizes.retraining.items():
        found.append(retraining_stage(num_classes, epochs, sizes, device, repeats))
    for num_classes, steps in sizes.synthesis.items():
        found.append(synthesis_stage(num_classes, steps, sizes, device, repeats))
    return found


def table(comparisons: list[Comparison]) -> str:
    """Return a Markdown table."""
    header = ["stage", "size", "one by one, s", "graph, s", "ratio", "difference"]
    rows = [
        [
            c.stage,
            c.size,
            median_and_spread(c.slow),
            median_and_spread(c.fast),
            median_and_spread(c.ratios),
            f"{c.difference:.1e}",
        ]
        for c in comparisons
    ]
    return markdown(header, rows)


def main() -> None:
    """Time all stages and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = TINY if arguments.tiny else FULL
    comparisons = run_all(sizes, device, arguments.repeats)
    write_results(
        "recorded",
        "CUDA graphs against single steps",
        f"Median (least-most) of {arguments.repeats} runs each, in one process, in "
        "turn, after one run that records; times are per step or epoch.\n\n"
        f"{table(comparisons)}",
        device,
        arguments.results,
    )


if __name__ == "__main__":
    main()
