"""Accuracy of a linear head that clients train on the frozen teacher's features.

    python -m benchmarks.teacher_head conf/photos-quick.toml --seeds 7 8 9

This is what a user could do who runs the teacher for every prediction: no student and
no distillation, only FedAvg of a linear classifier (the linear probe of Radford et al.
2021, in a federation). Partition, clients of each round, rounds, epochs and batch size
are those of the run configuration. Training is plain SGD without augmentation, since
the teacher's features are computed once from each image.

The head starts at zero, or at the teacher's text features, where it equals zero-shot
classification. Each start is trained with and without logit adjustment by the client's
own class frequencies. The step sizes are chosen at the first seed, on the tuning
images.
"""

import argparse
import copy
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.measure import RESULTS, markdown, write_results
from client_app.training import LocalObjective, logit_offsets, train_locally
from clip2fl_common.config import RunConfig
from clip2fl_common.config.files import complete_config, merge_run_config
from clip2fl_common.metrics import (
    HELD_OUT,
    TUNING,
    AccuracyReport,
    ShotGroups,
    accuracy_report,
    confusion_matrix,
)
from clip2fl_common.models import ImageClassifier
from clip2fl_common.project import PROJECT
from clip2fl_common.randomness import generator
from clip2fl_common.teacher import Teacher, load_teacher
from server_app.evaluation import BLOCK, tuning_images
from server_app.run_data import RunData
from strategy.clients import SimulatedClients
from strategy.model_mean import weighted_mean

STEP_SIZES = (0.001, 0.003, 0.01, 0.03, 0.1)
TUNING_SHARE = 0.2
# Accuracy is the mean over this many last rounds.
LAST_ROUNDS = 5
ALL = "all"
ACCURACIES = ("balanced", "many", "medium", "few")

# Accuracy in percent by part of the test images and name in `ACCURACIES`.
Accuracy = dict[tuple[str, str], float]


class TeacherHead(ImageClassifier):
    """A linear classifier whose "images" are features of one pixel [N, d, 1, 1].

    A crop without padding and a flip do not change an image of one pixel, so that
    `train_locally` serves as it is.

    Parameters
    ----------
    weight : Tensor, shape [C, d]
        Weight at the start; the bias starts at zero.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        classes, dim = weight.shape
        super().__init__(dim, classes, dim)
        del self.projection
        with torch.no_grad():
            self.classifier.weight.copy_(weight)
            self.classifier.bias.zero_()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the teacher's features [N, d] of images [N, d, 1, 1]."""
        return images.flatten(1)


@dataclass(frozen=True)
class Images:
    """The teacher's features of images, and their classes.

    Attributes
    ----------
    features : Tensor, shape [N, d]
        Unit features times sqrt(d): their entries have the mean square 1.
    labels : Tensor of int64, shape [N]
        Classes.
    """

    features: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Federation:
    """The clients' and the test images of one seed, as the teacher sees them.

    Attributes
    ----------
    config : RunConfig
        The run's configuration.
    clients : sequence of Images
        Each client's training images.
    test : Images
        Test images.
    parts : mapping of str to ndarray of bool
        Which test images belong to `ALL`, `TUNING` and `HELD_OUT`.
    groups : ShotGroups
        Shot groups of the training images.
    starts : mapping of str to Tensor, shape [C, d]
        Weights with which the head may start.
    """

    config: RunConfig
    clients: Sequence[Images]
    test: Images
    parts: Mapping[str, npt.NDArray[np.bool_]]
    groups: ShotGroups
    starts: Mapping[str, torch.Tensor]

    @classmethod
    def load(cls, config: RunConfig, teacher: Teacher) -> "Federation":
        """Load a seed's images, and compute the features that are not on disk."""
        data = RunData.load(config)
        train, test = data.dataset.train, data.dataset.test
        blocks = np.arange(len(test.labels))
        tuning = tuning_images(test.labels, TUNING_SHARE)
        text = teacher.text_features(data.class_names)
        scale = math.sqrt(text.shape[1])

        def features(images: torch.Tensor) -> torch.Tensor:
            return scale * teacher.cached_image_features(images)

        clients = []
        for part in data.parts:
            loaded = train.load(part)
            clients.append(Images(features(loaded.images), loaded.labels))
        seen = [
            features(test.load(blocks[start : start + BLOCK]).images)
            for start in range(0, len(blocks), BLOCK)
        ]
        return cls(
            config,
            clients,
            Images(torch.cat(seen), torch.from_numpy(test.labels)),
            {ALL: np.ones_like(tuning), TUNING: tuning, HELD_OUT: ~tuning},
            data.groups,
            {
                "zero": torch.zeros_like(text),
                "text features": teacher.logit_scale / scale * text,
            },
        )

    def rounds(
        self, start: str, adjustment: float, learning_rate: float
    ) -> Iterator[TeacherHead]:
        """Yield the global head after each round; it is the same object each time.

        Parameters
        ----------
        start : str
            Name of the start in ``starts``.
        adjustment : float
            Strength of the logit adjustment; 0: none.
        learning_rate : float
            Step size of the clients' SGD.
        """
        config = self.config
        sizes = tuple(len(client.labels) for client in self.clients)
        draws = SimulatedClients(
            (), len(sizes), config.federation.clients_per_round, config.seed, sizes
        )
        head = TeacherHead(self.starts[start])
        for server_round in range(1, config.federation.rounds + 1):
            models, weights = [], []
            for client in draws.sample(server_round):
                own = self.clients[client]
                local = copy.deepcopy(head)
                train_locally(
                    local,
                    own.features[:, :, None, None],
                    own.labels,
                    None,
                    LocalObjective(),
                    epochs=config.client.epochs,
                    batch_size=config.client.batch_size,
                    learning_rate=learning_rate,
                    crop_padding=0,
                    generator=generator(config.seed, "batches", server_round, client),
                    offsets=(
                        logit_offsets(own.labels, len(self.starts[start]), adjustment)
                        if adjustment
                        else None
                    ),
                )
                models.append(
                    {name: value.numpy() for name, value in local.state_dict().items()}
                )
                weights.append(sizes[client])
            mean = weighted_mean(models, weights)
            head.load_state_dict(
                {name: torch.from_numpy(value) for name, value in mean.items()}
            )
            yield head

    @torch.no_grad()
    def accuracy(self, head: TeacherHead) -> Accuracy:
        """Return a head's accuracy on each part of the test images."""
        predicted = head.classifier(self.test.features).argmax(1).numpy()
        labels, classes = self.test.labels.numpy(), head.classifier.out_features
        found = {}
        for part, chosen in self.parts.items():
            report = accuracy_report(
                confusion_matrix(labels[chosen], predicted[chosen], classes),
                self.groups,
            )
            for name in ACCURACIES:
                found[part, name] = _known(report, name)
        return found

    def zero_shot(self) -> Accuracy:
        """Return the accuracy of the teacher's zero-shot classification."""
        return self.accuracy(TeacherHead(self.starts["text features"]))

    def trained(
        self, start: str, adjustment: float, learning_rate: float
    ) -> list[Accuracy]:
        """Return the accuracies after each of the last `LAST_ROUNDS` rounds.

        The parameters are those of `rounds`.
        """
        first = self.config.federation.rounds - LAST_ROUNDS
        return [
            self.accuracy(head)
            for place, head in enumerate(self.rounds(start, adjustment, learning_rate))
            if place >= first
        ]


def _with_seed(config: RunConfig, seed: int) -> RunConfig:
    return RunConfig.from_run_config({**config.to_flat(), "seed": seed})


def _known(report: AccuracyReport, name: str) -> float:
    """Return an accuracy of a report that covers all classes."""
    value = getattr(report, name)
    assert isinstance(value, float), f"no test image for {name}"
    return value


def _mean(found: Sequence[Accuracy]) -> Accuracy:
    return {key: statistics.fmean(own[key] for own in found) for key in found[0]}


def measure(
    config: RunConfig,
    seeds: Sequence[int],
    step_sizes: Sequence[float],
    workers: int,
) -> tuple[str, str]:
    """Return Markdown tables of the accuracies, and of the choice of step sizes.

    Parameters
    ----------
    config : RunConfig
        The run's configuration; ``seeds`` replace its seed.
    seeds : sequence of int
        Seeds; the step sizes are chosen at the first one.
    step_sizes : sequence of float
        Step sizes to choose from, for each start and loss.
    workers : int
        Processes that train heads at the same time, each with one thread.
    """
    teacher = load_teacher(
        config.teacher.model,
        config.teacher.pretrained,
        prompt=config.teacher.prompt,
        batch_size=config.teacher.batch_size,
    )
    federations = [Federation.load(_with_seed(config, seed), teacher) for seed in seeds]
    first, *others = federations
    # The test images and the teacher are the same for all seeds.
    rows = [["teacher", "zero-shot", "-", *_cells([first.zero_shot()]), "-"]]
    choices = []
    heads = list(product(first.starts, (0.0, 1.0)))
    with ProcessPoolExecutor(
        workers,
        get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),  # the matrices are small
    ) as pool:
        tried = {
            (head, size): pool.submit(first.trained, *head, size)
            for head in heads
            for size in step_sizes
        }
        chosen: dict[tuple[str, float], float] = {}
        runs: dict[tuple[str, float], list[Future[list[Accuracy]]]] = {}
        for head in heads:
            on_tuning = [
                _mean(tried[head, size].result())[TUNING, "balanced"]
                for size in step_sizes
            ]
            best = step_sizes[on_tuning.index(max(on_tuning))]
            chosen[head] = best
            choices.append([*_names(*head), *(f"{value:.1f}" for value in on_tuning)])
            print(" | ".join(choices[-1]), flush=True)
            runs[head] = [tried[head, best]] + [
                pool.submit(other.trained, *head, best) for other in others
            ]
        for head in heads:
            found = [run.result() for run in runs[head]]
            rows.append(
                [
                    *_names(*head),
                    f"{chosen[head]:g}",
                    *_cells([_mean(own) for own in found]),
                    _spread([own[-1][ALL, "balanced"] for own in found]),
                ]
            )
    parts = [f"{part}, {name}" for part in ("held out", "all") for name in ACCURACIES]
    header = ["classifier", "loss", "step size", *parts, "last round, all"]
    tried_sizes = [f"{size:g}" for size in step_sizes]
    return (
        markdown(header, rows),
        markdown(["classifier", "loss", *tried_sizes], choices),
    )


def _names(start: str, adjustment: float) -> list[str]:
    return [f"head from {start}", "adjusted" if adjustment else "plain"]


def _cells(seeds: Sequence[Accuracy]) -> list[str]:
    """Return the cells of the held-out and of all test images, over seeds."""
    return [
        _spread([own[part, name] for own in seeds])
        for part in (HELD_OUT, ALL)
        for name in ACCURACIES
    ]


def _spread(values: Sequence[float]) -> str:
    """Return the mean and, of several values, the standard deviation."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables and write them to a dated page."""
    parser = argparse.ArgumentParser(description="Train a linear head federatedly.")
    parser.add_argument("run_config", type=Path, help="TOML file of the experiment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--set", nargs="*", default=[], help="key=value pairs")
    parser.add_argument("--step-sizes", type=float, nargs="+", default=STEP_SIZES)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="a sentence below the tables")
    options = parser.parse_args(arguments)
    config = complete_config(merge_run_config(PROJECT, options.run_config, options.set))
    accuracies, choices = measure(
        config, options.seeds, options.step_sizes, options.workers
    )
    federation, client = config.federation, config.client
    text = (
        f"{federation.rounds} rounds of {federation.clients_per_round} of "
        f"{config.partition.clients} clients, {client.epochs} epochs, batch "
        f"{client.batch_size}. Seeds: {', '.join(map(str, options.seeds))}. Accuracy "
        f"in percent, mean of the last {LAST_ROUNDS} rounds (± standard deviation "
        "over seeds). Loss: plain cross-entropy, or logit-adjusted by the client's own "
        f"class frequencies. Held out: the {1 - TUNING_SHARE:.0%} of each class's test "
        f"images that are not for tuning.\n\n{accuracies}\n\n"
        "Choice of the step size: balanced accuracy on the tuning images at seed "
        f"{options.seeds[0]}.\n\n{choices}"
    )
    if options.note:
        text += f"\n\n{options.note}"
    write_results(
        f"teacher-head-{options.run_config.stem}",
        f"A linear head on the teacher's features: {options.run_config.stem}",
        text,
        torch.device("cpu"),
        options.results,
    )


if __name__ == "__main__":
    main()
