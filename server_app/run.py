"""One run at the server: what is prepared, evaluated each round and left behind."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from logging import getLogger
from platform import python_version
from time import perf_counter
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import nn

from clip2fl_common.config import SITES, RunConfig
from clip2fl_common.data.datasets import ImageDataset, load_dataset, partition_indices
from clip2fl_common.devices import resolve_device
from clip2fl_common.messages import model_to_arrays
from clip2fl_common.metrics import (
    FEDAVG_HEAD,
    RETRAINED_HEAD,
    TEACHER_HEAD,
    AccuracyReport,
    listed_groups,
    median_site_reports,
    recall_report,
    shot_groups,
)
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.partition import class_counts
from clip2fl_common.provenance import ALL_CODE, code_fingerprint
from clip2fl_common.randomness import generator
from clip2fl_common.teacher import Teacher, load_teacher
from server_app.checkpoints import (
    BestRound,
    Checkpoint,
    DamagedCheckpointError,
    load_checkpoint,
    load_newest,
    prune,
    refuse_differences,
    rounds_with_checkpoint,
    save_checkpoint,
)
from server_app.delivery import ModelCard, save_model
from server_app.evaluation import Evaluator
from server_app.run_folder import (
    BEST_MODEL,
    MODEL,
    Progress,
    RunFolder,
    accuracy_fields,
    accuracy_from_fields,
    final_table,
)
from server_app.tracking import open_trackers, scalars
from strategy.base import Method
from strategy.recovery import Earlier
from strategy.registry import method_named
from strategy.round_record import RoundRecord

logger = getLogger(__name__)

TEACHER_ROW = "teacher zero-shot"


class StorageError(OSError):
    """A round's results could not be written; says what is safe and what to do."""


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
        self._held: npt.NDArray[np.int64] | None = None
        groups = listed_groups(classes)
        if config.dataset.name != SITES:
            self._parts = partition_indices(
                config.dataset, partition.clients, partition.alpha, config.seed
            )
            self._held = class_counts(self._parts, self.dataset.train.labels, classes)
            groups = shot_groups(self._held.sum(axis=0).tolist())
        self.images_per_client = tuple(len(part) for part in self._parts)
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
        self._progress = Progress(config.federation.rounds)
        self._teacher_row: dict[str, AccuracyReport] = {}
        self._best: BestRound | None = None
        self._resumed_after: tuple[int, ...] = ()
        self.folder = RunFolder(config, run_id)
        self._trackers = open_trackers(config, self.folder.path)

    def __enter__(self) -> Self:
        """Return the session, whose folder is its alone until the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the folder to others."""
        self.folder.release()

    def _load_teacher(self) -> Teacher | None:
        if not method_named(self.config.method).needs_teacher:
            return None
        teacher = self.config.teacher
        return load_teacher(
            teacher.model,
            teacher.pretrained,
            self.device,
            prompt=teacher.prompt,
            batch_size=teacher.batch_size,
        )

    def open(self, strategy: Method) -> int:
        """Begin the run or take it up again; say where it goes.

        Parameters
        ----------
        strategy : Method
            Gets the state of the last round, where there was one, and the way back to
            earlier ones.

        Returns
        -------
        int
            Rounds that are over.

        Raises
        ------
        ResumeError
            If the run in the folder is another, or cannot be read.
        """
        strategy.earlier = self._earlier
        done = self._resume(strategy) if self.config.run.resume else 0
        facts = self._facts()
        with self._storing("the run's beginning"):
            self.folder.write_config(self.config, facts)
            if not self.config.run.resume:
                self._write_checkpoint(0, strategy)
                self.folder.begin_metrics("")
        print(f"run folder: {self.folder.path}", flush=True)
        if done:
            print(f"resumed after round {done}", flush=True)
        return done

    def _facts(self) -> dict[str, Any]:
        """Return what ``config.json`` says besides the configuration."""
        facts: dict[str, Any] = {
            "class_names": self.dataset.class_names,
            "test_images": len(self.dataset.test.labels),
            "shot_groups": vars(self.evaluator.groups),
            "code": code_fingerprint(),
            "versions": _versions(),
        }
        if self._held is not None:
            facts["train_images_per_class"] = self._held.sum(axis=0).tolist()
            facts["train_images_per_client"] = self.images_per_client
        if self._resumed_after:
            facts["resumed_after_rounds"] = self._resumed_after
        if self.teacher:
            facts["teacher"] = {
                "name": self.teacher.name,
                "fingerprint": self.teacher.fingerprint,
            }
        if self.teacher and len(self.dataset.test.labels):
            print("teacher: zero-shot accuracy on the test images ...", flush=True)
            report = self.evaluator.teacher_accuracy(self.teacher)
            self._teacher_row = {TEACHER_ROW: report}
            facts["teacher"]["zero_shot"] = accuracy_fields(report)
        return facts

    def _resume(self, strategy: Method) -> int:
        """Take up the state of the newest whole checkpoint; return its round."""
        folder = self.folder.path
        newest = load_newest(folder)
        refuse_differences(newest, self.config.to_flat(), self._made_with())
        for name, now in self._environment().items():
            then = newest.environment.get(name)
            if then != now:
                logger.warning(
                    "%s was %s before round %d and is %s now: the run goes on, but not "
                    "to the last bit as it would have",
                    name,
                    then,
                    newest.round + 1,
                    now,
                )
        if newest.best:
            self._restore_best(newest.best, strategy)
        self._take(newest, strategy)
        self._best = newest.best
        self._resumed_after = (*newest.resumed_after, newest.round)
        self.folder.begin_metrics(newest.metrics)
        return newest.round

    def _earlier(self, before: int) -> Earlier | None:
        """Return the run's state after the last round before a given one."""
        for server_round in reversed(rounds_with_checkpoint(self.folder.path)):
            if server_round >= before:
                continue
            try:
                found = load_checkpoint(self.folder.path, server_round)
            except DamagedCheckpointError as error:
                logger.warning(
                    "the checkpoint of round %d is damaged (%s); looking for an "
                    "earlier one",
                    server_round,
                    error,
                )
                continue
            self.model.load_state_dict(found.model)
            return Earlier(model_to_arrays(self.model), found.strategy)
        return None

    def _take(self, checkpoint: Checkpoint, strategy: Method) -> None:
        self.model.load_state_dict(checkpoint.model)
        strategy.load_state(checkpoint.strategy)

    def _restore_best(self, best: BestRound, strategy: Method) -> None:
        """Write the best model again, in case a later round's replaced it."""
        try:
            checkpoint = load_checkpoint(self.folder.path, best.round)
        except DamagedCheckpointError as error:
            logger.warning(
                "the checkpoint of the best round %d is damaged (%s); %s stays as it "
                "is until a better round",
                best.round,
                error,
                BEST_MODEL,
            )
            return
        self._take(checkpoint, strategy)
        self._save_model(BEST_MODEL, best.round, strategy)

    def close_round(self, server_round: int, strategy: Method) -> None:
        """Evaluate the global model, keep the round's results, print its line.

        Parameters
        ----------
        server_round : int
            Round, from 1; the last one is evaluated on all test images.
        strategy : Method
            With the round's record.

        Raises
        ------
        StorageError
            If the results cannot be written.
        """
        started = perf_counter()
        config = self.config
        final = server_round == config.federation.rounds
        recalls = strategy.round.recalls
        medians = {
            head: report
            for head, report in median_site_reports(
                strategy.round.site_recalls, self.evaluator.groups
            ).items()
            if head != TEACHER_HEAD
        }
        reports = (
            self.evaluator.evaluate(*self._delivered(strategy), final)
            if recalls is None
            else self._site_reports(recalls)
        )
        seconds = {**strategy.round.seconds, "evaluation": perf_counter() - started}
        line = self._metrics_line(server_round, strategy.round, reports, seconds)
        if medians:
            line["accuracy_median_site"] = {
                head: accuracy_fields(report) for head, report in medians.items()
            }
        with self._storing(f"round {server_round}"):
            self.folder.append_metrics(line)
            if final:
                self.folder.write_artifacts(
                    strategy.artifacts(), self.evaluator.confusion, self._held
                )
            if final or server_round % config.checkpoint.every == 0:
                self._keep_round(
                    server_round,
                    strategy,
                    next(iter((medians or reports).values()), None),
                )
        for tracker in self._trackers:
            tracker.log(server_round, scalars(line))
        print(
            self._progress.line(
                server_round,
                reports,
                strategy.round.losses.get("client"),
                participation=strategy.round.participation,
                went_back_to=strategy.round.went_back_to,
                medians=medians,
            ),
            flush=True,
        )

    def _site_reports(
        self, recalls: Mapping[str, list[float | None]]
    ) -> dict[str, AccuracyReport]:
        """Return the heads' accuracy at the sites; note the teacher's as a row."""
        reports = {
            name: recall_report(recall, self.evaluator.groups)
            for name, recall in recalls.items()
            if any(value is not None for value in recall)
        }
        if TEACHER_HEAD in reports:
            self._teacher_row = {TEACHER_ROW: reports.pop(TEACHER_HEAD)}
        return reports

    def close(self, strategy: Method) -> None:
        """Write the final model and print the table, after all that Flower prints."""
        with self._storing("the final model"):
            self._save_model(MODEL, self.config.federation.rounds, strategy)
        for tracker in self._trackers:
            tracker.close()
        last = json.loads(self.folder.metrics.splitlines()[-1])
        students = {
            f"{self.config.method}, {head} head": accuracy_from_fields(fields)
            for head, fields in last["accuracy"].items()
        }
        table = final_table(
            students | self._teacher_row,
            self.evaluator.groups,
            self.dataset.class_names,
        )
        print(f"\n{table}\nResults and model: {self.folder.path}", flush=True)

    @contextmanager
    def _storing(self, what: str) -> Iterator[None]:
        """Say in an error of the file system what is safe and what to do."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{what} could not be written to {self.folder.path} ({error}). "
                "Checkpoints that are there stay whole: make room or repair the disk, "
                "then go on with run.resume set to that folder"
            ) from error

    def _delivered(
        self, strategy: Method
    ) -> tuple[ImageClassifier, dict[str, nn.Linear]]:
        """Return the delivered model and its classifiers by name, its own last."""
        model = strategy.delivered_model(self.model)
        retrained = strategy.delivered_classifier
        heads = {} if retrained is None else {RETRAINED_HEAD: retrained}
        return model, {**heads, FEDAVG_HEAD: model.classifier}

    def _metrics_line(
        self,
        server_round: int,
        record: RoundRecord,
        reports: Mapping[str, AccuracyReport],
        seconds: Mapping[str, float],
    ) -> dict[str, Any]:
        final = server_round == self.config.federation.rounds
        return {
            "round": server_round,
            "clients": record.clients,
            "dropped_replies": record.dropped,
            "kept_model": record.kept_model,
            "went_back_to": record.went_back_to,
            "left_out": record.left_out,
            "shortened": {
                "updates": record.shortened_updates,
                "class_gradients": record.shortened_gradients,
            },
            "accuracy": {n: accuracy_fields(r) for n, r in reports.items()},
            "test_images": len(self.evaluator.indices(final)),
            "losses": record.losses,
            "privacy": record.privacy,
            "unreadable_images": {
                "train": record.unreadable,
                "test": self.evaluator.unreadable,
            },
            "bytes": {
                "down": record.bytes_down,
                "up": sum(record.upload_bytes),
                "per_client": record.upload_bytes,
                "class_gradients": record.gradient_bytes,
            },
            "seconds": {name: round(s, 4) for name, s in seconds.items()},
        }

    def _keep_round(
        self,
        server_round: int,
        strategy: Method,
        report: AccuracyReport | None,
    ) -> None:
        """Write a round's checkpoint, and its model if it is the best so far."""
        value = getattr(report, self.config.checkpoint.best_metric, None)
        best = self._best
        if value is not None and (not best or value > best.value):
            self._best = BestRound(server_round, value)
        self._write_checkpoint(server_round, strategy)
        if self._best is not best:
            self._save_model(BEST_MODEL, server_round, strategy)
        prune(self.folder.path, self.config.checkpoint.keep)

    def _write_checkpoint(self, server_round: int, strategy: Method) -> None:
        save_checkpoint(
            self.folder.path,
            Checkpoint(
                round=server_round,
                config=self.config.to_flat(),
                made_with=self._made_with(),
                environment=self._environment(),
                best=self._best,
                resumed_after=self._resumed_after,
                metrics=self.folder.metrics,
                model=self.model.state_dict(),
                strategy=strategy.state(),
            ),
        )

    def _made_with(self) -> dict[str, str]:
        """Return the fingerprints of what decides the outcome besides the keys."""
        made_with = {
            "code": code_fingerprint(packages=ALL_CODE),
            "data": self._data_fingerprint(),
        }
        if self.teacher:
            made_with["teacher"] = self.teacher.fingerprint
        return made_with

    def _data_fingerprint(self) -> str:
        """Return a hash of class names, labels and partition; no image is read."""
        digest = hashlib.sha256(json.dumps(self.dataset.class_names).encode())
        for labels in (self.dataset.train.labels, self.dataset.test.labels):
            digest.update(labels.astype("<i8").tobytes())
        for part in self._parts:
            digest.update(part.astype("<i8").tobytes())
        return digest.hexdigest()

    def _environment(self) -> dict[str, str]:
        return {"device": self.device.type, **_versions()}

    def _save_model(self, name: str, server_round: int, strategy: Method) -> None:
        config = self.config
        model, heads = self._delivered(strategy)
        save_model(
            self.folder.path / name,
            model,
            next(iter(heads.values())),
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
                    "round": server_round,
                    "rounds": config.federation.rounds,
                    "teacher": self.teacher.name if self.teacher else None,
                },
            ),
        )


def _versions() -> dict[str, str]:
    return {
        "python": python_version(),
        **{name: version(name) for name in ("flwr", "torch", "numpy")},
    }


def _initial_model(config: RunConfig, num_classes: int) -> ImageClassifier:
    """Build the global model of round 0, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "model").initial_seed())
        return build_model(config.model.name, num_classes, config.model.feature_dim)
