"""The files of the deployment hold together; no container engine is needed."""

import re
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from clip2fl_cli.sites.keys import fingerprint, public_key
from clip2fl_cli.sites.registration import Server
from clip2fl_common.config import RunConfig
from clip2fl_common.config.dotted_keys import flatten
from scripts.draw_sites import draw_sites
from tests.defaults import ROOT, default_config
from tests.tools import needed_tool

DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """Return the compose file."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def sites(compose: dict[str, Any]) -> list[str]:
    """Return the services that are nodes."""
    return [
        name
        for name in compose["services"]
        if name.startswith("site-") and not name.endswith("-key")
    ]


def mounts(compose: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return for each service its volumes: name to place, with :ro where read-only."""
    return {
        name: dict(mount.split(":", 1) for mount in service.get("volumes", []))
        for name, service in compose["services"].items()
    }


def test_nodes_reach_the_proxy_only(compose: dict[str, Any]) -> None:
    services = compose["services"]
    on = {name: set(service.get("networks", [])) for name, service in services.items()}
    assert len(sites(compose)) == 5  # four, and one of them with a GPU
    for name, networks in on.items():
        if name == "proxy":
            assert networks == {"server", "nodes"}
        elif name == "page":
            assert networks == {"page"}
        elif name in sites(compose):
            assert networks == {"nodes"}
        elif name in ("setup", "images") or name.endswith("-key"):
            assert services[name]["network_mode"] == "none" and not networks
        else:
            assert networks == {"server"}
    inside = {n for n, network in compose["networks"].items() if network}
    assert inside == {"server", "nodes"}
    assert all(compose["networks"][name]["internal"] for name in inside)
    # This machine's browser reaches the page, which has no keys and cannot write.
    published = {n: s["ports"] for n, s in services.items() if "ports" in s}
    assert published == {"page": ["127.0.0.1:9400:9400"]}
    assert mounts(compose)["page"] == {"results": "/results:ro"}


def test_containers_have_no_rights_to_speak_of(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service and "user" not in service
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    users = re.findall(r"^USER (\S+)", dockerfile, flags=re.M)
    assert users == ["clip2fl"] and "--uid 10001" in dockerfile
    assert "HEALTHCHECK" in dockerfile


def test_every_container_has_bounds(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        memory = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", service["mem_limit"])
        assert re.fullmatch(r"\d+[mg]", memory), name
        assert 32 <= service["pids_limit"] <= 1024, name
        assert service["tmpfs"] == ["/tmp:size=512m"], name
        assert service["logging"] == {"driver": "local"}, name


def test_each_site_sees_its_own_folders_and_none_can_write_images(
    compose: dict[str, Any],
) -> None:
    for name in sites(compose):
        own = name.removesuffix("-gpu")
        assert mounts(compose)[name] == {
            own: "/data:ro",
            f"{own}-keys": "/keys/site:ro",
            "trust": "/keys/trust:ro",
            f"{own}-cache": "/cache",
        }
        assert compose["services"][name]["environment"]["SITE"] == own


def test_each_part_has_its_own_keys_and_no_others(compose: dict[str, Any]) -> None:
    by_volume: dict[str, dict[str, str]] = {}
    for name, volumes in mounts(compose).items():
        for volume, place in volumes.items():
            by_volume.setdefault(volume, {})[name] = place
    assert by_volume["ca"] == {"setup": "/keys/ca"}
    for part in ("superlink", "superexec", "proxy"):
        place = f"/keys/{part}"
        assert by_volume[f"{part}-keys"] == {"setup": place, part: f"{place}:ro"}
    for site in (name for name in sites(compose) if not name.endswith("-gpu")):
        holders = set(by_volume[f"{site}-keys"])
        gpu = {f"{site}-gpu"} & set(sites(compose))
        assert holders == {site, f"{site}-key"} | gpu
        # The public half goes from the site to the registration, and nowhere else.
        assert by_volume[f"{site}-public"] == {
            f"{site}-key": f"/public/{site}",
            "register": f"/public/{site}:ro",
        }
    # Whoever has the signing key can give all sites any model.
    assert by_volume["signing-key"] == {"superexec": "/keys/signing"}
    # Everybody may see the CA's certificate, and only the set-up may write it.
    assert {n for n, place in by_volume["trust"].items() if place == "/keys/trust"} == {
        "setup"
    }
    assert by_volume["registry"] == {
        "register": "/keys/registry",
        "superexec": "/registry:ro",
    }


def test_commands_name_keys_that_their_containers_have(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        places = {place.split(":")[0] for place in mounts(compose)[name].values()}
        values = [*service["command"], *service.get("environment", {}).values()]
        for value in values:
            for path in re.findall(r"/(?:keys|public)/[\w./-]+", str(value)):
                assert any(path == p or path.startswith(f"{p}/") for p in places), path
    proxy = (DEPLOY / "nginx.conf").read_text()
    assert set(re.findall(r"/keys/(\w+)/", proxy)) == {"proxy", "trust"}


def test_every_place_of_a_volume_belongs_to_the_containers_user(
    compose: dict[str, Any],
) -> None:
    """A new volume takes its owner from the folder in the image."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (made,) = re.findall(r"mkdir -p (.*?)&& chown", dockerfile, flags=re.S)
    folders = set(made.replace("\\", " ").split())
    used = {
        place.split(":")[0]
        for volumes in mounts(compose).values()
        for place in volumes.values()
    }
    assert used == folders


def test_parts_reach_each_other_without_a_proxy(compose: dict[str, Any]) -> None:
    """Docker's own configuration may name one for all containers."""
    for name, service in compose["services"].items():
        connects = "networks" in service and name not in ("proxy", "page")
        environment = service.get("environment") or {}
        for variable in ("NO_PROXY", "no_proxy") if connects else ():
            hosts = set(str(environment[variable]).split(","))
            assert hosts == {"127.0.0.1", "localhost", "superlink", "proxy"}, name


def test_runs_know_the_registry(compose: dict[str, Any]) -> None:
    services = compose["services"]
    folder = Path(services["register"]["environment"]["CLIP2FL_SERVER_FOLDER"])
    written = Server(folder, "").registry
    holder = mounts(compose)["register"]["registry"]
    seen = mounts(compose)["superexec"]["registry"].removesuffix(":ro")
    file = seen / written.relative_to(holder)
    assert f'federation.site-registry="{file}"' in services["runner"]["command"][-1]


def test_image_takes_named_folders_only() -> None:
    """A checkout may hold keys, kits, runs and private images."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert not allowed & {"server", "kits", "runs", "data", "photos"}
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (compiled,) = re.findall(r"compileall -q (.*)$", dockerfile, flags=re.M)
    assert {*compiled.split(), "conf", "pyproject.toml"} <= allowed
    for name in allowed:
        assert list(ROOT.glob(name)), name


def test_base_image_can_be_pinned(compose: dict[str, Any]) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)\nFROM \$\{BASE\}$", dockerfile, flags=re.M)
    for service in compose["services"].values():
        assert service["build"]["args"] == {
            "BASE": f"${{CLIP2FL_BASE:-{base}}}",
            "TORCH_INDEX": "${CLIP2FL_TORCH_INDEX:-}",
        }


@pytest.mark.parametrize("index", ["", "https://cpu.example/simple?a=b c"])
def test_image_has_the_users_packages_by_the_script_that_checks_hashes(
    tmp_path: Path, index: str
) -> None:
    """Runs the Dockerfile's line with another `python`, which prints its arguments."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (lock,) = re.findall(r"^ARG LOCK=(\S+)\nARG TORCH_INDEX=$", dockerfile, flags=re.M)
    assert (ROOT / lock).is_file() and lock == "requirements-user.lock"
    (place,) = re.findall(
        r"^COPY \$\{LOCK\} deploy/install\.py (\S+)$", dockerfile, flags=re.M
    )
    (step,) = re.findall(
        r"^RUN (PIP_.*?) \\\n    && rm -r", dockerfile, flags=re.M | re.S
    )
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$UV_NO_CACHE" "$@"\n')
    python.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOCK": lock}
    done = subprocess.run(
        ["/bin/sh", "-ec", step],
        env={**variables, "TORCH_INDEX": index},
        capture_output=True,
        text=True,
    )
    named = ["--torch-index", index] if index else []
    assert done.stdout.splitlines() == [
        *("1", f"{place}install.py", *named, f"{place}{lock}", "/opt/venv")
    ]


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
    secret = "--superexec-auth-secret-file=/keys/{}/superexec.secret"
    assert {"--isolation=process", "--enable-supernode-auth"} <= options
    assert secret.format("superlink") in options
    assert any(option.startswith("--database=/state/") for option in options)
    assert secret.format("superexec") in compose["services"]["superexec"]["command"]


def test_demo_registers_prepares_and_runs_the_same_sites(
    compose: dict[str, Any],
) -> None:
    names = [name for name in sites(compose) if not name.endswith("-gpu")]
    services = compose["services"]
    registered = [f"{name}=/public/{name}/{name}.pub" for name in names]
    assert services["register"]["command"][3:] == ["site", "register", *registered]
    assert services["images"]["command"][-4:] == names
    for name in names:
        key = services[f"{name}-key"]["command"]
        assert key[1:] == ["own-key", "/keys/site", name, f"/public/{name}"]
        assert f"{name}-key" in services["register"]["depends_on"]
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
    for tool in ("openssl", "ssh-keygen"):
        needed_tool(tool)
    return subprocess.run(
        [DEPLOY / "make-keys.sh", *map(str, arguments)], capture_output=True, text=True
    )


def verify(ca: Path, certificate: Path, *options: str) -> bool:
    """Return whether a certificate is good for what the options ask."""
    command = ["openssl", "verify", "-CAfile", str(ca), *options, str(certificate)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_each_part_of_the_server_gets_keys_of_its_own(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    assert (
        make_keys("server", keys, "fl.example.org", "10.1.2.3", "::1").returncode == 0
    )
    made = {str(p.relative_to(keys)): p for p in keys.rglob("*") if p.is_file()}
    assert set(made) == {
        *("ca/ca.key", "trust/ca.crt"),
        *("superlink/server.crt", "superlink/server.key", "superlink/superexec.secret"),
        *("proxy/proxy.crt", "proxy/proxy.key", "superexec/superexec.secret"),
    }
    for name, path in made.items():
        private = not name.endswith(".crt")
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if private else 0o644)
    for folder, mode in (("ca", 0o700), ("proxy", 0o700), ("trust", 0o755)):
        assert stat.S_IMODE((keys / folder).stat().st_mode) == mode
    assert stat.S_IMODE(keys.stat().st_mode) == 0o755
    secrets = [
        (keys / n / "superexec.secret").read_bytes() for n in ("superlink", "superexec")
    ]
    assert secrets[0] == secrets[1] and len(secrets[0]) == 64
    ca, proxy = made["trust/ca.crt"], made["proxy/proxy.crt"]
    for name in ("fl.example.org", "localhost"):
        assert verify(ca, proxy, "-verify_hostname", name, "-purpose", "sslserver")
    for address in ("10.1.2.3", "127.0.0.1", "::1"):
        assert verify(ca, proxy, "-verify_ip", address)
    # Whoever takes the SuperLink's key cannot stand in for the proxy, and so on.
    superlink = made["superlink/server.crt"]
    for path in (proxy, superlink):
        found = x509.load_pem_x509_certificate(path.read_bytes())
        assert (found.not_valid_after_utc - found.not_valid_before_utc).days == 825
    assert verify(ca, superlink, "-verify_hostname", "superlink")
    assert not verify(ca, superlink, "-verify_hostname", "fl.example.org")
    assert not verify(ca, proxy, "-verify_hostname", "superlink")


def test_server_keys_are_never_overwritten_nor_half_made(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for wrong in ("a b", "a,DNS:evil", "a\nb", "1.2.3.999"):
        refused = make_keys("server", keys, wrong)
        assert refused.returncode == 1 and refused.stderr.startswith("make-keys.sh: ")
        assert not [p for p in keys.rglob("*") if p.is_file()]
    assert make_keys("server", keys, "a").returncode == 0
    before = {p: p.read_bytes() for p in keys.rglob("*") if p.is_file()}
    again = make_keys("server", keys, "other")
    assert again.returncode == 1 and "exists and is not overwritten" in again.stderr
    assert {p: p.read_bytes() for p in keys.rglob("*") if p.is_file()} == before


def test_site_makes_its_key_once_and_sends_the_public_half(tmp_path: Path) -> None:
    keys, public = tmp_path / "keys", tmp_path / "public"
    public.mkdir()
    first = make_keys("own-key", keys, "site-a", public)
    assert first.returncode == 0, first.stderr
    private, half = keys / "site-a", keys / "site-a.pub"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert (
        half.read_text() in first.stdout
        and fingerprint(public_key(half)) in first.stdout
    )
    assert "PRIVATE" not in first.stdout
    assert [p.name for p in public.iterdir()] == ["site-a.pub"]
    key = private.read_bytes()
    again = make_keys("own-key", keys, "site-a", public)
    assert again.returncode == 0 and half.read_text() in again.stdout
    assert "exists and stays" in again.stdout and private.read_bytes() == key
    # A public half that is gone is made again from the private one.
    before = public_key(half)
    half.unlink()
    assert make_keys("own-key", keys, "site-a").returncode == 0
    assert public_key(half) == before and private.read_bytes() == key
    # Another key's public half is not replaced.
    (tmp_path / "more").mkdir()
    other = make_keys("own-key", tmp_path / "more", "site-a", public)
    assert other.returncode == 1 and "is another key's" in other.stderr


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "",
        "-a",
        ".a",
        "a b",
        "é",
        "a\n",
        "x" * 65,
        "a.pub",
        "ca.crt",
        "policy.toml",
    ],
)
def test_key_has_a_name_that_a_site_may_have(tmp_path: Path, name: str) -> None:
    refused = make_keys("own-key", tmp_path / "keys", name)
    assert refused.returncode == 1 and "site name '" in refused.stderr
    assert not (tmp_path / "keys").exists()


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
