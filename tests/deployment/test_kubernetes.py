"""deploy/kubernetes by the schemas of the Kubernetes API, and against the compose file.

The compose file runs in a real engine (test_compose). A cluster is not needed here.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from clip2fl_common.config.files import complete_config
from tests.defaults import ROOT
from tests.tools import find_tool, needed_tool

KUBERNETES = ROOT / "deploy" / "kubernetes"
KUSTOMIZATIONS = [KUBERNETES / "server", KUBERNETES / "site"]
# Lets the schema see what kustomize's own file would only name.
VERSIONS = ["1.31", kubernetes_validate.latest_version()]

Resource = dict[str, Any]


def kustomization(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``kustomization.yaml``."""
    content: dict[str, Any] = yaml.safe_load(
        (folder / "kustomization.yaml").read_text()
    )
    return content


def resources(folder: Path) -> list[Resource]:
    """Return all resources of a kustomization."""
    return [
        resource
        for name in kustomization(folder)["resources"]
        for resource in yaml.safe_load_all((folder / name).read_text())
    ]


def pods(folder: Path) -> Iterator[tuple[str, Resource]]:
    """Yield name and pod of everything that runs."""
    for resource in resources(folder):
        if "template" in resource.get("spec", {}):
            yield resource["metadata"]["name"], resource["spec"]["template"]["spec"]


def containers(folder: Path) -> Iterator[tuple[str, Resource]]:
    """Yield name and content of every container."""
    for _, pod in pods(folder):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield container["name"], container


def generated(folder: Path, kind: str) -> dict[str, list[str]]:
    """Return the files of each Secret or ConfigMap that kustomize makes."""
    made = kustomization(folder).get(f"{kind}Generator", [])
    return {one["name"]: one["files"] for one in made}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda f: f.name)
def test_resources_follow_the_api(folder: Path, version: str) -> None:
    found = resources(folder)
    for resource in found:
        kubernetes_validate.validate(resource, version, strict=True)
    names = [(r["kind"], r["metadata"]["name"]) for r in found]
    assert len(set(names)) == len(names)


def test_schema_refuses_a_misspelt_field() -> None:
    """Otherwise the test above could not fail."""
    service = next(r for r in resources(KUSTOMIZATIONS[0]) if r["kind"] == "Service")
    service["spec"]["portz"] = service["spec"].pop("ports")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda f: f.name)
def test_every_file_is_a_resource_and_every_name_is_defined(folder: Path) -> None:
    listed = {*kustomization(folder)["resources"], "kustomization.yaml"}
    assert {file.name for file in folder.glob("*.yaml")} == listed
    secrets, maps = generated(folder, "secret"), generated(folder, "configMap")
    claims = {
        r["metadata"]["name"]
        for r in resources(folder)
        if r["kind"] == "PersistentVolumeClaim"
    }
    used = set()
    for name, pod in pods(folder):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets
            elif "configMap" in volume:
                assert volume["configMap"]["name"] in maps
            elif "persistentVolumeClaim" in volume:
                used.add(volume["persistentVolumeClaim"]["claimName"])
            else:
                assert "emptyDir" in volume
        mounted = {
            mount["name"]
            for container in [*pod.get("initContainers", []), *pod["containers"]]
            for mount in container["volumeMounts"]
        }
        assert mounted == set(volumes), name
    assert used == claims


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda f: f.name)
def test_pods_have_as_few_rights_as_the_compose_file_gives(folder: Path) -> None:
    namespace = next(r for r in resources(folder) if r["kind"] == "Namespace")
    assert namespace["metadata"]["name"] == kustomization(folder)["namespace"]
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for _, pod in pods(folder):
        assert pod["automountServiceAccountToken"] is False
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        # Otherwise each start makes keys in volumes readable for the group.
        assert context["fsGroupChangePolicy"] == "OnRootMismatch"
    for name, container in containers(folder):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert "memory" in container["resources"]["limits"], name


def test_installed_site_takes_over_a_new_kit(tmp_path: Path) -> None:
    """Runs the command with another `python`, which prints its arguments."""
    command = dict(containers(KUSTOMIZATIONS[1]))["join"]["command"]
    assert "/site/site" in command[-1]
    command = [*command[:-1], command[-1].replace("/site/site", f"{tmp_path}/site")]
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)

    def arguments() -> list[str]:
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        run = subprocess.run(command, env=path, check=True, capture_output=True)
        return run.stdout.decode().split()

    first = ["-m", "clip2fl_cli.app", "site", "join", "/kit/kit.tar.gz", "--data=/data"]
    first += [f"--folder={tmp_path}/site", "--start=none"]
    assert arguments() == first
    (tmp_path / "site").mkdir()
    assert arguments() == [*first, "--update"]


@pytest.mark.parametrize("part", ["superlink", "superexec", "proxy"])
def test_parts_run_the_commands_of_the_compose_file(part: str) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    found = dict(containers(KUSTOMIZATIONS[0]))[part]
    assert found["command"] == compose[part]["command"]
    environment = {e["name"]: e["value"] for e in found.get("env", [])}
    assert environment == compose[part].get("environment", {})
    # Keys lie where the compose file has them; no part has the folder of another.
    there = {v.split(":")[1] for v in compose[part]["volumes"]} - {"/registry"}
    here = {m["mountPath"] for m in found["volumeMounts"]} - {"/tmp", "/registry"}
    assert here == there


def test_only_the_superexec_sees_the_key_that_signs_models() -> None:
    mounted = {
        name: mount["mountPath"]
        for name, container in containers(KUSTOMIZATIONS[0])
        for mount in container["volumeMounts"]
        if mount["name"] == "signing-key"
    }
    assert mounted == {"superexec": "/keys/signing"}


def test_keys_are_the_files_that_the_script_makes(tmp_path: Path) -> None:
    needed_tool("openssl")
    server = tmp_path / "server"
    shutil.copytree(KUSTOMIZATIONS[0], server)
    script = str(ROOT / "deploy" / "make-keys.sh")
    arguments = ["server", str(server / "keys"), "fl.example.org"]
    subprocess.run([script, *arguments], check=True, capture_output=True)
    of = {**generated(server, "secret"), **generated(server, "configMap")}
    for files in of.values():
        assert all((server / file).is_file() for file in files)
    assert not any("ca.key" in file for files in of.values() for file in files)
    mounts = {
        "superlink-keys": "/keys/superlink/",
        "superexec-keys": "/keys/superexec/",
        "trust": "/keys/trust/",
    }
    names = dict(containers(server))
    for part in ("superlink", "superexec"):
        for argument in names[part]["command"]:
            path = argument.partition("=")[2]
            for volume, place in mounts.items():
                if path.startswith(place):
                    assert f"keys{path.removeprefix('/keys')}" in of[volume]
    if kubectl := find_tool("kubectl"):
        command = [kubectl, "kustomize", str(server)]
        built = subprocess.run(command, check=True, capture_output=True, text=True)
        made = [*yaml.safe_load_all(built.stdout)]
        assert len(made) == len(resources(server)) + len(of)
        for resource in made:
            kubernetes_validate.validate(resource, VERSIONS[-1], strict=True)


def test_run_of_the_server_is_one_that_federate_accepts() -> None:
    text = (KUSTOMIZATIONS[0] / "run.toml").read_text("utf-8")
    config = complete_config(text)
    mounted = dict(containers(KUSTOMIZATIONS[0]))["superexec"]["volumeMounts"]
    places = {mount["mountPath"] for mount in mounted}
    assert str(Path(config.federation.site_registry).parent) in places
    assert config.run.dir in places
    assert not config.simulated


def test_only_server_and_proxy_reach_the_superlink() -> None:
    policies = {
        r["metadata"]["name"]: r["spec"]
        for r in resources(KUSTOMIZATIONS[0])
        if r["kind"] == "NetworkPolicy"
    }
    assert policies["nothing"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    inward = {
        spec["podSelector"]["matchLabels"]["app"]: spec["ingress"]
        for spec in policies.values()
        if "ingress" in spec
    }
    sources = [s["podSelector"]["matchLabels"] for s in inward["superlink"][0]["from"]]
    assert sources == [{"app": "server"}, {"app": "proxy"}]
    assert inward["proxy"] == [{"ports": [{"port": 9092}]}]
    assert set(inward) == {"superlink", "proxy"}
