"""Which runs a comparison has, and that it repeats none of them."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import torch
from rich.console import Console

from clip2fl_cli import comparison as module
from clip2fl_cli.comparison import Comparison, ComparisonError, PlannedRun, complete
from clip2fl_cli.flower_command import SimulationError
from clip2fl_cli.output import OutputError
from clip2fl_cli.progress import ComparisonProgress
from clip2fl_cli.run_schema import Images
from clip2fl_cli.simulation import RunResult
from clip2fl_common.config import ConfigError, Scalar
from clip2fl_common.provenance import (
    ALL_CODE,
    SHARED_TRAINING_VARIABLE,
    code_fingerprint,
)
from server_app.checkpoints import Checkpoint, load_newest, save_checkpoint
from server_app.run_folder import RunFolder
from tests.clip2fl_cli.made_up import change_facts, write_run
from tests.defaults import ROOT

FILE = """
experiment = "experiment.toml"
seeds = [1, 2]
baseline = "plain"

[settings]
client.epochs = 4

[variants.plain]
method = "fedavg"

[variants.adjusted]
method = "fedavg"
client.logit-adjustment = 1.5
client.epochs = 6
seeds = [2]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the file of a comparison of two variants."""
    (tmp_path / "experiment.toml").write_text(
        "client.epochs = 3\nfederation.rounds = 2\nfederation.clients-per-round = 2\n"
    )
    (tmp_path / "x.toml").write_text(FILE)
    return tmp_path / "x.toml"


def read(file: Path, *overrides: str, seeds: tuple[int, ...] = ()) -> Comparison:
    """Read a comparison whose runs lie beside it."""
    return Comparison.read(file, file.parent / "runs", overrides, seeds)


def test_only_the_named_variants_run_in_the_order_of_the_file(file: Path) -> None:
    everything = read(file)
    names = [run.variant for run in everything.plan]
    other = next(name for name in names if name != everything.baseline)
    chosen = Comparison.read(
        file, file.parent / "runs", variants=[other, everything.baseline]
    )
    assert chosen.plan == tuple(
        run for run in everything.plan if run.variant in (other, everything.baseline)
    )
    with pytest.raises(ComparisonError, match=f"the baseline {everything.baseline}"):
        Comparison.read(file, file.parent / "runs", variants=[other])
    with pytest.raises(ComparisonError, match="--variant adjust: there is no such"):
        Comparison.read(file, file.parent / "runs", variants=["adjust"])


class Watcher:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.log = io.StringIO()
        self.ends: list[tuple[str, bool]] = []

    def started(self, run: PlannedRun) -> TextIO:
        """Return where the log goes."""
        return self.log

    def ended(self, run: PlannedRun, result: RunResult) -> None:
        """Note the end."""
        self.ends.append((run.folder.name, result.completed))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Replace the simulation: runs complete at once, but those of seed 99 fail."""
    made: list[dict[str, object]] = []

    def simulate(
        *, run_config: Path | None = None, resume: Path | None = None, output: TextIO
    ) -> RunResult:
        if run_config is None:
            assert resume is not None
            config: dict[str, Any] = dict(load_newest(resume).config)
            config["run.resume"] = str(resume)
            shutil.rmtree(resume)
        else:
            lines = run_config.read_text().split("\n")[:-1]
            pairs = dict(line.split(" = ", 1) for line in lines)
            config = {key: json.loads(value) for key, value in pairs.items()}
        made.append(config)
        if config["seed"] == 99:
            return RunResult("finished:failed", "no more", "")
        output.write("round 1/2: fine\n")
        write_run(
            Path(config["run.dir"]) / config["run.name"],
            [50.0, 60.0],
            **{k.replace("-", "_").replace(".", "__"): v for k, v in config.items()},
        )
        return RunResult("finished:completed", "", "")

    monkeypatch.setattr(module, "simulate", simulate)
    return made


def test_settings_of_file_variant_and_command_line(file: Path) -> None:
    """Order of precedence: experiment, common settings, variant, command line."""
    found = read(file, "federation.rounds=9")
    assert found.baseline == "plain"
    runs = {run.folder.relative_to(file.parent).as_posix(): run for run in found.plan}
    assert list(runs) == [
        "runs/x/plain-seed1",
        "runs/x/adjusted-seed2",
        "runs/x/plain-seed2",
    ]
    plain, adjusted = runs["runs/x/plain-seed1"], runs["runs/x/adjusted-seed2"]
    assert (plain.config.seed, adjusted.config.seed) == (1, 2)
    assert (plain.config.client.epochs, adjusted.config.client.epochs) == (4, 6)
    assert plain.config.client.logit_adjustment == 0.0
    assert adjusted.config.client.logit_adjustment == 1.5
    assert {run.config.federation.rounds for run in found.plan} == {9}


def test_variant_keeps_what_is_set_for_all_in_the_same_group(file: Path) -> None:
    """A variant has the common client.epochs and its own client.logit-adjustment."""
    for for_all in ("client.epochs = 4", "client = {epochs = 4}"):
        own = FILE.replace("client.epochs = 4", for_all).replace(
            "client.epochs = 6", ""
        )
        file.write_text(own)
        found = {run.variant: run.config.client for run in read(file).plan}
        assert found["adjusted"].logit_adjustment == 1.5
        assert (found["plain"].epochs, found["adjusted"].epochs) == (4, 4)


def test_seeds_of_the_command_line_win(file: Path) -> None:
    found = [(run.variant, run.seed) for run in read(file, seeds=(5, 6)).plan]
    assert found == [
        *(("plain", 5), ("adjusted", 5)),
        *(("plain", 6), ("adjusted", 6)),
    ]


def test_seeds_may_be_whole_numbers_of_numpy(file: Path) -> None:
    for seeds in (np.arange(2), [np.int64(0), 1], (0, 1)):
        found: Any = seeds
        plan = read(file, seeds=found).plan
        assert {run.seed for run in plan} == {0, 1}
        assert {type(run.seed) for run in plan} == {int}


@pytest.mark.parametrize("seeds", [5, "12", [True], [1.0], np.arange(0), [[1]]])
def test_what_is_no_seed_is_named(file: Path, seeds: Any) -> None:
    with pytest.raises(ComparisonError, match="--seed = .* different whole numbers"):
        read(file, seeds=seeds)


def test_complete_runs_are_not_repeated(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    first = read(file)
    watcher = Watcher()
    assert list(complete(first, watcher)) == []
    assert [config["run.name"] for config in simulated] == [
        run.folder.name for run in first.plan
    ]
    assert simulated[1]["client.logit-adjustment"] == 1.5
    assert watcher.ends == [(run.folder.name, True) for run in first.plan]
    assert "round 1/2: fine" in watcher.log.getvalue()
    assert list(complete(read(file), watcher)) == []
    assert len(simulated) == 3
    assert {v: [r.seed for r in runs] for v, runs in first.finished().items()} == {
        "plain": [1, 2],
        "adjusted": [2],
    }


def test_complete_runs_of_other_code_are_named(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    """Those of early versions do not say what code of the server made them."""
    list(complete(read(file), Watcher()))
    old, other, same = (run.folder for run in read(file).plan)
    change_facts(other, all_code="another")
    change_facts(same, all_code=code_fingerprint(packages=ALL_CODE))
    assert read(file).missing() == []
    warning = read(file).other_code()
    assert f"complete runs {old.name}, {other.name} in {file.parent}" in warning
    assert "remove their folders" in warning and "--runs" in warning
    change_facts(old, all_code=code_fingerprint(packages=ALL_CODE))
    shutil.rmtree(other)
    assert read(file).other_code() == ""


def test_code_that_changes_between_two_comparisons_of_a_notebook_is_seen(
    file: Path, simulated: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(complete(read(file), Watcher()))
    for run in read(file).plan:
        change_facts(run.folder, all_code=code_fingerprint(packages=ALL_CODE))
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"#")
    assert "plain-seed1" in read(file).other_code()


def test_interrupted_run_starts_again_beside_its_remains(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    run = read(file).plan[0]
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"round": 1}\n')
    list(complete(read(file), Watcher()))
    assert len(simulated) == 3
    aside = run.folder.with_name("plain-seed1.part1")
    assert (aside / "metrics.jsonl").read_text() == '{"round": 1}\n'
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2


def leave_checkpoint(run: PlannedRun, code: str, **changes: Scalar) -> None:
    """Leave what a run has after a round, by this code or another."""
    run.folder.mkdir(parents=True)
    save_checkpoint(
        run.folder,
        Checkpoint(
            round=1,
            config={**run.config.to_flat(), **changes},
            made_with={"code": code},
            environment={},
            best=None,
            resumed_after=(),
            metrics='{"round": 1}\n',
            model={"bias": torch.zeros(1)},
            strategy={},
        ),
    )


def test_interrupted_run_goes_on_from_its_checkpoint(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    run = read(file).plan[0]
    leave_checkpoint(run, code_fingerprint(packages=ALL_CODE))
    watcher = Watcher()
    assert list(complete(read(file), watcher)) == []
    assert simulated[0]["run.resume"] == str(run.folder)
    assert [config["run.resume"] for config in simulated[1:]] == ["", ""]
    assert watcher.ends[0] == ("plain-seed1", True)
    assert not run.folder.with_name("plain-seed1.part1").exists()


def test_resumed_run_is_not_repeated(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    leave_checkpoint(read(file).plan[0], code_fingerprint(packages=ALL_CODE))
    list(complete(read(file), Watcher()))
    assert read(file).missing() == []


def test_local_training_is_kept_until_all_runs_are_there(
    file: Path, simulated: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(
        FILE.replace("[settings]", "share-local-training = true\n[settings]")
    )
    kept = file.parent / "runs" / "x" / "local-training"
    simulate, seen = vars(module)["simulate"], []

    def keeping(**arguments: Any) -> Any:
        seen.append(os.environ.get(SHARED_TRAINING_VARIABLE))
        kept.mkdir(parents=True, exist_ok=True)
        return simulate(**arguments)

    monkeypatch.setattr(module, "simulate", keeping)
    list(complete(read(file, seeds=(99, 3)), Watcher()))
    assert seen == [str(kept)] * 4
    assert kept.exists()  # a run failed
    list(complete(read(file), Watcher()))
    assert not kept.exists()
    assert SHARED_TRAINING_VARIABLE not in os.environ


def test_local_training_is_kept_for_the_variants_that_are_not_chosen(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    file.write_text(
        FILE.replace("[settings]", "share-local-training = true\n[settings]")
    )
    kept = file.parent / "runs" / "x" / "local-training"
    kept.mkdir(parents=True)
    some = Comparison.read(file, file.parent / "runs", variants=["plain"])
    assert list(complete(some, Watcher())) == []
    assert kept.exists()  # the variant adjusted has no run
    # Another command, with another seed, uses what is there.
    other = RunFolder(read(file, seeds=(5,)).plan[0].config, 1)
    try:
        list(complete(read(file), Watcher()))
        assert kept.exists()
    finally:
        other.release()
    list(complete(some, Watcher()))
    assert not kept.exists()


@pytest.mark.parametrize(
    ("code", "changes"),
    [("another", {}), (code_fingerprint(packages=ALL_CODE), {"client.epochs": 77})],
)
def test_checkpoint_of_another_run_is_set_aside(
    file: Path,
    simulated: list[dict[str, object]],
    code: str,
    changes: dict[str, Scalar],
) -> None:
    """A checkpoint of other code or another configuration would be refused."""
    run = read(file).plan[0]
    leave_checkpoint(run, code, **changes)
    list(complete(read(file), Watcher()))
    assert [config["run.resume"] for config in simulated] == [""] * 3
    aside = run.folder.with_name("plain-seed1.part1")
    assert load_newest(aside).metrics == '{"round": 1}\n'


def test_failed_run_does_not_stop_the_others(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    failed = list(complete(read(file, seeds=(99, 3)), Watcher()))
    assert [(run.variant, run.seed) for run in failed] == [
        ("plain", 99),
        ("adjusted", 99),
    ]
    assert len(simulated) == 4
    assert [r.seed for r in read(file, seeds=(99, 3)).finished()["plain"]] == [3]


def test_folder_of_an_active_run_is_left_alone(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    """A second command for the same comparison does not take the first one's run."""
    active = read(file).plan[0]
    lock = RunFolder(active.config, 1)
    try:
        (failed,) = complete(read(file), Watcher())
    finally:
        lock.release()
    assert (failed.variant, failed.seed) == ("plain", 1)
    assert failed.reason.startswith(f"another run works in {active.folder}: wait")
    assert [config["run.name"] for config in simulated] == [
        "adjusted-seed2",
        "plain-seed2",
    ]
    assert not active.folder.with_name("plain-seed1.part1").exists()
    # A lock that nobody holds is the remains of a run that has ended.
    assert list(complete(read(file), Watcher())) == []


@pytest.mark.parametrize("error", [SimulationError, ConfigError, OSError])
def test_run_that_cannot_start_does_not_stop_the_others(
    file: Path,
    simulated: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    simulate = vars(module)["simulate"]

    def failing_once(**arguments: Any) -> Any:
        monkeypatch.setattr(module, "simulate", simulate)
        raise error("the SuperLink did not start")

    monkeypatch.setattr(module, "simulate", failing_once)
    watcher = Watcher()
    (failed,) = complete(read(file), watcher)
    assert (failed.variant, failed.reason) == ("plain", "the SuperLink did not start")
    assert [completed for _, completed in watcher.ends] == [False, True, True]


def test_missing_images_are_named_before_the_first_run(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    images = 'dataset.name = "image-folder"\ndataset.root = "/no/where"\n'
    file.write_text(FILE.replace("[settings]\n", f"[settings]\n{images}"))
    message = "variant plain: dataset.root = '/no/where' is not there"
    with pytest.raises(ConfigError, match=message):
        list(complete(read(file), Watcher()))
    assert not simulated


def test_folder_that_cannot_be_made_is_named_before_the_first_run(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    (file.parent / "runs").touch()
    with pytest.raises(OutputError, match=f"{file.parent / 'runs'}"):
        list(complete(read(file), Watcher()))
    assert not simulated


def test_complete_run_with_other_settings_is_not_taken_for_this_one(
    file: Path, simulated: list[dict[str, object]]
) -> None:
    list(complete(read(file), Watcher()))
    with pytest.raises(
        ComparisonError,
        match=r"plain-seed1 was made with client.batch-size = 32, but the comparison "
        "now wants 16: choose another folder",
    ):
        read(file, "client.batch-size=16").missing()
    # A run's trackers do not change its results.
    assert read(file, 'run.trackers="tensorboard"').missing() == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('baseline = "plain"', 'baseline = "plan"', "baseline = 'plan' is none of the"),
        ("seeds = [1, 2]", "", "x.toml: seeds is missing"),
        (
            "seeds = [1, 2]",
            'seeds = ["1"]',
            "seeds.0 = '1', but it must be a valid int",
        ),
        ("seeds = [1, 2]", "seeds = [1", "x.toml"),
        ("[settings]", "[setings]", "setings is not known"),
    ],
)
def test_bad_file_is_named_with_what_is_wrong(
    file: Path, old: str, new: str, message: str
) -> None:
    file.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ComparisonError, match=message):
        read(file)


def test_experiment_may_be_one_that_comes_with_the_program(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name does not depend on the working directory."""
    file.write_text(FILE.replace("experiment.toml", "demo"))
    for place in (file.parent, file.parent.parent):
        monkeypatch.chdir(place)
        (place / "demo").mkdir()
        found = read(Path(os.path.relpath(file)))
        assert found.plan[0].config.federation.rounds == 30
    (file.parent / "demo").rmdir()
    (file.parent / "demo").write_text("federation.rounds = 3\n")
    assert read(file).plan[0].config.federation.rounds == 3


def test_bad_key_of_a_variant_is_named(file: Path) -> None:
    file.write_text(FILE.replace("client.logit-adjustment", "client.logit-adjustmint"))
    with pytest.raises(ConfigError, match="did you mean client.logit-adjustment"):
        read(file)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ComparisonError, match="^the comparison .*none.toml cannot be read"
    ):
        read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "file",
    [f for f in (ROOT / "conf").glob("*.toml") if "[variants." in f.read_text("utf-8")],
    ids=lambda file: file.name,
)
def test_comparisons_of_this_app_are_sound(tmp_path: Path, file: Path) -> None:
    places = [
        f'dataset.{name}="/photos"' for name in ("root", "train-list", "test-list")
    ]
    found = Comparison.read(file, tmp_path, places)
    assert len({run.folder for run in found.plan}) == len(found.plan)
    assert found.baseline in {run.variant for run in found.plan}


def test_progress_is_plain_lines_without_a_terminal(
    file: Path, user_logs: Path
) -> None:
    plan = list(read(file).plan)
    stream = io.StringIO()
    console = Console(file=stream, width=40)
    with ComparisonProgress(plan[:1], 2, console) as progress:
        log = progress.started(plan[0])
        log.write("INFO : noise\nprinted\nWARNING : bad\nround 1/2: fedavg balan")
        log.write("ced 10.0 %\nround 2/2: [red]\n")
        progress.ended(plan[0], RunResult("finished:failed", "out of luck", ""))
    (file_of_log,) = user_logs.iterdir()
    assert "INFO : noise" in file_of_log.read_text("utf-8")
    assert stream.getvalue().splitlines() == [
        "[3/3] plain, seed 1: starts",
        "[3/3] plain, seed 1: warning: bad",
        "[3/3] plain, seed 1: round 1/2: fedavg balanced 10.0 %",
        "[3/3] plain, seed 1: round 2/2: [red]",
        "plain, seed 1: did not complete (finished:failed): out of luck",
        f"plain, seed 1: the whole log is in {file_of_log}",
    ]


def test_progress_shows_rounds_and_time_left_on_a_terminal(file: Path) -> None:
    plan = list(read(file).plan)
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True)
    with ComparisonProgress(plan, 0, console) as progress:
        progress.started(plan[0]).write("round 1/2: x\n")
    shown = stream.getvalue()
    assert "[1/3] plain, seed 1" in shown
    assert "1/6" in shown
    assert "left" in shown


def test_variants_must_hold_out_the_same_images(file: Path) -> None:
    """The share belongs into the common settings."""
    file.write_text(FILE + "evaluation.tuning-share = 0.2\n")
    message = r"share is 0\.0 in the variant plain and 0\.2 in adjusted.*\[settings\]"
    with pytest.raises(ComparisonError, match=message):
        read(file)
    shared = read(file, "evaluation.tuning-share=0.3")
    assert {run.config.evaluation.tuning_share for run in shared.plan} == {0.3}


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("evaluation.max-images = 8", "is 0 in the variant plain and 8 in adjusted"),
        ("dataset.demo-test-per-class = 8", "is 200 in the variant plain and 8 in adj"),
        ('dataset.root = "/more"', "is '' in the variant plain and '/more' in adj"),
        (
            'dataset.test-list = "/more.csv"',
            "is '' in the variant plain and '/more",
        ),
        (
            'dataset.test-split = "dev"',
            "is 'test' in the variant plain and 'dev'",
        ),
    ],
)
def test_variants_are_judged_on_the_same_images(
    file: Path, pair: str, said: str
) -> None:
    file.write_text(f"{FILE}{pair}\n")
    with pytest.raises(ComparisonError, match=rf"{pair.split()[0]} {said}.*set it for"):
        read(file)
    assert read(file, pair.replace(" = ", "=")).plan


def test_variants_may_train_on_other_images(file: Path) -> None:
    file.write_text(
        f"{FILE}dataset.demo-train-per-class = 300\npartition.clients = 4\n"
    )
    assert {run.config.partition.clients for run in read(file).plan} == {10, 4}


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("seed = 99", r"seed has no effect .* write seeds = \[...\], or give --seed"),
        ('run.dir = "/elsewhere"', "run.dir has no effect .* --runs"),
        ('run.name = "x"', "run.name has no effect .* the comparison's file names"),
        ('run.resume = "/x"', "run.resume has no effect .* continues unfinished runs"),
    ],
)
def test_settings_that_the_comparison_overwrites_are_refused(
    file: Path, pair: str, said: str
) -> None:
    with pytest.raises(ComparisonError, match=f"^--set: {said}"):
        read(file, pair.replace(" = ", "="))
    file.write_text(FILE.replace("[settings]", f"[settings]\n{pair}"))
    with pytest.raises(ComparisonError, match=f"x.toml: settings: {said}"):
        read(file)
    file.write_text(f"{FILE}{pair}\n")
    with pytest.raises(ComparisonError, match=f"variants.adjusted: {said}"):
        read(file)


def test_images_that_no_run_has_are_refused_before_the_first_run(file: Path) -> None:
    undivided, divided = read(file), read(file, "evaluation.tuning-share=0.3")
    for images in (None, *Images):
        divided.refuse_absent(images)
    undivided.refuse_absent(None)
    undivided.refuse_absent(Images.ALL)
    for images in (Images.TUNING, Images.HELD_OUT):
        with pytest.raises(ComparisonError, match=f"--images {images}: .*set it for"):
            undivided.refuse_absent(images)
