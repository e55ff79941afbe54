"""Trackers receive the values of metrics.jsonl; no tracker is needed."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clip2fl_common.config import ConfigError
from clip2fl_common.config import types as config_types
from server_app.tracking import TRACKERS, open_trackers, scalars
from tests.defaults import run_config
from tests.server_app import test_run
from tests.server_app.test_run import strategy, tiny_run

own_cache = test_run.own_cache


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_scalars_are_the_numbers_by_their_path() -> None:
    line = {
        "round": 3,
        "clients": [1, 2],
        "accuracy": {"fedavg": {"few": 1.5, "many": None, "per_class": [1.0]}},
        "losses": {"client": 2},
        "dropped_replies": 0,
    }
    assert scalars(line) == {
        "accuracy/fedavg/few": 1.5,
        "losses/client": 2.0,
        "dropped_replies": 0.0,
    }


def test_tensorboard_shows_the_metrics(tmp_path: Path) -> None:
    """TensorBoard reads the values, even before the run has ended."""
    run = tiny_run(tmp_path / "run", method="creff", run__trackers="tensorboard")
    creff = strategy(run)
    run.open(creff)
    for server_round in (1, 2):
        run.close_round(server_round, creff)
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        events.Reload()
        assert len(events.Scalars("losses/client")) == server_round
    run.close(creff)
    for n, line in enumerate(metrics(tmp_path / "run")):
        for name, value in scalars(line).items():
            event = events.Scalars(name)[n]
            assert event.step == n + 1
            assert event.value == pytest.approx(value)
    assert "configuration/text_summary" in events.Tags()["tensors"]


class Recorder(ModuleType):
    """Substitute for a tracker's package or its run, which records each call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        """Return a function that records calls of this name."""
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> "Recorder":
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlflow", ["start_run", "log_params", "log_metrics", "end_run"]),
        ("wandb", ["init", "log", "finish"]),
    ],
)
def test_hosted_trackers_are_told_configuration_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]
) -> None:
    package = Recorder(name)
    monkeypatch.setitem(sys.modules, name, package)
    run = tiny_run(tmp_path / "run", method="fedavg", run__trackers=name)
    fedavg = strategy(run)
    run.open(fedavg)
    run.close_round(2, fedavg)
    run.close(fedavg)
    assert [call for call, _, _ in package.calls] == expected
    text = repr(package.calls)
    assert "'method': 'fedavg'" in text
    (line,) = metrics(tmp_path / "run")
    _, args, kwargs = package.calls[-2]
    assert args == (scalars(line),)
    assert kwargs == {"step": 2}


def test_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="run.trackers names wandb, which is not"):
        open_trackers(run_config(run__trackers="wandb"), tmp_path)


def test_trackers_are_those_that_the_configuration_accepts() -> None:
    assert tuple(TRACKERS) == config_types.TRACKERS
    with pytest.raises(
        ConfigError, match="'tensorboard comet', but .* some of tensorboard, mlflow, wa"
    ):
        run_config(run__trackers="tensorboard comet")
