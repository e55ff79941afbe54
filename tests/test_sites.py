"""Federations of nodes that have images of their own, in one process."""

import hashlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from PIL import Image
from safetensors.torch import load_file

from clip2fl_cli.report import write_run_report
from clip2fl_cli.runs import FinishedRun
from clip2fl_common import messages
from clip2fl_common.config import Scalar
from clip2fl_common.data.datasets import FileSource, open_site
from clip2fl_common.data.demo import CLASS_NAMES
from clip2fl_common.messages import TEACHER_FINGERPRINT
from clip2fl_common.models import build_model
from clip2fl_common.site_names import client_number
from clip2fl_common.site_registry import Site, SiteRegistry
from server_app.app import main
from server_app.delivery import load_model
from server_app.event_file import EventReader
from strategy.events import Event, What
from tests.clip2fl_cli.html_page import Page
from tests.conftest import be_flower
from tests.defaults import run_config
from tests.flower_private import lost_node_error, wire_bytes
from tests.in_process_grid import InProcessGrid, Tamper
from tests.site_folders import write_site

CLASSES = ", ".join(CLASS_NAMES)
COUNTS = [
    {"circle": 12, "triangle": 8, "square": 6},
    {"square": 8, "pentagon": 7, "star": 4, "cross": 5},
    {"circle": 5, "ring": 6, "heart": 9},
]
NAMES = ["north", "east", "west"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep out of the user's cache; be what Flower takes for one of its processes."""
    be_flower(tmp_path / "cache", monkeypatch)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategy.grid.POLL_S", 0.0)
    monkeypatch.setattr("strategy.site_clients.WAIT_S", 0.0)
    monkeypatch.setattr("strategy.site_clients.ASK_AGAIN_S", 0.0)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Return three sites' folders, unequal and overlapping."""
    return [
        write_site(tmp_path / f"private-{i}", counts, first=100 * i)
        for i, counts in enumerate(COUNTS)
    ]


def federate(
    run: Path,
    folders: Sequence[Path],
    names: Sequence[Any] = NAMES,
    tamper: Tamper | None = None,
    order_seed: int = 3,
    away: set[int] | None = None,
    kind: type[InProcessGrid] = InProcessGrid,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    **changes: Scalar,
) -> InProcessGrid:
    """Run a tiny federation of sites; ``rules`` are sites' own, by name."""
    settings: dict[str, Scalar] = {
        "dataset__name": "sites",
        "dataset__class_names": CLASSES,
        "dataset__validation_share": 0.3,
        "run__dir": str(run.parent),
        "run__name": run.name,
    }
    config = run_config(**{**settings, **changes})
    grid = kind(
        config,
        len(folders),
        order_seed,
        tamper,
        [
            {"data-path": str(folder), **(rules or {}).get(name, {})}
            | ({} if name is None else {"site": name})
            for folder, name in zip(folders, names, strict=True)
        ],
    )
    grid.away = away if away is not None else set()
    main(grid, Context(1, 0, {}, RecordDict(), cast(Any, config.to_flat())))
    return grid


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without its timings."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    for line in rounds:
        del line["seconds"], line["clock"]
        for site in line["sites"].values():
            for part in site.values():
                del part["seconds"]
    return rounds


def told(run: Path, what: What) -> list[tuple[int, str | int | None]]:
    """Return round and site of a run's events of one kind."""
    found: list[Event] = []
    EventReader(run / "events.jsonl").read(found.append, found.clear)
    return [(event.round, event.site) for event in found if event.what is what]


@pytest.mark.parametrize("method", ["clip2fl", "fedavg"])
def test_sites_train_and_evaluate(
    tmp_path: Path, folders: list[Path], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    federate(tmp_path / "run", folders, method=method)
    rounds = metrics(tmp_path / "run")
    assert [len(line["clients"]) for line in rounds] == [2, 2]
    assert all(set(line["clients"]) <= set(NAMES) for line in rounds)
    heads = {"clip2fl": {"retrained", "fedavg"}, "fedavg": {"fedavg"}}[method]
    for line in rounds:
        assert set(line["accuracy"]) == heads
        for report in line["accuracy"].values():
            assert report["top1"] is None
            # Nobody has the classes crescent and arrow.
            assert [report["per_class"][c] for c in (7, 9)] == [None, None]
    model, card = load_model(tmp_path / "run" / "model.safetensors")
    assert card.class_names == CLASS_NAMES
    assert len(model(card.normalization(_image()))) == 1
    table = capsys.readouterr().out
    assert "Accuracy on the sites' validation images, %" in table
    assert ("teacher zero-shot" in table) == (method == "clip2fl")
    assert "in the order of dataset.class-names" in table


def _image() -> Any:
    import torch

    return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("method", "head", "decay"),
    [
        ("fedavg", "fedavg", 0.0),
        ("fedavg", "fedavg", 0.5),
        ("creff", "retrained", 0.0),
        ("creff", "retrained", 0.5),
        ("clip2fl-plus", "retrained", 0.0),
        ("clip2fl-plus", "retrained", 0.5),
        ("fedlda", "discriminant", 0.0),
        ("fedlda", "discriminant", 0.5),
    ],
)
def test_accuracy_is_the_mean_over_the_sites_that_have_the_class(
    tmp_path: Path, folders: list[Path], method: str, head: str, decay: float
) -> None:
    """Computed again here, from the delivered model and the sites' images."""
    federate(tmp_path / "run", folders, method=method, ema__decay=decay)
    model, card = load_model(tmp_path / "run" / "model.safetensors")
    per_class: dict[int, list[float]] = {}
    config = run_config(
        dataset__name="sites",
        dataset__class_names=CLASSES,
        dataset__validation_share=0.3,
    )
    for folder in folders:
        test = open_site(config.dataset, folder).test
        loaded = test.load(np.arange(len(test.labels)))
        hits = model(card.normalization(loaded.images)).argmax(1) == loaded.labels
        for c in loaded.labels.unique().tolist():
            share = hits[loaded.labels == c].double().mean().item()
            per_class.setdefault(c, []).append(5 * round(20 * share))
    report = metrics(tmp_path / "run")[-1]["accuracy"][head]
    expected = [
        sum(per_class[c]) / len(per_class[c]) if c in per_class else None
        for c in range(10)
    ]
    assert report["per_class"] == pytest.approx(expected, abs=1e-3)
    known = [value for value in expected if value is not None]
    assert report["balanced"] == pytest.approx(sum(known) / len(known), abs=1e-3)


def test_metrics_say_what_each_site_did(tmp_path: Path, folders: list[Path]) -> None:
    """Computed again here, image by image, from the delivered model."""
    for i in range(8):
        (folders[0] / "circle" / f"broken-{i}.png").write_bytes(b"x" * (i + 1))
    federate(
        tmp_path / "run",
        folders,
        method="fedavg",
        federation__rounds=1,
        federation__clients_per_round=3,
        dataset__skip_unreadable=True,
        rules={name: {"send-confusion-matrix": True} for name in ("north", "west")},
    )
    (line,) = metrics(tmp_path / "run")
    assert list(line["sites"]) == sorted(NAMES)
    model, card = load_model(tmp_path / "run" / "model.safetensors")
    config = run_config(
        dataset__name="sites",
        dataset__class_names=CLASSES,
        dataset__validation_share=0.3,
        dataset__skip_unreadable=True,
    )
    broken = {"train": 0, "test": 0}
    summed = np.zeros((10, 10), dtype=np.int64)
    for name, folder in zip(NAMES, folders, strict=True):
        site = line["sites"][name]
        data = open_site(config.dataset, folder)
        for part, source, own in (
            ("train", data.train, site["training"]),
            ("test", data.test, site["evaluation"]),
        ):
            assert isinstance(source, FileSource)
            bad = sum("broken" in str(path) for path in source.paths)
            broken[part] += bad
            assert own["unreadable"] == bad
            assert own["images"] == len(source.labels) - bad
        loaded = data.test.load(np.arange(len(data.test.labels)))
        hits: dict[int, list[bool]] = {}
        for image, label in zip(loaded.images, loaded.labels.tolist(), strict=True):
            guess = int(model(card.normalization(image[None])).argmax())
            hits.setdefault(label, []).append(guess == label)
            if name != "east":
                summed[label, guess] += 1
        expected = {c: 5 * round(20 * sum(h) / len(h)) for c, h in hits.items()}
        accuracy = site["evaluation"]["accuracy"]["fedavg"]
        assert accuracy["per_class"] == [expected.get(c) for c in range(10)]
        assert accuracy["balanced"] == pytest.approx(
            sum(expected.values()) / len(expected), abs=1e-3
        )
        assert site["evaluation"]["confusion_matrix"] == (name != "east")
        assert (tmp_path / "run" / "events.jsonl").read_text().count(
            f'"what":"evaluated","round":1,"site":"{name}"'
        ) == 1
    assert broken["train"] > 0 and broken["test"] > 0
    assert line["unreadable_images"] == broken
    matrices = load_file(tmp_path / "run" / "artifacts.safetensors")
    assert matrices["confusion.fedavg"].tolist() == summed.tolist()


def test_seconds_of_a_round_have_the_evaluation_and_the_clock(
    tmp_path: Path, folders: list[Path]
) -> None:
    class Slow(InProcessGrid):
        """Evaluation takes 0.3 s longer than it needs."""

        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            asked = list(messages)
            if asked and asked[0].metadata.message_type == "evaluate":
                time.sleep(0.3)
            return super().send_and_receive(asked, timeout=timeout)

    started = time.perf_counter()
    federate(tmp_path / "run", folders, kind=Slow, method="fedavg")
    took = time.perf_counter() - started
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    for line in rounds:
        assert line["seconds"]["evaluation"] >= 0.3
        phases = [s for n, s in line["seconds"].items() if "clients-" not in n]
        assert sum(phases) <= line["clock"]["seconds"] + 0.01
    assert sum(line["clock"]["seconds"] for line in rounds) <= took


def test_metrics_name_the_sites_whose_replies_are_not_used(
    tmp_path: Path, folders: list[Path]
) -> None:
    def tamper(request: Message, reply: Message) -> Message:
        if request.content.config_records["config"]["partition-id"] != client_number(
            "west"
        ):
            return reply
        return Message(Error(code=2, reason="no\nmemory"), reply_to=request)

    federate(
        tmp_path / "run",
        folders,
        tamper=tamper,
        method="fedavg",
        federation__rounds=1,
        federation__clients_per_round=3,
    )
    (line,) = metrics(tmp_path / "run")
    assert line["unused_replies"] == [
        {"site": "west", "request": "train", "reason": r"no\nmemory"}
    ]
    assert "training" not in line["sites"]["west"]
    assert line["sites"]["west"]["evaluation"]["images"] > 0


def test_tampered_confusion_matrices_are_dropped() -> None:
    good = np.array([[2, 1], [0, 4]])

    def parsed(matrix: Any, images: int = 7, name: str = "confusion") -> Any:
        content = messages.Evaluation(images, {"fedavg": {0: 1.0}}).content()
        content["confusion"] = messages.numpy_to_arrays({name: matrix})
        reply = Message(content, reply_to=Message(RecordDict(), 5, "evaluate"))
        return messages.Evaluation.parse(reply, 2, ["fedavg"]).confusion

    assert parsed(good).tolist() == good.tolist()
    for matrix, images, name, reason in (
        (good[:1], 7, "confusion", "shape"),
        (good.astype(np.float32), 7, "confusion", "type"),
        (good, 8, "confusion", "does not count 8 images"),
        (np.array([[-1, 8], [0, 0]]), 7, "confusion", "does not count"),
        (np.full((2, 2), 2**62), 7, "confusion", "does not count"),
        (good, 7, "other", "holds no confusion matrix"),
    ):
        with pytest.raises(messages.ReplyError, match=reason):
            parsed(matrix, images, name)


# Records of class statistics in a train reply, with the shapes of their arrays. Each
# is one entry a class, or one of all images, however many images there are. H stands
# for the number of the site's classes.
H = -1
STATISTICS: dict[str, dict[str, tuple[int, ...]]] = {
    "class-gradients": {
        **{"classes": (H,), "ranks": (H,), "bias": (H, 10)},
        # Ten classes are few: each gradient is sent whole.
        **{"weight": (H, 10, 512), "left": (0, 10), "right": (0, 512)},
    },
    "class-statistics": {
        **{"classes": (H,), "counts": (H,), "means": (H, 64)},
        "covariances": (H, 64 * 65 // 2),
    },
    "class-moments": {"count": (10,), "total": (10, 64), "scatter": (64, 64)},
}


@pytest.mark.parametrize(
    ("method", "delivered", "records", "heads"),
    [
        ("clip2fl", "method", ["class-gradients"], ["retrained", "fedavg", "teacher"]),
        ("ccvr", "method", ["class-statistics"], ["retrained", "fedavg"]),
        ("fedlda", "method", ["class-moments"], ["discriminant", "fedavg"]),
        ("fedavg", "method", [], ["fedavg"]),
        (
            "creff",
            "discriminant",
            ["class-gradients", "class-moments"],
            ["discriminant", "retrained", "fedavg"],
        ),
    ],
)
def test_only_what_was_agreed_leaves_a_site(
    tmp_path: Path,
    folders: list[Path],
    method: str,
    delivered: str,
    records: list[str],
    heads: list[str],
) -> None:
    """Reads every message as it goes over the wire."""
    grid = federate(
        tmp_path / "run",
        folders,
        method=method,
        head__delivered=delivered,
        rules={"north": {"send-confusion-matrix": True}},
    )
    models = {
        name: tuple(tensor.shape)
        for name, tensor in build_model("resnet8-slim", 10, 512).state_dict().items()
        if tensor.is_floating_point()
    }
    kinds: list[str] = []
    names: dict[int, str] = {}
    matrices = []
    for reply in grid.replies:
        kind, node = reply.metadata.message_type, reply.metadata.src_node_id
        if kind not in kinds[-1:]:
            kinds.append(kind)
        content = reply.content
        if kind == "query":
            assert set(content) == {"config"}
            values = content.config_records["config"]
            assert set(values) == {"site", "versions"}
            names[node] = str(values["site"])
        elif kind == "evaluate":
            if "confusion" in content:
                matrices.append((len(kinds), names[node]))
                (matrix,) = content.array_records.pop("confusion").values()
                assert matrix.numpy().shape == (10, 10)
            assert set(content) == {"metrics"}
            found = content.metric_records["metrics"]
            recalls = {f"recall-{head}" for head in heads}
            counted = {"num-examples", "classes", "unreadable-images"}
            assert set(found) == counted | {"seconds-evaluation"} | recalls
            for recall in recalls:
                # Steps of 5 %: neither counts nor fractions that tell them.
                assert {v % 5 for v in cast(list[int], found[recall])} == {0}
        else:
            assert set(content) == {"arrays", "metrics", *records}
            arrays = content.array_records["arrays"]
            assert {n: tuple(a.shape) for n, a in arrays.items()} == models
            for record in records:
                sent = content.array_records[record]
                shapes = {n: tuple(a.shape) for n, a in sent.items()}
                held = shapes.get("classes", (0,))[0]
                assert shapes == {
                    n: tuple(held if size == H else size for size in shape)
                    for n, shape in STATISTICS[record].items()
                }
            assert set(content.metric_records["metrics"]) == {
                "partition-id",
                "num-examples",
                "loss",
                "distillation-loss",
                "unreadable-images",
                "seconds-data",
                "seconds-gradients",
                "seconds-training",
            }
        wire = wire_bytes(reply)
        for private in (b"private-", str(tmp_path).encode(), b".png"):
            assert private not in wire
    assert kinds == ["query", *["train", "evaluate"] * 2]
    # Only in the last round, and only from the site whose policy allows it.
    assert matrices == [(len(kinds), "north")]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("unreadable", "2 of 18 images cannot be read"),
        ("unknown", "some of its folders are no class of the run"),
        ("gone", "the data folder is not there"),
        ("empty", "the data folder has no image"),
    ],
)
def test_broken_site_is_left_out_by_name_without_names_from_its_disk(
    tmp_path: Path,
    folders: list[Path],
    flower_log: pytest.LogCaptureFixture,
    damage: str,
    reason: str,
) -> None:
    broken = folders[0]
    if damage == "unreadable":
        for i in range(2):
            (broken / "circle" / f"secret-{i}.png").write_bytes(b"x" * (i + 1))
    elif damage == "unknown":
        write_site(broken / "secret", {"circle": 1})
    elif damage == "gone":
        broken.rename(tmp_path / "moved")
    else:
        folders[0] = tmp_path / "nothing"
        folders[0].mkdir()
    grid = federate(tmp_path / "run", folders, federation__rounds=1)
    lines = [m for m in flower_log.messages if reason.split(" of ")[0] in m]
    if damage == "unreadable":
        assert any("(north)" in line and "cannot be read" in line for line in lines)
    else:
        assert any("does not take part" in line and reason in line for line in lines)
    (line,) = metrics(tmp_path / "run")
    assert "north" not in line["clients"]
    for reply in grid.replies:
        text = str(reply.error.reason) if reply.has_error() else ""
        assert "secret" not in text and str(tmp_path) not in text


def test_same_seed_repeats_who_trains_whatever_the_node_ids(
    tmp_path: Path, folders: list[Path]
) -> None:
    federate(tmp_path / "a", folders, order_seed=3)
    federate(tmp_path / "b", folders[::-1], NAMES[::-1], order_seed=4)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_site_that_leaves_is_not_waited_for_and_comes_back(
    tmp_path: Path, folders: list[Path], flower_log: pytest.LogCaptureFixture
) -> None:
    away: set[int] = set()

    def tamper(request: Message, reply: Message) -> Message:
        # Site 1 is away from the end of round 1 to the end of round 2.
        round_ = request.content.config_records["config"]["server-round"]
        away.clear()
        if round_ == 1:
            away.add(1)
        return reply

    federate(
        tmp_path / "run",
        folders,
        tamper=tamper,
        away=away,
        federation__rounds=3,
        federation__clients_per_round=3,
    )
    clients = [sorted(line["clients"]) for line in metrics(tmp_path / "run")]
    assert clients == [["east", "north", "west"], ["north", "west"], sorted(NAMES)]
    (left,) = [m for m in flower_log.messages if "is not connected" in m]
    assert left.startswith("site east (node ")
    assert sum("site east" in m and "takes part" in m for m in flower_log.messages) == 2
    assert [site for _, site in told(tmp_path / "run", What.AWAY)] == ["east"]
    joined = told(tmp_path / "run", What.JOINED)
    assert sorted(str(site) for _, site in joined) == sorted(NAMES)
    assert [site for _, site in told(tmp_path / "run", What.BACK)] == ["east"]


def test_silent_site_is_named(
    tmp_path: Path, folders: list[Path], flower_log: pytest.LogCaptureFixture
) -> None:
    class Silent(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            replies = super().send_and_receive(messages, timeout=timeout)
            lost = self._ids[2]
            return [
                r
                for r in replies
                if r.metadata.src_node_id != lost or r.metadata.message_type == "query"
            ]

    grid = federate(
        tmp_path / "run",
        folders,
        kind=Silent,
        federation__rounds=1,
        federation__round_timeout=0.1,
        federation__clients_per_round=3,
    )
    late = [m for m in flower_log.messages if "did not reply in time" in m]
    assert len(late) == 2  # training and evaluation
    assert all(f"node {grid._ids[2]} (west)" in m for m in late)
    # Each of them to train and to evaluate.
    assert told(tmp_path / "run", What.SILENT) == [(1, "west")] * 2
    replied = told(tmp_path / "run", What.REPLIED)
    assert sorted(map(str, replied)) == sorted(["(1, 'east')", "(1, 'north')"] * 2)
    assert sorted(metrics(tmp_path / "run")[0]["clients"]) == ["east", "north"]


def test_equal_names_are_told_apart_and_reported(
    tmp_path: Path, folders: list[Path], flower_log: pytest.LogCaptureFixture
) -> None:
    federate(
        tmp_path / "run", folders, ["a", "a", "b"], federation__clients_per_round=3
    )
    for line in metrics(tmp_path / "run"):
        assert len(set(line["clients"])) == 3
    assert any("calls itself a, as another node does" in m for m in flower_log.messages)


def test_any_size_and_mode_trains(tmp_path: Path, folders: list[Path]) -> None:
    """JPEG, PNG and WebP; grey, palette, CMYK; from one pixel to wide."""
    for i, (mode, name, size) in enumerate(
        [
            ("L", "a.jpg", (40, 9)),
            ("P", "b.png", (300, 200)),
            ("CMYK", "c.JPEG", (64, 48)),
            ("RGBA", "d.webp", (33, 90)),
            ("RGB", "e é.png", (1, 1)),
        ]
    ):
        picture = Image.effect_noise((size[0], size[1]), 50 + i).convert("RGB")
        picture.convert(mode).save(folders[0] / "circle" / name)
    federate(
        tmp_path / "run",
        folders,
        federation__rounds=1,
        federation__clients_per_round=3,
        dataset__image_size=16,
    )
    (line,) = metrics(tmp_path / "run")
    assert sorted(line["clients"]) == sorted(NAMES) and line["dropped_replies"] == 0


def test_tampered_evaluations_are_dropped_with_the_node_and_the_reason() -> None:
    good = {"retrained": {0: 10.0, 3: 99.0}, "fedavg": {0: 0.0, 3: 50.0}}

    def reply(**changes: Any) -> Message:
        content = messages.Evaluation(7, good, 2, 1.5).content()
        for name, value in changes.items():
            content.metric_records["metrics"][name.replace("_", "-")] = value
        request = Message(RecordDict(), 5, "evaluate")
        return Message(content, reply_to=request)

    heads = ["retrained", "fedavg"]
    found = messages.Evaluation.parse(reply(), 4, heads)
    assert found.recalls == {
        "retrained": {0: 10, 3: 100},
        "fedavg": {0: 0, 3: 50},
    }
    assert (found.images, found.unreadable, found.seconds) == (7, 2, 1.5)
    assert found.confusion is None
    cases: list[tuple[dict[str, Any], str]] = [
        ({"classes": [0, 4]}, "classes must be integers from 0 to 3"),
        ({"classes": [0, 0]}, "they must differ"),
        ({"recall_fedavg": [0, 101]}, "recall-fedavg must be integers from 0 to 100"),
        ({"recall_fedavg": [0.5, 1.0]}, "recall-fedavg must be integers"),
        ({"recall_fedavg": [5]}, "1 accuracies of fedavg for 2 classes"),
        ({"top1": 3}, "metrics missing or unknown: top1"),
        ({"num_examples": -1}, "num-examples must be an integer from 0"),
        ({"unreadable_images": 0.5}, "unreadable-images must be an integer from 0"),
        ({"seconds_evaluation": float("nan")}, "seconds-evaluation must be a number"),
    ]
    for changes, message in cases:
        with pytest.raises(messages.ReplyError, match=message):
            messages.Evaluation.parse(reply(**changes), 4, heads)


def test_site_with_another_teacher_is_left_out_by_name(
    tmp_path: Path, folders: list[Path], flower_log: pytest.LogCaptureFixture
) -> None:
    class Other(InProcessGrid):
        """One node takes the server's teacher for another than its own."""

        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            requests = list(messages)
            for request in requests:
                settings = request.content.config_records.get("config", {})
                if (
                    request.metadata.dst_node_id == self._ids[1]
                    and TEACHER_FINGERPRINT in settings
                ):
                    settings[TEACHER_FINGERPRINT] = "f00ba5" * 10
            return super().send_and_receive(requests, timeout=timeout)

    grid = federate(
        tmp_path / "run",
        folders,
        kind=Other,
        federation__rounds=1,
        federation__clients_per_round=3,
    )
    (refused,) = [m for m in flower_log.messages if "dropped the reply" in m]
    assert f"node {grid._ids[1]} (east)" in refused
    assert "f00ba5f00ba5 at the server: install the same weights on both" in refused
    assert sorted(metrics(tmp_path / "run")[0]["clients"]) == ["north", "west"]


def test_lost_node_is_named_though_the_superlink_signs_its_error(
    tmp_path: Path, folders: list[Path], flower_log: pytest.LogCaptureFixture
) -> None:
    """As Flower reports a node that went offline: from node 1, with code 5."""

    class Lossy(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> list[Message]:
            replies = super().pull_messages(message_ids)
            for i, reply in enumerate(replies):
                meta = reply.metadata
                if meta.src_node_id == self._ids[0] and meta.message_type == "train":
                    replies[i] = lost_node_error(
                        self.requests[0], meta.reply_to_message_id
                    )
            return replies

    grid = federate(
        tmp_path / "run",
        folders,
        kind=Lossy,
        federation__rounds=1,
        federation__clients_per_round=3,
    )
    (dropped,) = [m for m in flower_log.messages if "dropped the reply" in m]
    assert f"node {grid._ids[0]} (north)" in dropped
    assert told(tmp_path / "run", What.DROPPED) == [(1, "north")]
    # In training only the others have replied; all three evaluate.
    replied = [site for _, site in told(tmp_path / "run", What.REPLIED)]
    assert sorted(map(str, replied)) == sorted([*NAMES, "east", "west"])
    assert not any("did not reply in time" in m for m in flower_log.messages)
    assert sorted(metrics(tmp_path / "run")[0]["clients"]) == ["east", "west"]


def test_run_of_sites_has_a_report(tmp_path: Path, folders: list[Path]) -> None:
    """In the order of the class names, without counts that nobody knows."""
    federate(tmp_path / "run", folders)
    page = write_run_report(FinishedRun.read(tmp_path / "run")).read_text("utf-8")
    assert "on the sites&#39; validation images" in page
    assert ", in the order of dataset.class-names. " in page
    assert page.count("Sites do not report their number of images by class.") == 2
    balanced = metrics(tmp_path / "run")[-1]["accuracy"]["retrained"]["balanced"]
    assert f'data-value="{balanced}"' in page


def test_report_has_a_table_of_sites_and_their_spread(
    tmp_path: Path, folders: list[Path]
) -> None:
    def tamper(request: Message, reply: Message) -> Message:
        config = request.content.config_records["config"]
        asked = config["partition-id"], config["server-round"]
        if asked != (client_number("west"), 1):
            return reply
        return Message(Error(code=2, reason="no <b>memory"), reply_to=request)

    federate(
        tmp_path / "run",
        folders,
        tamper=tamper,
        federation__clients_per_round=3,
        rules={"east": {"send-confusion-matrix": True}},
    )
    run = FinishedRun.read(tmp_path / "run")
    page = Page(write_run_report(run))
    lines = metrics(tmp_path / "run")
    table = page.tables["sites-table"]
    names = [row[0] for row in table.texts]
    last = {name: site["evaluation"] for name, site in lines[-1]["sites"].items()}

    def balanced(head: str) -> dict[str, float]:
        return {n: found["accuracy"][head]["balanced"] for n, found in last.items()}

    own, teachers = balanced("retrained"), balanced("teacher")
    assert names == sorted(sorted(NAMES), key=lambda name: own[name])
    training = {n: site["training"] for n, site in lines[-1]["sites"].items()}
    for title, values in (
        ("balanced", own),
        ("teacher", teachers),
        ("training images", {n: training[n]["images"] for n in NAMES}),
        ("validation images", {n: last[n]["images"] for n in NAMES}),
        ("trained in rounds", {n: 1 if n == "west" else 2 for n in NAMES}),
        ("replies not used", {n: int(n == "west") for n in NAMES}),
    ):
        assert table.column(title) == [json.dumps(values[name]) for name in names]
    assert page.tables["unused-table"].texts == [["1", "west", "train", "no <b>memory"]]
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    worst, best = min(own.values()), max(own.values())
    mean = sum(own.values()) / 3
    spread = (sum((v - mean) ** 2 for v in own.values()) / 3) ** 0.5
    assert f"worst {worst:.1f} % ({names[0]})" in text
    assert f"best {best:.1f} % ({names[-1]}), standard deviation {spread:.1f}" in text
    assert "validation images of 1 of 3 sites" in text
    clock = run.clock_seconds()
    assert clock is not None and clock >= run.wall_seconds() - 0.1
    assert "minutes by the clock, waiting for sites included" in text


class _Liar(InProcessGrid):
    """A grid on which the third site claims an accuracy of 100 % throughout."""

    def send_and_receive(self, messages: Any, *, timeout: Any = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        for reply in replies:
            if (
                reply.metadata.message_type == "evaluate"
                and reply.metadata.src_node_id == self._ids[2]
            ):
                values = reply.content.metric_records["metrics"]
                for name, value in values.items():
                    if name.startswith("recall-"):
                        values[name] = [100] * len(cast(list[int], value))
        return replies


def test_a_claimed_accuracy_does_not_choose_the_best_round(
    tmp_path: Path, folders: list[Path]
) -> None:
    changes: dict[str, Any] = {"method": "fedavg", "federation__rounds": 4}
    federate(tmp_path / "honest", folders, **changes)
    federate(tmp_path / "lied-to", folders, kind=_Liar, **changes)
    honest, lied_to = metrics(tmp_path / "honest"), metrics(tmp_path / "lied-to")
    for before, after in zip(honest, lied_to, strict=True):
        claimed = after["accuracy"]["fedavg"]["balanced"]
        assert claimed > before["accuracy"]["fedavg"]["balanced"] + 10
        median = after["accuracy_median_site"]["fedavg"]["balanced"]
        # The greater of two honest sites' at most; both are far below 100 here.
        assert median < 60
    best = json.loads(
        (
            tmp_path / "lied-to" / "checkpoints" / "round-000004" / "state.json"
        ).read_text("utf-8")
    )["best"]
    medians = [r["accuracy_median_site"]["fedavg"]["balanced"] for r in lied_to]
    assert best["value"] == pytest.approx(max(medians), abs=1e-4)
    assert best["round"] == 1 + medians.index(max(medians))


def test_one_site_of_three_does_not_become_the_model(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sites leave after round 1, and one of them is back in round 3."""
    away: set[int] = set()

    class Leaving(InProcessGrid):
        rounds = 0

        def send_and_receive(
            self, messages: Any, *, timeout: Any = None
        ) -> list[Message]:
            messages = list(messages)
            if messages and messages[0].metadata.message_type == "evaluate":
                Leaving.rounds += 1
                replies = super().send_and_receive(messages, timeout=timeout)
                away.clear()
                away.update({1: {0, 1}, 2: {0}}.get(Leaving.rounds, set()))
                return replies
            return super().send_and_receive(messages, timeout=timeout)

    grid = federate(
        tmp_path / "run",
        folders,
        kind=Leaving,
        away=away,
        method="fedavg",
        federation__rounds=3,
        federation__clients_per_round=3,
    )
    rounds = metrics(tmp_path / "run")
    assert [line["kept_model"] for line in rounds] == [False, True, False]
    assert [len(line["clients"]) for line in rounds] == [3, 0, 2]
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("round")]
    trained = [
        r.content.metric_records["metrics"]["num-examples"]
        for r in grid.replies
        if r.metadata.message_type == "train"
    ]
    total = sum(cast(list[int], trained[:3]))
    assert f"3 of 3 sites, {total} of {total} images" in lines[0]
    assert f"1 of 3 sites, {trained[3]} of {total} images" in lines[1]
    assert "old model kept" in lines[1]
    assert "2 of 3 sites, " in lines[2]


@pytest.mark.parametrize("code", [2, messages.DATA_ERROR, messages.DIVERGED])
def test_a_site_never_stops_a_run(
    tmp_path: Path, folders: list[Path], code: int
) -> None:
    def tamper(request: Message, reply: Message) -> Message:
        config = request.content.config_records["config"]
        if config[messages.PARTITION] != client_number("west"):
            return reply
        return Message(Error(code, "DatasetError: DatasetError"), reply_to=request)

    federate(
        tmp_path / "run",
        folders,
        method="fedavg",
        tamper=tamper,
        federation__clients_per_round=3,
    )
    assert [line["dropped_replies"] for line in metrics(tmp_path / "run")] == [1, 1]
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_round_without_any_usable_reply_is_passed_over(
    tmp_path: Path, folders: list[Path]
) -> None:
    def tamper(request: Message, reply: Message) -> Message:
        config = request.content.config_records["config"]
        if config[messages.ROUND] != 2:
            return reply
        return Message(Error(2, "out of memory"), reply_to=request)

    federate(
        tmp_path / "run", folders, method="fedavg", tamper=tamper, federation__rounds=3
    )
    rounds = metrics(tmp_path / "run")
    assert [line["kept_model"] for line in rounds] == [False, True, False]


def test_random_numbers_are_the_streams_and_not_the_sites(
    tmp_path: Path, folders: list[Path]
) -> None:
    """A site's number has more bits than its stream, which is what it always was."""
    grid = federate(tmp_path / "run", folders, federation__rounds=1)
    request = grid.requests[0]
    config = request.content.config_records["config"]
    stream = cast(int, config["random-stream"])
    digests = {
        int.from_bytes(hashlib.blake2b(n.encode(), digest_size=4).digest(), "little")
        for n in NAMES
    }
    assert stream in digests and config["partition-id"] != stream

    def trained(**changes: int) -> list[bytes]:
        for name, value in changes.items():
            config[name.replace("_", "-")] = value
        (reply,) = grid.send_and_receive([request])
        arrays = reply.content.array_records
        return [a.data for kind in sorted(arrays) for a in arrays[kind].values()]

    first = trained()
    assert trained(partition_id=5) == first
    assert trained(random_stream=stream + 1) != first


def test_registry_names_sites_and_keeps_others_out(
    tmp_path: Path, folders: list[Path], flower_log: pytest.LogCaptureFixture
) -> None:
    """The last folder's node has no key in it, and calls itself the first one's."""
    (first, second, third) = random.Random(3).sample(range(1, 10**6), 3)
    registry = SiteRegistry(
        (Site("north", "ecdsa AAAA1", first), Site("east", "ecdsa AAAA2", second))
    )
    path = tmp_path / "sites.json"
    path.write_text(registry.text())
    path.chmod(0o644)
    federate(
        tmp_path / "run",
        folders,
        ["north", None, "north"],
        federation__site_registry=str(path),
        federation__rounds=1,
        federation__clients_per_round=2,
    )
    assert sorted(metrics(tmp_path / "run")[0]["clients"]) == ["east", "north"]
    refused = f"node {third} does not take part: it calls itself north, but its key"
    assert any(refused in m for m in flower_log.messages)


@pytest.mark.parametrize("name", ["", "s\u0456te", "a b", 5])
def test_name_that_no_site_may_have_is_refused_at_the_node(
    tmp_path: Path,
    folders: list[Path],
    flower_log: pytest.LogCaptureFixture,
    name: Any,
) -> None:
    federate(
        tmp_path / "run", folders[:2], [name, "b"], federation__clients_per_round=1
    )
    (line, *_) = [m for m in flower_log.messages if "does not take part" in m]
    assert "--node-config must be 1 to 64 ASCII letters" in line
