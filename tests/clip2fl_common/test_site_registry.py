"""The file that binds sites' names to keys, and the rule for names."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from clip2fl_common.shown import quoted
from clip2fl_common.site_names import is_site_name
from clip2fl_common.site_registry import RegistryError, Site, SiteRegistry

KEYS = [f"ecdsa-sha2-nistp384 AAAA{i}=" for i in range(4)]
NORTH = Site("north", KEYS[0], 2**64 - 1)
EAST = Site("east", KEYS[1], 5)


def written(path: Path, content: str | bytes) -> Path:
    """Write a file and return its path."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o644)
    return path


@pytest.mark.parametrize(
    "name", ["a", "7", "site-a", "Site_B.2", "x" * 64, "node-184467440737"]
)
def test_names_that_a_site_may_have(name: str) -> None:
    assert is_site_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "x" * 65, ".", "-a", "_a", "a b", "a/b", "a\n", "a\x00", 'a"', "a\\"),
        "s\u0456te-a",  # a Cyrillic i
        "site-\u0661",  # an Arabic one, a digit to some
        "\uff53ite",  # full width
        "e\u0301",
        *(None, 5, True, 1.5, b"a", ["a"]),
    ],
)
def test_names_that_no_site_may_have(name: Any) -> None:
    assert not is_site_name(name)
    line = quoted(name)
    assert line.isascii() and line.isprintable() and len(line) < 90


def test_long_strangers_are_cut() -> None:
    assert len(quoted("\U0001f600" * 10**6)) < 90


def test_registry_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = SiteRegistry().with_site(NORTH).with_site(EAST)
    read = SiteRegistry.read(written(tmp_path / "sites.json", made.text()))
    assert read == made and read.sites == (NORTH, EAST)
    assert (read.name_of(2**64 - 1), read.name_of(5)) == ("north", "east")
    assert read.name_of(6) is None
    assert read.without("north").name_of(2**64 - 1) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Site("north", KEYS[1], 6), "north is registered with another key"),
        (Site("NORTH", KEYS[1], 6), "NORTH differs from north only in case"),
        (Site("south", KEYS[0], 6), "the key of south is registered for north"),
        (Site("south", KEYS[1], NORTH.node), "north have the same node"),
        (Site("s\u0456te", KEYS[1], 6), r"'s\\u0456te' is no name of a site"),
        (Site("south", KEYS[1], 0), "south has the node 0"),
        (Site("south", KEYS[1], 2**64), "south has the node 1844"),
    ],
)
def test_nothing_is_bound_twice(other: Site, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        SiteRegistry((NORTH,)).with_site(other)
    # A registry that is read with such entries is refused, too.
    with pytest.raises(RegistryError):
        SiteRegistry((NORTH, other))


def test_new_node_id_takes_the_place_of_the_old_one() -> None:
    """A SuperLink that has lost its state gives a site a new node id."""
    moved = Site(NORTH.name, NORTH.key, 77)
    assert SiteRegistry((NORTH, EAST)).with_site(moved).sites == (EAST, moved)


GOOD = json.loads(SiteRegistry((NORTH, EAST)).text())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "EOF"),
        (SiteRegistry((NORTH,)).text()[:-9], "EOF"),
        ("[" * 100_000, "recursion limit"),
        ("null", "an object"),
        (b"\xff\xfe", "expected value"),
        (json.dumps({**GOOD, "format": 2}), "format"),
        (json.dumps({**GOOD, "more": 2}), "more"),
        (json.dumps({**GOOD, "sites": [{}]}), "sites.0.name"),
        (json.dumps({**GOOD, "sites": GOOD["sites"] * 2}), "north is there twice"),
        (
            json.dumps({**GOOD, "sites": [{**GOOD["sites"][0], "node": 5}]}),
            "sites.0.node",
        ),
        (
            json.dumps({**GOOD, "sites": [{**GOOD["sites"][0], "node": "5\n"}]}),
            "sites.0.node",
        ),
        (
            json.dumps({**GOOD, "sites": [{**GOOD["sites"][0], "name": "\u0430"}]}),
            r"'\u0430' is no name",
        ),
    ],
)
def test_damaged_file_gives_one_line(
    tmp_path: Path, content: str | bytes, reason: str
) -> None:
    path = written(tmp_path / "sites.json", content)
    with pytest.raises(RegistryError) as caught:
        SiteRegistry.read(path)
    line = str(caught.value)
    assert line.startswith(f"the site registry {path} is damaged (") and reason in line
    assert "\n" not in line and "register the sites again" in line


def test_what_is_no_file_of_its_own_gives_one_line(tmp_path: Path) -> None:
    path = written(tmp_path / "sites.json", SiteRegistry((NORTH,)).text())
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    written(tmp_path / "large", b" " * (4 * 2**20 + 1))
    written(tmp_path / "open", path.read_bytes()).chmod(0o666)
    for name, reason in (
        ("missing", "cannot be read (No such file or directory)"),
        ("link", "cannot be read (is a link)"),
        ("folder", "is no file"),
        ("pipe", "is no file"),
        ("large", "has more than 4194304 bytes"),
        ("open", "can be changed by every user"),
    ):
        with pytest.raises(RegistryError) as caught:
            SiteRegistry.read(tmp_path / name)
        line = str(caught.value)
        assert reason in line and str(tmp_path / name) in line and "\n" not in line
    with pytest.raises(RegistryError, match=r"federation.site-registry = 'sites.json'"):
        SiteRegistry.read(Path("sites.json"))
