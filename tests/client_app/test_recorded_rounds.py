"""Whole federations whose steps are recorded, as on a GPU, with a stand-in for it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clip2fl_common.devices import tf32_state
from clip2fl_common.graphs import Capture, run_directly
from tests.federation import federate, metrics
from tests.recording import StandInCapture

pytestmark = pytest.mark.usefixtures("federation_process")


@pytest.mark.parametrize("method", ["clip2fl", "clip2fl-plus"])
def test_recorded_rounds_equal_direct_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """To the last bit: clients, re-training, two rounds, one process for all."""
    capture = StandInCapture()
    ways: dict[str, Capture] = {"recorded": capture, "direct": run_directly}
    results = []
    for name, way in ways.items():

        def chosen(device: torch.device, way: Capture = way) -> Capture:
            return way

        for module in ("client_app.training", "strategy.retraining"):
            monkeypatch.setattr(f"{module}.capture_for", chosen)
        federate(tmp_path / name, method)
        model = (tmp_path / name / "model.safetensors").read_bytes()
        results.append((metrics(tmp_path / name), model))
    assert results[0] == results[1]
    assert 0 < capture.recordings < capture.replays


def test_training_and_class_gradients_round_as_the_key_says_and_teachers_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[tuple[bool, bool]]] = {}
    for name in ("train_locally", "_teacher_logits"):
        monkeypatch.setattr(f"client_app.round.{name}", _noting(name, seen))
    monkeypatch.setattr(
        "client_app.class_gradients.augmented_features",
        _noting("augmented_features", seen),
    )
    federate(tmp_path / "run", client__tf32="all")
    usual = tf32_state()
    assert seen == {
        "train_locally": {(True, True)},
        "augmented_features": {(True, True)},
        "_teacher_logits": {usual},
    }


def _noting(name: str, seen: dict[str, set[tuple[bool, bool]]]) -> Any:
    """Return a function that notes the setting of TF32, and calls the real one."""
    from client_app import round as client_round
    from client_app import training

    real: Any = getattr(training, name, None) or getattr(client_round, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.setdefault(name, set()).add(tf32_state())
        return real(*arguments, **options)

    return noted
