"""Measure a round with a thousand classes on one machine: seconds and peak memory.

    python -m benchmarks.scale --text-features imagenet1k_text_vitb32.npz

The round is shaped like ImageNet-LT, from class gradients to re-trained classifier:
1,000 classes with 645 to 5 images, twenty clients, Dirichlet 0.5. Random features
replace the images. ``--text-features`` gives real class prototypes (array
``text_features``, or the only two-dimensional one of width 512); the default is random
ones. Every part runs in its own process, since the operating system reports peak memory
by process.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks.measure import (
    in_fresh_process,
    markdown,
    median_and_spread,
    write_results,
)
from benchmarks.stages import SYNTHESIS, our_retraining, synthesis_problem
from client_app.gradients import coded_class_gradients
from clip2fl_common.class_gradients import (
    ClassGradient,
    CodedGradient,
    LowRankGradient,
    Precision,
    encoded_bytes,
)
from clip2fl_common.partition import long_tail_counts, long_tail_partition
from strategy.gradient_mean import mean_class_gradients
from strategy.synthesis import gradient_matching_loss, synthesize

DRAWS, SAMPLES_PER_CLASS = 10, 32
PRECISION: Precision = "half"
# Names of targets, and the rank of their factors; 0 means dense.
KINDS = {"dense": 0, "rank 20": 20}
# Features of a class spread along few directions of falling size. With this spread and
# this share of augmentation, two images have a cosine of about 0.6.
SPREAD, SPECTRUM_EXPONENT, AUGMENTATION_SHARE = 1.0, -0.5, 0.3


@dataclass(frozen=True)
class Shape:
    """The size of the round.

    Attributes
    ----------
    num_classes, per_class, dim : int
        C, m and d.
    largest, imbalance : int
        Images of the most frequent class, and the imbalance factor (how many times as
        many images it has as the rarest class).
    clients : int
        Number of clients; all take part.
    min_cosine : float
        Bound of the uploads' low-rank code.
    steps, epochs : int
        Descent steps of the synthesis and epochs of re-training.
    """

    num_classes: int = 1000
    per_class: int = 100
    dim: int = 512
    largest: int = 645
    imbalance: int = 129
    clients: int = 20
    min_cosine: float = 0.99
    steps: int = 100
    epochs: int = 300


def load_prototypes(path: Path | None, shape: Shape) -> torch.Tensor:
    """Return unit prototypes [C, d] from a file, or random ones.

    Raises
    ------
    ValueError
        If the file has no array of the required shape.
    """
    if path is None:
        drawn = torch.randn(shape.num_classes, shape.dim, generator=_seeded(0))
        return functional.normalize(drawn, dim=1)
    with np.load(path) as arrays:
        for name in arrays.files:
            if arrays[name].shape == (shape.num_classes, shape.dim):
                found = torch.from_numpy(arrays[name].astype(np.float32))
                return functional.normalize(found, dim=1)
        found_shapes = {name: arrays[name].shape for name in arrays.files}
    raise ValueError(
        f"{path} has the arrays {found_shapes}; one of shape "
        f"{(shape.num_classes, shape.dim)} is needed"
    )


def whole_round(shape: Shape, prototypes: torch.Tensor) -> dict[str, float]:
    """Compute a round; return the seconds by phase and the bytes per client."""
    counts = long_tail_counts(shape.largest, shape.num_classes, shape.imbalance)
    labels = np.repeat(np.arange(shape.num_classes), counts)
    parts = long_tail_partition(
        labels, shape.num_classes, 1.0, shape.clients, 0.5, seed=7
    )
    # A partly trained classifier, which resembles the prototypes.
    generator = _seeded(1)
    noise = torch.randn(prototypes.shape, generator=generator) * shape.dim**-0.5
    weight, bias = 4 * (prototypes + noise), torch.zeros(shape.num_classes)
    spectrum = torch.arange(1, shape.dim + 1) ** SPECTRUM_EXPONENT
    spectrum *= SPREAD / spectrum.norm()
    directions = torch.linalg.qr(
        torch.randn(shape.dim, shape.dim, generator=generator)
    ).Q
    mixing = spectrum[:, None] * directions
    figures = {"images": float(len(labels)), "classes held": 0.0, "bytes": 0.0}
    seconds = {"clients' gradients": 0.0}

    def replies() -> Iterator[dict[int, CodedGradient]]:
        for client, part in enumerate(parts):
            own = torch.from_numpy(labels[part])
            features, drawn = _drawn_features(own, prototypes, mixing, _seeded(client))
            started = time.perf_counter()
            coded = coded_class_gradients(
                features,
                drawn,
                weight,
                bias,
                min_cosine=shape.min_cosine,
                precision=PRECISION,
            )
            seconds["clients' gradients"] += time.perf_counter() - started
            figures["classes held"] += len(coded) / shape.clients
            size = encoded_bytes(coded.values(), PRECISION)
            figures["bytes"] += size / shape.clients
            yield coded

    started = time.perf_counter()
    gradients = mean_class_gradients(replies())
    seconds["mean"] = time.perf_counter() - started - seconds["clients' gradients"]
    figures["mean rank"] = float(
        np.mean([g.rank for g in gradients.values() if isinstance(g, LowRankGradient)])
    )
    start = torch.randn(
        shape.num_classes, shape.per_class, shape.dim, generator=generator
    )
    started = time.perf_counter()
    features = synthesize(
        start, gradients, weight, bias, prototypes, steps=shape.steps, **SYNTHESIS
    )
    seconds["synthesis"] = time.perf_counter() - started
    started = time.perf_counter()
    our_retraining(features, shape.epochs)
    seconds["re-training"] = time.perf_counter() - started
    for name, moved in (("loss before", start), ("loss after", features)):
        loss = gradient_matching_loss(moved, gradients, weight, bias)
        figures[name] = float(loss) / shape.num_classes**2
    return figures | seconds


def _drawn_features(
    labels: torch.Tensor,
    prototypes: torch.Tensor,
    mixing: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of augmented draws of a client's images, and their labels."""

    def spread(number: int) -> torch.Tensor:
        return torch.randn(number, len(mixing), generator=generator) @ mixing

    images = prototypes[labels] + spread(len(labels))
    picked = []
    for _ in range(DRAWS):
        order = torch.randperm(len(labels), generator=generator)
        ordered = labels[order].argsort(stable=True)
        sizes = torch.bincount(labels)
        place = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels.sort()[0]]
        picked.append(order[ordered[place < SAMPLES_PER_CLASS]])
    chosen = torch.cat(picked)
    return images[chosen] + AUGMENTATION_SHARE * spread(len(chosen)), labels[chosen]


def synthesis_step(shape: Shape, rank: int) -> float:
    """Return the seconds of a descent step; rank 0 means dense gradients."""
    features, gradients, weight, bias, prototypes = synthesis_problem(
        shape.num_classes if not rank else 2, shape.per_class, torch.device("cpu")
    )
    coded: dict[int, CodedGradient] = dict(gradients)
    if rank:
        generator = _seeded(5)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        classes, dim = shape.num_classes, shape.dim
        coded = {
            c: LowRankGradient(
                normal(classes, rank), normal(rank, dim), normal(classes)
            )
            for c in range(classes)
        }
        features = normal(classes, shape.per_class, dim)
        weight, bias = normal(classes, dim) * dim**-0.5, normal(classes)
        prototypes = functional.normalize(normal(classes, dim), dim=1)
    started = time.perf_counter()
    synthesize(
        features, coded, weight, bias, prototypes, steps=shape.steps, **SYNTHESIS
    )
    return (time.perf_counter() - started) / shape.steps


def server_mean(shape: Shape, rank: int) -> float:
    """Return the seconds to average all clients' class gradients as they arrive."""
    classes, dim = shape.num_classes, shape.dim
    generator = _seeded(6)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    def replies() -> Iterator[dict[int, CodedGradient]]:
        for _ in range(shape.clients):
            yield {
                c: LowRankGradient(normal(classes, rank), normal(rank, dim), bias)
                if rank
                else ClassGradient(normal(classes, dim), bias)
                for c, bias in enumerate(normal(classes, classes))
            }

    waiting = 0.0
    arriving = replies()

    def timed() -> Iterator[dict[int, CodedGradient]]:
        nonlocal waiting
        while True:
            started = time.perf_counter()
            reply = next(arriving, None)
            waiting += time.perf_counter() - started
            if reply is None:
                return
            yield reply

    started = time.perf_counter()
    mean_class_gradients(timed())
    return time.perf_counter() - started - waiting


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Sized = dict[tuple[str, int], tuple[list[float], float]]


def measure(
    function: Callable[[Shape, int], float], shape: Shape, rank: int, repeats: int
) -> tuple[list[float], float]:
    """Return the seconds of each run, and the largest peak memory in GiB."""
    runs = [in_fresh_process(function, shape, rank) for _ in range(repeats)]
    seconds, peak = [s for s, _ in runs], max(peak for _, peak in runs)
    print(function.__name__, shape, rank, median_and_spread(seconds), f"{peak:.2f} GiB")
    return seconds, peak


def size_table(size: str, measured: Sized) -> str:
    """Return a Markdown table for one growing size."""
    return markdown(
        [size, "gradients", "seconds", "peak memory, GiB"],
        [
            [str(number), kind, median_and_spread(seconds), f"{peak:.2f}"]
            for (kind, number), (seconds, peak) in measured.items()
        ],
    )


def plot(path: Path, by_classes: Sized, by_clients: Sized) -> None:
    """Draw cost against classes and clients; print a note without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    titles = ("classes C", "clients")
    for axes, title, measured in zip(
        figure.subplots(1, 2), titles, (by_classes, by_clients), strict=True
    ):
        for kind, marker in zip(KINDS, "os", strict=True):
            sizes = [number for k, number in measured if k == kind]
            medians = [statistics.median(measured[kind, n][0]) for n in sizes]
            axes.loglog(sizes, medians, marker=marker, label=f"{kind} gradients")
        axes.set_xlabel(title)
        axes.set_xticks(sizes, labels=list(map(str, sizes)))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    axes_left, axes_right = figure.axes
    axes_left.set_ylabel("seconds a synthesis step")
    axes_right.set_ylabel("seconds for the clients' mean, C = 100")
    figure.savefig(path, dpi=120)
    print(path)


def main() -> None:
    """Measure steps of growing size and a whole round, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-features", type=Path)
    parser.add_argument("--steps", type=int, default=Shape.steps)
    parser.add_argument("--epochs", type=int, default=Shape.epochs)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    by_classes = {
        (kind, num_classes): measure(
            synthesis_step,
            replace(Shape(), num_classes=num_classes, steps=3),
            rank,
            arguments.repeats,
        )
        for num_classes in (10, 30, 100, 300, 1000)
        for kind, rank in KINDS.items()
    }
    by_clients = {
        (kind, clients): measure(
            server_mean,
            replace(Shape(), num_classes=100, clients=clients),
            rank,
            arguments.repeats,
        )
        for clients in (5, 10, 20, 40, 80)
        for kind, rank in KINDS.items()
    }
    shape = replace(Shape(), steps=arguments.steps, epochs=arguments.epochs)
    prototypes = load_prototypes(arguments.text_features, shape)
    figures, peak = in_fresh_process(whole_round, shape, prototypes)
    dense = figures["classes held"] * shape.num_classes * (shape.dim + 1) * 4
    phases = ("clients' gradients", "mean", "synthesis", "re-training")
    text = (
        f"Synthesis step, m = {shape.per_class}, d = {shape.dim}, each in a process of "
        f"its own ({arguments.repeats} runs, median and range):\n\n"
        f"{size_table('C', by_classes)}\n\n"
        "Mean of the class gradients of many clients, C = 100, all classes held, as "
        f"they arrive:\n\n{size_table('clients', by_clients)}\n\n"
        f"A whole round of {shape.clients} clients that share {figures['images']:,.0f} "
        f"images of {shape.num_classes} classes, {figures['classes held']:.0f} classes "
        f"a client, low-rank uploads of cosine {shape.min_cosine} at least: "
        f"{figures['bytes'] / 2**20:.1f} MiB of class gradients a client, against "
        f"{dense / 2**30:.2f} GiB as published. {shape.steps} descent steps, "
        f"{shape.epochs} epochs of re-training. Peak memory, all in one process: "
        f"{peak:.2f} GiB. Mean rank of the clients' mean: "
        f"{figures['mean rank']:.0f}. Mean of 1 - cosine of a gradient's row: "
        f"{figures['loss before']:.4f} before the synthesis, "
        f"{figures['loss after']:.4f} after it.\n\n"
        + markdown(
            ["phase", "seconds"],
            [[phase, f"{figures[phase]:.0f}"] for phase in phases],
        )
    )
    page = write_results(
        "scale", "A thousand classes on one machine", text, torch.device("cpu")
    )
    plot(page.with_suffix(".png"), by_classes, by_clients)


if __name__ == "__main__":
    main()
