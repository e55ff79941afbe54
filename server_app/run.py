"""One run at the server: preparation, evaluation of each round, results."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from platform import python_version
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import nn

from clip2fl_common.config import RunConfig
from clip2fl_common.devices import resolve_device
from clip2fl_common.metrics import (
    FEDAVG_HEAD,
    HELD_OUT,
    TEACHER_HEAD,
    TUNING,
    AccuracyReport,
    median_site_reports,
    recall_report,
)
from clip2fl_common.models import ImageClassifier, build_model
from clip2fl_common.project import commit
from clip2fl_common.provenance import (
    ALL_CODE,
    SHARED_TRAINING_VARIABLE,
    code_fingerprint,
)
from clip2fl_common.randomness import generator
from clip2fl_common.teacher import Teacher, load_teacher, public_name
from server_app.checkpoints import ResumeError
from server_app.console import (
    COLUMNS,
    FOR_TUNING,
    HEAD_TITLES,
    Progress,
    Row,
    final_table,
    mean_rows,
)
from server_app.delivery import ModelCard, save_model
from server_app.evaluation import Evaluator
from server_app.event_file import EventWriter
from server_app.file_names import EVENTS
from server_app.hook import Hook
from server_app.metrics_line import accuracy_fields, metrics_line
from server_app.run_data import RunData
from server_app.run_folder import BEST_MODEL, MODEL, RunFolder
from server_app.run_state import RunState
from server_app.site_fields import site_fields, summed_confusion
from server_app.tracking import open_trackers, scalars
from strategy.base import Method
from strategy.events import Event, Events, What
from strategy.registry import method_named

TEACHER_ROW = "teacher zero-shot"


class StorageError(OSError):
    """A round's results could not be written; says what is saved and what to do."""


class ServerRun:
    """One run: data, initial model, teacher and folder, from the start to the results.

    Parameters
    ----------
    config : RunConfig
        The run's configuration.
    run_id : int
        Flower's id of the run.

    Attributes
    ----------
    events : Events
        Writes what happens to the folder's ``events.jsonl``.
    """

    def __init__(self, config: RunConfig, run_id: int) -> None:
        self.data = RunData.load(config)
        config = config.for_classes(len(self.data.class_names))
        self.config = config
        self.device = resolve_device(config.device)
        self.model = _initial_model(config, len(self.data.class_names))
        self.evaluator = Evaluator(
            self.data.dataset,
            self.data.groups,
            config.evaluation.max_images,
            config.evaluation.batch_size,
            self.device,
            config.seed,
            config.evaluation.tuning_share,
        )
        self.teacher = self._load_teacher()
        self._progress = Progress(config.federation.rounds)
        self._teacher_row: dict[str, AccuracyReport] = {}
        self._round_from = perf_counter()
        self.folder = RunFolder(config, run_id)
        self.state = RunState(
            config,
            self.folder,
            self.model,
            self._made_with(),
            {"device": self.device.type, **_versions()},
        )
        self._trackers = open_trackers(config, self.folder.path)
        self._event_file = EventWriter(self.folder.path / EVENTS)
        self._hook = Hook.of_environment(self.folder.path)
        self.events = Events(self._tell)

    def _tell(self, event: Event) -> None:
        self._event_file(event)
        if self._hook is not None:
            self._hook(event)

    def __enter__(self) -> Self:
        """Return the run, which alone uses its folder until the end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell of an error, and release the folder for other runs."""
        # A folder that must not be resumed stays as it is.
        if error is not None and not isinstance(error, ResumeError):
            failed = isinstance(error, Exception)
            self.events.note(
                What.RUN_FAILED if failed else What.RUN_STOPPED,
                reason=f"{type(error).__name__}: {error}".removesuffix(": "),
            )
        self._event_file.close()
        if self._hook is not None:
            self._hook.close()
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
        """Start the run or resume it; print the folder and the round.

        Parameters
        ----------
        strategy : Method
            Receives the state of the last completed round, if there is one, and the
            function that returns earlier states.

        Returns
        -------
        int
            Number of completed rounds.

        Raises
        ------
        ResumeError
            If the folder contains another run, or cannot be read.
        """
        strategy.earlier = self.state.earlier
        done = self._resume(strategy) if self.config.run.resume else 0
        if not self.config.simulated:
            # Simulated clients repeat a round with the same noise, sites do not.
            strategy.ledger.at_least(self.folder.requests())
            strategy.ledger.keep = self._keep_requests
        facts = self._facts()
        with self._storing("the run's beginning"):
            self.folder.write_config(self.config, facts)
            if not self.config.run.resume:
                self.state.write(0, strategy)
                self.folder.begin_metrics("")
        self.events.begin_run(done)
        self._round_from = perf_counter()
        print(f"run folder: {self.folder.path}", flush=True)
        if done:
            print(f"resumed after round {done}", flush=True)
        return done

    def _keep_requests(self, asked: Mapping[int, int]) -> None:
        with self._storing("the number of requests"):
            self.folder.write_requests(asked)

    def _facts(self) -> dict[str, Any]:
        """Return the facts that ``config.json`` holds besides the configuration."""
        facts: dict[str, Any] = {
            "class_names": self.data.class_names,
            "test_images": len(self.data.dataset.test.labels),
            "shot_groups": vars(self.data.groups),
            "code": code_fingerprint(),
            "all_code": code_fingerprint(packages=ALL_CODE),
            "versions": _versions(),
            # Seconds then say little: training may come from another run.
            "shared_training": SHARED_TRAINING_VARIABLE in os.environ,
            **self.data.counts(),
            **{
                f"test_images_{part}": size
                for part, size in self.evaluator.part_sizes().items()
            },
        }
        if known := commit():
            facts["commit"] = known
        if self.state.resumed_after:
            facts["resumed_after_rounds"] = self.state.resumed_after
        if self.teacher:
            facts["teacher"] = {
                "name": self.teacher.name,
                "fingerprint": self.teacher.fingerprint,
            }
        self.measure_teacher()
        if TEACHER_ROW in self._teacher_row:
            report = self._teacher_row[TEACHER_ROW]
            facts["teacher"]["zero_shot"] = accuracy_fields(report)
            for part, of_teacher in self.evaluator.parts.items():
                facts["teacher"][f"zero_shot_{part}"] = accuracy_fields(
                    of_teacher[TEACHER_HEAD]
                )
        return facts

    def measure_teacher(self) -> None:
        """Compute the teacher's accuracy, once, if the server has test images."""
        measured = TEACHER_ROW in self._teacher_row
        if self.teacher and len(self.data.dataset.test.labels) and not measured:
            print("teacher: zero-shot accuracy on the test images ...", flush=True)
            self._teacher_row[TEACHER_ROW] = self.evaluator.teacher_accuracy(
                self.teacher
            )

    def _resume(self, strategy: Method) -> int:
        """Load the newest complete checkpoint; return its round."""
        newest = self.state.find()
        if best := self.state.find_best():
            # Saved again, because a later round's model may have replaced it.
            self.state.take(best, strategy)
            self._save_model(BEST_MODEL, best.round, strategy)
        self.state.take(newest, strategy)
        self.folder.begin_metrics(newest.metrics)
        return newest.round

    def close_round(self, server_round: int, strategy: Method) -> None:
        """Evaluate the global model, save the round's results and print its line.

        Parameters
        ----------
        server_round : int
            Round, from 1; the last one is evaluated on all test images.
        strategy : Method
            Holds the round's record.

        Raises
        ------
        StorageError
            If the results cannot be written.
        """
        self.events.begin_phase("evaluation")
        started = perf_counter()
        final = server_round == self.config.federation.rounds
        record, groups = strategy.round, self.data.groups
        recalls = [found.recalls for found in record.evaluations.values()]
        medians = median_site_reports(recalls, groups)
        medians.pop(TEACHER_HEAD, None)
        reports = (
            self.evaluator.evaluate(*self._delivered(strategy), final)
            if record.recalls is None
            else self._site_reports(record.recalls)
        )
        spent = perf_counter() - started + record.seconds.get("evaluation", 0.0)
        seconds = {**record.seconds, "evaluation": spent}
        line = metrics_line(
            server_round, record, reports, medians, self.evaluator, seconds, final
        )
        if not self.config.simulated:
            line |= site_fields(record, groups, self._clock())
        with self._storing(f"round {server_round}"):
            self.folder.append_metrics(line)
            if final:
                self.folder.write_artifacts(
                    strategy.artifacts(),
                    self.evaluator.confusion | summed_confusion(record),
                    self.data.held,
                )
            if final or server_round % self.config.checkpoint.every == 0:
                # The best round is chosen, so images that are held out have no part.
                judged = medians or self.evaluator.parts.get(TUNING) or reports
                delivered = next(iter(judged.values()), None)
                if self.state.keep(server_round, strategy, delivered):
                    self._save_model(BEST_MODEL, server_round, strategy)
                self.state.prune()
        for tracker in self._trackers:
            tracker.log(server_round, scalars(line))
        self.events.note(What.ROUND_ENDED)
        print(
            self._progress.line(
                server_round,
                reports,
                record.losses.get("client"),
                clients=len(record.clients),
                participation=record.participation,
                went_back_to=record.went_back_to,
                medians=medians,
                tuning=self.evaluator.parts.get(TUNING),
            ),
            flush=True,
        )

    def _clock(self) -> float:
        """Return the seconds since the run's start or since the last round's end."""
        last, self._round_from = self._round_from, perf_counter()
        return self._round_from - last

    def _site_reports(
        self, recalls: Mapping[str, list[float | None]]
    ) -> dict[str, AccuracyReport]:
        """Return the heads' accuracy at the sites; keep the teacher's for the table."""
        reports = {
            name: recall_report(recall, self.data.groups)
            for name, recall in recalls.items()
            if any(value is not None for value in recall)
        }
        if TEACHER_HEAD in reports:
            self._teacher_row = {TEACHER_ROW: reports.pop(TEACHER_HEAD)}
        return reports

    def close(self, strategy: Method) -> None:
        """Write the final model, and print the table after Flower's own output."""
        with self._storing("the final model"):
            self._save_model(MODEL, self.config.federation.rounds, strategy)
        self.events.note(What.RUN_ENDED)
        for tracker in self._trackers:
            tracker.close()
        lines = list(map(json.loads, self.folder.metrics.splitlines()))
        rows: dict[str, Row] = {
            f"{self.config.method}, {HEAD_TITLES[head]}{on}": row
            for key, on in (
                ("accuracy", ""),
                (f"accuracy_{HELD_OUT}", ", held out"),
                (f"accuracy_{TUNING}", FOR_TUNING),
            )
            for head, row in mean_rows(lines, key).items()
        }
        for name, report in self._teacher_row.items():
            rows[name] = {column: getattr(report, column) for column in COLUMNS}
        table = final_table(
            rows,
            self.data.groups,
            self.data.class_names,
            sum(bool(line["accuracy"]) for line in lines),
        )
        print(f"\n{table}\nResults and model: {self.folder.path}", flush=True)

    @contextmanager
    def _storing(self, what: str) -> Iterator[None]:
        """Turn a file system error into one that says what is saved and what to do."""
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
        """Return the delivered model and its classifiers, the delivered one first."""
        model = strategy.delivered_model(self.model)
        heads = strategy.delivered_heads(model.state_dict())
        return model, {**heads, FEDAVG_HEAD: model.classifier}

    def _made_with(self) -> dict[str, str]:
        """Return fingerprints of code, data and teacher, which also decide results."""
        made_with = {
            "code": code_fingerprint(packages=ALL_CODE),
            "data": self.data.fingerprint(),
        }
        if self.teacher:
            made_with["teacher"] = self.teacher.fingerprint
        return made_with

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
                class_names=self.data.class_names,
                image_size=self.data.dataset.image_size,
                normalization=self.data.dataset.normalization,
                provenance={
                    "method": config.method,
                    "dataset": self.data.dataset.name,
                    "seed": config.seed,
                    "round": server_round,
                    "rounds": config.federation.rounds,
                    "teacher": public_name(self.teacher.name) if self.teacher else None,
                },
            ),
        )


def _versions() -> dict[str, str]:
    return {
        "python": python_version(),
        **{name: version(name) for name in ("flwr", "torch", "numpy")},
    }


def _initial_model(config: RunConfig, num_classes: int) -> ImageClassifier:
    """Build the model of round 0; earlier random draws do not change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "model").initial_seed())
        return build_model(config.model.name, num_classes, config.model.feature_dim)
