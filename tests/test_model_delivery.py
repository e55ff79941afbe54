"""A run's model reaches its sites, which then predict as the server does."""

import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from onnxruntime import InferenceSession

from clip2fl_cli.prediction import Model
from clip2fl_common import messages
from clip2fl_common.config import RunConfig, Scalar
from clip2fl_common.files import remove
from clip2fl_common.signed_folder import public_key_of, verify_folder
from clip2fl_common.site_registry import Site, SiteRegistry
from server_app import signed_model
from server_app.app import main
from server_app.delivery import ModelCard, load_model
from server_app.outbox import DeliveryError
from server_app.signing import public_key_file, signing_key
from strategy import model_delivery
from tests.conftest import be_flower
from tests.defaults import run_config
from tests.flower_private import wire_bytes
from tests.in_process_grid import InProcessGrid
from tests.site_folders import write_site
from tests.test_sites import CLASSES, COUNTS, NAMES
from tests.tiny_teacher import write_teacher

ORDER_SEED = 3
Settings = dict[str, Any]


@pytest.fixture
def real_onnx() -> None:
    """Let a test export the model, which takes many seconds."""


@pytest.fixture(autouse=True)
def quick_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Keep out of the user's cache, wait for nothing, send pieces of 50 kB."""
    be_flower(tmp_path / "cache", monkeypatch)
    if "real_onnx" not in request.fixturenames:
        monkeypatch.setattr(signed_model, "onnx_bytes", lambda *_: b"o" * 90_000)
    monkeypatch.setattr("strategy.grid.POLL_S", 0.0)
    monkeypatch.setattr("strategy.site_clients.WAIT_S", 0.0)
    monkeypatch.setattr(messages, "PIECE_BYTES", 50_000)


class Federation:
    """Three sites, which take models, and their server's key."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.key = folder / "server" / "signing.key"
        self.public = public_key_of(str(public_key_file(self.key)))
        self.folders = [
            write_site(folder / f"private-{i}", counts, first=100 * i)
            for i, counts in enumerate(COUNTS)
        ]
        self.models = [folder / f"models-{name}" for name in NAMES]
        self.nodes: list[dict[str, Any]] = [
            {
                "data-path": str(images),
                "site": name,
                "models-folder": str(models),
                "model-key": self.public,
            }
            for images, name, models in zip(
                self.folders, NAMES, self.models, strict=True
            )
        ]

    def config(self, **changes: Scalar) -> RunConfig:
        """Return the configuration of a tiny run that delivers its model."""
        settings: Settings = {
            "method": "fedavg",
            "dataset__name": "sites",
            "dataset__class_names": CLASSES,
            "dataset__validation_share": 0.3,
            "federation__rounds": 1,
            "federation__clients_per_round": 2,
            "model__feature_dim": 16,
            "run__dir": str(self.run.parent),
            "run__name": self.run.name,
            "delivery__signing_key": str(self.key),
        }
        return run_config(**{**settings, **changes})

    def start(
        self,
        config: RunConfig,
        kind: type[InProcessGrid] = InProcessGrid,
        away: Sequence[int] = (),
    ) -> InProcessGrid:
        """Run the ServerApp to its end."""
        nodes = len(self.nodes)
        grid = kind(config, nodes, ORDER_SEED, node_configs=self.nodes)
        grid.away = set(away)
        main(grid, Context(1, 0, {}, RecordDict(), cast(Any, config.to_flat())))
        return grid

    def deliver(self, away: Sequence[int] = (), **changes: Scalar) -> InProcessGrid:
        """Deliver the model again, as ``clip2fl deliver`` does."""
        return self.start(run_config(delivery__run=str(self.run), **changes), away=away)

    def arrived(self) -> list[list[Path]]:
        """Return the folders of each site's models."""
        return [sorted(folder.glob("[!.]*")) for folder in self.models]


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    """Return a federation that has not run yet."""
    return Federation(tmp_path)


def images(federation: Federation) -> list[Path]:
    """Return some images of each site."""
    return [p for f in federation.folders for p in sorted(f.rglob("*.png"))[:4]]


@pytest.mark.usefixtures("real_onnx")
def test_sites_receive_the_model_and_predict_as_the_server_does(
    made: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = made.start(made.config())
    expected = Model.load(made.run).predict(images(made))
    for (folder,) in made.arrived():
        manifest = verify_folder(folder, made.public)
        assert manifest.run == "run"
        assert {file.name for file in manifest.files} == {
            *("model.safetensors", "model.onnx", "MODEL_CARD.md", "card.json")
        }
        own = Model.load(folder, made.public).predict(images(made))
        assert own == expected
        assert (folder / "model.safetensors").read_bytes() == (
            made.run / "model.safetensors"
        ).read_bytes()
    # Nothing is half-written, and nothing of the site is in its answers.
    for folder in made.models:
        assert [path.name for path in folder.glob(".*")] == [".lock"]
    sent = [r for r in grid.replies if r.metadata.message_type == "query.model"]
    assert len(sent) > 3 * 4
    for reply in sent:
        assert set(reply.content) == {"model-answer"}
        for private in (b"private-", b"models-", b".png"):
            assert private not in wire_bytes(reply)
    printed = capsys.readouterr().out
    assert "delivery: 3 of 3 connected sites have run-" in printed
    assert "clip2fl deliver" not in printed
    # The export of ONNX notes the lines of code that it has seen, with paths.
    for file in made.arrived()[0][0].iterdir():
        content = file.read_bytes()
        assert str(made.run.parent).encode() not in content, file.name
        assert b"server_app/" not in content, file.name
    onnx = str(made.arrived()[0][0] / "model.onnx")
    pixels = np.zeros((3, 3, 32, 32), np.uint8)
    (logits,) = InferenceSession(onnx).run(["logits"], {"pixels": pixels})
    model, card = load_model(made.run / "model.safetensors")
    with torch.no_grad():
        wanted = model(card.normalization(torch.from_numpy(pixels)))
    np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=0)


def test_no_delivered_file_has_the_teachers_path(
    made: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tmp_path / "private-teacher"
    write_teacher(teacher, seed=0)
    for node in made.nodes:
        node["teacher-folders"] = str(teacher)
    provenance: list[Any] = []

    def onnx(_: object, card: ModelCard) -> bytes:
        provenance.append(card.provenance)
        return b"o"

    monkeypatch.setattr(signed_model, "onnx_bytes", onnx)
    made.start(
        made.config(
            method="clip2fl",
            model__feature_dim=512,
            teacher__model=f"local-dir:{teacher}",
            synthesis__steps=1,
            retraining__epochs=1,
        )
    )
    folder = made.run / "delivery"
    assert json.loads((folder / "card.json").read_text("utf-8"))["teacher"]["name"] == (
        "local-dir"
    )
    for content in (*(f.read_bytes() for f in folder.iterdir()), repr(provenance)):
        assert "private-teacher" not in str(content)
    assert provenance[0]["teacher"] == "local-dir"


def test_card_lists_only_the_sites_that_allow_it(made: Federation) -> None:
    made.nodes[1]["listed-in-card"] = True
    made.start(made.config(federation__clients_per_round=3))
    folder = made.run / "delivery"
    card = json.loads((folder / "card.json").read_text("utf-8"))
    (line,) = (made.run / "metrics.jsonl").read_text("utf-8").splitlines()
    (listed,) = card["sites"]["listed"]
    assert listed["name"] == "east" and card["sites"]["trained"] == 3
    # Three in ten images are for validation; the site has 24.
    assert 12 < listed["images"] < 22
    assert set(listed["per_class"]) <= set(COUNTS[1])
    values = listed["per_class"].values()
    assert listed["balanced"] == pytest.approx(sum(values) / len(values))
    # Two other sites: a mean with theirs would tell each the other's accuracy.
    reported = json.loads(line)["sites"]
    per_class = [
        site["evaluation"]["accuracy"]["fedavg"]["per_class"]
        for site in reported.values()
    ]
    own = [{c for c, x in enumerate(one) if x is not None} for one in per_class]
    alone = own[0] - own[1] - own[2]
    assert sorted(reported) == ["east", "north", "west"]
    for c, given in enumerate(card["accuracy"]["per_class"]):
        assert (given["accuracy"] is not None) == (c in alone)
    assert card["accuracy_median_site"] is None
    config = json.loads((made.run / "config.json").read_text("utf-8"))
    assert card["code"]["fingerprint"] == config["code"]
    assert card["versions"] == config["versions"]
    for text in (
        (folder / "card.json").read_text("utf-8"),
        (folder / "MODEL_CARD.md").read_text("utf-8"),
    ):
        assert "east" in text
        for private in ("north", "west", str(made.run.parent)):
            assert private not in text


def test_sites_that_were_away_are_served_later_and_nobody_twice(
    made: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    made.start(made.config(), away=[2])
    assert [len(models) for models in made.arrived()] == [1, 1, 0]
    assert "2 of 2 connected sites" in capsys.readouterr().out
    before = made.arrived()[0][0].stat().st_mtime_ns
    grid = made.deliver()
    assert [len(models) for models in made.arrived()] == [1, 1, 1]
    assert len({folder.name for (folder,) in made.arrived()}) == 1
    assert made.arrived()[0][0].stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert "north: was there before" in printed and "west: stored" in printed
    # Only the site that lacked the model got pieces of it.
    third = grid._ids[2]
    assert {
        reply.metadata.src_node_id
        for reply in grid.replies
        if reply.content.config_records["model-answer"]["state"] == "wanted"
    } == {third}
    assert {r.metadata.message_type for r in grid.replies} == {"query.model"}


def test_model_is_as_old_as_its_run_whenever_it_is_signed(made: Federation) -> None:
    """An older run that is delivered today does not become the newest model."""
    made.start(made.config(delivery__signing_key=""))
    metrics = made.run / "metrics.jsonl"
    line = json.loads(metrics.read_text("utf-8"))
    line["clock"]["ended"] = "2026-03-01T12:00:00+02:00"
    metrics.write_text(json.dumps(line) + "\n", "utf-8")
    made.deliver(delivery__signing_key=str(made.key))
    ((first,), *_) = made.arrived()
    manifest = verify_folder(first, made.public)
    assert manifest.made == datetime(2026, 3, 1, 10, tzinfo=UTC)
    text = (first / "MODEL_CARD.md").read_text("utf-8")
    assert "The run ended on 2026-03-01T10:00:00+00:00." in text
    # Signed again, it is the same folder to a site.
    remove(made.run / "delivery")
    made.deliver(delivery__signing_key=str(made.key))
    assert made.arrived()[0] == [first]


def test_registry_keeps_unknown_nodes_out(
    made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _, third = random.Random(ORDER_SEED).sample(range(1, 10**6), 3)
    registry = tmp_path / "sites.json"
    sites = (Site("north", "ecdsa AAAA1", first), Site("west", "ecdsa AAAA2", third))
    registry.write_text(SiteRegistry(sites).text())
    registry.chmod(0o644)
    made.start(made.config(federation__site_registry=str(registry)))
    assert [len(models) for models in made.arrived()] == [1, 0, 1]
    # A later delivery takes the registry from the run's own configuration.
    made.deliver()
    assert [len(models) for models in made.arrived()] == [1, 0, 1]
    assert capsys.readouterr().out.count("2 of 2 connected sites") == 2


class Breaking(InProcessGrid):
    """A grid on which the second site's third piece gets no reply."""

    pieces = 0

    def send_and_receive(
        self, messages: Any, *, timeout: float | None = None
    ) -> list[Message]:
        """Return the replies; the lost piece has not reached the site either."""
        requests = list(messages)
        kept = []
        for request in requests:
            if (
                request.metadata.dst_node_id == self._ids[1]
                and request.metadata.message_type == "query.model"
                and request.content.array_records
            ):
                Breaking.pieces += 1
                if Breaking.pieces >= 3:
                    continue
            kept.append(request)
        return super().send_and_receive(kept, timeout=timeout)


def test_interrupted_transfer_leaves_no_model_and_goes_on_later(
    made: Federation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(model_delivery, "PIECE_TIMEOUT_S", 0.4)
    monkeypatch.setattr(Breaking, "pieces", 0)
    made.start(made.config(), kind=Breaking)
    assert [len(models) for models in made.arrived()] == [1, 0, 1]
    printed = capsys.readouterr().out
    assert "no answer in 0 s" in printed
    assert f"clip2fl deliver {made.run} serves the others" in printed
    (incoming,) = made.models[1].glob(".incoming-*")
    arrived = sum(file.stat().st_size for file in incoming.iterdir())
    assert arrived == 2 * 50_000
    grid = made.deliver()
    starts = [
        cast(int, reply.content.config_records["model-answer"]["next"])
        for reply in grid.replies
        if reply.metadata.src_node_id == grid._ids[1]
    ]
    assert starts[0] == arrived
    assert starts == sorted(starts)
    verify_folder(made.arrived()[1][0], made.public)
    assert not list(made.models[1].glob(".incoming-*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models-folder": None, "model-key": None}, "no models-folder"),
        ({"model-key": "00" * 31 + "01"}, "or another key signed them"),
        ({"max-model-mib": 0.01}, "max-model-mib is 0.01"),
        ({"max-request-mib": 0.01}, "max-request-mib is 0.01"),
        ({"data-path": None, "partition-id": 0}, "simulates a client"),
    ],
)
def test_refusing_site_is_named_and_hinders_nobody(
    made: Federation,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    said: str,
) -> None:
    made.start(made.config(delivery__signing_key=""))
    changed = {**made.nodes[1], **change}
    made.nodes[1] = {k: v for k, v in changed.items() if v is not None}
    made.deliver(delivery__signing_key=str(made.key))
    assert [len(models) for models in made.arrived()] == [1, 0, 1]
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if said in line]
    assert "delivery: node " in line
    assert str(made.models[1]) not in line


def test_budgets_do_not_count_a_delivery(made: Federation, tmp_path: Path) -> None:
    """The run may be the last one that a site answers; its model still comes."""
    for place, node in enumerate(made.nodes):
        node |= {"max-runs": 1, "max-rounds": 1}
        node["site-state"] = str(tmp_path / f"state-{place}")
    made.start(made.config(), away=[2])
    made.deliver()
    assert [len(models) for models in made.arrived()] == [1, 1, 1]


def _no_run(made: Federation) -> None:
    (made.run / "model.safetensors").unlink()


def _no_site(made: Federation) -> None:
    for node in made.nodes:
        del node["models-folder"]


def _simulation(made: Federation) -> None:
    path = made.run / "config.json"
    facts = json.loads(path.read_text("utf-8"))
    facts["config"]["dataset.name"] = "demo"
    path.write_text(json.dumps(facts))


def test_missing_signing_key_replaces_no_signature(made: Federation) -> None:
    """A typing error would make a new key, and sites would refuse the model."""
    made.start(made.config())
    before = {p: p.read_bytes() for p in (made.run / "delivery").iterdir()}
    wrong = made.key.with_name("singing.key")
    with pytest.raises(DeliveryError, match=f"there is no signing key {wrong}"):
        made.deliver(delivery__signing_key=str(wrong))
    assert not wrong.exists()
    assert {p: p.read_bytes() for p in (made.run / "delivery").iterdir()} == before


@pytest.mark.parametrize("damaged", [False, True])
def test_another_key_keeps_the_sites_that_the_card_lists(
    made: Federation, damaged: bool
) -> None:
    """Only the end of the run knows which sites allow it."""
    made.nodes[1]["listed-in-card"] = True
    made.start(made.config(federation__clients_per_round=3))
    file = made.run / "delivery" / "card.json"
    card = json.loads(file.read_text("utf-8"))
    assert [site["name"] for site in card["sites"]["listed"]] == ["east"]
    if damaged:
        file.write_text(file.read_text("utf-8").replace("east", "west"), "utf-8")
    other = made.key.with_name("other.key")
    public = public_key_of(str(public_key_file(other)))
    for node in made.nodes:
        node["model-key"] = public
    made.deliver(delivery__signing_key=str(other))
    verify_folder(made.run / "delivery", public)
    again = json.loads(file.read_text("utf-8"))
    assert again["sites"]["listed"] == (None if damaged else card["sites"]["listed"])


def test_two_deliveries_at_once_sign_one_after_the_other(
    made: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.start(made.config(delivery__signing_key=""))
    key = signing_key(made.key)
    exported, active = [], []

    def slowly(*_: object) -> bytes:
        active.append(1)
        exported.append(len(active))
        time.sleep(0.3)
        active.pop()
        return b"o"

    monkeypatch.setattr(signed_model, "onnx_bytes", slowly)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: signed_model.signed_model(made.run, key), "ab"))
    assert exported == [1]  # the second one found the first one's folder
    assert found[0] == found[1]
    assert verify_folder(made.run / "delivery", made.public) == found[0]


@pytest.mark.parametrize(
    ("prepare", "key", "said"),
    [
        (_no_run, True, "holds no complete run"),
        (_no_site, True, "no site has the model"),
        (_simulation, True, "is a simulation's"),
        (lambda made: None, False, "run without delivery.signing-key"),
    ],
    ids=["no run", "no site", "simulation", "no key"],
)
def test_delivery_that_reaches_nobody_fails_with_the_reason(
    made: Federation, prepare: Callable[[Federation], None], key: bool, said: str
) -> None:
    made.start(made.config(delivery__signing_key=""))
    assert made.arrived() == [[], [], []]
    prepare(made)
    with pytest.raises(DeliveryError, match=said):
        made.deliver(delivery__signing_key=str(made.key) if key else "")


def test_run_stays_complete_if_its_model_cannot_be_signed(
    made: Federation, flower_log: pytest.LogCaptureFixture
) -> None:
    made.key.chmod(0o644)
    made.start(made.config())
    assert (made.run / "model.safetensors").is_file()
    assert made.arrived() == [[], [], []]
    assert "clip2fl deliver" in flower_log.text and "chmod 600" in flower_log.text


def test_run_without_delivery_asks_sites_nothing_new(made: Federation) -> None:
    """Nor does the delivery change a digit of the run."""
    made.start(made.config())
    first = (made.run / "model.safetensors").read_bytes()
    made.run = made.run.with_name("plain")
    grid = made.start(made.config(delivery__signing_key=""))
    kinds = {reply.metadata.message_type for reply in grid.replies}
    assert kinds == {"query", "train", "evaluate"}
    assert (made.run / "model.safetensors").read_bytes() == first
    assert not (made.run / "delivery").exists()
