"""Bytes of uploaded class gradients at a hundred classes, on real features.

    python -m benchmarks.uploads --clip-features cifar10_test500_vitb32.npz \
        --run runs/demo-clip2fl-7 --accuracy dense=runs-full half=runs low=runs-lowrank

A hundred classes are made of a data set's ten: each of the ten stands for ten of the
hundred, so that a class gradient has a hundred rows, as many images as a real class and
real features. Features are true CLIP ViT-B/32's, or a trained student's on augmented
images (``--run``, a run folder). ``--accuracy`` compares finished runs of the demo that
differ in their uploads only.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import markdown, write_results
from benchmarks.stages import DRAWS, SAMPLES_PER_CLASS, our_retraining
from client_app.gradients import class_gradients
from client_app.training import augmented_features
from clip2fl_cli.runs import FinishedRun
from clip2fl_common.class_gradients import (
    LowRankGradient,
    Precision,
    encode_gradients,
    encoded_bytes,
    row_cosines,
)
from clip2fl_common.config import RunConfig, defaults
from clip2fl_common.data.datasets import load_dataset
from server_app.delivery import load_model
from strategy.retraining import new_classifier

NUM_CLASSES = 100
CODES: tuple[tuple[Precision, float], ...] = (
    ("full", 1.0),
    ("half", 1.0),
    ("half", 0.999),
    ("half", 0.99),
    ("half", 0.95),
)

Features = tuple[torch.Tensor, torch.Tensor]


def clip_features(path: Path) -> Features:
    """Return true CLIP features [N, d] and their ten classes [N].

    Unit features would leave the classifier untrained at the usual step size, so they
    get the length of federated features, sqrt(d).
    """
    with np.load(path) as arrays:
        labels = next(
            arrays[name] for name in arrays.files if arrays[name].ndim == 1
        ).astype(np.int64)
        features = next(
            arrays[name]
            for name in arrays.files
            if arrays[name].shape[:1] == labels.shape and arrays[name].ndim == 2
        ).astype(np.float32)
    scale = features.shape[1] ** 0.5
    return torch.from_numpy(scale * features), torch.from_numpy(labels)


def student_features(run: Path) -> Features:
    """Return a delivered model's features of augmented test images, and classes."""
    model, card = load_model(run / "model.safetensors")
    # A run of an earlier version lacks keys that are none of the data set's.
    config = RunConfig.from_run_config({**defaults(), **FinishedRun.read(run).config})
    dataset = load_dataset(config.dataset)
    loaded = dataset.test.load(np.arange(len(dataset.test.labels)))
    return augmented_features(
        model,
        card.normalization(loaded.images),
        loaded.labels,
        draws=DRAWS,
        samples_per_class=SAMPLES_PER_CLASS,
        augment=True,
        batch_size=64,
        generator=torch.Generator().manual_seed(0),
    )


def as_a_hundred(features: Features) -> Features:
    """Return each class's features ten times, for ten of a hundred classes."""
    values, labels = features
    times = NUM_CLASSES // (int(labels.max()) + 1)
    copies = torch.arange(times).repeat_interleave(len(labels))
    return values.repeat(times, 1), labels.repeat(times) * times + copies


def rows_of(name: str, features: Features) -> Iterator[list[str]]:
    """Yield the table's rows of one kind of features, at two classifiers."""
    values, labels = as_a_hundred(features)
    counts = labels.bincount()
    per_class = int(counts.min())
    balanced = torch.stack(
        [values[labels == c][:per_class] for c in range(NUM_CLASSES)]
    )
    generator = torch.Generator().manual_seed(1)
    classifiers = {
        "fresh": new_classifier(values.shape[1], NUM_CLASSES, generator),
        "trained": our_retraining(balanced, epochs=300),
    }
    for state, classifier in classifiers.items():
        dense = class_gradients(
            values, labels, classifier.weight.detach(), classifier.bias.detach()
        )
        today = encoded_bytes(dense.values(), "full")
        for precision, min_cosine in CODES:
            started = time.perf_counter()
            coded = encode_gradients(dense, min_cosine=min_cosine, precision=precision)
            seconds = time.perf_counter() - started
            size = encoded_bytes(coded.values(), precision)
            cosines = [
                float(row_cosines(dense[c].weight, coded[c].weight).min())
                for c in dense
            ]
            ranks = [
                g.rank if isinstance(g, LowRankGradient) else 0 for g in coded.values()
            ]
            yield [
                f"{name} ({int(counts.min())} a class)",
                state,
                precision,
                f"{min_cosine:g}",
                f"{size / 2**20:.2f}",
                f"1/{today / size:.1f}",
                f"{statistics.mean(ranks):.1f}, {max(ranks)}" if any(ranks) else "-",
                f"{min(cosines):.5f}",
                f"{1000 * seconds / NUM_CLASSES:.1f}",
            ]


def accuracy_rows(settings: Sequence[str]) -> list[list[str]]:
    """Return a row for each ``LABEL=FOLDER``: accuracy of the finished runs in it."""
    rows = []
    for setting in settings:
        label, _, folder = setting.partition("=")
        runs = sorted(
            (
                FinishedRun.read(place.parent)
                for place in Path(folder).glob("*-clip2fl-*/model.safetensors")
            ),
            key=lambda run: run.seed,
        )
        upload = runs[0].config
        gradient_bytes = [
            statistics.mean(line["bytes"]["class_gradients"])
            for run in runs
            for line in run.rounds
        ]
        balanced = [run.last("retrained", "balanced") or 0.0 for run in runs]
        few = [run.last("retrained", "few") or 0.0 for run in runs]
        rows.append(
            [
                label,
                upload["upload.precision"],
                f"{upload['upload.min-cosine']:g}",
                ", ".join(str(run.seed) for run in runs),
                f"{statistics.mean(gradient_bytes) / 1024:.1f}",
                ", ".join(f"{value:.2f}" for value in balanced),
                f"{statistics.mean(balanced):.2f}",
                f"{statistics.mean(few):.2f}",
            ]
        )
    return rows


def main() -> None:
    """Measure what the command line names, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip-features", type=Path)
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--accuracy", nargs="*", default=[], metavar="LABEL=FOLDER")
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    if arguments.clip_features:
        rows += rows_of("CLIP ViT-B/32", clip_features(arguments.clip_features))
    if arguments.run:
        rows += rows_of("student", student_features(arguments.run))
    header = [
        *("features", "classifier", "precision", "min-cosine", "MiB", "of float32"),
        *("rank: mean, largest", "worst cosine", "ms a class"),
    ]
    text = "One client that holds all of 100 classes, d = 512:\n\n" + markdown(
        header, rows
    )
    if arguments.accuracy:
        text += (
            "\n\nThe demo (mean of the last five rounds, re-trained head, %; KiB of "
            "class gradients a client and round):\n\n"
        ) + markdown(
            [
                *("uploads", "precision", "min-cosine", "seeds", "KiB"),
                *("balanced by seed", "balanced", "few"),
            ],
            accuracy_rows(arguments.accuracy),
        )
    write_results("uploads", "Uploads of class gradients", text, torch.device("cpu"))


if __name__ == "__main__":
    main()
