"""An interrupted run goes on as if nothing had happened, to the last bit."""

import errno
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors import safe_open

from clip2fl_common import files, provenance
from clip2fl_common.config import Scalar
from server_app import checkpoints
from server_app import run as run_module
from server_app.checkpoints import ResumeError
from server_app.delivery import load_model
from server_app.run import StorageError
from server_app.run_folder import checkpoint_path, rounds_with_checkpoint
from strategy.registry import METHODS
from tests.conftest import be_flower
from tests.defaults import run_config
from tests.federation import federate, metrics
from tests.in_process_grid import Tamper
from tests.tools import cannot_run, need_root

pytestmark = pytest.mark.usefixtures("federation_process")

ROUNDS = 3


class Stop(BaseException):
    """Ends a run as a signal would; nothing catches it."""


def run(folder: Path, tamper: Tamper | None = None, /, **changes: Scalar) -> None:
    """Run a tiny federation of three rounds into a folder."""
    settings: dict[str, Any] = {"federation__rounds": ROUNDS, **changes}
    federate(folder, tamper=tamper, **settings)


def go_on(folder: Path, tamper: Tamper | None = None, /, **changes: Scalar) -> None:
    """Resume the run in a folder."""
    run(folder, tamper, run__resume=str(folder), **changes)


@pytest.fixture(scope="module")
def whole_fedavg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run of FedAvg."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        be_flower(folder.parent / "cache", patch)
        run(folder, method="fedavg")
    return folder


def stop_in(server_round: int) -> Tamper:
    """Return what stops the run when a client of this round has answered."""

    def tamper(request: Message, reply: Message) -> Message:
        if request.content.config_records["config"]["server-round"] == server_round:
            raise Stop
        return reply

    return tamper


def outcome(folder: Path) -> tuple[list[dict[str, Any]], bytes, bytes]:
    """Return all of a run's results that are not timings."""
    models = [folder / "model.safetensors", folder / "model-best.safetensors"]
    first, best = (path.read_bytes() for path in models)
    return metrics(folder), first, best


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_the_uninterrupted(tmp_path: Path, method: str) -> None:
    run(tmp_path / "whole", method=method)
    with pytest.raises(Stop):
        run(tmp_path / "run", stop_in(2), method=method)
    assert len(metrics(tmp_path / "run")) == 1
    go_on(tmp_path / "run", method=method)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    facts = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert facts["resumed_after_rounds"] == [1]
    whole = json.loads((tmp_path / "whole" / "config.json").read_text("utf-8"))
    del facts["resumed_after_rounds"], facts["config"], whole["config"]
    assert facts == whole


@pytest.mark.parametrize("method", ["fedavg", "creff"])
def test_resumed_run_goes_on_with_the_average(tmp_path: Path, method: str) -> None:
    run(tmp_path / "whole", method=method, ema__decay=0.5)
    with pytest.raises(Stop):
        run(tmp_path / "run", stop_in(3), method=method, ema__decay=0.5)
    go_on(tmp_path / "run", method=method, ema__decay=0.5)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_resumed_run_goes_on_with_noise_and_account(tmp_path: Path) -> None:
    """Simulated clients' noise is the seed's, and what it has cost is kept."""
    protected: dict[str, Scalar] = {
        "privacy__gradient_clip_norm": 1.0,
        "privacy__gradient_noise_multiplier": 4.0,
        "privacy__update_noise_multiplier": 1.0,
        "aggregation__max_update_norm": 0.1,
    }
    run(tmp_path / "whole", **protected)
    with pytest.raises(Stop):
        run(tmp_path / "run", stop_in(3), **protected)
    go_on(tmp_path / "run", **protected)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert metrics(tmp_path / "run")[-1]["privacy"].keys() == {
        "class_gradients",
        "updates",
    }


def test_resumed_run_goes_on_with_noisy_class_moments(tmp_path: Path) -> None:
    """Sums of earlier rounds count, and the noise in them decides what is believed."""
    changes: dict[str, Scalar] = {
        "method": "creff",
        "head__delivered": "discriminant",
        "privacy__moment_clip_norm": 3.0,
        "privacy__moment_noise_multiplier": 0.1,
        "privacy__gradient_clip_norm": 1.0,
        "privacy__gradient_noise_multiplier": 4.0,
    }
    run(tmp_path / "whole", **changes)
    with pytest.raises(Stop):
        run(tmp_path / "run", stop_in(3), **changes)
    go_on(tmp_path / "run", **changes)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    last = metrics(tmp_path / "run")[-1]
    assert list(last["accuracy"]) == ["discriminant", "retrained", "fedavg"]
    assert last["privacy"].keys() == {"class_gradients", "class_moments", "images"}


@pytest.mark.parametrize(
    ("stops", "every", "keep"),
    [
        ([1, 3], 1, 1),
        ([2, 2], 2, 1),
        ([1], 4, 1),  # before the only checkpoint, which the last round has
    ],
)
def test_any_number_of_stops(
    tmp_path: Path, stops: list[int], every: int, keep: int
) -> None:
    """Wherever they come and whichever rounds have a checkpoint."""
    kept: dict[str, Scalar] = {
        "method": "creff",
        "checkpoint__every": every,
        "checkpoint__keep": keep,
    }
    run(tmp_path / "whole", None, **kept)
    for begin, server_round in zip([run, *[go_on] * len(stops)], stops, strict=False):
        with pytest.raises(Stop):
            begin(tmp_path / "run", stop_in(server_round), **kept)
    go_on(tmp_path / "run", **kept)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def moments(folder: Path, begin: Callable[[], None]) -> list[Path]:
    """Run, and copy the run's folder before each change in it: as kill -9 leaves it.

    In every second copy the file that is appended to is cut short.
    """
    copies: list[Path] = []

    def before(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if folder.is_dir():
                copy = folder.parent / "moments" / str(len(copies))
                shutil.copytree(folder, copy)
                lines = copy / "metrics.jsonl"
                if len(copies) % 2 and lines.exists():
                    os.truncate(lines, lines.stat().st_size * 2 // 3)
                copies.append(copy)
            return original(*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", before(os.fsync))
        patch.setattr(os, "replace", before(os.replace))
        patch.setattr("server_app.checkpoints.remove", before(files.remove))
        begin()
    return copies


def go_on_or_begin(folder: Path, **changes: Scalar) -> bool:
    """Resume a run, or begin it where nothing is to be resumed; tell which."""
    begun = bool(rounds_with_checkpoint(folder))
    if begun:
        go_on(folder, **changes)
    else:
        run(folder, None, **changes)
    return begun


def test_killed_between_writes(tmp_path: Path) -> None:
    """A sample of all moments at which files change; `make test-all` takes them all."""
    whole = tmp_path / "whole"
    copies = moments(whole, lambda: run(whole, method="fedavg"))
    for copy in random.Random(0).sample(copies, 6):
        go_on_or_begin(copy, method="fedavg")
        assert outcome(copy) == outcome(whole), copy


@pytest.mark.slow
def test_killed_between_any_writes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    copies = moments(whole, lambda: run(whole))
    resumed = 0
    for copy in copies:
        resumed += go_on_or_begin(copy)
        assert outcome(copy) == outcome(whole), copy
        assert not [p for p in copy.rglob("*") if p.suffix == ".incomplete"]
    assert len(copies) > 30 and resumed > len(copies) - 10


def fail_at(nth: int, error: BaseException) -> pytest.MonkeyPatch:
    """Let the nth synchronisation of a file fail; return what takes that back."""
    patch = pytest.MonkeyPatch()
    fsync, calls = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise error
        fsync(descriptor)

    patch.setattr(os, "fsync", failing)
    return patch


@pytest.mark.parametrize(
    ("nth", "kind"),
    [
        (1, "disk full"),
        (5, "Ctrl-C"),
        (10, "disk full"),
        (13, "Ctrl-C"),
        (19, "disk full"),
        (24, "Ctrl-C"),
        (27, "disk full"),
    ],
)
def test_failure_while_files_are_written(
    tmp_path: Path, whole_fedavg: Path, nth: int, kind: str
) -> None:
    """What was there stays, nothing half-written does, and the run can go on."""
    full = OSError(errno.ENOSPC, "No space left on device")
    patch = fail_at(nth, full if kind == "disk full" else KeyboardInterrupt())
    try:
        if kind == "disk full":
            with pytest.raises(StorageError) as caught:
                run(tmp_path / "run", method="fedavg")
            message = str(caught.value)
            assert "No space left on device" in message
            assert f"could not be written to {tmp_path / 'run'}" in message
            assert "make room or repair the disk, then go on with run.resume" in message
        else:
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "run", method="fedavg")
    finally:
        patch.undo()
    assert not list((tmp_path / "run").rglob("*.incomplete"))
    for server_round in rounds_with_checkpoint(tmp_path / "run"):
        checkpoints.load_checkpoint(tmp_path / "run", server_round)
    go_on_or_begin(tmp_path / "run", method="fedavg")
    assert outcome(tmp_path / "run") == outcome(whole_fedavg)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of its own, with room for two checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    need_root("mount a file system")
    if subprocess.call(mount):
        cannot_run("no file system can be mounted")
    yield place
    subprocess.check_call(["umount", str(place)])


def test_disk_that_is_really_full(whole_fedavg: Path, small_disk: Path) -> None:
    ballast = small_disk / "ballast"

    def fill(request: Message, reply: Message) -> Message:
        server_round = request.content.config_records["config"]["server-round"]
        if server_round == 2 and not ballast.exists():
            free = shutil.disk_usage(small_disk).free
            ballast.write_bytes(bytes(free - 200_000))
        return reply

    with pytest.raises(StorageError, match="round 2 could not be written"):
        run(small_disk / "run", fill, method="fedavg")
    assert rounds_with_checkpoint(small_disk / "run") == [0, 1]
    ballast.unlink()
    go_on(small_disk / "run", method="fedavg")
    assert outcome(small_disk / "run") == outcome(whole_fedavg)


def test_damaged_newest_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "whole", method="creff")
    with pytest.raises(Stop):
        run(tmp_path / "run", stop_in(3), method="creff")
    newest = checkpoint_path(tmp_path / "run", 2)
    tensors = bytearray((newest / "tensors.safetensors").read_bytes())
    tensors[len(tensors) // 2] ^= 1
    (newest / "tensors.safetensors").write_bytes(tensors)
    go_on(tmp_path / "run", method="creff")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    (warning,) = [m for m in caplog.messages if "damaged" in m]
    assert str(newest) in warning
    assert str(checkpoint_path(tmp_path / "run", 1)) in warning


def stopped(folder: Path, **changes: Scalar) -> None:
    """Run FedAvg into a folder and stop it in round 2."""
    with pytest.raises(Stop):
        run(folder, stop_in(2), method="fedavg", **changes)


def test_other_configuration_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ResumeError) as caught:
        go_on(folder, method="creff", seed=8)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("so that it cannot go on from round 1:")
    assert lines[1:3] == [
        "  - method: the run has 'fedavg', now it is 'creff'",
        "  - seed: the run has 7, now it is 8",
    ]
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["code", "teacher", "data"])
def test_other_surroundings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "run", stop_in(2))
    own = run_module.ServerRun._made_with
    monkeypatch.setattr(
        run_module.ServerRun, "_made_with", lambda self: {**own(self), name: "another"}
    )
    with pytest.raises(ResumeError, match=f"the {name} is not the run's"):
        go_on(tmp_path / "run")


def test_code_of_the_server_counts_as_well(tmp_path: Path) -> None:
    for package in provenance.ALL_CODE:
        (tmp_path / package).mkdir()
        (tmp_path / package / "module.py").write_text("x = 1\n", "utf-8")

    def fingerprints() -> tuple[str, str]:
        provenance.code_fingerprint.cache_clear()
        of_all = provenance.code_fingerprint(tmp_path, provenance.ALL_CODE)
        return provenance.code_fingerprint(tmp_path), of_all

    before = fingerprints()
    (tmp_path / "strategy" / "module.py").write_text("x = 2\n", "utf-8")
    after = fingerprints()
    assert after[0] == before[0]  # clients need not be updated
    assert after[1] != before[1]


def test_data_are_told_by_classes_labels_and_partition(tmp_path: Path) -> None:
    changes: list[dict[str, Scalar]] = [
        {"method": "fedavg"},
        {"method": "creff", "federation__rounds": 9},
        {"method": "fedavg", "dataset__demo_test_per_class": 4},
        {"method": "fedavg", "dataset__demo_train_per_class": 30},
        {"method": "fedavg", "partition__alpha": 5.0},
    ]
    made = []
    for number, change in enumerate(changes):
        place: dict[str, Scalar] = {
            "run__dir": str(tmp_path),
            "run__name": str(number),
        }
        with run_module.ServerRun(run_config(**place, **change), 1) as opened:
            made.append(opened.data.fingerprint())
    assert made[0] == made[1]
    assert len(set(made)) == 4


def test_other_machine_is_let_through_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(tmp_path / "run")
    now = {**run_module._versions(), "torch": "99.0"}
    monkeypatch.setattr(run_module, "_versions", lambda: now)
    go_on(tmp_path / "run", method="fedavg")
    (warning,) = [m for m in caplog.messages if "last bit" in m]
    assert warning.startswith("torch was ") and "is 99.0 now" in warning


def test_complete_run_is_only_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run")
    before = outcome(tmp_path / "run")
    table = capsys.readouterr().out.rsplit("Accuracy on", 1)[1]

    def forbidden(request: Message, reply: Message) -> Message:
        raise AssertionError("a client trained")

    go_on(tmp_path / "run", forbidden)
    assert outcome(tmp_path / "run") == before
    assert capsys.readouterr().out.rsplit("Accuracy on", 1)[1] == table


@pytest.mark.parametrize("metric", ["balanced", "few"])
def test_best_model_is_the_first_of_the_best_rounds(
    tmp_path: Path, metric: str
) -> None:
    folder = tmp_path / "run"
    run(folder, checkpoint__best_metric=metric, checkpoint__keep=1)
    values = [line["accuracy"]["retrained"][metric] for line in metrics(folder)]
    best = values.index(max(values)) + 1
    # The last but one stays as well, with the best round before it: only the next
    # round shows whether clients can train on the newest model.
    before = 1 + values.index(max(values[:-1]))
    assert rounds_with_checkpoint(folder) == sorted({best, before, ROUNDS - 1, ROUNDS})
    _, card = load_model(folder / "model-best.safetensors")
    assert card.provenance["round"] == best
    state = checkpoints.load_checkpoint(folder, best)
    with safe_open(folder / "model-best.safetensors", framework="pt") as file:
        for name, tensor in state.model.items():
            if not name.startswith("classifier."):
                assert torch.equal(file.get_tensor(name), tensor)
        for name in ("weight", "bias"):
            assert torch.equal(
                file.get_tensor(f"classifier.{name}"),
                state.strategy[f"retrained-classifier.{name}"],
            )
    _, last = load_model(folder / "model.safetensors")
    assert last.provenance["round"] == ROUNDS


def test_best_checkpoint_that_is_damaged_leaves_the_best_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checkpoint is not the newest, so that the run goes on nevertheless."""
    run(tmp_path / "run", method="fedavg")
    state = checkpoints.load_newest(tmp_path / "run")
    assert state.best is not None and state.best.round < ROUNDS, "choose another seed"
    (checkpoint_path(tmp_path / "run", state.best.round) / "SHA256SUMS").unlink()
    before = outcome(tmp_path / "run")
    go_on(tmp_path / "run", method="fedavg")
    assert outcome(tmp_path / "run") == before
    (warning,) = [m for m in caplog.messages if "damaged" in m]
    assert f"best round {state.best.round}" in warning


def test_neither_global_generators_nor_the_clock_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no random state needs to be kept, and a clock may jump."""
    run(tmp_path / "whole")
    disturbance = random.Random(5)

    def disturb(request: Message, reply: Message) -> Message:
        seed = disturbance.getrandbits(32)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return reply

    monkeypatch.setattr(time, "time", lambda: disturbance.uniform(0, 4e9))
    with pytest.raises(Stop):
        run(
            tmp_path / "run",
            lambda request, reply: disturb(request, stop_in(3)(request, reply)),
        )
    go_on(tmp_path / "run", disturb)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
