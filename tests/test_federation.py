"""Whole federations, with the real ServerApp and ClientApp in one process."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Error, Message

from clip2fl_common import messages
from clip2fl_common.config import TEACHER_METHODS
from clip2fl_common.config.types import RETRAINING_METHODS
from clip2fl_common.data.datasets import DatasetError, load_dataset, partition_indices
from clip2fl_common.epsilon import epsilon
from clip2fl_common.models import ImageClassifier
from server_app.checkpoints import load_checkpoint
from server_app.delivery import ModelCard, load_model
from strategy.creff import CLASSIFIER
from strategy.registry import METHODS
from strategy.safeguards import NoRepliesError
from tests.defaults import run_config
from tests.federation import federate, metrics
from tests.in_process_grid import Tamper, client_of

pytestmark = pytest.mark.usefixtures("federation_process")


@pytest.mark.parametrize("method", METHODS)
def test_run_leaves_config_metrics_and_a_model_that_predicts(
    tmp_path: Path, method: str
) -> None:
    federate(tmp_path / "run", method)
    facts = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert facts["config"]["method"] == method
    assert ("teacher" in facts) == (method in TEACHER_METHODS)
    rounds = metrics(tmp_path / "run")
    assert [line["round"] for line in rounds] == [1, 2]

    top1 = _top1(*load_model(tmp_path / "run" / "model.safetensors"))
    usual = "retrained" if method in RETRAINING_METHODS else "fedavg"
    head = "discriminant" if method == "fedlda" else usual
    assert top1 == pytest.approx(rounds[-1]["accuracy"][head]["top1"], abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_one_client_with_all_images_can_train_alone(
    tmp_path: Path, method: str
) -> None:
    """The upper bound of a table: the global model is the one client's model."""
    alone: dict[str, Any] = {
        "partition__clients": 1,
        "federation__clients_per_round": 1,
    }
    federate(tmp_path / "run", method, **alone)
    facts = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    held = [sum(facts["train_images_per_class"])]
    assert facts["train_images_per_client"] == held
    assert [line["clients"] for line in metrics(tmp_path / "run")] == [[0], [0]]


def _top1(model: ImageClassifier, card: ModelCard) -> float:
    """Return the accuracy on all test images in percent."""
    test = load_dataset(run_config().dataset).test
    loaded = test.load(np.arange(len(test.labels)))
    with torch.no_grad():
        logits = model(card.normalization(loaded.images))
    top1: float = 100 * (logits.argmax(1) == loaded.labels).double().mean().item()
    return top1


@pytest.mark.parametrize("method", ["clip2flm", "fedavg"])
def test_average_over_rounds_is_delivered_but_not_trained_on(
    tmp_path: Path, method: str
) -> None:
    """Computed again from the rounds of a run without averaging."""
    settings: dict[str, Any] = {"federation__rounds": 4, "checkpoint__keep": 4}
    federate(tmp_path / "plain", method, **settings)
    federate(tmp_path / "averaged", method, ema__decay=0.6, **settings)
    plain, averaged = metrics(tmp_path / "plain"), metrics(tmp_path / "averaged")
    assert [line["losses"] for line in averaged] == [line["losses"] for line in plain]
    assert averaged[0]["accuracy"] == plain[0]["accuracy"]

    rounds = [load_checkpoint(tmp_path / "plain", n) for n in (1, 2, 3, 4)]
    weights = 0.6 ** np.arange(3, -1, -1.0)
    model, card = load_model(tmp_path / "averaged" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        retrained = name.replace("classifier", CLASSIFIER)
        values = [(c.strategy.get(retrained, c.model[name])).double() for c in rounds]
        expected = sum(w * v for w, v in zip(weights, values, strict=True))
        torch.testing.assert_close(
            tensor.double(), expected / weights.sum(), rtol=1e-5, atol=1e-6
        )
    assert _top1(model, card) == pytest.approx(
        next(iter(averaged[-1]["accuracy"].values()))["top1"], abs=1e-3
    )


def test_table_is_the_last_thing_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federate(tmp_path / "run")
    printed = capsys.readouterr().out
    assert "; re-trained head balanced" in printed
    table = printed[printed.index("Accuracy on the test images, %") :].splitlines()
    assert [line.split("  ")[0] for line in table[2:5]] == [
        "clip2fl, re-trained head",
        "clip2fl, model's own head",
        "teacher zero-shot",
    ]
    assert "by frequency rank" in table[5]  # no class has more than 100 images
    assert table[-1] == f"Results and model: {tmp_path / 'run'}"


def test_metrics_depend_neither_on_nodes_nor_on_order_of_replies(
    tmp_path: Path,
) -> None:
    federate(tmp_path / "a", nodes=2)
    federate(tmp_path / "b", nodes=3)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_methods_share_clients_partition_and_training(tmp_path: Path) -> None:
    for method in METHODS:
        federate(tmp_path / method, method)
    runs = {method: metrics(tmp_path / method) for method in METHODS}
    for run in runs.values():
        assert [r["clients"] for r in run] == [r["clients"] for r in runs["fedavg"]]
    # CReFF's own additions do not touch the averaged model.
    for creff, fedavg in zip(runs["creff"], runs["fedavg"], strict=True):
        assert creff["accuracy"]["fedavg"] == fedavg["accuracy"]["fedavg"]
        assert creff["losses"]["client"] == fedavg["losses"]["client"]


def test_bytes_are_those_of_the_arrays_on_the_wire(tmp_path: Path) -> None:
    grid = federate(tmp_path / "run")
    line = metrics(tmp_path / "run")[0]
    sent = [
        sum(
            len(array.data)
            for record in message.content.array_records.values()
            for array in record.values()
        )
        for message in grid.requests[:2]
    ]
    assert line["bytes"]["down"] == sum(sent)
    sizes = line["bytes"]
    assert len(sizes["per_client"]) == len(sizes["class_gradients"]) == 2
    assert sizes["up"] == sum(sizes["per_client"])
    assert all(
        0 < gradients < total
        for gradients, total in zip(
            sizes["class_gradients"], sizes["per_client"], strict=True
        )
    )


def test_low_rank_uploads_are_smaller_and_still_learn(tmp_path: Path) -> None:
    """The averaged model is untouched; only what synthesis sees has changed."""
    federate(tmp_path / "dense")
    federate(tmp_path / "coded", upload__min_cosine=0.95)
    for dense, coded in zip(
        metrics(tmp_path / "dense"), metrics(tmp_path / "coded"), strict=True
    ):
        assert sum(coded["bytes"]["class_gradients"]) < 0.7 * sum(
            dense["bytes"]["class_gradients"]
        )
        assert coded["accuracy"]["fedavg"] == dense["accuracy"]["fedavg"]
        assert coded["dropped_replies"] == 0


def _broken(change: str) -> Tamper:
    """Return what damages the reply of partition 0 only, or of all (``no replies``)."""

    def tamper(request: Message, reply: Message) -> Message:
        content = reply.content
        values = content.metric_records[messages.METRICS]
        if values[messages.PARTITION] != 0 and change != "no replies":
            return reply
        model = content.array_records[messages.ARRAYS]
        if change == "not finite":
            model["bn1.bias"] = Array(np.full(16, np.nan, np.float32))
        elif change == "shape":
            model["bn1.bias"] = Array(np.zeros(17, np.float32))
        elif change == "unknown":
            model["extra"] = Array(np.zeros(1, np.float32))
        elif change == "num-examples":
            values[messages.NUM_EXAMPLES] = -3
        elif change == "class":
            gradients = content.array_records[messages.GRADIENTS]
            classes = gradients["classes"].numpy().copy()
            classes[0] = 99
            gradients["classes"] = Array(classes)
        else:
            return _error(request, "the dog ate it")
        return reply

    return tamper


def _error(request: Message, reason: str) -> Message:
    return Message(Error(code=2, reason=reason), reply_to=request)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("not finite", "array bn1.bias has values that are not finite"),
        ("shape", r"array bn1.bias has shape (17,), expected (16,)"),
        ("unknown", "model arrays missing or unknown: extra"),
        ("num-examples", "num-examples = -3; it must be a positive integer"),
        ("class", "they must differ and be from 0 to 9"),
    ],
)
def test_bad_reply_is_dropped_with_node_and_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str, reason: str
) -> None:
    # Flower's logger does not hand its lines on, so they are caught at the source.
    flower = logging.getLogger("flwr")
    flower.addHandler(caplog.handler)
    try:
        grid = federate(tmp_path / "run", tamper=_broken(change))
    finally:
        flower.removeHandler(caplog.handler)
    dropped = [m for m in caplog.messages if "dropped the reply of node" in m]
    assert dropped and all(reason in m for m in dropped)
    assert any(str(r.metadata.dst_node_id) in dropped[0] for r in grid.requests)
    assert sum(r["dropped_replies"] for r in metrics(tmp_path / "run")) > 0
    assert all(0 not in r["clients"] for r in metrics(tmp_path / "run"))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_round_with_too_few_replies_keeps_model_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], decay: float
) -> None:
    """The next round goes on from the old model, and the run to its end."""

    def tamper(request: Message, reply: Message) -> Message:
        config = request.content.config_records[messages.CONFIG]
        if config[messages.ROUND] == 2 and not failed:
            failed.append(config[messages.PARTITION])
            return _error(request, "the dog ate it")
        models.append(dict(request.content.array_records[messages.ARRAYS]))
        return reply

    failed: list[object] = []
    models: list[dict[str, Array]] = []
    federate(
        tmp_path / "run",
        tamper=tamper,
        ema__decay=decay,
        federation__rounds=3,
        federation__min_replies=2,
    )
    first, second, third = metrics(tmp_path / "run")
    assert [r["kept_model"] for r in (first, second, third)] == [False, True, False]
    assert second["clients"] == [] and second["losses"] == {}
    assert second["dropped_replies"] == 1
    assert second["accuracy"] == first["accuracy"]
    sent = [{n: a.data for n, a in model.items()} for model in models]
    assert sent[2] == sent[-1] != sent[0]  # rounds 2, 3 and 1
    assert "; old model kept; " in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_robust_rules_and_bounds_run_to_the_end(tmp_path: Path, rule: str) -> None:
    federate(
        tmp_path / "run",
        aggregation__rule=rule,
        aggregation__max_update_norm=0.5,
        aggregation__max_gradient_norm=0.01,
    )
    for line in metrics(tmp_path / "run"):
        assert line["shortened"]["updates"] == len(line["clients"]) == 2
        assert line["shortened"]["class_gradients"] > 2


def test_no_replies_stops_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(NoRepliesError, match="round 1: no usable reply.*dog ate it"):
        federate(tmp_path / "run", tamper=_broken("no replies"))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_unreadable_image_at_a_client_stops_the_run(tmp_path: Path) -> None:
    def tamper(request: Message, reply: Message) -> Message:
        reason = "1 of 5 images cannot be read: /x.png"
        return Message(Error(messages.DATA_ERROR, reason), reply_to=request)

    with pytest.raises(DatasetError, match=r"round 1: .*/x\.png"):
        federate(tmp_path / "run", tamper=tamper)


def test_no_run_overwrites_another(tmp_path: Path) -> None:
    federate(tmp_path / "run", "fedavg")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run"):
        federate(tmp_path / "run", "fedavg")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_protected_gradients_are_accounted_for(tmp_path: Path) -> None:
    """The client asked most often counts; small classes send nothing, or noise."""
    grid = federate(
        tmp_path / "run",
        federation__rounds=3,
        privacy__min_class_samples=6,
        privacy__gradient_clip_norm=1.0,
        privacy__gradient_noise_multiplier=4.0,
    )
    rounds = metrics(tmp_path / "run")
    asked: Counter[int] = Counter()
    for line in rounds:
        asked.update(line["clients"])
        assert line["privacy"]["class_gradients"] == {
            "epsilon_round": epsilon(4.0, 1, 1e-5),
            "epsilon_total": epsilon(4.0, max(asked.values()), 1e-5),
            "delta": 1e-5,
        }
    config = run_config()
    labels = load_dataset(config.dataset).train.labels
    parts = partition_indices(config.dataset, config.partition, config.seed)
    assert not [r.error.reason for r in grid.replies if r.has_error()]
    replies = [r for r in grid.replies if messages.GRADIENTS in r.content]
    assert len(replies) == sum(asked.values())
    sent = 0
    for reply in replies:
        counts = np.bincount(labels[parts[client_of(reply)]])
        arrays = reply.content.array_records[messages.GRADIENTS]
        assert (
            arrays["classes"].numpy().tolist() == np.flatnonzero(counts >= 6).tolist()
        )
        sent += len(arrays["classes"].numpy())
    assert sent
    federate(tmp_path / "plain")
    assert all(line["privacy"] == {} for line in metrics(tmp_path / "plain"))
