"""What node.sh starts, with stand-ins for the commands that it calls."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.node_config import node_config
from tests.defaults import ROOT
from tests.flower_private import parse_node_config

# Notes what it was called with; python runs all but the doctor.
STAND_IN = """#!{python}
import json, os, sys
name = os.path.basename(sys.argv[0])
checks = sys.argv[1:3] == ["-m", "client_app.doctor"]
if name == "python" and not checks:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with open({log!r}, "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
sys.exit(int(os.environ.get("CHECK_STATUS", "0")) if checks else 0)
"""


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    folder.mkdir()
    return folder


def start(tmp_path: Path, **environment: str) -> tuple[list[list[str]], str]:
    """Run node.sh; return what it called, and what it complained about."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    for name in ("python", "flower-supernode"):
        text = STAND_IN.format(python=sys.executable, log=str(log))
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / "deploy" / "node.sh"],
        cwd=ROOT,
        env={
            "PATH": f"{commands}:{os.environ['PATH']}",
            "SUPERLINK": "proxy:9092",
            "SITE": "site-a",
            "KEYS": str(tmp_path / "keys"),
            **environment,
        },
        capture_output=True,
        text=True,
    )
    lines = log.read_text().splitlines() if log.exists() else []
    called = [json.loads(line) for line in lines]
    assert (called[-1:] != [] and called[-1][0] == "flower-supernode") == (
        done.returncode == 0
    )
    return called, done.stderr


def after(option: str, command: list[str]) -> str:
    """Return an option's value."""
    return command[command.index(option) + 1]


def test_node_without_a_runs_file_is_checked_without_a_run(
    tmp_path: Path, keys: Path
) -> None:
    (check, node), _ = start(tmp_path)
    key, ca = str(keys / "site-a"), str(keys / "ca.crt")
    assert check[:3] == ["python", "-m", "client_app.doctor"]
    assert after("--data-path", check) == "/data"
    assert after("--superlink", check) == "proxy:9092"
    assert after("--root-certificates", check) == ca
    assert after("--private-key", check) == key
    assert "--run-config" not in check and "--policy" not in check
    assert after("--superlink", node) == "proxy:9092"
    assert after("--root-certificates", node) == ca
    assert after("--auth-supernode-private-key", node) == key
    assert parse_node_config(after("--node-config", node)) == {
        "data-path": "/data",
        "site": "site-a",
    }
    assert "--trusted-entities" not in node


def test_run_config_and_ca_are_the_given_ones(tmp_path: Path, keys: Path) -> None:
    (check, node), _ = start(tmp_path, RUN_CONFIG="conf/mine.toml", CA="/ca.crt")
    assert check[:3] == ["python", "-m", "client_app.doctor"]
    assert after("--run-config", check) == "conf/mine.toml"
    assert after("--data-path", check) == "/data" and "--policy" not in check
    assert after("--root-certificates", check) == "/ca.crt"
    assert after("--root-certificates", node) == "/ca.crt"


def test_node_that_fails_its_check_does_not_start(tmp_path: Path, keys: Path) -> None:
    called, _ = start(tmp_path, CHECK_STATUS="1")
    assert [name for name, *_ in called] == ["python"]


def test_policy_beside_the_key_is_passed_to_doctor_and_node(
    tmp_path: Path, keys: Path
) -> None:
    (keys / "policy.toml").write_text("")
    (check, node), _ = start(tmp_path, RUN_CONFIG="conf/mine.toml")
    policy = str(keys / "policy.toml")
    assert after("--policy", check) == policy
    assert parse_node_config(after("--node-config", node))["policy"] == policy
    (tmp_path / "other.toml").write_text("")
    (_, node), _ = start(tmp_path, POLICY=str(tmp_path / "other.toml"))
    config = parse_node_config(after("--node-config", node))
    assert config["policy"] == str(tmp_path / "other.toml")


def test_missing_policy_is_not_no_policy(tmp_path: Path, keys: Path) -> None:
    called, said = start(tmp_path, POLICY=str(tmp_path / "none.toml"))
    assert not called and "none.toml is no file" in said
    (keys / "policy.toml").symlink_to(tmp_path / "none.toml")
    called, said = start(tmp_path)
    assert not called and "policy.toml is no file" in said


def test_only_trusted_code_runs_where_somebody_is_trusted(
    tmp_path: Path, keys: Path
) -> None:
    trusted = tmp_path / "trusted.yaml"
    trusted.write_text("fpk_1: 'ssh-ed25519 AAAA reviewer'\n")
    (_, node), _ = start(tmp_path, TRUSTED_ENTITIES=str(trusted))
    assert after("--trusted-entities", node) == str(trusted)
    # Flower would run anybody's code with these.
    for text in ("", "{}", "[]", "a: 5", "a: 'ssh-rsa AAAA'", "{"):
        trusted.write_text(text)
        called, said = start(tmp_path, TRUSTED_ENTITIES=str(trusted))
        assert not called and "TRUSTED_ENTITIES = " in said
        assert len(said.splitlines()) == 1
    trusted.unlink()
    assert "No such file" in start(tmp_path, TRUSTED_ENTITIES=str(trusted))[1]


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
def test_every_path_arrives_as_it_is(tmp_path: Path, keys: Path, path: str) -> None:
    expected: dict[str, Any] = {"data-path": path, "site": "site-a"}
    text = node_config({"DATA_PATH": path, "SITE": "site-a"})
    assert parse_node_config(text) == expected
    (_, node), _ = start(tmp_path, DATA_PATH=path)
    assert parse_node_config(after("--node-config", node)) == expected


@pytest.mark.parametrize(
    ("path", "reason"), [("data", "is relative"), ("/d\udcff", "is no UTF-8")]
)
def test_paths_that_flower_cannot_use_are_refused(
    tmp_path: Path, keys: Path, path: str, reason: str
) -> None:
    called, said = start(tmp_path, DATA_PATH=path)
    assert not called and said.startswith("node.sh: DATA_PATH = ") and reason in said


def test_real_check_without_a_runs_file_finds_what_is_not_there(
    tmp_path: Path, keys: Path
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "client_app.doctor", "--data-path", tmp_path),
            *("--superlink", "127.0.0.1:9", "--root-certificates", keys / "ca.crt"),
            *("--private-key", keys / "site-a"),
        ],
        cwd=ROOT,
        env={**os.environ, "CLIP2FL_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    found = [line.split()[:2] for line in done.stdout.splitlines() if "PROBLEM" in line]
    assert found == [["PROBLEM", name] for name in ("certificate", "key", "server")]
