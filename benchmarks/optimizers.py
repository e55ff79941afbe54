"""Time a local epoch with each optimizer against plain SGD's.

    python -m benchmarks.optimizers

The images are random: the work does not depend on their content. All optimizers train
the same model in turn in one process, and an epoch's time is divided by plain SGD's of
the same turn. Epochs of two batches keep the turns short, and quartiles leave out the
turns that other work on the machine delayed.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch

from benchmarks.measure import (
    interleaved,
    markdown,
    median_and_spread,
    write_results,
)
from client_app.optimizers import OptimizerSettings
from client_app.training import LocalObjective, TrainingLosses, train_locally
from clip2fl_common.choices import OptimizerName
from clip2fl_common.config import defaults
from clip2fl_common.devices import resolve_device
from clip2fl_common.models import build_model

NUM_CLASSES = 10
FEATURE_DIM = 512
# Step sizes do not change the time, but a model that diverges stops the training.
LEARNING_RATE = 0.001


def epoch(
    model: str, batch_size: int, images: int, device: torch.device, name: OptimizerName
) -> Callable[[], TrainingLosses]:
    """Return a local epoch with distillation, on its own copy of the same model."""
    torch.manual_seed(7)
    network = build_model(model, NUM_CLASSES, FEATURE_DIM).to(device)
    pixels = torch.randn(images, 3, 32, 32).to(device)
    labels = torch.randint(NUM_CLASSES, (images,)).to(device)
    teacher = torch.randn(images, NUM_CLASSES).to(device)
    return partial(
        train_locally,
        copy.deepcopy(network),
        pixels,
        labels,
        teacher,
        LocalObjective(1.0, 3.0),
        epochs=1,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        crop_padding=4,
        generator=torch.Generator().manual_seed(7),
        optimizer=OptimizerSettings(name, other_learning_rate=LEARNING_RATE),
    )


def table(
    model: str, batch_size: int, images: int, repeats: int, device: torch.device
) -> str:
    """Return a Markdown table of the optimizers' times.

    Parameters
    ----------
    model : str
        The student.
    batch_size, images : int
        Mini-batch size and number of images of the epoch.
    repeats : int
        Number of timed epochs of each optimizer, at least 2.
    device : torch.device
        Device on which they train.
    """
    names: tuple[OptimizerName, ...] = get_args(OptimizerName)
    seconds = interleaved(
        {name: epoch(model, batch_size, images, device, name) for name in names},
        repeats=repeats,
        device=device,
    )
    steps = -(-images // batch_size)
    rows = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["sgd"], strict=True)]
        milliseconds = [1000 * value / steps for value in own]
        rows.append([name, _quartiles(milliseconds), _quartiles(ratios)])
    return markdown(["optimizer", "ms a step", "of sgd's"], rows)


def _quartiles(values: list[float]) -> str:
    """Return "median (first quartile-third quartile)"."""
    return median_and_spread(statistics.quantiles(values, n=4, method="inclusive"))


def main() -> None:
    """Print the table and write it to a dated page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=defaults()["model.name"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=150)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--note", default="", help="a sentence below the table")
    options = parser.parse_args()
    device = resolve_device(options.device)
    found = table(
        options.model, options.batch_size, options.images, options.repeats, device
    )
    text = (
        f"{options.model}, batch {options.batch_size}, {options.images} images of 32 "
        f"pixels, with distillation, {torch.get_num_threads()} threads; median "
        f"(quartiles) of {options.repeats} epochs, ratios pair by pair.\n\n{found}"
    )
    if options.note:
        text += f"\n\n{options.note}"
    write_results("optimizers", "Optimizers of local training", text, device)


if __name__ == "__main__":
    main()
