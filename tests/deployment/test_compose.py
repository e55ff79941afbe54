"""The files of the deployment hold together; no container engine is needed."""

import re
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip2fl_common.config import RunConfig
from clip2fl_common.dotted_keys import flatten
from scripts.draw_sites import draw_sites
from tests.defaults import ROOT, default_config

DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """Return the compose file."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def sites(compose: dict[str, Any]) -> list[str]:
    """Return the services that are nodes."""
    return [name for name in compose["services"] if name.startswith("site-")]


def test_nodes_reach_the_proxy_only(compose: dict[str, Any]) -> None:
    services = compose["services"]
    on = {name: set(service.get("networks", [])) for name, service in services.items()}
    assert len(sites(compose)) == 5  # four, and one of them with a GPU
    for name, networks in on.items():
        if name == "proxy":
            assert networks == {"server", "nodes"}
        elif name in sites(compose):
            assert networks == {"nodes"}
        elif name == "setup":
            assert services[name]["network_mode"] == "none"
        else:
            assert networks == {"server"}
    assert all(network["internal"] for network in compose["networks"].values())
    assert not any("ports" in service for service in services.values())


def test_containers_have_no_rights_to_speak_of(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service and "user" not in service
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    users = re.findall(r"^USER (\S+)", dockerfile, flags=re.M)
    assert users == ["clip2fl"] and "--uid 10001" in dockerfile
    assert "--require-hashes --compile-bytecode" in dockerfile
    assert "HEALTHCHECK" in dockerfile


def test_each_site_sees_its_own_folders_and_none_can_write_images(
    compose: dict[str, Any],
) -> None:
    for name in sites(compose):
        own = name.removesuffix("-gpu")
        mounts = compose["services"][name]["volumes"]
        assert mounts == [
            f"{own}:/data:ro",
            f"{own}-keys:/keys:ro",
            f"{own}-cache:/cache",
        ]
        assert compose["services"][name]["environment"]["SITE"] == own


def test_volumes_and_files_are_those_that_are_used(compose: dict[str, Any]) -> None:
    used = set()
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            used.add(mount.split(":")[0])
        for word in service["command"]:
            path = word.removeprefix("/app/").split("=")[-1]
            if re.match(r"(deploy|scripts|conf)/", path):
                assert (ROOT / path).is_file(), path
        for needed in service.get("depends_on", {}):
            assert needed in compose["services"]
    assert used == set(compose["volumes"])


def test_superlink_is_closed_to_those_without_key_or_secret(
    compose: dict[str, Any],
) -> None:
    options = set(compose["services"]["superlink"]["command"])
    secret = "--superexec-auth-secret-file=/keys/superexec.secret"
    assert {"--isolation=process", "--enable-supernode-auth", secret} <= options
    assert any(option.startswith("--database=/state/") for option in options)
    assert secret in compose["services"]["superexec"]["command"]


def test_demo_registers_prepares_and_runs_the_same_sites(
    compose: dict[str, Any],
) -> None:
    names = [name for name in sites(compose) if not name.endswith("-gpu")]
    assert compose["services"]["register"]["command"][3:] == names
    assert f'nodes="{" ".join(names)}"' in (DEPLOY / "demo-setup.sh").read_text()
    text = (ROOT / "conf" / "sites.toml").read_text("utf-8")
    settings: dict[str, Any] = {**default_config(), **flatten(tomllib.loads(text))}
    assert RunConfig.from_run_config(settings).federation.clients_per_round == 4


def test_proxy_lets_two_places_through() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    # Places with an @ are the proxy's own: nobody can ask for them.
    places = re.findall(r"location ([^@]*?) \{\s*(.*?);", text)
    assert places == [
        ("/v1/fleet/", "proxy_pass https://superlink"),
        ("= /health", "proxy_pass https://superlink"),
        ("/", "return 404"),
    ]
    assert "proxy_ssl_verify on" in text and "ssl_protocols TLSv1.2 TLSv1.3" in text


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.sh")), ids=lambda f: f.name)
def test_scripts_are_executable_and_parse(file: Path) -> None:
    assert file.stat().st_mode & stat.S_IXUSR
    shell = file.read_text().splitlines()[0].split("/")[-1].split()[-1]
    done = subprocess.run([shell, "-n", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_keys(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run make-keys.sh."""
    return subprocess.run(
        [DEPLOY / "make-keys.sh", *map(str, arguments)], capture_output=True, text=True
    )


def test_keys_are_made_once_and_never_overwritten(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    assert make_keys("server", keys, "fl.example.org", "10.1.2.3").returncode == 0
    assert make_keys("node", keys, "a", "b").returncode == 0
    before = {p: p.read_bytes() for p in keys.rglob("*") if p.is_file()}
    assert {str(p.relative_to(keys)) for p in before} == {
        *("ca.crt", "ca.key", "server.crt", "server.key", "superexec.secret"),
        *("nodes/a", "nodes/a.pub", "nodes/b", "nodes/b.pub"),
    }
    for arguments in (("server", keys, "other"), ("node", keys, "c", "a")):
        again = make_keys(*arguments)
        assert again.returncode == 1 and "exists and is not overwritten" in again.stderr
    assert {p: p.read_bytes() for p in keys.rglob("*") if p.is_file()} == before
    for path in before:
        private = path.suffix not in (".crt",)
        assert bool(path.stat().st_mode & 0o077) != private
    shown = subprocess.run(
        ["openssl", "x509", "-in", keys / "server.crt", "-noout", "-text"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in ("DNS:localhost", "DNS:fl.example.org", "IP Address:10.1.2.3"):
        assert name in shown
    verified = subprocess.run(
        ["openssl", "verify", "-CAfile", keys / "ca.crt", keys / "server.crt"],
        capture_output=True,
    )
    assert verified.returncode == 0
    assert make_keys("node", keys, "../evil").returncode == 1


def test_drawn_sites_are_unequal_and_stay(tmp_path: Path) -> None:
    names = ["site-a", "site-b", "site-c", "site-d"]
    held = draw_sites(tmp_path, names)
    files = {name: sorted((tmp_path / name).rglob("*.png")) for name in names}
    assert {n: len(found) for n, found in files.items()} == {
        n: sum(counts.values()) for n, counts in held.items()
    }
    sizes = sorted(len(found) for found in files.values())
    assert sizes[0] > 0 and sizes[-1] > 1.5 * sizes[0]
    everywhere = [p.relative_to(tmp_path).parts[1:] for f in files.values() for p in f]
    assert len(set(everywhere)) == len(everywhere)  # no image at two sites
    files["site-a"][0].write_bytes(b"mine")
    draw_sites(tmp_path, names)
    assert files["site-a"][0].read_bytes() == b"mine"
