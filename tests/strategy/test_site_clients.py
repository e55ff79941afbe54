"""Which node is which site: names, numbers and the registry."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from clip2fl_common import messages
from clip2fl_common.messages import training
from clip2fl_common.site_registry import RegistryError, Site, SiteRegistry
from strategy.site_clients import SiteClients, client_number
from tests.stand_in_grid import StandInGrid

# Found by trying s1, s2, ...
SAME_32_BITS = ("s65257", "s96800")


def number_32(name: str) -> int:
    """Return what used to be a site's number: 32 bits."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class Nodes(StandInGrid):
    """A grid of nodes that answer queries with these names."""

    def __init__(self, names: Mapping[int, Any]) -> None:
        self.names = dict(names)
        self.asked: list[int] = []

    def get_node_ids(self) -> list[int]:
        return list(self.names)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(node)
            content = RecordDict({"config": ConfigRecord({"site": self.names[node]})})
            replies.append(Message(content, reply_to=message))
        return replies


@pytest.fixture(autouse=True)
def ask_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategy.site_clients.ASK_AGAIN_S", 0.0)
    monkeypatch.setattr("strategy.site_clients.WAIT_S", 0.0)


def meet(
    names: Mapping[int, Any], registry: Path | None = None, nodes: Nodes | None = None
) -> SiteClients:
    """Return a plan that has met these nodes."""
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
    """Return each node that takes part, and what it is called."""
    return {plan.node_of(c): plan.label(c) for c in plan.connected()}


def test_names_that_share_32_bits_are_two_sites() -> None:
    assert len({number_32(name) for name in SAME_32_BITS}) == 1
    plan = meet({3: SAME_32_BITS[0], 4: SAME_32_BITS[1]})
    assert labels(plan) == {3: "s65257", 4: "s96800"}


def test_order_and_random_streams_are_those_of_32_bits() -> None:
    """They decide the order of sums and what is drawn: results stay as they were."""
    names = [f"site-{i}" for i in range(200)]
    plan = meet(dict(enumerate(names, start=1)))
    old = {name: number_32(name) for name in names}
    numbers = {name: client_number(name) for name in names}
    assert sorted(names, key=numbers.__getitem__) == sorted(names, key=old.__getitem__)
    assert {name: plan.stream_of(numbers[name]) for name in names} == old
    assert len({n & (2**31 - 1) for n in numbers.values()}) == len(names)
    assert max(numbers.values()) < 2**63


def test_numbers_pass_through_flowers_records() -> None:
    """Which hold 64 bits with a sign."""
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
    # Asked again, as other nodes that were refused.
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
