"""What many classes cost: a client, the server, and a round of a thousand classes.

    python -m benchmarks.many_classes cost
    python -m benchmarks.many_classes round --set synthesis.steps=10
    python -m benchmarks.many_classes draw FOLDER

``cost`` times a client's class gradients against its local epoch, and the server's
synthesis and re-training, with the defaults for few classes (the published settings,
except that the released code has 10 draws) and with those that ``"auto"`` chooses.
``round`` runs a whole round of 1,000 classes through ``clip2fl run``: image files of 32
pixels in lists as ImageNet-LT has them, four clients, two a round. ``draw`` writes a
data set of 240 classes that the demo's teacher knows ("small red circle"), on which
``conf/many-classes-compare.toml`` compares accuracies.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import in_fresh_process, markdown, median_and_spread
from benchmarks.measure import write_results as write_page
from benchmarks.process_memory import measured_memory
from benchmarks.stages import SYNTHESIS
from client_app.gradients import coded_class_gradients
from client_app.training import (
    LocalObjective,
    PixelImages,
    augmented_features,
    train_locally,
)
from clip2fl_cli.simulation import simulate
from clip2fl_common.class_gradients import CodedGradient, encoded_bytes
from clip2fl_common.config import RunConfig, defaults
from clip2fl_common.data.datasets import IMAGENET_NORMALIZATION
from clip2fl_common.data.demo import (
    CLASS_NAMES,
    COLOUR_NAMES,
    Split,
    draw_images,
    sample_scenes,
)
from clip2fl_common.models import build_model
from clip2fl_common.partition import long_tail_counts, long_tail_partition
from strategy.gradient_mean import mean_class_gradients
from strategy.retraining import new_classifier, retrain_classifier
from strategy.synthesis import synthesize

CPU = torch.device("cpu")
MODEL, DIM, SAMPLES_PER_CLASS, BATCH = "resnet8-slim", 512, 32, 32
# The demo teacher's captions have these names, with these limits of the radius.
SIZE_NAMES, SIZE_LIMITS = ("small", "middling", "big"), (8.0, 10.0)
DRAWN_AT_ONCE = 500
THOUSAND = 1000


def draw_folders(root: Path, train: int, test: int) -> int:
    """Write drawn pictures of 240 classes: size, colour and shape.

    Parameters
    ----------
    root : Path
        Gets the folders ``train/<class>`` and ``test/<class>``.
    train, test : int
        Pictures of each class.

    Returns
    -------
    int
        Number of classes.
    """
    splits: tuple[tuple[Split, int], ...] = (("train", train), ("test", test))
    for (split, wanted), label in product(splits, range(len(CLASS_NAMES))):
        folders = [
            root / split / f"{size} {colour} {CLASS_NAMES[label]}"
            for size, colour in product(SIZE_NAMES, COLOUR_NAMES)
        ]
        written = [0] * len(folders)
        for folder in folders:
            folder.mkdir(parents=True)
        first = 0
        while min(written) < wanted:
            scenes = sample_scenes(split, label, DRAWN_AT_ONCE, first)
            images = draw_images(split, label, DRAWN_AT_ONCE, first)
            sizes = np.digitize(scenes.radius, SIZE_LIMITS)
            for kind, image in zip(
                sizes * len(COLOUR_NAMES) + scenes.colour, images, strict=True
            ):
                if written[kind] < wanted:
                    _write(folders[kind] / f"{written[kind]:04}.png", image)
                    written[kind] += 1
            first += DRAWN_AT_ONCE
    return len(SIZE_NAMES) * len(COLOUR_NAMES) * len(CLASS_NAMES)


def _write(file: Path, image: "np.typing.NDArray[np.uint8]") -> None:
    Image.fromarray(image.transpose(1, 2, 0)).save(file)


def settings_of(classes: int, published: bool) -> RunConfig:
    """Return the configuration that a run of so many classes gets.

    Parameters
    ----------
    classes : int
        Number of classes C.
    published : bool
        Whether few classes decide the keys, as before they could be ``"auto"``.
    """
    flat = {**defaults(), "dataset.name": "image-folder", "dataset.root": "/x"}
    return RunConfig.from_run_config(flat, 2 if published else classes)


def client_cost(
    classes: int, images: int, clients: int, repeats: int
) -> dict[str, list[float]]:
    """Return a client's core seconds and bytes, by published and chosen settings.

    Parameters
    ----------
    classes, images, clients : int
        The size of the federation: its images are a long tail (IF 10), divided by
        Dirichlet 0.5. The client with the median number of images is measured.
    repeats : int
        Times that everything is measured, in turn.

    Returns
    -------
    dict of str to list of float
        By measurement, one figure a repeat.
    """
    torch.set_num_threads(1)  # as clients of a simulation have it
    torch.manual_seed(0)
    counts = _tail(classes, images)
    labels = np.repeat(np.arange(classes), counts)
    parts = long_tail_partition(labels, classes, 1.0, clients, 0.5, seed=7)
    part = sorted(parts, key=len)[len(parts) // 2]
    own = torch.from_numpy(labels[part])
    pixels = torch.randint(0, 256, (len(part), 3, 32, 32), dtype=torch.uint8)
    loaded = PixelImages(pixels, IMAGENET_NORMALIZATION, CPU)
    found: dict[str, list[float]] = {
        "images": [len(own)],
        "classes held": [len(own.unique())],
    }

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    generator = torch.Generator().manual_seed(1)
    for _ in range(repeats):
        model = build_model(MODEL, classes, DIM)
        classifier = new_classifier(DIM, classes, generator)
        for published in (True, False):
            config = settings_of(classes, published)
            name = "published" if published else "chosen"
            started = time.process_time()
            features, drawn = augmented_features(
                model,
                loaded,
                own,
                draws=config.class_gradients.draws,
                samples_per_class=SAMPLES_PER_CLASS,
                augment=True,
                batch_size=config.evaluation.batch_size,
                generator=generator,
            )
            note(f"{name}: features, s", time.process_time() - started)
            coding = time.process_time()
            coded = coded_class_gradients(
                features,
                drawn,
                classifier.weight.detach(),
                classifier.bias.detach(),
                min_cosine=config.upload.min_cosine,
                precision=config.upload.precision,
            )
            note(f"{name}: gradients and coding, s", time.process_time() - coding)
            note(f"{name}: together, s", time.process_time() - started)
            size = encoded_bytes(coded.values(), config.upload.precision)
            note(f"{name}: upload, MB", size / 1e6)
        started = time.process_time()
        train_locally(
            model,
            loaded,
            own,
            torch.zeros(len(own), classes),
            LocalObjective(distillation_weight=1.0, distillation_temperature=3.0),
            epochs=1,
            batch_size=BATCH,
            learning_rate=0.1,
            crop_padding=4,
            generator=generator,
        )
        note("local epoch, s", time.process_time() - started)
    return found


def _tail(classes: int, images: int, factor: int = 10) -> list[int]:
    """Return a long tail of about so many images, IF 10."""
    largest = max(factor, round(images / classes * np.log(factor) / (1 - 1 / factor)))
    return long_tail_counts(largest, classes, factor)


def server_cost(classes: int, clients: int, steps: int) -> dict[str, float]:
    """Return core seconds for a step of synthesis and an epoch of re-training.

    Every client's class gradients are of random features with four directions a class,
    coded as the run would.
    """
    config = settings_of(classes, published=False)
    per_class = config.synthesis.features_per_class
    generator = torch.Generator().manual_seed(0)
    classifier = new_classifier(DIM, classes, generator)
    weight, bias = classifier.weight.detach(), classifier.bias.detach()
    labels = torch.arange(classes).repeat_interleave(8)

    def reply() -> Mapping[int, CodedGradient]:
        basis = torch.randn(classes, 4, DIM, generator=generator)
        mixed = torch.randn(classes, 8, 4, generator=generator) @ basis
        return coded_class_gradients(
            mixed.flatten(0, 1),
            labels,
            weight,
            bias,
            min_cosine=config.upload.min_cosine,
            precision=config.upload.precision,
        )

    replies = [reply() for _ in range(clients)]
    started = time.process_time()
    gradients = mean_class_gradients(replies)
    seconds = {"mean": time.process_time() - started}
    features = torch.randn(classes, per_class, DIM, generator=generator)
    prototypes = torch.nn.functional.normalize(
        torch.randn(classes, DIM, generator=generator), dim=1
    )
    started = time.process_time()
    features = synthesize(
        features, gradients, weight, bias, prototypes, steps=steps, **SYNTHESIS
    )
    seconds["step"] = (time.process_time() - started) / steps
    started = time.process_time()
    retrain_classifier(
        features,
        epochs=1,
        batch_size=config.retraining.batch_size,
        learning_rate=config.retraining.learning_rate,
        generator=generator,
    )
    seconds["epoch"] = time.process_time() - started
    return seconds


def cost_page(classes: int, images: int, clients: int, repeats: int) -> str:
    """Return the tables of ``cost``."""
    found, _ = in_fresh_process(client_cost, classes, images, clients, repeats)
    ratios = {
        name: [
            gradients / epoch
            for gradients, epoch in zip(
                found[f"{name}: together, s"], found["local epoch, s"], strict=True
            )
        ]
        for name in ("published", "chosen")
    }
    rows = [[name, median_and_spread(values)] for name, values in found.items()] + [
        [f"{name}: class gradients over a local epoch", median_and_spread(values)]
        for name, values in ratios.items()
    ]
    text = (
        f"The median client of {clients} that share {images:,} images of {classes} "
        f"classes (IF 10, Dirichlet 0.5), {MODEL}, one thread, {repeats} times in "
        "turn, median (least-most). Seconds are the process's own seconds on a core, "
        "which other programs change less than the clock's:\n\n"
        f"{markdown(['', 'a round'], rows)}\n\n"
    )
    server_rows = []
    for number in (10, classes, THOUSAND):
        seconds, peak = in_fresh_process(server_cost, number, 2, 2)
        published, chosen = (
            settings_of(number, few).retraining.epochs for few in (True, False)
        )
        server_rows.append(
            [
                str(number),
                f"{seconds['mean']:.2f}",
                f"{seconds['step']:.3g}",
                f"{seconds['epoch']:.3g}",
                f"{published * seconds['epoch']:.3g}",
                f"{chosen * seconds['epoch']:.3g}",
                f"{peak:.2f}",
            ]
        )
    header = ["C", "mean of 2 clients, s", "step of synthesis, s", "epoch, s"]
    header += ["published re-training, s", "chosen re-training, s", "peak, GiB"]
    return text + (
        "The server, m = 100, each C in a process of its own, seconds on all cores "
        "together; re-training is the epoch's seconds times the epochs:\n\n"
        f"{markdown(header, server_rows)}"
    )


def thousand_lists(folder: Path, pictures: int, images: int) -> str:
    """Write pictures and lists of 1,000 classes; return the settings that name them."""
    (folder / "pictures").mkdir(parents=True)
    for number in range(pictures):
        label, place = number % len(CLASS_NAMES), number // len(CLASS_NAMES)
        (image,) = draw_images("train", label, 1, place)
        _write(folder / "pictures" / f"{number:05}.png", image)
    counts = {"train": _tail(THOUSAND, images), "test": [1] * THOUSAND}
    for split, of_class in counts.items():
        labels = np.repeat(np.arange(THOUSAND), of_class)
        lines = [
            f"pictures/{number % pictures:05}.png {label}"
            for number, label in enumerate(labels)
        ]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return (
        f'dataset.name="imagenet-lt" dataset.root="{folder}" '
        f'dataset.train-list="{folder / "train.txt"}" '
        f'dataset.test-list="{folder / "test.txt"}" dataset.imbalance-factor=1.0'
    )


def round_page(images: int, rounds: int, settings: Sequence[str]) -> str:
    """Run rounds of 1,000 classes through the command; return their table.

    Raises
    ------
    RuntimeError
        If the run failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        federation = (
            "partition.clients=4 federation.clients-per-round=2 client.epochs=1 "
            f'federation.rounds={rounds} run.dir="{folder}" run.name="run"'
        )
        lists = thousand_lists(folder / "data", 2000, images)
        overrides = [lists, federation, *settings]
        with measured_memory() as peaks:
            result = simulate(overrides=overrides, supernodes=2)
        if not result.completed:
            raise RuntimeError(f"{result.status}: {result.details}\n{result.log}")
        lines = (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        config = json.loads((folder / "run" / "config.json").read_text("utf-8"))
    measured = [json.loads(line) for line in lines]
    phases = list(measured[0]["seconds"])
    rows = [
        [phase, *(f"{line['seconds'][phase]:.1f}" for line in measured)]
        for phase in phases
    ]
    for way in ("down", "up"):
        rows.append(
            [f"MB {way}", *(f"{line['bytes'][way] / 1e6:.1f}" for line in measured)]
        )
    rows.append(
        [
            "MB of class gradients, by client",
            *(
                ", ".join(
                    f"{size / 1e6:.1f}" for size in one["bytes"]["class_gradients"]
                )
                for one in measured
            ),
        ]
    )
    chosen = config["config"]
    table = markdown(["s", *(f"round {line['round']}" for line in measured)], rows)
    memory = markdown(
        ["process", "peak, GiB"],
        [
            *([role, f"{peak:.2f}"] for role, peak in sorted(peaks.of_role.items())),
            ["all together", f"{peaks.together:.2f}"],
        ],
    )
    return (
        f"{sum(config['train_images_per_class']):,} images (2,000 pictures, repeated) "
        f"of 1,000 classes, 4 clients, 2 a round, one local epoch of {MODEL}. "
        f"{chosen['synthesis.steps']} steps of synthesis, "
        f"{chosen['retraining.epochs']} epochs of re-training, "
        f"{chosen['class-gradients.draws']} draws, upload.min-cosine = "
        f"{chosen['upload.min-cosine']}. Seconds of phases; those of clients are sums "
        f"over the round's clients:\n\n{table}\n\nLargest memory of a process of each "
        f"kind, and of all together (shared memory counts once):\n\n{memory}"
    )


def main() -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    cost = kinds.add_parser("cost")
    cost.add_argument("--classes", type=int, default=200)
    cost.add_argument("--images", type=int, default=28_000)
    cost.add_argument("--clients", type=int, default=20)
    cost.add_argument("--repeats", type=int, default=3)
    whole = kinds.add_parser("round")
    whole.add_argument("--images", type=int, default=13_000)
    whole.add_argument("--rounds", type=int, default=1)
    whole.add_argument("--set", nargs="*", default=[])
    draw = kinds.add_parser("draw")
    draw.add_argument("folder", type=Path)
    draw.add_argument("--train", type=int, default=60)
    draw.add_argument("--test", type=int, default=10)
    options = parser.parse_args()
    if options.kind == "draw":
        number = draw_folders(options.folder, options.train, options.test)
        print(f"{number} classes in {options.folder}")
    elif options.kind == "cost":
        text = cost_page(
            options.classes, options.images, options.clients, options.repeats
        )
        write_page("many-classes-cost", "What many classes cost", text, CPU)
    else:
        text = round_page(options.images, options.rounds, options.set)
        title = "A round with a thousand classes through `clip2fl run`"
        write_page("thousand-classes", title, text, CPU)


if __name__ == "__main__":
    main()
