"""The attack does what it says, and each rule is run with and without it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from benchmarks import attack
from benchmarks.attack import ATTACKER, CLIENTS, Observer
from clip2fl_common import messages
from strategy.safeguards import NoRepliesError
from tests.defaults import run_config
from tests.federation import federate
from tests.in_process_grid import Tamper, client_of

pytestmark = pytest.mark.usefixtures("federation_process")

TINY = (
    "federation.rounds=1 dataset.demo-train-per-class=20 dataset.demo-test-per-class=2 "
    "dataset.imbalance-factor=2.0 client.epochs=1 class-gradients.draws=1 "
    "synthesis.steps=2 retraining.epochs=2 synthesis.features-per-class=2"
)


def test_attacker_flips_and_scales_what_it_sends(tmp_path: Path) -> None:
    """Against the honest reply; the others' replies are passed on as they are."""
    observer = Observer(run_config(upload__precision="full"), attacks=True)
    seen: list[int] = []

    def compare(request: Message, reply: Message) -> Message:
        partition = client_of(reply)
        seen.append(partition)
        arrays = reply.content.array_records
        sent = messages.arrays_to_numpy(request.content.array_records[messages.ARRAYS])
        honest = messages.arrays_to_numpy(arrays[messages.ARRAYS])
        honest_bias = arrays[messages.GRADIENTS]["bias"].numpy().copy()
        forged = messages.arrays_to_numpy(
            observer(request, reply).content.array_records[messages.ARRAYS]
        )
        bias = reply.content.array_records[messages.GRADIENTS]["bias"].numpy()
        for name, values in forged.items():
            if partition != ATTACKER:
                np.testing.assert_array_equal(values, honest[name])
                continue
            expected = sent[name] - 10 * (honest[name] - sent[name])
            if "running_var" in name:
                expected = expected.clip(0)
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
        factor = -10 if partition == ATTACKER else 1
        np.testing.assert_allclose(bias, factor * honest_bias, rtol=1e-5)
        return reply

    tamper: Tamper = compare
    federate(
        tmp_path / "run",
        tamper=tamper,
        federation__rounds=1,
        federation__clients_per_round=3,
        upload__precision="full",
    )
    assert sorted(seen) == [0, 1, 2]
    assert len(observer.update_norms) == 2


@pytest.mark.slow
def test_whole_benchmark_and_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text('method = "clip2fl"\n', "utf-8")
    arguments = [str(config), "--set", TINY, "--runs", str(tmp_path / "runs")]
    arguments += ["--results", str(tmp_path)]
    attack.main(arguments)
    (page,) = tmp_path.glob("*-attack-tiny.md")
    text = page.read_text("utf-8")
    rows = [line.split(" | ")[:2] for line in text.splitlines() if "| none |" in line]
    assert [row[0] for row in rows] == [
        "| length ratio",
        "| mean",
        "| norm bound",
        "| median",
        "| trimmed mean",
    ]
    assert text.count(f"| 1 of {CLIENTS} |") == 5
    assert text in capsys.readouterr().out

    def forbidden(*_: Any) -> None:
        raise AssertionError("a complete run was repeated")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "__call__", forbidden)
        attack.main(arguments)
    assert page.read_text("utf-8") == text


def test_columns_without_a_value_have_a_dash() -> None:
    accuracy = {"balanced": 50.04, "many": None, "medium": 1.0, "few": 0.0, "end": "7"}
    assert attack.table({("mean", True): accuracy}).splitlines()[-1] == (
        f"| mean | 1 of {CLIENTS} | 7 | 50.0 | - | 1.0 | 0.0 |"
    )


def test_run_that_breaks_down_is_told_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    calls = []

    def break_down(*_: Any) -> None:
        calls.append(1)
        folder.mkdir()
        line = {"round": 5, "accuracy": {"retrained": {"balanced": 10.0}}}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
        raise NoRepliesError("round 6: no usable reply")

    monkeypatch.setattr(attack, "server_main", break_down)
    for _ in range(2):
        attack.run(folder, {}, attacks=True)
    assert len(calls) == 1
    assert attack.last_accuracy(folder) == {"balanced": 10.0, "end": "5, broke down"}
