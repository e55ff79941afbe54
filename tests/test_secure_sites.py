"""Secure sums of nodes that have images, keys and rules of their own."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import Context, Error, Message, RecordDict
from safetensors.torch import load_file

from client_app.policy_check import check_policy
from clip2fl_cli.report import write_run_report
from clip2fl_cli.runs import FinishedRun
from clip2fl_common import messages
from clip2fl_common.config import Scalar
from clip2fl_common.data.demo import CLASS_NAMES
from clip2fl_common.messages.names import DIVERGED, MASKED, METRICS
from clip2fl_common.messages.secure import is_of_evaluation
from clip2fl_common.site_registry import Site, SiteRegistry
from server_app.app import main
from server_app.checkpoints import load_checkpoint
from tests.clip2fl_cli.html_page import Page
from tests.conftest import be_flower
from tests.defaults import run_config
from tests.flower_private import give_id
from tests.in_process_grid import InProcessGrid
from tests.site_folders import write_site
from tests.site_node import SiteNode, policy, refusal, site_run

NAMES = ["east", "north", "south", "west"]
COUNTS = [
    {"circle": 6, "triangle": 4},
    {"square": 5, "star": 4},
    {"circle": 5, "heart": 4},
    {"ring": 5, "square": 4},
]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategy.grid.POLL_S", 0.0)
    monkeypatch.setattr("strategy.site_clients.WAIT_S", 0.0)
    monkeypatch.setattr("strategy.site_clients.ASK_AGAIN_S", 0.0)


@dataclass
class Sites:
    """Four sites in a folder: images, keys, lists of keys, and rules."""

    folder: Path

    def __post_init__(self) -> None:
        """Write all files; each site trusts all sites."""
        for number, name in enumerate(NAMES):
            write_site(self.folder / name / "images", COUNTS[number], 100 * number)
            self.new_key(name)
        for name in NAMES:
            self.trust(name, NAMES)

    def new_key(self, name: str) -> None:
        """Write a key as ssh-keygen writes it."""
        key = ec.generate_private_key(ec.SECP384R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        (self.folder / name / "key").write_bytes(pem)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (self.folder / name / "key.pub").write_bytes(public)

    def registry(self, names: Sequence[str]) -> SiteRegistry:
        """Return names and keys of some sites."""
        return SiteRegistry(
            tuple(
                Site(name, (self.folder / name / "key.pub").read_text(), node)
                for node, name in enumerate(names, 1)
            )
        )

    def trust(self, name: str, others: Sequence[str]) -> None:
        """Write the list of the sites that a site trusts."""
        path = self.folder / name / "trusted.json"
        path.write_text(self.registry(others).text(), "utf-8")

    def policy(self, name: str, **rules: Any) -> Path:
        """Write a site's rules."""
        own = self.folder / name
        lines = [
            f'identity-key = "{own / "key"}"',
            f'trusted-sites = "{own / "trusted.json"}"',
            "secure-only = true",
            *(f"{key.replace('_', '-')} = {value}" for key, value in rules.items()),
        ]
        (own / "policy.toml").write_text("\n".join(lines), "utf-8")
        return own / "policy.toml"

    def federate(
        self,
        name: str,
        secure: bool = True,
        ruled: bool = True,
        grid_type: type[InProcessGrid] = InProcessGrid,
        **rules: Any,
    ) -> InProcessGrid:
        """Run two rounds."""
        settings: dict[str, Scalar] = {
            "method": "fedavg",
            "aggregation__secure": secure,
            "dataset__name": "sites",
            "dataset__class_names": ", ".join(CLASS_NAMES),
            "dataset__image_size": 16,
            "dataset__validation_share": 0.3,
            "federation__clients_per_round": 4,
            "run__dir": str(self.folder),
            "run__name": name,
        }
        config = run_config(**settings)
        nodes = []
        for site in NAMES:
            own = {"data-path": str(self.folder / site / "images"), "site": site}
            own["site-state"] = str(self.folder / site / f"state-{name}")
            if ruled:
                own["policy"] = str(self.policy(site, **rules))
            nodes.append(own)
        grid = grid_type(config, 4, 3, node_configs=nodes)
        main(grid, Context(1, 0, {}, RecordDict(), cast(Any, config.to_flat())))
        return grid

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Return a run's metrics."""
        lines = (self.folder / name / "metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


class Leaving(InProcessGrid):
    """One site leaves while the server waits for the keys of the second round."""

    leaves, silent = NAMES.index("west"), NAMES.index("west")
    number, looked = 0, False

    def get_node_ids(self) -> list[int]:
        """Return the nodes' ids; the server looks who is there while it waits."""
        self.looked = bool(self.away)
        return super().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Count the requests for keys, without the sums of evaluations."""
        requests = list(messages)
        if requests and requests[0].metadata.message_type == "train.keys":
            if not is_of_evaluation(requests[0].content):
                self.number += 1
        return super().push_messages(requests)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Hold a site's keys of the second round until the server has looked."""
        found = []
        for reply in super().pull_messages(message_ids):
            keys = reply.metadata.message_type == "train.keys"
            mine = reply.metadata.src_node_id == self._ids[self.silent]
            if keys and mine and self.number == 2 and not self.looked:
                self.away.add(self.leaves)
                self._waiting[reply.metadata.reply_to_message_id] = reply
            elif self.leaves in self.away and mine and self.silent == self.leaves:
                # As Flower says it of a node that is lost.
                lost = Error(code=4, reason="SuperNode unavailable")
                found.append(Message(lost, reply_to=self._request_of(reply)))
            else:
                found.append(reply)
        return found

    def _request_of(self, reply: Message) -> Message:
        request = Message(RecordDict(), reply.metadata.src_node_id, "train.keys")
        give_id(request, reply.metadata.reply_to_message_id)
        return request


class LeavingAfterItsKeys(Leaving):
    """The site that leaves has sent its keys; the server waits for another's."""

    silent = NAMES.index("north")


class Diverging(InProcessGrid):
    """In each round one site says that training diverged, and another fails."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Change what arrives in place of masked sums of training."""
        requests = list(messages)
        replies = super().send_and_receive(requests, timeout=timeout)
        if not requests or requests[0].metadata.message_type != "train":
            return replies
        codes = {self._ids[0]: 2, self._ids[1]: DIVERGED}
        errors = [
            Message(Error(codes[node], "no reply"), reply_to=request)
            for request in requests
            if (node := request.metadata.dst_node_id) in codes
        ]
        return errors + [r for r in replies if r.metadata.src_node_id not in codes]


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sites:
    be_flower(tmp_path / "cache", monkeypatch)
    return Sites(tmp_path)


def test_sites_sum_with_their_own_keys(sites: Sites) -> None:
    """In as many rounds as the sites allow; the last one is finished too."""
    sites.federate("secure", max_rounds=2, min_secure_sites=4)
    sites.federate("plain", secure=False, ruled=False)
    plain, secure = (
        load_checkpoint(sites.folder / name, 1).model for name in ("plain", "secure")
    )
    for name, values in plain.items():
        found = secure[name].double().numpy()
        np.testing.assert_allclose(found, values.double().numpy(), atol=3e-6, rtol=3e-6)
    for line in sites.metrics("secure"):
        assert sorted(line["clients"]) == NAMES and not line["kept_model"]
    for name in NAMES:
        state = sites.folder / name / "state-secure"
        assert (state / "secure-sums.sqlite").stat().st_mode & 0o777 == 0o600


def test_accuracies_are_summed_and_no_sites_own_is_told(sites: Sites) -> None:
    """The mean over sites is that of a run that tells each site's accuracies."""
    sites.federate("plain", secure=False, ruled=False)
    grid = sites.federate("secure", send_confusion_matrix="true")
    plain, secure = sites.metrics("plain"), sites.metrics("secure")
    assert secure[0]["accuracy"] == plain[0]["accuracy"] != {}
    for line, told in zip(secure, plain, strict=True):
        assert line["sites"] == {} and "accuracy_median_site" not in line
        reports = [site["evaluation"] for site in told["sites"].values()]
        images = [report["images"] for report in reports]
        by_class = zip(
            *(next(iter(r["accuracy"].values()))["per_class"] for r in reports),
            strict=True,
        )
        assert line["summed_evaluation"] == {
            "sites": 4,
            "images": sum(images),
            "sites_by_class": [sum(x is not None for x in own) for own in by_class],
        }
        assert told["summed_evaluation"] is None and sum(images) > 0
    artifacts = load_file(sites.folder / "secure" / "artifacts.safetensors")
    (matrix,) = [v for name, v in artifacts.items() if name.startswith("confusion")]
    assert int(matrix.sum()) == secure[-1]["summed_evaluation"]["images"]
    text = (sites.folder / "secure" / "events.jsonl").read_text("utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    noted = [event for event in events if event["what"] == "evaluated"]
    assert sorted(event["site"] for event in noted) == sorted(NAMES * 2)
    assert not any("accuracy" in event or "images" in event for event in noted)
    # Each site's answer is as long as any other's, and says nothing but who sends it.
    answers = [m for m in grid.replies if m.metadata.message_type == "evaluate"]
    assert len(answers) == 8
    for answer in answers:
        assert set(answer.content) == {MASKED, METRICS}
        assert set(answer.content.metric_records[METRICS]) == {"partition-id"}
    assert len({messages.message_bytes(m.content) for m in answers[:4]}) == 1


def test_report_tells_what_the_sums_tell_and_who_was_in_them(sites: Sites) -> None:
    """West leaves in round 2, after it has trained in round 1."""
    sites.federate("run", grid_type=Leaving, send_confusion_matrix="true")
    run = FinishedRun.read(sites.folder / "run")
    page = Page(write_run_report(run))
    table = page.tables["sites-table"]
    assert [row[0] for row in table.texts] == NAMES
    assert table.column("trained in rounds") == [
        "1" if name == "west" else "2" for name in NAMES
    ]
    lost = Counter(
        reply["site"] for line in run.rounds for reply in line["unused_replies"]
    )
    assert lost["west"] >= 1
    assert table.column("replies not used") == [str(lost[name]) for name in NAMES]
    assert len(page.tables["unused-table"].texts) == lost.total()
    images = run.rounds[-1]["summed_evaluation"]["images"]
    text = (sites.folder / "run" / "report.html").read_text("utf-8")
    assert f"the sum of 3 sites with {images} validation images" in text
    assert "The matrix is a sum of 3 sites." in text


def test_matrix_without_permission_is_none(sites: Sites) -> None:
    sites.federate("run")
    artifacts = load_file(sites.folder / "run" / "artifacts.safetensors")
    assert not [name for name in artifacts if name.startswith("confusion")]


def test_too_few_sites_that_evaluate_give_no_accuracy(
    sites: Sites, flower_log: pytest.LogCaptureFixture
) -> None:
    """Two sites miss one in their lists; the run goes on without an accuracy."""
    for name in ("east", "north"):
        sites.trust(name, ["east", "north", "south"])
    sites.federate("run")
    for line in sites.metrics("run"):
        assert line["accuracy"] == {} and line["summed_evaluation"] is None
    told = [m for m in flower_log.messages if "no secure sum of evaluations" in m]
    assert len(told) == 2
    assert "masked sums of 2 of 4 clients, and 3 are needed" in told[0]


def test_server_that_asks_for_plain_accuracies_gets_none(sites: Sites) -> None:
    """A run with secure aggregation, whose requests to evaluate have no keys."""
    folder = sites.folder / "east"
    rules = {"policy": str(sites.policy("east")), "site": "east"}
    node = SiteNode(folder / "images", rules)
    run = site_run(aggregation__secure=True, federation__clients_per_round=3)
    assert refusal(node.ask("evaluate", run)) == (
        "no request of a secure sum: it has no record secure-aggregation"
    )


@pytest.mark.parametrize("grid_type", [Leaving, LeavingAfterItsKeys])
def test_site_that_leaves_while_keys_are_collected_costs_only_its_update(
    sites: Sites, grid_type: type[Leaving], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategy.grid.LOOK_S", 0.0)
    grid = sites.federate("run", grid_type=grid_type)
    first, second = sites.metrics("run")
    assert grid.away == {NAMES.index("west")}
    assert sorted(first["clients"]) == NAMES
    assert sorted(second["clients"]) == ["east", "north", "south"]
    assert not second["kept_model"] and second["summed_evaluation"]["sites"] == 3


def test_one_site_that_diverges_ends_no_run(sites: Sites) -> None:
    """Two masked sums are too few for a sum, but their training did not diverge."""
    sites.federate("run", grid_type=Diverging)
    for line in sites.metrics("run"):
        assert line["kept_model"] and line["went_back_to"] is None
        assert line["lost"] == "masked sums of 2 of 4 clients, and 3 are needed"


def test_site_that_others_do_not_trust_is_named(
    sites: Sites, flower_log: pytest.LogCaptureFixture
) -> None:
    """Two sites miss one in their lists: they refuse, and two are too few."""
    for name in ("east", "north"):
        sites.trust(name, ["east", "north", "south"])
    sites.federate("run")
    for line in sites.metrics("run"):
        assert line["kept_model"]
        assert line["lost"] == "masked sums of 2 of 4 clients, and 3 are needed"
    refusals = [m for m in flower_log.messages if "dropped the reply" in m]
    assert len(refusals) == 4
    assert all(
        "'west' takes part in the round, and is not in this" in m for m in refusals
    )


def test_swapped_key_file_does_not_pass_for_the_site(
    sites: Sites, flower_log: pytest.LogCaptureFixture
) -> None:
    """A node has another key than the one that all know for its name."""
    sites.new_key("west")
    sites.federate("run")
    for line in sites.metrics("run"):
        assert sorted(line["clients"]) == ["east", "north", "south"]
        assert not line["kept_model"]
    told = [m for m in flower_log.messages if "client west sent no usable key" in m]
    assert len(told) == 4  # to train and to evaluate, in two rounds
    assert all(str(sites.folder) not in m and "own log says more" in m for m in told)


def test_site_may_refuse_runs_without_secure_aggregation(
    sites: Sites, flower_log: pytest.LogCaptureFixture
) -> None:
    folder = sites.folder / "east"
    rules = policy(folder, secure_only=True)
    node = SiteNode(folder / "images", rules)
    for kind in ("query", "train", "evaluate"):
        assert refusal(node.ask(kind, site_run())) == (
            "the run has aggregation.secure = false, and the site's secure-only is true"
        )
    secure = site_run(aggregation__secure=True, federation__clients_per_round=3)
    assert refusal(node.ask("train", secure)) == (
        "the run has aggregation.secure = true, and the site has no identity-key or no "
        "trusted-sites"
    )


def test_doctor_tells_the_sites_name_and_whom_it_trusts(sites: Sites) -> None:
    findings = list(check_policy(sites.policy("north"), None))
    assert [f.text for f in findings if f.check == "keys"] == [
        "this site is north in secure sums; it trusts east, north, south, west"
    ]
    sites.new_key("north")
    (problem,) = [
        f for f in check_policy(sites.policy("north"), None) if f.level == "problem"
    ]
    assert "own identity-key is not in its file trusted-sites" in problem.text
