"""A run's folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from clip2fl_common.config import ConfigError, RunConfig, known_keys
from server_app.foreign_files import ForeignFileError
from server_app.run_folder import RunFolder, RunInUseError
from tests.defaults import ROOT, run_config

NAMES = ("circle", "square", "star")


def folder(parent: Path, name: str = "run") -> RunFolder:
    """Return a run's folder."""
    return RunFolder(run_config(run__dir=str(parent), run__name=name), 123)


def test_name_says_method_data_seed_and_run(tmp_path: Path) -> None:
    config = run_config(method="creff", seed=11, run__dir=str(tmp_path / "a" / "b"))
    path = RunFolder(config, 987).path
    assert path == tmp_path / "a" / "b" / "creff-demo-seed11-987"
    assert path.is_dir()


def test_without_a_place_it_goes_to_the_users_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        platformdirs, "user_data_dir", lambda name: str(tmp_path / name)
    )
    path = RunFolder(run_config(run__name="here"), 1).path
    assert path == tmp_path / "clip2fl" / "runs" / "here"


@pytest.mark.parametrize(
    "value", ["../x", "..", ".", "/x", "a/b", "a/../../b", "\0", "a\nb", "x", "x" * 200]
)
@pytest.mark.parametrize("key", ["run__name", "method"])
def test_no_configuration_leads_out_of_the_runs_folder(
    tmp_path: Path, key: str, value: str
) -> None:
    """The value is refused, or the folder lies directly in run.dir."""
    try:
        config = run_config(**{"run__dir": str(tmp_path / "runs"), key: value})
    except ConfigError:
        assert value != "x"
        return
    path = RunFolder(config, 5).path
    assert value == "x"
    assert path.parent == tmp_path / "runs"
    assert path.name == {"run__name": "x", "method": "x-demo-seed7-5"}[key]
    assert list(tmp_path.rglob(".lock")) == [path / ".lock"]


def test_existing_run_is_refused_and_stays(tmp_path: Path) -> None:
    first = folder(tmp_path)
    first.begin_metrics("")
    first.append_metrics({"round": 1})
    first.release()
    with pytest.raises(
        FileExistsError,
        match=rf"{re.escape(str(first.path))} already holds a run; go on with it by "
        r"run\.resume, choose another run\.name or run\.dir, or remove that folder",
    ):
        folder(tmp_path)
    first.append_metrics({"round": 2})
    lines = (first.path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert lines == ['{"round": 1}', '{"round": 2}']
    assert folder(tmp_path, "another").path != first.path


def test_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    """A new run is refused, and a run that would resume the first."""
    first = folder(tmp_path)
    first.begin_metrics("")
    resuming = run_config(run__resume=str(first.path))
    for second in (resuming, run_config(run__dir=str(tmp_path), run__name="run")):
        with pytest.raises(
            RunInUseError, match=rf"another run works in {re.escape(str(first.path))}"
        ):
            RunFolder(second, 124)
    first.release()
    RunFolder(resuming, 125).release()


def test_process_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    """A living process holds the lock; another process checks both cases."""
    program = (
        "from tests.server_app.test_run_folder import folder; "
        "from pathlib import Path; "
        f"run = folder(Path({str(tmp_path)!r})); print('locked', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunInUseError):
            folder(tmp_path)
        other.kill()
    folder(tmp_path).release()


def test_resuming_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"resume = '.*nowhere' is no fold"):
        RunFolder(run_config(run__resume=str(tmp_path / "nowhere")), 1)


def test_line_is_on_disk_when_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is synchronised, and readable through another handle during the run."""
    run = folder(tmp_path)
    synchronised = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synchronised.append((run.path / "metrics.jsonl").read_text("utf-8"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run.append_metrics({"round": 1, "loss": 0.5})
    run.append_metrics({"round": 2, "loss": 0.25})
    first, second = (
        '{"round": 1, "loss": 0.5}\n',
        '{"round": 2, "loss": 0.25}\n',
    )
    assert synchronised == [first, first + second]


def test_config_is_resolved(tmp_path: Path) -> None:
    """config.json has every key, in a form that another run accepts."""
    config = run_config(run__dir=str(tmp_path), run__name="run", seed=12)
    run = RunFolder(config, 1)
    run.write_config(config, {"class_names": NAMES, "code": "abc"})
    content = json.loads((run.path / "config.json").read_text("utf-8"))
    assert content["class_names"] == list(NAMES)
    assert content["code"] == "abc"
    assert sorted(content["config"]) == known_keys()
    assert content["config"]["seed"] == 12
    assert RunConfig.from_run_config(content["config"]) == config
    assert {file.name for file in run.path.iterdir()} == {".lock", "config.json"}


def test_requests_are_read_back(tmp_path: Path) -> None:
    """A resumed run must know of all of them; an old run has no such file."""
    made = folder(tmp_path)
    assert made.requests() == {}
    made.write_requests({3: 2, 12345678901234: 1})
    assert made.requests() == {3: 2, 12345678901234: 1}
    (made.path / "requests.json").write_text('{"3": "many"}', "utf-8")
    with pytest.raises(ForeignFileError, match=r"requests.json.*3 = 'many'"):
        made.requests()
