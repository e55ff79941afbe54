"""Checkpoints: their content, detection of damage, pruning and refusals."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server_app import checkpoints as resume
from server_app.checkpoints import (
    BestRound,
    Checkpoint,
    DamagedCheckpointError,
    ResumeError,
    load_checkpoint,
    load_newest,
    prune,
    refuse_differences,
    save_checkpoint,
)
from server_app.run_folder import checkpoint_path, rounds_with_checkpoint
from tests.defaults import default_config
from tests.tools import needed_tool

# Keys for the place of results and site registry, for trackers, waiting times and kept
# checkpoints: none of them changes the results.
FREE_KEYS = (
    "run.dir",
    "run.name",
    "run.resume",
    "run.trackers",
    "federation.round-timeout",
    "federation.site-registry",
    "dataset.skip-unreadable",
    "checkpoint.every",
    "checkpoint.keep",
    "delivery.signing-key",
    "delivery.run",
)

FILES = ("tensors.safetensors", "state.json", "metrics.jsonl", "SHA256SUMS")


def state(server_round: int = 3, best: BestRound | None = None) -> Checkpoint:
    """Return a small checkpoint whose tensors contain the round."""
    return Checkpoint(
        round=server_round,
        config=default_config(),
        made_with={"code": "c0de", "teacher": "7eac4e6", "data": "da7a"},
        environment={"device": "cpu", "torch": "2.15.0"},
        best=best,
        resumed_after=(1, 2),
        metrics="".join(f'{{"round": {r}}}\n' for r in range(1, server_round + 1)),
        model={
            "conv.weight": torch.arange(24.0).view(2, 3, 2, 2) + server_round,
            "bn.num_batches_tracked": torch.tensor(7),
        },
        strategy={"federated-features": torch.full((2, 3), server_round / 3)},
    )


def same(a: Checkpoint, b: Checkpoint) -> bool:
    """Return whether two checkpoints are equal to the last bit."""
    plain = [name for name in vars(a) if name not in ("model", "strategy")]
    return all(getattr(a, n) == getattr(b, n) for n in plain) and all(
        of_a.keys() == of_b.keys()
        and all(
            of_a[n].dtype == of_b[n].dtype and torch.equal(of_a[n], of_b[n])
            for n in of_a
        )
        for of_a, of_b in ((a.model, b.model), (a.strategy, b.strategy))
    )


@pytest.mark.parametrize("best", [None, BestRound(2, 100 / 3)])
def test_checkpoint_comes_back(tmp_path: Path, best: BestRound | None) -> None:
    channels_last = state(best=best)
    weight = channels_last.model["conv.weight"]
    as_trained = {
        **channels_last.model,
        "conv.weight": weight.to(memory_format=torch.channels_last),
    }
    save_checkpoint(
        tmp_path, Checkpoint(**{**vars(channels_last), "model": as_trained})
    )
    assert same(load_checkpoint(tmp_path, 3), channels_last)
    assert {f.name for f in checkpoint_path(tmp_path, 3).iterdir()} == set(FILES)
    assert rounds_with_checkpoint(tmp_path) == [3]


def test_state_is_explicit_and_readable_without_our_code(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state())
    folder = checkpoint_path(tmp_path, 3)
    fields = json.loads((folder / "state.json").read_text("utf-8"))
    assert fields["format"] == 1
    assert fields["config"] == default_config()
    assert fields["random"]["seed"] == 7
    assert fields["random"]["next_round"] == 4
    lines = (folder / "SHA256SUMS").read_text("utf-8").splitlines()
    assert lines == [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}"
        for name in FILES[:3]
    ]


def test_sums_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    command = [needed_tool("sha256sum"), "--check", "--strict", "SHA256SUMS"]
    save_checkpoint(tmp_path, state())
    folder = checkpoint_path(tmp_path, 3)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@given(
    name=st.sampled_from(FILES),
    kind=st.sampled_from(["truncated", "flipped", "removed", "longer", "zeroed"]),
    place=st.floats(0, 1, exclude_max=True),
)
def test_any_damage_is_found(
    tmp_path_factory: pytest.TempPathFactory, name: str, kind: str, place: float
) -> None:
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder, state())
    file = checkpoint_path(folder, 3) / name
    content = bytearray(file.read_bytes())
    at = int(place * len(content))
    if kind == "removed":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[:at])
    elif kind == "longer":
        file.write_bytes(content + b"0  x\n")
    elif kind == "zeroed":
        file.write_bytes(bytes(len(content)))
    else:
        content[at] ^= 1
        file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(folder, 3)


def test_newest_that_is_damaged_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for server_round in (2, 9, 10):
        save_checkpoint(tmp_path, state(server_round))
    newest, before = checkpoint_path(tmp_path, 10), checkpoint_path(tmp_path, 9)
    (newest / "tensors.safetensors").write_bytes(b"?")
    assert same(load_newest(tmp_path), state(9))
    (warning,) = caplog.messages
    assert f"checkpoint {newest} is damaged" in warning
    assert "tensors.safetensors does not have its checksum" in warning
    assert f"the run goes on from {before}" in warning
    assert rounds_with_checkpoint(tmp_path) == [2, 9]
    assert (newest.with_name("round-000010.damaged") / "state.json").exists()
    caplog.clear()
    assert same(load_newest(tmp_path), state(9))
    assert not caplog.messages


def test_without_a_whole_checkpoint_the_reason_and_a_way_out_are_named(
    tmp_path: Path,
) -> None:
    with pytest.raises(ResumeError, match="no checkpoint, so there is nothing to res"):
        load_newest(tmp_path)
    for server_round in (1, 2):
        save_checkpoint(tmp_path, state(server_round))
        (checkpoint_path(tmp_path, server_round) / "state.json").unlink()
    with pytest.raises(ResumeError, match=r"every .* damaged \(round 2: .*; round 1: "):
        load_newest(tmp_path)
    assert rounds_with_checkpoint(tmp_path) == [1, 2]


def test_incomplete_folder_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    (tmp_path / "checkpoints" / ".round-000002.incomplete").mkdir()
    assert load_newest(tmp_path).round == 1


def test_times_of_files_do_not_matter(tmp_path: Path) -> None:
    """The clock may have jumped, so only the rounds' numbers count."""
    for server_round in (3, 2, 1):
        save_checkpoint(tmp_path, state(server_round))
    assert load_newest(tmp_path).round == 3


def test_other_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "FORMAT", 2)
    save_checkpoint(tmp_path, state())
    monkeypatch.undo()
    with pytest.raises(ResumeError, match=r"checkpoint format 2, this program reads 1"):
        load_newest(tmp_path)


@given(
    keep=st.integers(1, 4),
    values=st.lists(st.integers(0, 3), min_size=1, max_size=9),
)
def test_last_ones_and_their_best_stay(
    tmp_path_factory: pytest.TempPathFactory, keep: int, values: list[int]
) -> None:
    """Prune after every round, as in a run; the first of equal values is the best."""
    folder = tmp_path_factory.mktemp("run")
    best: BestRound | None = None
    for server_round, value in enumerate(values, start=1):
        if best is None or value > best.value:
            best = BestRound(server_round, value)
        save_checkpoint(folder, state(server_round, best))
        prune(folder, keep)
    rounds = range(1, len(values) + 1)
    last = rounds[-max(keep, 2) :]  # the next round must show that the newest is usable
    bests = {values.index(max(values[:r])) + 1 for r in last}
    assert rounds_with_checkpoint(folder) == sorted({*last, *bests})


@pytest.mark.parametrize("text", [None, "{", "{}", "[]", '{"best": 3}'])
def test_damaged_older_checkpoint_does_not_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    for server_round in (1, 2, 3):
        save_checkpoint(tmp_path, state(server_round, BestRound(1, 50.0)))
    damaged = checkpoint_path(tmp_path, 2) / "state.json"
    damaged.unlink()
    if text is not None:
        damaged.write_text(text, "utf-8")
    prune(tmp_path, 2)
    assert rounds_with_checkpoint(tmp_path) == [1, 2, 3]
    assert f"checkpoint {damaged.parent} is damaged" in caplog.text
    assert load_newest(tmp_path).round == 3


def test_only_names_of_checkpoints_count(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("round-backup", "round-0000002", "round-000003.part", "round-00001"):
        (folder / name).mkdir(parents=True)
    for server_round in (0, 1_000_000, 12):
        checkpoint_path(tmp_path, server_round).mkdir()
    assert rounds_with_checkpoint(tmp_path) == [0, 12, 1_000_000]


def test_same_run_is_let_through_and_free_keys_may_differ() -> None:
    before = state()
    changed = {**before.config, **dict.fromkeys(FREE_KEYS, "another")}
    refuse_differences(before, changed, before.made_with)


@pytest.mark.parametrize("key", sorted(set(default_config()) - set(FREE_KEYS)))
def test_every_other_key_is_compared(key: str) -> None:
    before = state()
    changed = {**before.config, key: "another", "run.dir": "/elsewhere"}
    with pytest.raises(ResumeError) as caught:
        refuse_differences(before, changed, before.made_with)
    lines = [line for line in str(caught.value).splitlines() if "  - " in line]
    assert lines == [
        f"  - {key}: the run has {before.config[key]!r}, now it is 'another'"
    ]


def test_key_that_is_new_or_gone_is_a_difference() -> None:
    before = state()
    config = dict(before.config)
    config["new-key"] = config.pop("seed")
    with pytest.raises(ResumeError) as caught:
        refuse_differences(before, config, before.made_with)
    assert "  - new-key: the run has 'nothing', now it is 7\n" in str(caught.value)
    assert "  - seed: the run has 7, now it is 'nothing'\n" in str(caught.value)


@pytest.mark.parametrize("name", ["code", "teacher", "data"])
@pytest.mark.parametrize("now", ["another", None])
def test_other_code_teacher_or_data_is_refused(name: str, now: str | None) -> None:
    before = state()
    made_with = dict(before.made_with)
    del made_with[name]
    if now:
        made_with[name] = now
    with pytest.raises(
        ResumeError,
        match=rf"the {name} is not the run's: it began with {before.made_with[name]}, "
        rf"here is {now or 'nothing'}\. To go on from round 3, ",
    ):
        refuse_differences(before, before.config, made_with)
