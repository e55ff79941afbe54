"""What a node is started with, and what its check lets start."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clip2fl_cli.sites import node as module
from clip2fl_cli.sites.node import NOTHING_HELPS, TRY_AGAIN, Node, NodeError
from tests.defaults import ROOT
from tests.flower_private import parse_node_config


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    folder.mkdir()
    return folder


def node(keys: Path, **variables: object) -> Node:
    """Return the node that an environment describes."""
    given = {"SUPERLINK": "proxy:9092", "SITE": "site-a", "KEYS": keys, **variables}
    return Node.of_environment({name: str(value) for name, value in given.items()})


def after(option: str, command: list[str]) -> str:
    """Return an option's value."""
    return command[command.index(option) + 1]


def test_node_without_a_runs_file_is_checked_without_a_run(keys: Path) -> None:
    made = node(keys)
    check, command = made.doctor_arguments(), made.command(9094)
    key, ca = str(keys / "site-a"), str(keys / "ca.crt")
    assert after("--data-path", check) == "/data"
    assert after("--superlink", check) == "proxy:9092"
    assert after("--root-certificates", check) == ca
    assert after("--private-key", check) == key
    assert "--run-config" not in check and "--policy" not in check
    assert Path(command[0]).name == "flower-supernode"
    assert after("--superlink", command) == "proxy:9092"
    assert after("--root-certificates", command) == ca
    assert after("--auth-supernode-private-key", command) == key
    assert after("--port", command) == "9094"
    assert parse_node_config(after("--node-config", command)) == {
        "data-path": "/data",
        "site": "site-a",
    }
    assert "--trusted-entities" not in command


def test_run_config_ca_and_teacher_are_the_given_ones(keys: Path) -> None:
    given = node(
        keys,
        RUN_CONFIG="conf/mine.toml",
        CA="/ca.crt",
        TEACHER_PATH="/weights of clip",
    )
    check, command = given.doctor_arguments(), given.command(1)
    assert after("--run-config", check) == "conf/mine.toml"
    assert after("--root-certificates", check) == "/ca.crt"
    assert after("--root-certificates", command) == "/ca.crt"
    assert after("--teacher-path", check) == "/weights of clip"
    config = parse_node_config(after("--node-config", command))
    assert config["teacher-path"] == "/weights of clip"


@pytest.mark.parametrize("missing", ["SUPERLINK", "SITE"])
def test_missing_variable_is_named(keys: Path, missing: str) -> None:
    with pytest.raises(NodeError, match=f"the environment has no {missing}"):
        node(keys, **{missing: ""})


def test_policy_beside_the_key_is_passed_to_doctor_and_node(
    tmp_path: Path, keys: Path
) -> None:
    (keys / "policy.toml").write_text("")
    found = node(keys)
    policy = str(keys / "policy.toml")
    assert after("--policy", found.doctor_arguments()) == policy
    assert parse_node_config(found.node_config)["policy"] == policy
    (tmp_path / "other.toml").write_text("")
    config = parse_node_config(node(keys, POLICY=tmp_path / "other.toml").node_config)
    assert config["policy"] == str(tmp_path / "other.toml")


def test_missing_policy_is_not_no_policy(tmp_path: Path, keys: Path) -> None:
    with pytest.raises(NodeError, match=r"none\.toml is no file"):
        node(keys, POLICY=tmp_path / "none.toml")
    (keys / "policy.toml").symlink_to(tmp_path / "none.toml")
    with pytest.raises(NodeError, match=r"policy\.toml is no file"):
        node(keys)


def test_only_trusted_code_runs_where_somebody_is_trusted(
    tmp_path: Path, keys: Path
) -> None:
    trusted = tmp_path / "trusted.yaml"
    trusted.write_text("fpk_1: 'ssh-ed25519 AAAA reviewer'\n")
    command = node(keys, TRUSTED_ENTITIES=trusted).command(1)
    assert after("--trusted-entities", command) == str(trusted)
    # Flower would run anybody's code with these.
    for text in ("", "{}", "[]", "a: 5", "a: 'ssh-rsa AAAA'", "{"):
        trusted.write_text(text)
        with pytest.raises(NodeError, match="the trusted entities ") as error:
            node(keys, TRUSTED_ENTITIES=trusted)
        assert len(str(error.value).splitlines()) == 1
    trusted.unlink()
    with pytest.raises(NodeError, match="No such file"):
        node(keys, TRUSTED_ENTITIES=trusted)


@pytest.mark.parametrize(
    "path",
    [
        "/data/a b",
        '/data/"quoted" x',
        "/data/'single' y",
        "/data/back\\slash\\n \\",
        '/data/" site="other" policy="',
        "/data/a=b c=d",
        "/data/$(touch x)`y`;&|",
        "/data/line\nbreak\ttab\r",
        "/data/ünï-日本-😀",
        "/data/{1}[2]#x.toml",
        "/data/\x7f\x01",
    ],
)
def test_every_path_arrives_as_it_is(keys: Path, path: str) -> None:
    expected: dict[str, Any] = {"data-path": path, "site": "site-a"}
    assert parse_node_config(node(keys, DATA_PATH=path).node_config) == expected


@pytest.mark.parametrize(
    ("path", "reason"), [("data", "is relative"), ("/d\udcff", "is no UTF-8")]
)
def test_paths_that_flower_cannot_use_are_refused(
    keys: Path, path: str, reason: str
) -> None:
    with pytest.raises(NodeError, match=reason):
        node(keys, DATA_PATH=path)


def start(keys: Path, *options: str, **variables: object) -> subprocess.Popen[str]:
    """Start a node by the command, with a SuperLink where nobody listens."""
    return subprocess.Popen(
        [sys.executable, "-m", "clip2fl_cli.app", "site", "start", *options],
        cwd=ROOT,
        env={
            **os.environ,
            "SUPERLINK": "127.0.0.1:9",
            "SITE": "site-a",
            "KEYS": str(keys),
            "CLIP2FL_CACHE_DIR": str(keys.parent / "cache"),
            **{name: str(value) for name, value in variables.items()},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_missing_key_is_named_and_not_tried_again(keys: Path) -> None:
    """A service manager that started it again would help nobody."""
    process = start(keys, "--only-check", DATA_PATH=keys)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == NOTHING_HELPS, told
    found = [line.split()[:2] for line in told.splitlines() if "PROBLEM" in line]
    assert found == [["PROBLEM", name] for name in ("certificate", "key", "server")]


def test_container_waits_for_somebody_to_mend_it(keys: Path) -> None:
    """An engine starts a container again, whatever its exit status."""
    process = start(keys, "--hold", DATA_PATH=keys)
    assert process.stdout is not None
    for line in process.stdout:
        if "the node waits" in line:
            break
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == NOTHING_HELPS


@pytest.mark.parametrize(
    ("problems", "status"),
    [
        ([], 0),
        (["server"], TRY_AGAIN),
        (["server", "clock"], TRY_AGAIN),
        (["data"], NOTHING_HELPS),
        (["server", "classes"], NOTHING_HELPS),
    ],
)
def test_only_what_passes_by_itself_is_tried_again(
    keys: Path, monkeypatch: pytest.MonkeyPatch, problems: list[str], status: int
) -> None:
    from client_app import doctor
    from client_app.preflight import Finding

    asked = []

    def examine(arguments: list[str], prog: str, stop_at: object) -> list[Finding]:
        asked.append((arguments, stop_at))
        findings = [Finding("warning", "images", "-")]
        return findings + [Finding("problem", check, "-") for check in problems]

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    found = node(keys)
    assert module.check(found, all_checks=False) == status
    assert module.check(found, all_checks=True) == status
    # A service does not read all images before each attempt to reach the server.
    assert asked == [
        (found.doctor_arguments(), ("server", "clock")),
        (found.doctor_arguments(), ()),
    ]
