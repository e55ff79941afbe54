"""Comparisons that cannot be run are refused before any run; failures are named."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

import pytest

from clip2fl_cli import comparison as module
from clip2fl_cli import results
from clip2fl_cli.comparison import Comparison, ComparisonError
from clip2fl_cli.simulation import RunResult
from tests.clip2fl_cli.commands import refused, run, tree
from tests.clip2fl_cli.html_page import Page
from tests.clip2fl_cli.made_up import write_run

HEAD = 'experiment = "experiment.toml"\nseeds = [1, 2]\nbaseline = "plain"\n'
PLAIN = '[variants.plain]\nmethod = "fedavg"\n'
DEEP = "[" * 50_000

# Contents of the file, and the expected part of the message.
FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "x.toml is empty"),
    "not UTF-8": (b"\xff\xfe", "x.toml is not UTF-8"),
    "NUL": (HEAD + PLAIN + "\0", "x.toml: "),
    "nothing": ("a = 1\n", "x.toml: experiment is missing"),
    "date": (HEAD.replace('"experiment.toml"', "2024-01-01") + PLAIN, "experiment = "),
    "date for a value": (HEAD + PLAIN + "client.epochs = 2024-01-01\n",
                         "variants.plain: client.epochs = datetime.date(2024, 1, 1)"),
    "time": (HEAD + "[settings]\nseed = 12:00:00\n" + PLAIN, "settings: seed = "),
    "list": (HEAD + PLAIN + "client.epochs = [1]\n", "client.epochs = a list"),
    "tables": (HEAD + PLAIN + "client.epochs = [{a = 1}]\n", "client.epochs = a list"),
    "table for a value": (HEAD + PLAIN + "client.epochs = {a = 1}\n", "client.epochs"),
    "text": (HEAD + PLAIN + 'client.epochs = "3"\n', "client.epochs = '3'"),
    "not a number": (HEAD + PLAIN + "client.learning-rate = nan\n", "learning-rate"),
    "infinite": (HEAD + PLAIN + "client.learning-rate = inf\n", "learning-rate"),
    "huge": (HEAD + PLAIN + "client.epochs = " + "9" * 5000 + "\n", "x.toml: "),
    "key": (HEAD + PLAIN + "client.epoch = 1\n", "did you mean client.epochs"),
    "top key": ("hello = 1\n" + HEAD + PLAIN, "x.toml: hello is not known"),
    "twice": (HEAD + PLAIN + PLAIN, "x.toml: "),
    "deep list": (HEAD + f"[settings]\nseed = {DEEP}\n" + PLAIN, "nested too deeply"),
    "deep table": (HEAD + PLAIN + "a." * 900 + "b = 1\n", "x.toml"),
    "deeper table": (HEAD + PLAIN + "a." * 100_000 + "b = 1\n", "nested too deeply"),
    "large": (HEAD + PLAIN + "#" * 2_000_000, "too large"),
    "no variants": (HEAD + "[variants]\n", "x.toml: variants = {}"),
    "variants is a list": (HEAD + "variants = []\n", "variants = []"),
    "variant is a number": (HEAD + "[variants]\nplain = 1\n", "variants.plain = 1"),
    "baseline": (HEAD + PLAIN.replace("plain", "other"), "baseline = 'plain' is none"),
    "path": (HEAD + PLAIN + '[variants."a/b"]\n', "'a/b' has a separator"),
    "above": (HEAD + PLAIN + '[variants."../../x"]\n', "'../../x' has a separator"),
    "backslash": (HEAD + PLAIN + "[variants.'a\\b']\n", "has a separator"),
    "dots": (HEAD + PLAIN + '[variants.".."]\n', "begins with a dot"),
    "hidden": (HEAD + PLAIN + '[variants.".x"]\n', "begins with a dot"),
    "option": (HEAD + PLAIN + '[variants."-x"]\n', "begins with a dot or a dash"),
    "no name": (HEAD + PLAIN + '[variants.""]\n', "begins with a dot or a dash"),
    "blank": (HEAD + PLAIN + '[variants." x"]\n', "has blanks around it"),
    "line": (HEAD + PLAIN + '[variants."a\\nb"]\n', "cannot be seen"),
    "escape": (HEAD + PLAIN + '[variants."\\u001b[2J"]\n', "cannot be seen"),
    "bidi": (HEAD + PLAIN + '[variants."a\\u202eb"]\n', "cannot be seen"),
    "long": (HEAD + PLAIN + f'[variants.{"x" * 300}]\n', "is longer than"),
    "case": (HEAD + PLAIN + "[variants.Plain]\n", "'plain' and 'Plain' have the same"),
    "accents": (HEAD + PLAIN + '[variants."\u00e9"]\n[variants."e\u0301"]\n',
                "have the same name"),
    "many": (HEAD + PLAIN + "".join(f"[variants.v{n}]\n" for n in range(300)),
             "variants"),
    "seeds": (HEAD.replace("[1, 2]", "[1, 1]") + PLAIN, "seeds = [1, 1]"),
    "no seeds": (HEAD.replace("[1, 2]", "[]") + PLAIN, "seeds = []"),
    "negative seed": (HEAD.replace("[1, 2]", "[-1]") + PLAIN, "seeds.0 = -1"),
    "large seed": (HEAD.replace("[1, 2]", "[4294967296]") + PLAIN, "seeds.0 = "),
    "true": (HEAD.replace("[1, 2]", "[true]") + PLAIN, "seeds.0 = True"),
    "own seeds": (HEAD + PLAIN + 'seeds = "1"\n', "variants.plain.seeds = '1'"),
    "own seeds twice": (HEAD + PLAIN + "seeds = [3, 3]\n", "plain.seeds = [3, 3]"),
    "no own seeds": (HEAD + PLAIN + "seeds = []\n", "plain.seeds = []"),
    "method": (HEAD + PLAIN + '[variants.b]\nmethod = "fedavgg"\n',
               "variants.b: method = 'fedavgg', but it must be one of"),
    "method of all": (HEAD + '[settings]\nmethod = "x"\n[variants.plain]\n',
                      "variants.plain: method = 'x'"),
    "contradiction": (HEAD + PLAIN + "federation.clients-per-round = 99\n",
                      "plain: run configuration: federation.clients-per-round"),
    "experiment is missing": (HEAD.replace("experiment.toml", "none.toml") + PLAIN,
                              "none.toml cannot be read: No such file"),
    "experiment is a folder": (HEAD.replace("experiment.toml", ".") + PLAIN,
                               "is a folder"),
    "experiment is a device": (HEAD.replace("experiment.toml", "/dev/zero") + PLAIN,
                               "/dev/zero is a device"),
    "experiment is another": (HEAD.replace("experiment.toml", "x.toml") + PLAIN,
                              "x.toml: seeds = a list"),
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the file of a sound comparison."""
    (tmp_path / "experiment.toml").write_text("federation.rounds = 2\n")
    (tmp_path / "x.toml").write_text(HEAD + PLAIN)
    return tmp_path / "x.toml"


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the simulation: runs complete at once, but fail for some methods."""
    started: list[str] = []

    def simulate(*, run_config: Path, output: TextIO) -> RunResult:
        lines = run_config.read_text().split("\n")[:-1]
        pairs = dict(line.split(" = ", 1) for line in lines)
        config: dict[str, Any] = {key: json.loads(v) for key, v in pairs.items()}
        started.append(config["run.name"])
        if config["method"] == "fedprox" or config["seed"] == 99:
            details = "out of memory |<b>\x1b[2J\nTraceback: see the log"
            return RunResult("finished:failed", details, "")
        write_run(
            Path(config["run.dir"]) / config["run.name"],
            [50.0, 60.0],
            **{k.replace("-", "_").replace(".", "__"): v for k, v in config.items()},
        )
        return RunResult("finished:completed", "", "")

    monkeypatch.setattr(module, "simulate", simulate)
    # The reports of single runs take most of the time, and have tests of their own.
    monkeypatch.setattr(results, "write_run_report", lambda *_: None)
    return started


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the comparison's report out, too."""
    monkeypatch.setattr(results, "rewrite_report", lambda folder: folder)


@pytest.mark.usefixtures("undrawn")
def test_sound_comparison_runs(
    file: Path, simulated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "compare", file, "--runs", file.parent / "runs") == 0
    assert simulated == ["plain-seed1", "plain-seed2"]


@pytest.mark.parametrize(("text", "said"), FILES.values(), ids=FILES)
def test_bad_comparison_is_refused_before_the_first_run(
    file: Path,
    simulated: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | bytes,
    said: str,
) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = tree(file.parent)
    line = refused(monkeypatch, capsys, "compare", file, "--runs", file.parent / "runs")
    assert said in line
    assert simulated == []
    assert tree(file.parent) == before


@pytest.mark.parametrize("name", ["..toml", "...toml", ".x.toml", "a\nb.toml"])
def test_folder_of_a_comparison_stays_below_the_runs(
    file: Path,
    simulated: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    odd = file.rename(file.with_name(name))
    line = refused(monkeypatch, capsys, "compare", odd, "--runs", file.parent / "runs")
    assert "rename it" in line
    assert simulated == []


@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a device", "missing", "loop"])
def test_comparison_that_is_no_file_is_refused(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    file.unlink()
    {
        "a folder": lambda: file.mkdir(),
        "a FIFO": lambda: os.mkfifo(file),
        "a device": lambda: file.symlink_to("/dev/zero"),
        "missing": lambda: None,
        "loop": lambda: file.symlink_to(file),
    }[kind]()
    line = refused(monkeypatch, capsys, "compare", file)
    assert "clip2fl: the comparison " in line
    assert kind in line or "cannot be read" in line


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_of_the_command_line_is_checked(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: int,
) -> None:
    line = refused(monkeypatch, capsys, "compare", file, f"--seed={seed}")
    assert f"--seed = [{seed}]" in line


def test_seed_twice_on_the_command_line_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(monkeypatch, capsys, "compare", file, "--seed", 3, "--seed", 3)
    assert "--seed = [3, 3]" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", 'method="fedavgg"'), "method = 'fedavgg', but it must be one of"),
        (("--set", "seed=[1]"), "seed"),
        (("--run-config", "/dev/zero"), "/dev/zero is a device"),
        (("--run-config", "/nowhere.toml"), "/nowhere.toml cannot be read"),
        (("--run-config", "/"), "/ is a folder"),
    ],
)
def test_partition_refuses_what_no_run_accepts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, str],
    said: str,
) -> None:
    assert said in refused(monkeypatch, capsys, "partition", *arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('method = "fedavgg"\n', "e.toml: method = 'fedavgg'"),
        ("client.epochs = 0\n", "e.toml: run configuration: client.epochs = 0"),
        ("client.epochs = [1]\n", "e.toml: client.epochs = a list"),
        ("client.epochs = 1979-05-27\n", "e.toml: client.epochs = datetime.date"),
        (f"a = {DEEP}", "e.toml is nested too deeply"),
        (b"a = '\xff'", "e.toml is not UTF-8"),
    ],
    ids=["method", "value", "list", "date", "deep", "not UTF-8"],
)
def test_bad_run_configuration_names_file_and_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | bytes,
    said: str,
) -> None:
    file = tmp_path / "e.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in refused(monkeypatch, capsys, "partition", "--run-config", file)


def test_no_variant_goes_on_with_another_run(file: Path) -> None:
    file.write_text(HEAD + PLAIN + 'run.resume = "/elsewhere"\n')
    with pytest.raises(ComparisonError, match="plain: run.resume has no effect"):
        Comparison.read(file, file.parent)


REASON = r"out of memory |<b>\x1b[2J"


def test_failed_runs_are_named_in_all_results(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All runs of one variant failed, and one seed of another variant."""
    file.write_text(
        HEAD.replace("[1, 2]", "[1, 99]") + PLAIN + '[variants.b]\nmethod = "fedprox"\n'
    )
    place = file.parent / "runs" / "x"
    assert run(monkeypatch, "compare", file, "--runs", place.parent) == 1
    captured = capsys.readouterr()
    for table in (captured.out, (place / "comparison.md").read_text()):
        rows = [line for line in table.split("\n") if line.startswith("|")]
        escaped = REASON.replace("\\", "\\\\").replace("|", r"\|")
        escaped = escaped.replace("<", r"\<").replace(">", r"\>").replace("[", r"\[")
        assert "| plain | fedavg | 1 | 55.0 |" in table
        empty = "| - | - | - | - | - | - | - | - |"
        assert f"| plain | - | failed: seed 99: {escaped} {empty}" in rows
        assert (
            f"| b | - | failed: seed 1: {escaped}; seed 99: {escaped} {empty}" in rows
        )
    summary = json.loads((place / "comparison.json").read_text())
    assert summary["failed"] == [
        {"variant": "b", "seed": 1, "reason": REASON},
        {"variant": "plain", "seed": 99, "reason": REASON},
        {"variant": "b", "seed": 99, "reason": REASON},
    ]
    assert summary["runs"] == {"plain": ["plain-seed1"]}
    assert captured.err.splitlines()[-3:] == [
        f"failed: b, seed 1: {REASON}",
        f"failed: plain, seed 99: {REASON}",
        f"failed: b, seed 99: {REASON}",
    ]
    # The page, and again when it is made from the folder alone.
    for command in (None, ("report", place)):
        if command:
            (place / "report.html").unlink()
            assert run(monkeypatch, *command) == 0
        rows_of_page = Page(place / "report.html").tables["results-table"].texts
        failed = {row[0]: row[-1] for row in rows_of_page if "failed" in row[-1]}
        assert failed == {
            "plain": f"failed: seed 99: {REASON}",
            "b": f"failed: seed 1: {REASON}; seed 99: {REASON}",
        }
        assert "3 runs failed" in (place / "report.html").read_text()


def test_baseline_without_a_finished_run_leaves_a_report(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(
        HEAD + '[variants.plain]\nmethod = "fedprox"\n[variants.b]\nmethod = "fedavg"\n'
    )
    place = file.parent / "runs" / "x"
    assert run(monkeypatch, "compare", file, "--runs", place.parent) == 1
    table = Page(place / "report.html").tables["results-table"]
    places = [table.header.index(title) for title in ("variant", "difference", "head")]
    assert [[row[place] for place in places] for row in table.texts[:2]] == [
        ["b", "-", "the model's own head"],
        ["plain", "-", "-"],
    ]


def test_comparison_of_which_no_run_finished_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(HEAD + '[variants.plain]\nmethod = "fedprox"\n')
    place = file.parent / "runs" / "x"
    assert run(monkeypatch, "compare", file, "--runs", place.parent) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-3:] == [
        "no run has completed, so there is nothing to report",
        f"failed: plain, seed 1: {REASON}",
        f"failed: plain, seed 2: {REASON}",
    ]


@pytest.mark.usefixtures("undrawn")
def test_damaged_complete_run_is_named_before_the_first_run(
    file: Path,
    simulated: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = file.parent / "runs"
    assert run(monkeypatch, "compare", file, "--runs", place) == 0
    simulated.clear()
    (place / "x" / "plain-seed2" / "config.json").write_text("{}")
    line = refused(monkeypatch, capsys, "compare", file, "--runs", place)
    assert "plain-seed2/config.json: config is missing" in line
    assert simulated == []


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("state", ["{}", "[]", "not JSON", '{"format": 1}'])
def test_checkpoint_of_somebody_else_is_set_aside(
    file: Path, simulated: list[str], monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    place = file.parent / "runs" / "x" / "plain-seed1" / "checkpoints" / "round-000001"
    place.mkdir(parents=True)
    contents = {"state.json": state, "tensors.safetensors": "", "metrics.jsonl": ""}
    sums = []
    for name, text in contents.items():
        (place / name).write_text(text)
        sums.append(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n")
    (place / "SHA256SUMS").write_text("".join(sums))
    assert run(monkeypatch, "compare", file, "--runs", file.parent / "runs") == 0
    assert (file.parent / "runs" / "x" / "plain-seed1.part1").is_dir()
    assert simulated == ["plain-seed1", "plain-seed2"]
