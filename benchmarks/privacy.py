"""Measure what a curious server learns from class gradients, by protection.

    python -m benchmarks.privacy runs/NAME

NAME is a finished run of clip2fl or creff. Its delivered model computes the features.

Reconstruction: for class c, row c of the weight gradient divided by the bias gradient
is a mean of the images' features, weighted by the classifier's error on each image (Zhu
et al. 2019 for one image; see docs/privacy.md). This benchmark computes the cosine of
the reconstruction with each image's own feature, not augmented. The baseline is the
cosine of another image of the same class. Only the excess over the baseline was
revealed by the gradient; the rest follows from the class.

Class set: the classes that a client holds, found from the classes that it sent, and
from its local model, whose bias rises for the classes it trained on.

The effect of noise on accuracy is measured by
``clip2fl compare conf/demo-privacy.toml``.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks.measure import RESULTS, markdown, write_results
from client_app.gradients import coded_class_gradients
from client_app.noise import gradient_protection
from client_app.training import LocalObjective, augmented_features, train_locally
from clip2fl_cli.runs import FinishedRun
from clip2fl_common.class_gradients import CodedGradient
from clip2fl_common.config import RunConfig, Scalar, defaults
from clip2fl_common.data.datasets import load_dataset, partition_indices
from clip2fl_common.epsilon import epsilon
from clip2fl_common.models import ImageClassifier
from clip2fl_common.randomness import seeded_noise
from server_app.delivery import load_model

IMAGES_OF_A_CLASS = (1, 2, 5, 20)
TRIALS = 50
# Requests to the client asked most often: 30 rounds of the demo, seeds 7 to 9.
RELEASES = 23
NOISE = {8: 3.06, 2: 10.31}

ONE_VIEW: dict[str, Scalar] = {
    "class-gradients.draws": 1,
    "class-gradients.augment": False,
    "upload.precision": "full",
}
CLIPPED: dict[str, Scalar] = {"privacy.gradient-clip-norm": 1.0}
FEWEST = 5
AT_LEAST_5: dict[str, Scalar] = {"privacy.min-class-samples": FEWEST}


def noise(target: int) -> dict[str, Scalar]:
    """Return settings with noise that spends the epsilon ``target`` over a run."""
    return {"privacy.gradient-noise-multiplier": NOISE[target]}


PROTECTIONS: dict[str, dict[str, Scalar]] = {
    "none: one view, not augmented, float32": ONE_VIEW,
    "defaults: augmented draws, bfloat16": {},
    "low rank, min-cosine 0.99": {"upload.min-cosine": 0.99},
    "min-class-samples 5": AT_LEAST_5,
    "clip norm 1": CLIPPED,
    **{
        f"clip norm 1, noise for epsilon {target}": CLIPPED | noise(target)
        for target in NOISE
    },
    **{
        f"min-class-samples 5, clip norm 1, noise for epsilon {target}": AT_LEAST_5
        | CLIPPED
        | noise(target)
        for target in NOISE
    },
}


@dataclass
class Victim:
    """A delivered model and the test images of its data set, unused in training.

    Attributes
    ----------
    settings : dict
        The run's configuration, flat.
    model : ImageClassifier
        Delivered model.
    images : Tensor, shape [N, 3, H, W]
        Normalised test images.
    labels : Tensor of int64, shape [N]
        Their classes.
    features : Tensor, shape [N, d]
        Features of the images, not augmented.
    """

    settings: dict[str, Scalar]
    model: ImageClassifier
    images: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Compute the features."""
        self.features = features_of(self.model, self.images)

    @classmethod
    def of(cls, run: Path) -> "Victim":
        """Return the model and images of a finished run."""
        # A run of an earlier version may lack keys that do not concern the data set.
        settings = {**defaults(), **FinishedRun.read(run).config}
        model, card = load_model(run / "model.safetensors")
        test = load_dataset(RunConfig.from_run_config(settings).dataset).test
        loaded = test.load(np.arange(len(test.labels)))
        images = card.normalization(loaded.images)
        return cls(settings, model, images, loaded.labels)

    def config(self, changes: dict[str, Scalar]) -> RunConfig:
        """Return the run's configuration with other settings of protection."""
        unprotected = {
            name: value
            for name, value in defaults().items()
            if name.startswith(("privacy.", "upload."))
        }
        return RunConfig.from_run_config({**self.settings, **unprotected, **changes})

    def upload(
        self, config: RunConfig, chosen: torch.Tensor, seed: int
    ) -> dict[int, CodedGradient]:
        """Return the class gradients that a client with these images sends."""
        gradients = config.class_gradients
        features, labels = augmented_features(
            self.model,
            self.images[chosen],
            self.labels[chosen],
            draws=gradients.draws,
            samples_per_class=gradients.samples_per_class,
            augment=gradients.augment,
            batch_size=64,
            generator=torch.Generator().manual_seed(seed),
            min_class_samples=config.privacy.min_class_samples,
        )
        classifier = self.model.classifier
        return coded_class_gradients(
            features,
            labels,
            classifier.weight.detach(),
            classifier.bias.detach(),
            min_cosine=config.upload.min_cosine,
            precision=config.upload.precision,
            protection=gradient_protection(
                config.privacy,
                gradients.samples_per_class,
                seeded_noise(torch.Generator().manual_seed(10_000 + seed)),
            ),
        )


@torch.no_grad()
def features_of(model: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
    """Return the features [N, d] of images, not augmented."""
    model.eval()
    return torch.cat([model.features(batch) for batch in images.split(64)])


def cosine(feature: torch.Tensor, others: torch.Tensor) -> float:
    """Return the mean cosine of a feature [d] with others [n, d]."""
    return float(functional.cosine_similarity(feature[None], others).mean())


def reconstruction(
    victim: Victim, changes: dict[str, Scalar], images: int
) -> float | None:
    """Return the mean cosine of reconstructed and true features.

    Parameters
    ----------
    victim : Victim
        Model and images.
    changes : dict
        Settings of the protection.
    images : int
        Number of images of the class at the client.

    Returns
    -------
    float or None
        None if the client sent nothing.
    """
    config = victim.config(changes)
    found = []
    for trial, (label, chosen) in enumerate(draws(victim, images)):
        sent = victim.upload(config, chosen, trial)
        if label not in sent:
            return None
        row, bias = sent[label].weight[label], sent[label].bias[label]
        found.append(cosine(row / bias, victim.features[chosen]))
    return statistics.mean(found)


def same_class(victim: Victim, images: int) -> float:
    """Return the mean cosine with an image of the class that is not at the client."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for label, chosen in draws(victim, images):
        others = torch.nonzero(victim.labels == label).flatten()
        others = others[~torch.isin(others, chosen)]
        other = others[torch.randint(len(others), (1,), generator=generator)]
        found.append(cosine(victim.features[other[0]], victim.features[chosen]))
    return statistics.mean(found)


def draws(victim: Victim, images: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield, for each trial, a class and the given number of its images."""
    generator = torch.Generator().manual_seed(images)
    classes = int(victim.labels.max()) + 1
    for trial in range(TRIALS):
        members = torch.nonzero(victim.labels == trial % classes).flatten()
        order = torch.randperm(len(members), generator=generator)
        yield trial % classes, members[order[:images]]


def reconstruction_table(victim: Victim) -> str:
    """Return a table of cosines by protection and number of images."""
    sizes = [f"{n} image{'s' if n > 1 else ''}" for n in IMAGES_OF_A_CLASS]
    rows = [
        [
            "baseline: another image of the same class",
            *(f"{same_class(victim, n):.3f}" for n in IMAGES_OF_A_CLASS),
        ]
    ]
    for name, changes in PROTECTIONS.items():
        found = [reconstruction(victim, changes, n) for n in IMAGES_OF_A_CLASS]
        cells = ["nothing sent" if c is None else f"{c:.3f}" for c in found]
        rows.append([name, *cells])
        print(" | ".join(rows[-1]), flush=True)
    return markdown(["protection", *sizes], rows)


def class_set_table(victim: Victim) -> str:
    """Return a table of how well clients' class sets are found, for the partition."""
    config = victim.config({})
    dataset = load_dataset(config.dataset)
    parts = partition_indices(config.dataset, config.partition, config.seed)
    classes = len(dataset.class_names)
    held, risen = [], []
    for client, part in enumerate(parts):
        loaded = dataset.train.load(part)
        held.append(torch.bincount(loaded.labels, minlength=classes))
        model = copy.deepcopy(victim.model)
        train_locally(
            model,
            dataset.normalization(loaded.images),
            loaded.labels,
            None,
            LocalObjective(),
            epochs=config.client.epochs,
            batch_size=config.client.batch_size,
            learning_rate=config.client.learning_rate,
            crop_padding=config.client.crop_padding,
            generator=torch.Generator().manual_seed(client),
        )
        moved = model.classifier.bias - victim.model.classifier.bias
        risen.append(moved.detach() > 0)
    counts = torch.stack(held)
    truth = counts > 0
    told = {
        "classes sent, min-class-samples 1": truth,
        "classes sent, min-class-samples 5": counts >= FEWEST,
        "local model, classes whose bias rose": torch.stack(risen),
    }
    rows = [
        [name, _share(guess & truth, truth), _share(guess & truth, guess)]
        for name, guess in told.items()
    ]
    return markdown(
        [
            "found from",
            "held classes that are found, %",
            "found classes that are held, %",
        ],
        rows,
    )


def _share(part: torch.Tensor, whole: torch.Tensor) -> str:
    return f"{100 * int(part.sum()) / int(whole.sum()):.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Attack the uploads of a run's model and write the tables."""
    parser = argparse.ArgumentParser(description="Measure what class gradients reveal.")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    victim = Victim.of(options.run)
    settings = victim.settings
    spent = ", ".join(
        f"{multiplier:g} ({epsilon(multiplier, RELEASES, 1e-5):.2f})"
        for multiplier in NOISE.values()
    )
    text = (
        f"Student of {settings['method']} on {settings['dataset.name']}, seed "
        f"{settings['seed']}: features of test images, {TRIALS} trials a number. Noise "
        f"multipliers (epsilon at delta = 1e-5 after {RELEASES} releases): {spent}.\n\n"
        "Mean cosine of the reconstructions with the images' true features:\n\n"
        f"{reconstruction_table(victim)}\n\n"
        "Classes that a client holds, over all clients of the run's partition:\n\n"
        f"{class_set_table(victim)}"
    )
    write_results(
        "privacy",
        "What class gradients reveal",
        text,
        torch.device("cpu"),
        options.results,
    )


if __name__ == "__main__":
    main()
