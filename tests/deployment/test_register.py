"""Registration binds each site's name to one key, whatever is tried or goes wrong."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from clip2fl_cli.sites import registration as register
from clip2fl_cli.sites.keys import KeyFileError, fingerprint, public_key
from clip2fl_cli.sites.registration import RegistrationError
from clip2fl_common.site_registry import RegistryError, Site, SiteRegistry
from tests.clip2fl_cli.commands import refused
from tests.defaults import ROOT
from tests.tools import needed_tool


class FakeSuperLink(register.Flower):
    """Stands for `flwr supernode`, as version 1.42 answers."""

    def __init__(self, first: int = 2**63) -> None:
        self.first = first
        self.keys: dict[str, int] = {}
        self.status: dict[int, str] = {}
        self.refuse = False

    def register(self, name: str, key: str) -> int | None:
        if self.refuse:
            raise RegistrationError(f"{name} is not registered: no SuperLink")
        if key in self.keys:
            return None
        self.keys[key] = self.first + len(self.keys)
        self.status[self.keys[key]] = "registered"
        return self.keys[key]

    def nodes(self) -> dict[int, str]:
        return self.status

    def remove(self, site: Site) -> None:
        self.status[site.node] = "unregistered"


@pytest.fixture
def superlink() -> FakeSuperLink:
    return FakeSuperLink()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return three public keys in files."""
    folder = tmp_path_factory.mktemp("keys")
    for name in "abc":
        make_key(folder / name)
    return [folder / f"{name}.pub" for name in "abc"]


def make_key(path: Path, *kind: str) -> Path:
    """Make a key pair."""
    kind = kind or ("-t", "ecdsa", "-b", "384")
    command = [needed_tool("ssh-keygen"), "-q", "-N", "", *kind, "-f", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path.with_suffix(".pub")


class Desk:
    """A registry file and those who use it."""

    def __init__(self, path: Path, superlink: FakeSuperLink) -> None:
        self.path = path
        self.superlink = superlink

    def register(self, node: int | None = None, **sites: Path) -> None:
        wanted = [(n.replace("_", "-"), public_key(k)) for n, k in sites.items()]
        with register.opened(self.path) as registry:
            register.register(registry, wanted, self.superlink, self.path, node)

    def remove(self, *names: str) -> None:
        with register.opened(self.path) as registry:
            register.remove(registry, names, self.superlink, self.path)

    def nodes(self) -> dict[str, int]:
        return {s.name: s.node for s in SiteRegistry.read(self.path).sites}


@pytest.fixture
def desk(tmp_path: Path, superlink: FakeSuperLink) -> Desk:
    return Desk(tmp_path / "registry" / "sites.json", superlink)


def test_registered_sites_have_the_nodes_of_their_keys(
    desk: Desk, keys: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    desk.register(site_a=keys[0], site_b=keys[1])
    assert desk.nodes() == {"site-a": 2**63, "site-b": 2**63 + 1}
    assert desk.superlink.keys[public_key(keys[1])] == 2**63 + 1
    # The ServerApp may be another user; nobody but the owner writes.
    assert stat.S_IMODE(desk.path.stat().st_mode) == 0o644
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", keys[0]], capture_output=True, text=True
    ).stdout.split()[1]
    assert fingerprint(public_key(keys[0])) == shown
    assert shown in capsys.readouterr().out
    desk.register(site_a=keys[0])
    assert "site-a: was registered before" in capsys.readouterr().out
    assert [p.name for p in desk.path.parent.iterdir()] == ["sites.json"]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"new": 1, "site_a": 2}, "site-a is registered with another key"),
        ({"new": 1, "SITE_A": 2}, "differs from site-a only in case"),
        ({"new": 1, "site_b": 0}, "key of site-b is registered for site-a"),
        ({"new": 1, "newer": 1}, "key of newer is registered for new"),
        ({"new": 1, "s\u0456te": 2}, "is no name of a site"),
    ],
)
def test_taken_names_and_keys_are_refused_before_anything_is_registered(
    desk: Desk, keys: list[Path], sites: dict[str, int], message: str
) -> None:
    desk.register(site_a=keys[0])
    before = desk.path.read_bytes(), dict(desk.superlink.keys)
    with pytest.raises(RegistryError, match=message):
        desk.register(None, **{name: keys[i] for name, i in sites.items()})
    assert (desk.path.read_bytes(), desk.superlink.keys) == before


def test_removed_site_is_gone_and_its_key_does_not_come_back(
    desk: Desk, keys: list[Path]
) -> None:
    desk.register(site_a=keys[0], site_b=keys[1])
    desk.remove("site-a")
    assert desk.nodes() == {"site-b": 2**63 + 1}
    assert desk.superlink.status[2**63] == "unregistered"
    with pytest.raises(RegistrationError, match="was removed before, and is of no use"):
        desk.register(site_a=keys[0])
    desk.register(site_a=keys[2])
    assert desk.nodes()["site-a"] == 2**63 + 2
    with pytest.raises(RegistrationError, match="no site 'SITE-A'"):
        desk.remove("SITE-A")


def test_what_was_removed_by_flowers_own_command_is_said(
    desk: Desk, keys: list[Path]
) -> None:
    desk.register(site_a=keys[0])
    desk.superlink.status[2**63] = "unregistered"
    with pytest.raises(RegistrationError, match="was removed at the SuperLink"):
        desk.register(site_a=keys[0])


def test_registration_that_was_cut_off_is_taken_up(
    desk: Desk, keys: list[Path]
) -> None:
    """Flower had the key, and the registry was not written."""
    desk.register(site_a=keys[0])
    desk.superlink.register("site-b", public_key(keys[1]))
    desk.register(site_b=keys[1])
    assert desk.nodes() == {"site-a": 2**63, "site-b": 2**63 + 1}


def test_which_node_a_key_has_is_never_guessed(desk: Desk, keys: list[Path]) -> None:
    for name, key in zip("ab", keys, strict=False):
        desk.superlink.register(name, public_key(key))
    with pytest.raises(RegistrationError, match=f"one of {2**63}, {2**63 + 1}, "):
        desk.register(site_b=keys[1])
    with pytest.raises(RegistrationError, match="5 is none of them"):
        desk.register(5, site_b=keys[1])
    desk.register(2**63 + 1, site_b=keys[1])
    assert desk.nodes() == {"site-b": 2**63 + 1}
    # The node of another site is not to be had.
    with pytest.raises(RegistrationError, match="is none of them"):
        desk.register(2**63 + 1, site_a=keys[0])


def test_new_superlink_gives_new_nodes(desk: Desk, keys: list[Path]) -> None:
    desk.register(site_a=keys[0], site_b=keys[1])
    desk.superlink = FakeSuperLink(first=70)
    desk.register(site_b=keys[1])
    assert desk.nodes() == {"site-a": 2**63, "site-b": 70}


def test_failure_of_the_second_leaves_the_first(desk: Desk, keys: list[Path]) -> None:
    class Once(FakeSuperLink):
        def register(self, name: str, key: str) -> int | None:
            self.refuse = bool(self.keys)
            return super().register(name, key)

    desk.superlink = Once()
    with pytest.raises(RegistrationError, match="site-b is not registered: no Super"):
        desk.register(site_a=keys[0], site_b=keys[1])
    assert desk.nodes() == {"site-a": 2**63}


def test_only_public_keys_that_flower_takes_pass(
    tmp_path: Path, keys: list[Path]
) -> None:
    cases = {
        "is a private key, which must never leave": keys[0].with_suffix(""),
        "is no key of a NIST": make_key(tmp_path / "ed", "-t", "ed25519"),
        "is no public key": tmp_path / "text",
        "lines, expected one": tmp_path / "two",
        "No such file": tmp_path / "missing",
    }
    (tmp_path / "text").write_text("ecdsa-sha2-nistp384 AAAA\n")
    (tmp_path / "two").write_bytes(keys[0].read_bytes() * 2)
    for reason, path in cases.items():
        with pytest.raises(KeyFileError, match=reason):
            public_key(path)
    # A comment is no part of the key.
    (tmp_path / "same.pub").write_text(keys[0].read_text().split("=")[0] + "= x y z\n")
    assert len(public_key(keys[0]).split()) == 2


def test_command_line_says_in_one_line_what_is_wrong(
    tmp_path: Path,
    keys: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def says(command: str, *arguments: object) -> str:
        given = [*map(str, arguments), "--server", str(tmp_path)]
        return refused(monkeypatch, capsys, "site", command, *given)

    assert "ca.crt is not there" in says("register", f"site-a={keys[0]}")
    (tmp_path / "trust").mkdir()
    (tmp_path / "trust" / "ca.crt").write_text("-")
    assert "'site-a' is not SITE=KEY" in says("register", "site-a")
    missing = f"site-a={tmp_path / 'none.pub'}"
    assert "No such file or directory" in says("register", missing)
    assert "--node-id goes with one" in says("register", "a=b", "c=d", "--node-id", 3)
    assert "cannot be read (No such file or directory)" in says("list")
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "sites.json").symlink_to(keys[0])
    assert "(is a link)" in says("register", f"a={keys[0]}")
    assert "(is a link)" in says("remove", "a")


def test_key_may_be_given_as_its_line(keys: list[Path]) -> None:
    line = keys[0].read_text().strip()
    assert register.wanted([f"a={line}"]) == [("a", public_key(keys[0]))]


def test_unreachable_superlink_is_said(tmp_path: Path, keys: list[Path]) -> None:
    """The real command, against a port on which nobody listens."""
    (tmp_path / "trust").mkdir()
    (tmp_path / "trust" / "ca.crt").write_text("-")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "clip2fl_cli.app", "site", "register"),
            *(f"a={keys[0]}", "--server", tmp_path, "--superlink", "127.0.0.1:9"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("clip2fl: a is not")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "registry" / "sites.json").exists()
