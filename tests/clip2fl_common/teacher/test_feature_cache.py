"""Cached features come back exact or not at all; damage is taken out."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from clip2fl_common.teacher.feature_cache import TABLE, FeatureStore

KEYS = [bytes([i]) * 16 for i in range(40)]


def features(keys: Sequence[bytes]) -> torch.Tensor:
    """Return what belongs to some keys."""
    return torch.tensor([[key[0] / 7 + j for j in range(64)] for key in keys])


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Return a store that holds all keys."""
    made = FeatureStore("fingerprint", tmp_path)
    made.put(KEYS, features(KEYS))
    return made


def holds(store: FeatureStore, keys: Sequence[bytes]) -> bool:
    """Tell whether exactly these keys are there, with their exact features."""
    found = store.get(KEYS)
    return sorted(found) == sorted(keys) and all(
        torch.equal(found[key], features([key])[0]) for key in keys
    )


def test_features_come_back(store: FeatureStore) -> None:
    assert holds(store, KEYS)
    assert store.get([b"unknown" + bytes(9)]) == {}


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "text"])
def test_damaged_file_is_replaced_once(
    store: FeatureStore, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """The first access says so and clears the way; then all is as before."""
    content = store.path.read_bytes()
    assert len(content) > 8192
    store.path.write_bytes(
        {
            "garbage": content[:4096] + bytes(range(256)) * (len(content) // 256 - 16),
            "truncated": content[: len(content) // 2 // 4096 * 4096],
            "empty": b"",
            "text": b"this is no database at all" * 400,
        }[damage]
    )
    assert store.get(KEYS) == {}
    warnings = [m for m in caplog.messages if "the file is removed" in m]
    assert len(warnings) == (damage != "empty")
    assert all(str(store.path) in m for m in warnings)
    caplog.clear()
    store.put(KEYS[:5], features(KEYS[:5]))
    assert holds(store, KEYS[:5])
    assert not caplog.messages


def test_damage_found_when_writing_is_taken_out_too(
    store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.path.write_bytes(b"this is no database at all" * 400)
    store.put(KEYS[:2], features(KEYS[:2]))
    assert "the file is removed" in caplog.text
    store.put(KEYS[:2], features(KEYS[:2]))
    assert holds(store, KEYS[:2])


@pytest.mark.parametrize("kind", ["flipped", "short", "of another key"])
def test_damaged_row_is_computed_again(
    store: FeatureStore, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    bad = KEYS[3]
    value = features([bad])[0].numpy().tobytes()
    changed = {
        "flipped": bytes([value[0] ^ 1]) + value[1:],
        "short": value[:-3],
        "of another key": features([KEYS[4]])[0].numpy().tobytes(),
    }[kind]
    with sqlite3.connect(store.path) as connection:
        connection.execute(f"UPDATE {TABLE} SET value=? WHERE key=?", (changed, bad))
    connection.close()
    assert holds(store, [key for key in KEYS if key != bad])
    assert "1 of the teacher's cached features" in caplog.text
    store.put([bad], features([bad]))
    assert holds(store, KEYS)


def test_file_that_another_process_renewed_stays(store: FeatureStore) -> None:
    """The damage was seen before, the lock is held after the renewal."""
    store._remove_damaged(sqlite3.DatabaseError("seen before"))
    assert holds(store, KEYS)


def test_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = FeatureStore("fingerprint", tmp_path / "file")
    store.put(KEYS, features(KEYS))
    assert store.get(KEYS) == {}
    assert "cannot write the teacher's cached features" in caplog.text
    assert "cannot read the teacher's cached features" in caplog.text
