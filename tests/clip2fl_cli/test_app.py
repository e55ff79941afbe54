"""The command with its subcommands, called in this process or as a program."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import typer
from PIL import Image
from typer.core import TyperGroup

from clip2fl_cli import app as module
from clip2fl_cli import comparison as comparisons
from clip2fl_cli import exporting, results
from clip2fl_cli.flower_command import SimulationError
from clip2fl_cli.runs import FinishedRun
from clip2fl_cli.signals import Interrupted
from clip2fl_common.config.files import merge_run_config
from clip2fl_common.data.datasets import load_dataset
from clip2fl_common.project import experiment
from tests.clip2fl_cli.commands import refused, run
from tests.clip2fl_cli.made_up import write_run
from tests.clip2fl_cli.test_comparison import FILE
from tests.defaults import ROOT, run_config

SUBCOMMANDS = set(cast(TyperGroup, typer.main.get_command(module.app)).commands)
SMALL = (
    "dataset.demo-train-per-class=20 dataset.imbalance-factor=10.0 "
    "dataset.demo-test-per-class=3 partition.clients=3 federation.clients-per-round=2"
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write the test images to files; return them in the order of the test set."""
    folder = tmp_path_factory.mktemp("photographs")
    test = load_dataset(run_config().dataset).test
    files = []
    for n, pixels in enumerate(test.load(np.arange(len(test.labels))).images):
        files.append(folder / f"{n}.png")
        Image.fromarray(pixels.numpy().transpose(1, 2, 0)).save(files[-1])
    return files


def test_prediction_of_files_agrees_with_evaluation(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: dict[str, FinishedRun],
    photographs: list[Path],
) -> None:
    """Predicting all 30 test images gives the confusion matrix of the run's end."""
    finished = runs["clip2fl"]
    assert (
        run(monkeypatch, "predict", "--model", finished.folder, "--json", *photographs)
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in answer] == [str(file) for file in photographs]
    labels = load_dataset(run_config().dataset).test.labels
    confusion = np.zeros((10, 10), dtype=int)
    for label, entry in zip(labels, answer, strict=True):
        (likeliest,) = entry["classes"]
        confusion[label, finished.class_names.index(likeliest["name"])] += 1
        assert 0.1 <= likeliest["probability"] <= 1
    assert confusion.tolist() == finished.artifacts["confusion.retrained"].tolist()


def test_prediction_names_several_classes_in_order(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: dict[str, FinishedRun],
    photographs: list[Path],
) -> None:
    model = runs["fedavg"].folder / "model.safetensors"
    assert (
        run(monkeypatch, "predict", "--model", model, "--top", 10, photographs[0]) == 0
    )
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{photographs[0]}: ")
    shares = [float(part.split()[-2]) for part in line.split(": ")[1].split(", ")]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.6)


def test_what_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: dict[str, FinishedRun],
    tmp_path: Path,
) -> None:
    (tmp_path / "x.png").write_text("no image")
    folder = runs["fedavg"].folder
    assert run(monkeypatch, "predict", "--model", folder, tmp_path / "x.png") == 2
    assert "x.png cannot be read as an image" in capsys.readouterr().err
    assert run(monkeypatch, "predict", "--model", tmp_path, tmp_path / "x.png") == 2
    assert "give a model.safetensors or a complete run's" in capsys.readouterr().err


def test_partition_shows_who_holds_what(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: dict[str, FinishedRun],
    tmp_path: Path,
) -> None:
    """Table, JSON and figure show the partition of a run with this configuration."""
    held = runs["fedavg"].artifacts["clients_by_class"].tolist()
    assert run(monkeypatch, "partition", "--set", SMALL, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["images"] == held
    assert answer["classes"] == runs["fedavg"].class_names

    picture = tmp_path / "held.png"
    assert run(monkeypatch, "partition", "--set", SMALL, "--figure", picture) == 0
    table = capsys.readouterr().out.splitlines()
    rows = [line.strip("│ ").split("│") for line in table if line.startswith("│")]
    numbers = [[int(cell) for cell in row[1:]] for row in rows]
    assert numbers[:-1] == [[*row, sum(row)] for row in held]
    assert numbers[-1][-1] == sum(map(sum, held))
    with Image.open(picture) as image:
        assert image.width > 600


def test_unknown_key_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "partition", "--set", "partition.client=2") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "clip2fl: run configuration: partition.client is not a key of the run "
        "configuration; did you mean partition.clients?"
    )
    assert len(captured.err.splitlines()) == 1


def test_export_writes_both_files_and_says_what_they_cost(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: dict[str, FinishedRun],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(exporting, "MEASURED_SECONDS", 0.01)
    arguments = ("export", "--model", runs["clip2fl"].folder, "--output", tmp_path)
    assert run(monkeypatch, *arguments, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert {Path(file).name for file in answer["files"]} == {
        "model.safetensors",
        "model.onnx",
    }
    assert all(Path(file).is_file() for file in answer["files"])
    assert [cost["name"] for cost in answer["costs"]] == [
        "student resnet8-slim",
        "teacher demo",
    ]


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """Return the file of a comparison whose runs are all complete."""
    (tmp_path / "experiment.toml").write_text("federation.rounds = 2\n")
    (tmp_path / "x.toml").write_text(FILE)
    for planned in comparisons.Comparison.read(
        tmp_path / "x.toml", tmp_path / "runs"
    ).plan:
        write_run(
            planned.folder,
            [50.0, 60.0],
            **{
                key.replace("-", "_").replace(".", "__"): value
                for key, value in planned.config.to_flat().items()
            },  # type: ignore[arg-type]
        )
    return tmp_path / "x.toml"


def test_comparison_leaves_table_summary_and_reports(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    comparison: Path,
) -> None:
    runs = comparison.parent / "runs"
    assert run(monkeypatch, "compare", comparison, "--runs", runs) == 0
    captured = capsys.readouterr()
    assert "3 of 3 runs are there" in captured.err
    # As early versions, these runs do not name their code.
    assert "warning: other code than the present one made the complete" in captured.err
    assert "Drawing the reports" in captured.err
    assert "| plain | fedavg | 1, 2 | 55.0 ± 0.0 |" in captured.out
    folder = runs / "x"
    assert captured.out.strip() == (folder / "comparison.md").read_text().strip()
    assert run(monkeypatch, "report", folder / "comparison.csv") == 0
    assert capsys.readouterr().out == captured.out
    assert (folder / "report.html").is_file()
    assert (folder / "plain-seed1" / "report.html").is_file()

    # The reports of the runs exist already; making them takes most of the time.
    monkeypatch.setattr(results, "write_run_report", lambda *_: None)
    only = ("--runs", runs, "--seed", 2, "--json")
    assert run(monkeypatch, "compare", comparison, *only) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == json.loads((folder / "comparison.json").read_text())
    assert [row["variant"] for row in answer["rows"]] == ["plain", "adjusted"]
    assert answer["rows"][1]["difference"]["mean"] == 0.0

    (folder / "report.html").unlink()
    line = refused(monkeypatch, capsys, "report", folder, "--against", folder)
    assert "--against belongs to the report of a single run" in line
    assert run(monkeypatch, "report", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "report": str(folder / "report.html")
    }
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("interruption", "signum"),
    [
        (Interrupted(signal.SIGTERM), signal.SIGTERM),
        (KeyboardInterrupt(), signal.SIGINT),
    ],
)
def test_interrupted_comparison_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    comparison: Path,
    interruption: KeyboardInterrupt,
    signum: int,
) -> None:
    runs = comparison.parent / "runs"
    (runs / "x" / "plain-seed2" / "model.safetensors").unlink()

    def simulate(**_: object) -> None:
        raise interruption

    monkeypatch.setattr(comparisons, "simulate", simulate)
    status = run(monkeypatch, "compare", comparison, "--runs", runs)
    assert status == 128 + signum
    assert "goes on where this one stopped" in capsys.readouterr().err


def test_failed_simulation_is_status_1(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    comparison: Path,
) -> None:
    """If the SuperLink does not start, the run's line says so, without a traceback."""
    runs = comparison.parent / "runs"
    (runs / "x" / "plain-seed2" / "model.safetensors").unlink()

    def simulate(**_: object) -> None:
        raise SimulationError("flower-superlink did not start")

    monkeypatch.setattr(comparisons, "simulate", simulate)
    assert run(monkeypatch, "compare", comparison, "--runs", runs) == 1
    error = capsys.readouterr().err
    assert error.endswith("failed: plain, seed 2: flower-superlink did not start\n")
    assert "Traceback" not in error


@pytest.mark.slow
def test_comparison_goes_on_after_an_interruption(tmp_path: Path) -> None:
    """With real simulations: after Ctrl-C in run two, run one is not repeated."""
    (tmp_path / "tiny.toml").write_text(
        "federation.rounds = 2\n"
        "client.epochs = 1\n"
        "class-gradients.draws = 2\n"
        "synthesis.steps = 5\n"
        "retraining.epochs = 10\n" + SMALL.replace(" ", "\n")
    )
    (tmp_path / "c.toml").write_text(
        'experiment = "tiny.toml"\nseeds = [1]\nbaseline = "fedavg"\n'
        '[variants.fedavg]\nmethod = "fedavg"\n[variants.creff]\nmethod = "creff"\n'
    )
    command = [sys.executable, "-m", "clip2fl_cli.app", "compare"]
    command += [str(tmp_path / "c.toml"), "--runs", str(tmp_path / "runs")]
    first = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A background process of a shell ignores SIGINT, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("[2/2] creff, seed 1: starts"):
            break
    first.send_signal(signal.SIGINT)
    rest = first.stderr.read()
    first.wait(timeout=120)
    assert first.returncode == 128 + signal.SIGINT
    assert "goes on where this one stopped" in rest
    done = tmp_path / "runs" / "c" / "fedavg-seed1" / "metrics.jsonl"
    before = (done.read_bytes(), done.stat().st_mtime_ns)

    second = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert second.returncode == 0, second.stderr
    assert "c: 1 of 2 runs are there" in second.stderr
    assert "fedavg, seed 1" not in second.stderr
    assert (done.read_bytes(), done.stat().st_mtime_ns) == before
    assert "| creff | retrained | 1 |" in second.stdout
    assert (tmp_path / "runs" / "c" / "report.html").is_file()


def test_installed_command_and_module_are_the_same() -> None:
    """``make install`` creates ``.venv/bin/clip2fl``; ``python -m`` works, too."""
    helps = []
    for command in (
        [str(Path(sys.executable).with_name("clip2fl"))],
        [sys.executable, "-m", "clip2fl_cli.app"],
    ):
        done = subprocess.run(
            [*command, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        helps.append(done.stdout.replace("python -m clip2fl_cli.app", "clip2fl"))
    for name in SUBCOMMANDS:
        assert all(name in text for text in helps)


# Files that a page has its readers write, or that a command before has written.
MADE_BY_READERS = ("mine.toml", "conf/mine.toml", "kits/run.toml")


def documented() -> list[str]:
    """Return the commands in the README and in docs/, each on one line."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text("utf-8") for page in pages).replace("\\\n", " ")
    # A page may have its readers activate the environment first.
    lines = r"(?:\.venv/bin/|^ {4})clip2fl ([a-z-][^`\n]*)"
    return sorted(set(re.findall(lines, text, flags=re.M)))


@pytest.mark.parametrize("line", documented())
def test_documented_commands_are_understood(line: str) -> None:
    """Check subcommands, options and their types; other tests run each subcommand."""
    group = cast(TyperGroup, typer.main.get_command(module.app))
    name, *arguments = shlex.split(line, comments=True)
    if name == "--help":
        return
    context = typer.Context(group, info_name="clip2fl")
    subcommand = group.get_command(context, name)
    while isinstance(subcommand, TyperGroup):
        context = typer.Context(subcommand, info_name=name, parent=context)
        name, *arguments = arguments
        subcommand = subcommand.get_command(context, name)
    assert subcommand is not None
    parsed = subcommand.make_context(name, arguments, parent=context)
    for option in ("run_config", "comparison"):
        given = parsed.params.get(option)
        if given and str(given) not in MADE_BY_READERS:
            assert (ROOT / experiment(given)).is_file()
    if parsed.params.get("settings"):
        merge_run_config(ROOT, None, parsed.params["settings"])


def test_documentation_has_every_subcommand() -> None:
    used = {line.split()[0] for line in documented()}
    assert used >= SUBCOMMANDS


def test_doctor_checks_a_site(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``clip2fl doctor`` has the node command's options, help and exit status."""
    config = ROOT / "conf" / "sites.toml"
    missing = tmp_path / "nowhere"
    arguments: list[str | int | Path] = ["--data-path", missing, "--run-config", config]
    assert run(monkeypatch, "doctor", *arguments) == 1
    assert f"PROBLEM  data         {missing} is not a folder" in capsys.readouterr().out
    assert run(monkeypatch, "doctor", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: clip2fl doctor")
    assert run(monkeypatch, "doctor", "--run-config", config) == 2
    assert "--data-path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("predict", "--model", "x", "--top", 0, "y"), "'--top': 0 is not in the"),
        (("predict", "--model", "x", "--top", "many", "y"), "'--top': 'many' is not"),
        (("predict", "--model", "x"), "Missing argument 'IMAGES...'"),
        (("export", "--model", "x"), "Missing option '--output'"),
        (("report", "--nothing", "x"), "No such option"),
        (("report", "x.csv", "--against", "y"), "--against belongs to the report of a"),
        (("nothing",), "No such command 'nothing'"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str | int, ...],
    said: str,
) -> None:
    line = refused(monkeypatch, capsys, *arguments)
    assert said in line
    assert line.endswith("--help lists the choices")


def test_shell_completes_subcommands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_CLIP2FL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "clip2fl p")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run(monkeypatch) == 0
    assert capsys.readouterr().out.split() == ["partition", "predict"]
    monkeypatch.setenv("_CLIP2FL_COMPLETE", "source_bash")
    assert run(monkeypatch) == 0
    assert "_CLIP2FL_COMPLETE=complete_bash" in capsys.readouterr().out


def test_version_is_that_of_the_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    name, version = capsys.readouterr().out.split()
    assert name == "clip2fl"
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_command_without_arguments_shows_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 2
    captured = capsys.readouterr()
    assert "predict" in captured.out + captured.err
    assert "Traceback" not in captured.err
