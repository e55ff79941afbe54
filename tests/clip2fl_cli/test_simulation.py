"""The simulation runs an app by itself, tells how it ended and leaves nothing."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any, TextIO

import psutil
import pytest

import clip2fl
import clip2fl_cli.simulation as module
from clip2fl_cli.app_folder import checked_run_config
from clip2fl_cli.flower_command import (
    WAITING_FLWR,
    environment,
    executable,
    parsed,
)
from clip2fl_cli.signals import Interrupted, NotedSignals
from clip2fl_cli.simulation import RunResult, shared_gpus, simulate
from clip2fl_common.config import ConfigError
from clip2fl_common.config.files import merge_run_config, parse_overrides
from clip2fl_common.project import PROJECT
from tests.clip2fl_cli.commands import refused, run
from tests.clip2fl_cli.made_up import write_run
from tests.defaults import ROOT, default_config

COMMAND = [sys.executable, "-m", "clip2fl_cli.app", "run"]

PYPROJECT = """
[project]
name = "toy"
version = "0.1.0"
description = "One round trip."
license = { file = "LICENSE" }
dependencies = ["flwr[simulation]>=1.42,<1.43"]

[tool.flwr.app]
publisher = "toy"
fab-format-version = 1
flwr-version-target = "1.42.0"
fab-include = ["LICENSE", "toy.py"]

[tool.flwr.app.components]
serverapp = "toy:server"
clientapp = "toy:client"

[tool.flwr.app.config]
mode = "once"
group.factor = 2.0
"""

TOY = """
import os
import time

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()


@client.query()
def reply(message, context):
    seen = MetricRecord({"cache": len(os.environ["CLIP2FL_CACHE_DIR"])})
    return Message(RecordDict({"seen": seen}), reply_to=message)


@server.main()
def main(grid, context):
    print("mode:", context.run_config["mode"], flush=True)
    print("factor:", context.run_config["group.factor"], flush=True)
    if context.run_config["mode"] == "raise":
        raise ValueError("the toy broke")
    while context.run_config["mode"] == "forever":
        time.sleep(0.1)
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.1)
    requests = [
        Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes
    ]
    for answer in grid.send_and_receive(requests, timeout=60):
        print("client saw:", int(answer.content["seen"]["cache"]), flush=True)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Return the directory of a small Flower app."""
    app = tmp_path / "toy-app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT, "utf-8")
    (app / "toy.py").write_text(TOY, "utf-8")
    (app / "LICENSE").write_text("Do as you like.\n", "utf-8")
    return app


@pytest.fixture
def private_tmp(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Send temporary files to a directory whose name marks what a test started.

    Ray's socket paths leave no room for pytest's long names.
    """
    monkeypatch.setenv("TMPDIR", str(short_folder))
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    return short_folder


def processes_naming(path: Path) -> list[str]:
    """Return the living processes whose command or environment names a path."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if any(f"{path}/" in word for word in words) and process.pid != os.getpid():
                found.append(" ".join(words))
    return found


def assert_nothing_left(path: Path) -> None:
    """Check that neither a process nor a file is left, and remove the directory."""
    assert processes_naming(path) == []
    path.rmdir()  # refuses when something is in it


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("supernodes", value) for value in (0, -3, 2.5, "2", True, 100_001)),
        *(("cpus_per_client", value) for value in (0, -1, "2", None, 1.0)),
        *(("gpus_per_client", value) for value in (-1, math.nan, math.inf, "1")),
        *(("timeout", value) for value in (0, -1.0, math.nan, math.inf, "9", True)),
    ],
)
def test_numbers_that_no_simulation_has_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    """Also from Python, where no parser of options has checked them."""
    monkeypatch.setattr(
        "clip2fl_cli.simulation.own_superlink", lambda *_: pytest.fail("it started")
    )
    numbers: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"^{name} = .*, but it must be a "):
        simulate(**numbers)
    with pytest.raises(ConfigError, match=f"^{name} = .*, but it must be a "):
        clip2fl.run("demo", quiet=True, **numbers)


@pytest.mark.slow
def test_completed_run(
    toy: Path, private_tmp: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run gets its configuration and environment, and its log comes back."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", "cache")
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "conf.toml"
    config.write_text('mode = "other"\n[group]\nfactor = 3.0\n', "utf-8")

    result = simulate(toy, run_config=config, overrides=['mode="set"'], supernodes=3)

    assert result.status == "finished:completed", result.log
    assert result.completed
    assert result.details == ""
    lines = result.log.splitlines()
    assert "mode: set" in lines
    assert "factor: 3.0" in lines
    # The absolute path: the run's processes work in a folder of their own.
    assert lines.count(f"client saw: {len(str(tmp_path / 'cache'))}") == 3
    assert_nothing_left(private_tmp)


@pytest.mark.slow
def test_simulation_listens_on_the_loopback_only(
    toy: Path, private_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray runs whatever code it is sent."""
    monkeypatch.setenv("CLIP2FL_CACHE_DIR", str(private_tmp))
    found: set[tuple[str, str]] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    words = [*process.cmdline(), *process.environ().values()]
                    if any(f"{private_tmp}/" in word for word in words):
                        found.update(
                            (process.name(), place.laddr.ip)
                            for place in process.net_connections("inet")
                            if place.status == psutil.CONN_LISTEN
                        )

    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert simulate(toy, supernodes=3).completed
    finally:
        ended.set()
        looking.join()
    assert {"raylet", "gcs_server"} <= {name for name, _ in found}
    own = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert {(name, place) for name, place in found if place not in own} == set()
    assert_nothing_left(private_tmp)


@pytest.mark.slow
def test_failed_run_exits_1_with_the_reason(
    toy: Path, private_tmp: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A ServerApp that raises fails the command, which `flwr run` alone does not."""
    command = [*COMMAND, "--app", str(toy), "--set", 'mode="raise"']
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 1
    assert "mode: raise" in done.stdout
    assert "finished:failed" in done.stderr
    assert "the toy broke" in done.stderr
    (log,) = re.findall(r"the whole log is in (.+)", done.stderr)
    assert "Traceback" not in done.stdout
    assert "Traceback" in Path(log).read_text("utf-8")
    assert_nothing_left(private_tmp)


@pytest.mark.slow
def test_interrupt_leaves_nothing(toy: Path, private_tmp: Path) -> None:
    """Ctrl-C in mid-run ends the SuperLink, the ServerApp and Ray."""
    command = [*COMMAND, "--app", str(toy), "--set", 'mode="forever"']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        assert any(line == "mode: forever\n" for line in done.stdout)
        end = time.monotonic() + 60
        while not any("raylet" in process for process in processes_naming(private_tmp)):
            assert time.monotonic() < end
            time.sleep(0.1)
        done.send_signal(signal.SIGINT)
        assert done.wait(timeout=60) == 128 + signal.SIGINT
    assert_nothing_left(private_tmp)


def simulated(
    monkeypatch: pytest.MonkeyPatch, lines: str, end: RunResult | KeyboardInterrupt
) -> None:
    """Replace the simulation by a log and an end."""

    def simulate(_app: Path, *, output: TextIO, **_: object) -> RunResult:
        output.write(lines)
        if isinstance(end, KeyboardInterrupt):
            raise end
        return end

    monkeypatch.setattr(module, "simulate", simulate)


def test_completed_run_ends_with_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", [50.0, 60.0]).folder
    noise = "INFO :      noise\n" * 100
    simulated(
        monkeypatch,
        f"run folder: {folder}\n{noise}round 1/1: x\n",
        RunResult("finished:completed", "", ""),
    )
    assert run(monkeypatch, "run") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"run folder: {folder}",
        "round 1/1: x",
        f"Report: {folder / 'report.html'}",
    ]
    assert captured.err == ""
    assert (folder / "report.html").is_file()
    assert (folder / "run.log").read_text("utf-8").count("noise") == 100


def test_complete_run_whose_report_fails_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", [50.0]).folder
    (folder / "metrics.jsonl").write_text("{")
    completed = RunResult("finished:completed", "", "")
    simulated(monkeypatch, f"run folder: {folder}\n", completed)
    assert run(monkeypatch, "run") == 0
    assert "clip2fl: no report: " in capsys.readouterr().err


def test_failed_run_names_reason_and_log(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    user_logs: Path,
) -> None:
    simulated(monkeypatch, "INFO :  x\n", RunResult("finished:failed", "why\nso", ""))
    assert run(monkeypatch, "run") == 1
    (log,) = user_logs.iterdir()
    assert capsys.readouterr().err.splitlines() == [
        "clip2fl: the run did not complete (finished:failed): why",
        "so",
        f"clip2fl: the whole log is in {log}",
    ]
    assert log.read_text("utf-8").endswith(" INFO :  x\n")


def test_interrupted_run_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    simulated(monkeypatch, f"run folder: {tmp_path}\n", Interrupted(signal.SIGINT))
    assert run(monkeypatch, "run") == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines() == [
        "clip2fl: interrupted by SIGINT; all processes have ended",
        f"clip2fl run --resume {tmp_path} continues the run",
        f"clip2fl: the whole log is in {tmp_path / 'run.log'}",
    ]


def test_ctrl_c_is_answered_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    with NotedSignals() as signals:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            said.append(capsys.readouterr().err)
    assert (signals.first, signals.hurry) == (signal.SIGINT, True)
    assert said[0].startswith("clip2fl: SIGINT received: stopping the run")
    assert "Checkpoints stay" in said[0]
    assert said[1:] == ["clip2fl: SIGINT received again: killing the processes\n", ""]


def test_overrides_win_over_the_file(toy: Path, tmp_path: Path) -> None:
    """File and pairs are merged key by key, later pairs last."""
    config = tmp_path / "conf.toml"
    config.write_text("group.factor = 3.0\n", "utf-8")
    merged = merge_run_config(
        toy, config, ['mode="a = b" group.factor=1e-7', "mode='c'"]
    )
    assert tomllib.loads(merged) == {"mode": "c", "group": {"factor": 1e-7}}


def test_interrupted_run_keeps_its_configuration(toy: Path, tmp_path: Path) -> None:
    """The folder is made absolute; other settings are passed on and checked there."""
    config = {"mode": "other", "group.factor": 3.0, "run.resume": "/before"}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}), "utf-8")
    project = toy / "pyproject.toml"
    project.write_text(project.read_text("utf-8") + 'run.resume = ""\n', "utf-8")
    relative = Path(os.path.relpath(tmp_path))
    merged = merge_run_config(toy, None, ["mode='new'"], relative)
    assert tomllib.loads(merged) == {
        "mode": "new",
        "group": {"factor": 3.0},
        "run": {"resume": str(relative.absolute())},
    }


@pytest.mark.parametrize("text", [None, "{", "[]", '{"seed": 7}'])
def test_folder_without_a_run_is_refused(
    toy: Path, tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"--resume .*config\.json cannot be read"):
        merge_run_config(toy, None, [], tmp_path)


@pytest.mark.parametrize("text", ["seed", "seed 8", "mode=fedavg", "seed=8 oops", "=1"])
def test_unreadable_pairs_are_refused(text: str) -> None:
    """Text that is no pair of key and value is refused; flwr would ignore it."""
    with pytest.raises(ValueError, match="key=value|strings need quotes"):
        parse_overrides([text])


def test_unknown_key_is_named_with_the_nearest(toy: Path) -> None:
    """A wrong key is named before anything is started."""
    command = [*COMMAND, "--app", str(toy), "--set", "group.fctor=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "'group.fctor' does not exist; did you mean 'group.factor'" in done.stderr


WRONG = {
    'method="fedavgn"': "did you mean 'fedavg'",
    "seed=-1": "seed = -1, but it must be",
    "federation.rounds=10000000": "federation.rounds = 10000000, but it must be",
    'run.name="../../x"': "run.name = '../../x', but it must be",
    "federation.min-replies=6": "federation.min-replies = 6 is more than",
    'dataset.name="cifar10"': "dataset.root is empty",
    "privacy.min-class-samples=40": "class-gradients.samples-per-class = 32",
    'dataset.name="image-folder" dataset.root="/no/where"': "'/no/where' is not there",
    'dataset.name="hugging-face" dataset.root="/no/set"': "'/no/set' is not there",
    'dataset.name="list" dataset.train-list="/a.csv" dataset.test-list="/b.csv"': (
        "dataset.train-list = '/a.csv' is not there"
    ),
    'client.precision="float16"': "client.precision = 'float16', but it must be",
}
"""Settings of this program, each with its message."""


@pytest.mark.parametrize("setting", WRONG)
def test_wrong_configuration_is_refused_before_anything_starts(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(module, "private_directory")
    assert WRONG[setting] in refused(monkeypatch, capsys, "run", "--set", setting)


def test_wrong_configuration_of_an_interrupted_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(module, "private_directory")
    content = {"config": {**default_config(), "client.epochs": 0}}
    (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
    line = refused(monkeypatch, capsys, "run", "--resume", tmp_path)
    assert "client.epochs = 0, but it must be" in line


SLOW = {"torch", "torchvision", "flwr", "open_clip", "ray", "scipy", "matplotlib"}
"""Packages whose import takes a large part of a second, or seconds."""


def imported_by(arguments: list[str]) -> tuple[int, str, set[str]]:
    """Return status, errors and slow packages of the command in a new process."""
    code = (
        "import json, sys; from clip2fl_cli.app import main\n"
        "status = 0\n"
        "try:\n    main()\n"
        "except SystemExit as exit_:\n    status = exit_.code\n"
        "print(json.dumps([status, sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    status, names = json.loads(done.stdout.splitlines()[-1])
    return status, done.stderr, SLOW & set(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--set", "seeed=3"], "did you mean 'seed'?"),
        (["run", "--set", 'method="fedavgn"'], "did you mean 'fedavg"),
        (["run", "--set", "seed=-1"], "seed = -1, but it must be"),
        (
            ["run", "--set", 'dataset.name="image-folder" dataset.root="/no/where"'],
            "'/no/where' is not there",
        ),
        (["run", "--run-config", "no.toml"], "no.toml"),
        (["partition", "--set", "seed=-1"], "seed = -1, but it must be"),
        (["compare", "demo-compare", "--set", "seeed=3"], "did you mean seed"),
        (["compare", "demo-compare", "--images", "held-out"], "are not divided"),
        (["federate", "--root-certificates", "ca.crt", "--set", "seed=-1"], "seed ="),
    ],
)
def test_wrong_setting_is_refused_before_any_slow_import(
    arguments: list[str], message: str
) -> None:
    """It is refused within a second, and not after seconds of imports."""
    status, errors, slow = imported_by(arguments)
    assert status == 2
    assert message in errors
    assert not slow


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_and_version_import_nothing_slow(arguments: list[str]) -> None:
    status, _, slow = imported_by(arguments)
    assert status == 0
    assert not slow


def test_start_needs_neither_torch_nor_flower_in_the_command() -> None:
    """Their import would come before the SuperLink's, one after the other."""
    code = (
        "import sys; from pathlib import Path; import clip2fl_cli.progress\n"
        "from clip2fl_cli.app_folder import checked_run_config\n"
        "from clip2fl_cli import simulation\n"
        "simulation.GPU_DEVICES = ()\n"
        "checked_run_config(Path.cwd(), None, ['method=\"creff\"'])\n"
        "assert simulation.shared_gpus(1) == 0\n"
        "assert not {'torch', 'flwr'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_waiting_flower_does_what_flwr_does() -> None:
    waiting = subprocess.run(
        [sys.executable, "-c", WAITING_FLWR],
        input=json.dumps(["run", "--help"]) + "\n",
        capture_output=True,
        text=True,
    )
    direct = subprocess.run(
        [executable("flwr"), "run", "--help"], capture_output=True, text=True
    )
    assert waiting.returncode == direct.returncode == 0
    assert waiting.stdout == direct.stdout


def test_answers_of_flower_are_read_where_colours_are_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jupyter and some CI services set these variables."""
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, "1")
    answer = subprocess.run(
        [executable("flwr"), "ls", "nowhere", "--format", "json"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert "'nowhere' not found" in parsed(answer.stdout)["error-message"]


def test_other_apps_decide_about_their_own_configuration(toy: Path) -> None:
    assert checked_run_config(toy, None, ['mode="any thing"']) == 'mode = "any thing"\n'
    with pytest.raises(ConfigError, match="method = 'no-such'"):
        checked_run_config(PROJECT, None, ['method="no-such"'])
    # However its folder is written.
    with pytest.raises(ConfigError, match="method = 'no-such'"):
        checked_run_config(PROJECT / "conf" / "..", None, ['method="no-such"'])
    checked_run_config(PROJECT, None, ['method="fedprox"'])


def test_gpu_by_its_number_is_refused(tmp_path: Path) -> None:
    """Ray hides it from clients, and the run would end in round 1."""
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=3"):
        simulate(overrides=[f'device="cuda:3" run.dir="{tmp_path}"'])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--timeout=nan", "nan is no finite number"),
        ("--timeout=inf", "inf is no finite number"),
        ("--timeout=0", "0 is not above 0"),
        ("--gpus-per-client=nan", "nan is no finite number"),
        ("--gpus-per-client=-1", "-1.0 is not in the range"),
        ("--supernodes=1000000000", "1000000000 is not in the range"),
        ("--cpus-per-client=0", "0 is not in the range"),
    ],
)
def test_odd_numbers_on_the_command_line_are_wrong_usage(
    option: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(module, "private_directory")
    line = refused(monkeypatch, capsys, "run", option)
    assert f"Invalid value for '{option.partition('=')[0]}': {said}" in line


@pytest.mark.parametrize(
    ("gpus", "cores", "cpus_per_client", "share"),
    [(0, 8, 1, 0.0), (1, 2, 1, 0.5), (1, 16, 1, 0.25), (2, 16, 4, 0.5), (4, 2, 1, 1.0)],
)
def test_gpus_are_shared_among_clients(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    cores: int,
    cpus_per_client: int,
    share: float,
) -> None:
    monkeypatch.setattr(module, "_has_gpu_driver", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(module, "cpu_count", lambda: cores)
    assert shared_gpus(cpus_per_client) == share
    assert shared_gpus(cpus_per_client, "cpu") == 0
