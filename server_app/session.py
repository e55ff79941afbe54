"""One run at the server: what is prepared, evaluated each round and left behind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from platform import python_version
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from clip2fl_common.config import SITES, RunConfig
from clip2fl_common.datasets import ImageDataset, load_dataset, partition_indices
from clip2fl_common.devices import resolve_device
from clip2fl_common.metrics import (
    FEDAVG_HEAD,
    RETRAINED_HEAD,
    TEACHER_HEAD,
    AccuracyReport,
    listed_groups,
    recall_report,
    shot_groups,
)
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.provenance import code_fingerprint
from clip2fl_common.randomness import generator
from clip2fl_common.teacher import Teacher, load_teacher
from server_app.checkpoint import ModelCard, save_model
from server_app.evaluation import Evaluator
from server_app.report import Progress, RunFolder, accuracy_fields, final_table

TEACHER_ROW = "teacher zero-shot"


@dataclass
class RoundOutcome:
    """What a strategy reports of a round, besides the global model.

    Attributes
    ----------
    clients : sequence of (int or str)
        Partitions, or names of sites, whose replies were used.
    dropped : int
        Replies that were not.
    bytes_down : int
        Arrays sent to all clients.
    upload_bytes, gradient_bytes : sequence of int
        Arrays received from each of ``clients``, and the class gradients among them.
    losses : dict
        Clients' and server's losses by name.
    unreadable : int
        Training images left out by the clients.
    seconds : dict
        Seconds of each phase.
    recalls : dict or None
        Sites' mean accuracy on each class, by head; None: the server evaluates.
    """

    clients: Sequence[int | str]
    dropped: int
    bytes_down: int
    upload_bytes: Sequence[int]
    gradient_bytes: Sequence[int]
    losses: dict[str, float] = field(default_factory=dict)
    unreadable: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    recalls: dict[str, list[float | None]] | None = None


class Session:
    """Data, initial model, teacher and run folder of one run.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    run_id : int
        Flower's.
    """

    def __init__(self, config: RunConfig, run_id: int) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.dataset: ImageDataset = load_dataset(config.dataset)
        partition = config.partition
        classes = len(self.dataset.class_names)
        # Sites tell nobody how many images of a class they have.
        self._parts: tuple[npt.NDArray[np.int64], ...] = ()
        self.counts: npt.NDArray[np.int64] | None = None
        groups = listed_groups(classes)
        if config.dataset.name != SITES:
            self._parts = partition_indices(
                config.dataset, partition.clients, partition.alpha, config.seed
            )
            self.counts = np.bincount(
                self.dataset.train.labels[np.concatenate(self._parts)],
                minlength=classes,
            )
            groups = shot_groups(self.counts.tolist())
        self.model = _initial_model(config, classes)
        self.evaluator = Evaluator(
            self.dataset,
            groups,
            config.evaluation.max_images,
            config.evaluation.batch_size,
            self.device,
            config.seed,
        )
        self.teacher = self._load_teacher()
        self.folder = RunFolder(config, run_id)
        self._progress = Progress(config.federation.rounds)
        self._rows: dict[str, AccuracyReport] = {}

    def _load_teacher(self) -> Teacher | None:
        if self.config.method != "clip2fl":
            return None
        teacher = self.config.teacher
        return load_teacher(
            teacher.model,
            teacher.pretrained,
            self.device,
            prompt=teacher.prompt,
            batch_size=teacher.batch_size,
        )

    def open(self) -> None:
        """Measure the teacher and write ``config.json``; say where the run goes."""
        facts: dict[str, Any] = {
            "class_names": self.dataset.class_names,
            "test_images": len(self.dataset.test.labels),
            "shot_groups": vars(self.evaluator.groups),
            "code": code_fingerprint(),
            "versions": {
                "python": python_version(),
                **{name: version(name) for name in ("flwr", "torch", "numpy")},
            },
        }
        if self.counts is not None:
            facts["train_images_per_class"] = self.counts.tolist()
            facts["train_images_per_client"] = [len(part) for part in self._parts]
        if self.teacher:
            facts["teacher"] = {
                "name": self.teacher.name,
                "fingerprint": self.teacher.fingerprint,
            }
        if self.teacher and len(self.dataset.test.labels):
            print("teacher: zero-shot accuracy on the test images ...", flush=True)
            self._rows[TEACHER_ROW] = self.evaluator.teacher_accuracy(self.teacher)
            facts["teacher"]["zero_shot"] = accuracy_fields(self._rows[TEACHER_ROW])
        self.folder.write_config(self.config, facts)
        print(f"run folder: {self.folder.path}", flush=True)

    def close_round(
        self, server_round: int, retrained: nn.Linear | None, outcome: RoundOutcome
    ) -> None:
        """Evaluate the global model, write the round's metrics, print its line.

        Parameters
        ----------
        server_round : int
            Round, from 1; the last one is evaluated on all test images.
        retrained : nn.Linear or None
            Re-trained classifier, where the method has one.
        outcome : RoundOutcome
            What the strategy reports.
        """
        started = perf_counter()
        final = server_round == self.config.federation.rounds
        heads = {FEDAVG_HEAD: self.model.classifier}
        if retrained is not None:
            heads = {RETRAINED_HEAD: retrained, **heads}
        if outcome.recalls is None:
            reports = self.evaluator.evaluate(self.model, heads, final)
        else:
            reports = self._site_reports(outcome.recalls)
        seconds = {**outcome.seconds, "evaluation": perf_counter() - started}
        self.folder.append_metrics(
            {
                "round": server_round,
                "clients": list(outcome.clients),
                "dropped_replies": outcome.dropped,
                "accuracy": {n: accuracy_fields(r) for n, r in reports.items()},
                "test_images": len(self.evaluator.indices(final)),
                "losses": outcome.losses,
                "unreadable_images": {
                    "train": outcome.unreadable,
                    "test": self.evaluator.unreadable,
                },
                "bytes": {
                    "down": outcome.bytes_down,
                    "up": sum(outcome.upload_bytes),
                    "per_client": list(outcome.upload_bytes),
                    "class_gradients": list(outcome.gradient_bytes),
                },
                "seconds": {name: round(s, 4) for name, s in seconds.items()},
            }
        )
        print(
            self._progress.line(server_round, reports, outcome.losses["client"]),
            flush=True,
        )
        if final:
            method = self.config.method
            students = {f"{method}, {name} head": r for name, r in reports.items()}
            self._rows = students | self._rows
            self._save(next(iter(heads.values())))

    def _site_reports(
        self, recalls: dict[str, list[float | None]]
    ) -> dict[str, AccuracyReport]:
        """Return the heads' accuracy at the sites; note the teacher's as a row."""
        reports = {
            name: recall_report(recall, self.evaluator.groups)
            for name, recall in recalls.items()
            if any(value is not None for value in recall)
        }
        if TEACHER_HEAD in reports:
            self._rows[TEACHER_ROW] = reports.pop(TEACHER_HEAD)
        return reports

    def close(self) -> None:
        """Print the final table, after everything that Flower prints."""
        table = final_table(self._rows, self.evaluator.groups, self.dataset.class_names)
        print(f"\n{table}\nResults and model: {self.folder.path}", flush=True)

    def _save(self, head: nn.Linear) -> None:
        config = self.config
        save_model(
            self.folder.path / "model.safetensors",
            self.model,
            head,
            ModelCard(
                architecture=config.model.name,
                feature_dim=config.model.feature_dim,
                class_names=self.dataset.class_names,
                image_size=self.dataset.image_size,
                normalization=self.dataset.normalization,
                provenance={
                    "method": config.method,
                    "dataset": self.dataset.name,
                    "seed": config.seed,
                    "rounds": config.federation.rounds,
                    "teacher": self.teacher.name if self.teacher else None,
                },
            ),
        )


def _initial_model(config: RunConfig, num_classes: int) -> ImageClassifier:
    """Build the global model of round 0, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "model").initial_seed())
        return build_model(config.model.name, num_classes, config.model.feature_dim)
