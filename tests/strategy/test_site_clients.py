"""Test which node is which site: names, numbers and the registry."""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from clip2fl_common import messages
from clip2fl_common.messages import training
from clip2fl_common.provenance import versions_here
from clip2fl_common.site_names import client_number
from clip2fl_common.site_registry import RegistryError, Site, SiteRegistry
from strategy.events import Event, Events, What
from strategy.grid import AttentiveGrid
from strategy.site_clients import QUERY_TIMEOUT_S, SiteClients
from tests.flower_private import give_id
from tests.strategy.site_nodes import Nodes

# Two names with equal 32-bit numbers, found by trying s1, s2, ...
SAME_32_BITS = ("s65257", "s96800")


def number_32(name: str) -> int:
    """Return the 32-bit number that sites had in earlier versions."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@pytest.fixture(autouse=True)
def ask_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategy.site_clients.ASK_AGAIN_S", 0.0)
    monkeypatch.setattr("strategy.site_clients.WAIT_S", 0.0)


def meet(
    names: Mapping[int, Any], registry: Path | None = None, nodes: Nodes | None = None
) -> SiteClients:
    """Return the sites after meeting these nodes."""
    plan = SiteClients(1, 7, 1000, registry)
    plan.refresh(nodes or Nodes(names))
    return plan


def registry_file(path: Path, nodes: Mapping[str, int]) -> Path:
    """Write a registry."""
    sites = (Site(name, f"ecdsa AAAA{node}", node) for name, node in nodes.items())
    path.write_text(SiteRegistry(tuple(sites)).text())
    path.chmod(0o644)
    return path


def labels(plan: SiteClients) -> dict[int, str]:
    """Return the name of each node that takes part."""
    return {plan.node_of(c): plan.label(c) for c in plan.connected()}


def test_names_that_share_32_bits_are_two_sites() -> None:
    assert len({number_32(name) for name in SAME_32_BITS}) == 1
    plan = meet({3: SAME_32_BITS[0], 4: SAME_32_BITS[1]})
    assert labels(plan) == {3: "s65257", 4: "s96800"}


def test_order_and_random_streams_are_those_of_32_bits() -> None:
    """These decide the order of sums and the random draws, so results do not change."""
    names = [f"site-{i}" for i in range(200)]
    plan = meet(dict(enumerate(names, start=1)))
    old = {name: number_32(name) for name in names}
    numbers = {name: client_number(name) for name in names}
    assert sorted(names, key=numbers.__getitem__) == sorted(names, key=old.__getitem__)
    assert {name: plan.stream_of(numbers[name]) for name in names} == old
    assert len({n & (2**31 - 1) for n in numbers.values()}) == len(names)
    assert max(numbers.values()) < 2**63


def test_numbers_pass_through_flowers_records() -> None:
    """Flower's records hold signed 64-bit numbers."""
    names = [f"site-{i}" for i in range(200)]
    largest = max(map(client_number, names))
    assert largest > 2**62
    config = ConfigRecord({messages.PARTITION: largest})
    assert config[messages.PARTITION] == largest
    with pytest.raises(messages.ReplyError, match="was asked for"):
        training._check_metrics(metrics(largest), {largest + 1: 10})
    training._check_metrics(metrics(largest), {largest: 10})


def metrics(partition: int) -> Any:
    """Return a train reply's metrics."""
    names = (*messages.AVERAGED_METRICS, *messages.SUMMED_METRICS)
    zeros: dict[str, Any] = dict.fromkeys(names, 0)
    return MetricRecord(
        {**zeros, messages.PARTITION: partition, messages.NUM_EXAMPLES: 1}
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("s\u0456te-a", r"'s\u0456te-a'"),
        ("a\x1b[2J\n", r"'a\x1b[2J\n'"),
        ("x" * 10_000, "'" + "x" * 79 + "..."),
        (-5, "(-5)"),
        (".", "'.'"),
    ],
)
def test_refused_name_is_shown_escaped(
    name: Any, shown: str, flower_log: pytest.LogCaptureFixture
) -> None:
    assert labels(meet({3: name, 4: "b"})) == {4: "b"}
    (line,) = [m for m in flower_log.messages if "node 3 does not take part" in m]
    assert shown in line and line.isascii() and line.isprintable()
    assert "1 to 64 ASCII letters" in line


def test_names_that_differ_in_case_clash(flower_log: pytest.LogCaptureFixture) -> None:
    assert labels(meet({3: "Site-A", 4: "site-a"})) == {3: "Site-A", 4: "site-a-4"}
    (line,) = [m for m in flower_log.messages if "calls itself" in m]
    assert "node 4 calls itself site-a" in line and "case does not count" in line


def test_nobody_takes_the_name_that_a_second_node_of_a_name_would_get(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    plan = meet({3: "a", 4: "A-5", 5: "a", 6: "c"})
    assert labels(plan) == {3: "a", 4: "A-5", 6: "c"}
    assert any("node 5 does not take part" in m for m in flower_log.messages)


def test_node_without_name_has_its_id_for_one() -> None:
    assert labels(meet({2**64 - 1: ""})) == {2**64 - 1: "node-18446744073709551615"}


def test_free_names_are_warned_of(flower_log: pytest.LogCaptureFixture) -> None:
    meet({3: "a"})
    (line,) = [m for m in flower_log.messages if "site-registry" in m]
    assert "names of sites are free" in line


def test_only_the_registered_node_has_the_name(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    path = registry_file(tmp_path / "sites.json", {"north": 2**64 - 1, "east": 4})
    nodes = Nodes({1: "north", 2: "", 4: "north", 2**64 - 1: ""})
    plan = meet({}, path, nodes)
    assert labels(plan) == {2**64 - 1: "north"}
    lines = [m for m in flower_log.messages if "does not take part" in m]
    assert len(lines) == 3
    assert "node 1 does not take part: it calls itself north, but its key" in lines[0]
    assert "calls itself nothing, but its key is not in" in lines[1]
    assert "calls itself north, but its key is registered for east" in lines[2]
    assert not any("names of sites are free" in m for m in flower_log.messages)
    # The server asks again, as it asks other refused nodes again.
    nodes.names[4] = "east"
    plan.refresh(nodes)
    assert labels(plan) == {2**64 - 1: "north", 4: "east"}
    assert nodes.asked.count(1) == 2


def test_registry_is_read_again_in_a_run(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    path = registry_file(tmp_path / "sites.json", {"north": 3})
    nodes = Nodes({3: "north", 4: "east"})
    plan = meet({}, path, nodes)
    assert labels(plan) == {3: "north"}
    registry_file(path, {"east": 4})
    plan.refresh(nodes)
    assert labels(plan) == {4: "east"}
    assert any(
        "site north (node 3) is no longer in the site registry" in m
        for m in flower_log.messages
    )
    path.write_text("{")
    plan.refresh(nodes)
    assert labels(plan) == {4: "east"}
    assert any("is damaged" in m for m in flower_log.messages)


def test_run_does_not_start_with_an_unusable_registry(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot be read"):
        SiteClients(1, 7, 1000, tmp_path / "missing")


class Versioned(Nodes):
    """Nodes that also tell their versions."""

    versions: list[Any] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        for reply in replies:
            reply.content.config_records["config"]["versions"] = self.versions
        return replies


def test_versions_of_a_site_are_listed_and_compared(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    told: list[Event] = []
    here = versions_here()
    for versions, warned in (
        ({**here, "torch": "0.1+cpu", "else": "7"}, True),
        (here, False),
        ({}, False),
    ):
        flower_log.clear()
        told.clear()
        nodes = Versioned({3: "north"})
        nodes.versions = [f"{name}={version}" for name, version in versions.items()]
        SiteClients(1, 7, 1000, events=Events(told.append)).refresh(nodes)
        (takes_part,) = [m for m in flower_log.messages if "takes part" in m]
        assert all(f"{n} {v}" in takes_part for n, v in versions.items())
        warnings = [m for m in flower_log.messages if "other versions" in m]
        differs = f"torch 0.1+cpu (server {here['torch']})"
        said = f"site north has other versions than the server: {differs}"
        assert warnings == ([said] if warned else [])
        (joined,) = [e for e in told if e.what is What.JOINED]
        assert (joined.versions or {}) == versions


@pytest.mark.parametrize(
    "versions",
    [["torch"], ["torch=\x1b[2J"], ["a=b\n"], [f"a{n}=1" for n in range(51)], [7]],
)
def test_node_with_forged_versions_does_not_take_part(
    versions: list[Any], flower_log: pytest.LogCaptureFixture
) -> None:
    nodes = Versioned({3: "north"})
    nodes.versions = versions
    plan = SiteClients(1, 7, 1000)
    plan._meet(nodes)
    assert plan.connected() == []
    (line,) = [m for m in flower_log.messages if "does not take part" in m]
    assert "versions" in line and line.isprintable()


def test_line_about_missing_sites_is_repeated_only_when_it_changes(
    monkeypatch: pytest.MonkeyPatch, flower_log: pytest.LogCaptureFixture
) -> None:
    clock = [1000.0]
    nodes = Nodes({})

    def sleep(_: float) -> None:
        """Three seconds pass; nodes come after 90 and 400 of them."""
        clock[0] += 3.0
        if clock[0] == 1090.0:
            nodes.names[3] = "north"
        if clock[0] == 1399.0:
            nodes.names[4] = "east"

    monkeypatch.setattr("strategy.site_clients.time.sleep", sleep)
    monkeypatch.setattr("strategy.site_clients.time.monotonic", lambda: clock[0])
    SiteClients(2, 7, 1000).refresh(nodes)
    lines = [m for m in flower_log.messages if "waiting for sites" in m]
    assert lines == [
        "waiting for sites: 0 of 2 connected (none)",
        "waiting for sites: 1 of 2 connected (north)",
        "waiting for sites: 1 of 2 connected (north)",
    ]


@pytest.mark.parametrize("late", [None, 15.0])
def test_node_that_never_answers_is_asked_less_and_less(
    late: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sites wait while it is asked, also where it refuses after seconds."""
    clock = [1000.0]
    monkeypatch.setattr("strategy.site_clients.ASK_AGAIN_S", 30.0)
    monkeypatch.setattr("strategy.site_clients.time.monotonic", lambda: clock[0])

    class Silent(Nodes):
        """Node 4 answers from the thirteenth query on."""

        at: ClassVar[list[float]] = []

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> list[Message]:
            replies = super().send_and_receive(messages, timeout=timeout)
            if any(reply.metadata.src_node_id == 4 for reply in replies):
                self.at.append(clock[0])
                if len(self.at) < 13:
                    others = [r for r in replies if r.metadata.src_node_id != 4]
                    if late is not None:
                        clock[0] += late
                        (asked,) = [m for m in messages if m.metadata.dst_node_id == 4]
                        refused = Message(Error(0, "its disk hangs"), reply_to=asked)
                        return [*others, refused]
                    assert timeout is not None
                    clock[0] += timeout
                    return others
            return replies

    nodes = Silent({3: "north", 4: "east"})
    plan = SiteClients(1, 7, 1000)
    while len(plan.connected()) < 2:
        plan.refresh(nodes)
        clock[0] += 1.0
    took = QUERY_TIMEOUT_S if late is None else late
    gaps = [b - a - took for a, b in pairwise(nodes.at)]
    expected = [30.0, 60.0, 120.0, 240.0, 480.0, *[900.0] * 7]
    # The clock goes on by a second after each refresh.
    assert gaps == pytest.approx(expected, abs=1.0)


def test_lost_site_is_noticed_while_others_still_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether or not the lost site was asked."""
    monkeypatch.setattr("strategy.grid.POLL_S", 0.0)
    monkeypatch.setattr("strategy.grid.LOOK_S", 0.0)
    told: list[Event] = []
    plan = SiteClients(2, 7, 1000, events=Events(told.append))

    class Slow(Nodes):
        """One node answers once the other one, which goes, has been missed."""

        polls = 0

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            self.request = next(iter(messages))
            give_id(self.request, "one")
            return ["one"]

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            self.polls += 1
            if self.polls == 2:
                del self.names[4]
            # A test without a limit would hang if the loss were never noticed.
            away = [e.site for e in told if e.what is What.AWAY]
            if away or self.polls > 1000:
                assert away == ["east"]
                return [Message(RecordDict(), reply_to=self.request)]
            return []

    nodes = Slow({3: "north", 4: "east"})
    plan.refresh(nodes)
    request = Message(RecordDict(), 3, "train")
    (reply,) = AttentiveGrid(nodes, look=plan.look).send_and_receive([request])
    assert not reply.has_error()
    assert [plan.label(c) for c in plan.connected()] == ["north"]
