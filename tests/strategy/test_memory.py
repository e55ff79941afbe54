"""The server's memory is predicted, and a run that cannot fit is refused."""

from pathlib import Path

import pytest

from clip2fl_common.config import ConfigError
from strategy import memory

SIZES = (1000, 100, 512)


def test_prediction_counts_the_arrays_that_a_round_holds() -> None:
    features = 3 * 1000 * 100 * 512 * 4
    assert memory.least_server_bytes(*SIZES, dense=False) == features
    assert memory.least_server_bytes(*SIZES, dense=True) == features + 2_048_000_000


@pytest.mark.parametrize(("dense", "advice"), [(True, "min-cosine"), (False, "lower")])
def test_run_that_cannot_fit_is_refused_with_both_sizes(
    monkeypatch: pytest.MonkeyPatch, dense: bool, advice: str
) -> None:
    needed = memory.least_server_bytes(*SIZES, dense=dense)
    monkeypatch.setattr(memory, "machine_bytes", lambda: needed)
    memory.refuse_beyond_memory(*SIZES, dense=dense)
    monkeypatch.setattr(memory, "machine_bytes", lambda: needed - 1)
    with pytest.raises(ConfigError) as refused:
        memory.refuse_beyond_memory(*SIZES, dense=dense)
    text = str(refused.value)
    assert text.startswith("1,000 classes and model.feature-dim = 512 need at least")
    assert f"{needed / 2**30:.1f} GiB" in text and advice in text
    assert ("min-cosine" in text) == dense


def test_a_containers_limit_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)
    whole = memory.machine_bytes()
    assert whole > 2**20
    limit.write_text("1048576\n", "ascii")
    assert memory.machine_bytes() == 2**20
    limit.write_text("max\n", "ascii")
    assert memory.machine_bytes() == whole
