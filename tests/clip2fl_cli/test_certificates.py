"""The ends of certificates, and their renewal by deploy/make-keys.sh."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from clip2fl_cli.app import app
from clip2fl_cli.sites.certificates import endings
from tests.certificates import let_end
from tests.defaults import ROOT
from tests.tools import needed_tool

PARTS = ("superlink/server", "proxy/proxy")


def make_keys(
    *arguments: object, tools: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script, perhaps with other tools; its output is not checked."""
    path = os.environ["PATH"]
    return subprocess.run(
        [str(ROOT / "deploy" / "make-keys.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path if tools is None else f"{tools}:{path}"},
    )


# As on macOS: no --reference, and another option of stat.
BSD = {
    "chmod": 'case "$1" in --*) exit 64;; esac; exec /bin/chmod "$@"',
    "chown": 'case "$1" in --*) exit 64;; esac; exec /bin/chown "$@"',
    "stat": """[ "$1 $2" = "-f %Lp %u:%g" ] || exit 64
exec /usr/bin/stat -c "%a %u:%g" "$3\"""",
}


@pytest.fixture(params=["gnu", "bsd"])
def tools(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder with tools to use in place of the system's."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in BSD.items() if request.param == "bsd" else ():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a server's folder with new keys."""
    needed_tool("openssl")
    made = make_keys("server", tmp_path / "server", "fl.example.org", "fd00::1")
    assert made.returncode == 0, made.stderr
    return tmp_path / "server"


def certificate(folder: Path, part: str) -> x509.Certificate:
    """Read a part's certificate."""
    return x509.load_pem_x509_certificate((folder / f"{part}.crt").read_bytes())


def names(found: x509.Certificate) -> list[str]:
    """Return for which names a certificate was made."""
    alternative = found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(name.value) for name in alternative.value]


@pytest.mark.parametrize(
    ("name", "days", "text"),
    [
        ("proxy/proxy.crt", -1, "ended on"),
        ("superlink/server.crt", 29, "ends on"),
        ("trust/ca.crt", 29, "ends on"),
        ("proxy/proxy.crt", 31, None),
    ],
)
def test_end_is_told_a_month_before(
    folder: Path, name: str, days: int, text: str | None
) -> None:
    now = datetime.now(UTC)
    assert not [*endings(folder, now)]
    let_end(folder, name, days)
    told = [*endings(folder, now)]
    assert len(told) == (text is not None)
    if text is not None:
        assert f"{folder / name} {text}" in told[0]
        assert ("empty folder" if "ca" in name else "make-keys.sh renew") in told[0]


def test_commands_at_the_server_tell_it(folder: Path) -> None:
    let_end(folder, "proxy/proxy.crt", 3)
    # No SuperLink listens on this port: the command fails after it has told.
    arguments = ["site", "list", "--server", str(folder), "--superlink", "127.0.0.1:9"]
    told = CliRunner().invoke(app, arguments).stderr
    assert "proxy.crt ends on" in told.replace("\n", "")


def test_what_a_part_keeps_to_itself_is_left_out(folder: Path) -> None:
    (folder / "proxy" / "proxy.crt").unlink()
    (folder / "superlink" / "server.crt").write_text("no certificate")
    assert not [*endings(folder, datetime.now(UTC))]


@pytest.mark.parametrize("days", [-1, 20])
def test_renewed_certificates_keep_names_owner_and_mode(
    folder: Path, days: int, tools: Path
) -> None:
    ca = (folder / "trust" / "ca.crt").read_bytes()
    before = {}
    for part in PARTS:
        let_end(folder, f"{part}.crt", days)
        (folder / f"{part}.crt").chmod(0o640)
        key = (folder / f"{part}.key").read_bytes()
        before[part] = (names(certificate(folder, part)), key)
    done = make_keys("renew", folder, tools=tools)
    assert done.returncode == 0, done.stderr
    assert not [*endings(folder, datetime.now(UTC))]
    assert (folder / "trust" / "ca.crt").read_bytes() == ca
    authority = x509.load_pem_x509_certificate(ca)
    for part in PARTS:
        now = certificate(folder, part)
        now.verify_directly_issued_by(authority)
        # openssl writes an IPv6 address in another way than it was given.
        assert {n.lower() for n in names(now)} == {n.lower() for n in before[part][0]}
        assert (folder / f"{part}.key").read_bytes() != before[part][1]
        assert (folder / f"{part}.crt").stat().st_mode & 0o777 == 0o640
        assert (folder / f"{part}.key").stat().st_mode & 0o777 == 0o600
    assert not [*(folder / "ca").glob(".new*")]


def test_renewal_can_change_the_proxys_names(folder: Path) -> None:
    assert make_keys("renew", folder, "other.example.org").returncode == 0
    found = names(certificate(folder, "proxy/proxy"))
    assert found == ["localhost", "127.0.0.1", "other.example.org"]
    assert names(certificate(folder, "superlink/server"))[-1] == "superlink"


@pytest.mark.parametrize("what", ["no key", "another key", "old ca", "bad name"])
def test_renewal_that_cannot_be_leaves_all_as_it_was(folder: Path, what: str) -> None:
    key = folder / "ca" / "ca.key"
    more = []
    if what == "no key":
        key.unlink()
        said = "ca.key is missing"
    elif what == "another key":
        key.write_bytes((folder / "proxy" / "proxy.key").read_bytes())
        said = "is not the key of"
    elif what == "old ca":
        let_end(folder, "trust/ca.crt", -1)
        said = "the CA's certificate has expired"
    else:
        more = ["not a name"]
        said = "is no DNS name or IP address"
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    done = make_keys("renew", folder, *more)
    assert done.returncode == 1
    assert said in done.stderr
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
