"""Test how a site takes the list of the sites that it trusts in secure sums."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client_app.site_keys import site_keys
from client_app.site_policy import policy_file
from clip2fl_cli.sites.folder import SiteFolderError, SiteSettings
from clip2fl_cli.sites.keys import new_key, public_half
from clip2fl_cli.sites.kit_archive import Entry, Manifest
from clip2fl_cli.sites.trust import list_code, take
from clip2fl_common.secure.statements import SecureError
from clip2fl_common.site_registry import RegistryError, Site, SiteRegistry
from tests.clip2fl_cli.commands import refused, run

NAMES = ("east", "north", "west")


def some_key() -> str:
    public = generate_private_key(SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


KEYS = [some_key() for _ in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of the installed site east."""
    place = tmp_path / "east folder"
    place.mkdir()
    (place / "key").write_bytes(new_key())
    SiteSettings("east", "fl.example:9092", "/data", "0" * 12).write(place)
    write_kit(place)
    return place


def write_kit(place: Path, *files: str) -> None:
    """Write what the kit said of itself."""
    manifest = Manifest(
        site="east",
        superlink="fl.example:9092",
        version="0.2.0",
        teacher_fingerprint="",
        files={
            name: Entry(size=1, sha256="0" * 64)
            for name in ("ca.crt", "policy.toml", "run.toml", "README.md", *files)
        },
    )
    (place / "kit.json").write_text(manifest.model_dump_json(), "utf-8")


@pytest.fixture
def listed(folder: Path, tmp_path: Path) -> Path:
    """Return a list of three sites."""
    path = tmp_path / "sites.json"
    path.write_text(registry(folder).text(), "utf-8")
    return path


def registry(folder: Path, *, names: tuple[str, ...] = NAMES) -> SiteRegistry:
    own = public_half((folder / "key").read_bytes())
    keys = [own, *KEYS]
    return SiteRegistry(
        tuple(Site(name, keys[i], 10 + i) for i, name in enumerate(names))
    )


def test_lines_make_a_policy_with_which_the_site_takes_part(
    folder: Path,
    listed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command's own output goes into the policy as it is."""
    assert run(monkeypatch, "site", "trust", listed, folder) == 0
    text = capsys.readouterr().out
    own = [line for line in text.splitlines() if "this site" in line]
    assert len(own) == 1 and "east" in own[0] and "SHA256:" in own[0]
    (code,) = [line for line in text.splitlines() if re.fullmatch(r"[\d ]{71}", line)]
    assert code == list_code(registry(folder))
    rules = [line for line in text.splitlines() if " = " in line]
    policy = folder / "policy.toml"
    policy.write_text("\n".join(rules), "utf-8")
    assert tomllib.loads(policy.read_text())["secure-only"] is True
    found = site_keys(policy_file(policy))
    assert found is not None
    assert found[0].name == "east" and set(found[1].keys) == set(NAMES)


def test_code_is_of_names_and_keys_only(folder: Path, tmp_path: Path) -> None:
    """Another order, other nodes and other white space are the same list."""
    first = registry(folder)
    again = SiteRegistry(
        tuple(Site(s.name, s.key, s.node + 5) for s in reversed(first.sites))
    )
    assert list_code(first) == list_code(again)
    path = tmp_path / "again.json"
    path.write_text(json.dumps(json.loads(again.text()), indent=7), "utf-8")
    assert take(path, folder).code == list_code(first)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.integers(0, 2), changed=st.sampled_from(["name", "key", "gone"]))
def test_any_other_list_has_another_code(
    folder: Path, place: int, changed: str
) -> None:
    first = registry(folder)
    sites = list(first.sites)
    site = sites.pop(place)
    if changed == "name":
        sites.insert(place, Site("south", site.key, site.node))
    elif changed == "key":
        sites.insert(place, Site(site.name, KEYS[3], site.node))
    assert list_code(SiteRegistry(tuple(sites))) != list_code(first)


def test_swapped_names_have_another_code(folder: Path) -> None:
    first = registry(folder)
    a, b, c = first.sites
    swapped = SiteRegistry(
        (a, Site(b.name, c.key, b.node), Site(c.name, b.key, c.node))
    )
    assert list_code(swapped) != list_code(first)


def test_unusable_list_is_refused_and_the_old_one_stays(
    folder: Path, listed: Path, tmp_path: Path
) -> None:
    take(listed, folder)
    before = (folder / "trusted-sites.json").read_bytes()
    bad = tmp_path / "bad.json"

    def not_taken(error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            take(bad, folder)
        assert (folder / "trusted-sites.json").read_bytes() == before

    not_taken(RegistryError, "bad.json")
    bad.write_text("{}", "utf-8")
    not_taken(RegistryError, "damaged")
    bad.write_text(registry(folder, names=NAMES[:2]).text(), "utf-8")
    not_taken(SiteFolderError, "has 2 sites, and secure sums need 3")
    bad.write_text(registry(folder, names=("south", "north", "west")).text(), "utf-8")
    not_taken(SiteFolderError, "this site's key for south, and the site is east")
    others = tuple(Site(n, KEYS[i], i + 1) for i, n in enumerate(NAMES))
    bad.write_text(SiteRegistry(others).text(), "utf-8")
    not_taken(SecureError, "own identity-key is not in its file")


def test_key_that_the_server_has_made_is_told(
    folder: Path,
    listed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for files, told in ((), False), (("key",), True):
        write_kit(folder, *files)
        assert run(monkeypatch, "site", "trust", listed, folder) == 0
        assert ("can sign as this site" in capsys.readouterr().err) is told


def test_list_can_be_read_by_the_nodes_user(folder: Path, listed: Path) -> None:
    take(listed, folder)
    found = (folder / "trusted-sites.json").stat()
    assert found.st_mode & 0o777 == 0o644
    owner = folder.stat()
    assert (found.st_uid, found.st_gid) == (owner.st_uid, owner.st_gid)


def test_unusable_list_is_told_in_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place in (folder, tmp_path / "no site"):
        line = refused(
            monkeypatch, capsys, "site", "trust", tmp_path / "nothing.json", place
        )
        assert str(tmp_path) in line
