"""Cached features are returned exactly or not at all; damage is removed."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from clip2fl_common.teacher.feature_cache import TABLE, FeatureCache

KEYS = [bytes([i]) * 16 for i in range(40)]


def features(keys: Sequence[bytes]) -> torch.Tensor:
    """Return the features of some keys."""
    return torch.tensor([[key[0] / 7 + j for j in range(64)] for key in keys])


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    """Return a cache that holds all keys."""
    made = FeatureCache("fingerprint", tmp_path)
    made.put(KEYS, features(KEYS))
    return made


def holds(cache: FeatureCache, keys: Sequence[bytes]) -> bool:
    """Return whether the cache has exactly these keys, with their exact features."""
    found = cache.get(KEYS)
    return sorted(found) == sorted(keys) and all(
        torch.equal(found[key], features([key])[0]) for key in keys
    )


def test_features_come_back(cache: FeatureCache) -> None:
    assert holds(cache, KEYS)
    assert cache.get([b"unknown" + bytes(9)]) == {}


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "text"])
def test_damaged_file_is_replaced_once(
    cache: FeatureCache, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """The first access warns and removes the file; then the cache works again."""
    content = cache.path.read_bytes()
    assert len(content) > 8192
    cache.path.write_bytes(
        {
            "garbage": content[:4096] + bytes(range(256)) * (len(content) // 256 - 16),
            "truncated": content[: len(content) // 2 // 4096 * 4096],
            "empty": b"",
            "text": b"this is no database at all" * 400,
        }[damage]
    )
    assert cache.get(KEYS) == {}
    warnings = [m for m in caplog.messages if "the file is removed" in m]
    assert len(warnings) == (damage != "empty")
    assert all(str(cache.path) in m for m in warnings)
    caplog.clear()
    cache.put(KEYS[:5], features(KEYS[:5]))
    assert holds(cache, KEYS[:5])
    assert not caplog.messages


def test_damage_found_when_writing_is_taken_out_too(
    cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.path.write_bytes(b"this is no database at all" * 400)
    cache.put(KEYS[:2], features(KEYS[:2]))
    assert "the file is removed" in caplog.text
    cache.put(KEYS[:2], features(KEYS[:2]))
    assert holds(cache, KEYS[:2])


@pytest.mark.parametrize("kind", ["flipped", "short", "of another key"])
def test_damaged_row_is_computed_again(
    cache: FeatureCache, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    bad = KEYS[3]
    value = features([bad])[0].numpy().tobytes()
    changed = {
        "flipped": bytes([value[0] ^ 1]) + value[1:],
        "short": value[:-3],
        "of another key": features([KEYS[4]])[0].numpy().tobytes(),
    }[kind]
    with sqlite3.connect(cache.path) as connection:
        connection.execute(f"UPDATE {TABLE} SET value=? WHERE key=?", (changed, bad))
    connection.close()
    assert holds(cache, [key for key in KEYS if key != bad])
    assert "1 of the teacher's cached features" in caplog.text
    cache.put([bad], features([bad]))
    assert holds(cache, KEYS)


def test_file_that_another_process_renewed_stays(cache: FeatureCache) -> None:
    """The process sees the damage before the renewal, and gets the lock after it."""
    cache._remove_damaged(sqlite3.DatabaseError("seen before"))
    assert holds(cache, KEYS)


def test_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = FeatureCache("fingerprint", tmp_path / "file")
    cache.put(KEYS, features(KEYS))
    assert cache.get(KEYS) == {}
    assert "cannot write the teacher's cached features" in caplog.text
    assert "cannot read the teacher's cached features" in caplog.text
