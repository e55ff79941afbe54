"""A small version of the thousand-class round, and what uploads cost."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.flower import round_seconds
from benchmarks.measure import in_fresh_process, peak_memory
from benchmarks.phases import phase_table
from benchmarks.scale import (
    Shape,
    load_prototypes,
    plot,
    server_mean,
    size_table,
    synthesis_step,
    whole_round,
)
from benchmarks.uploads import as_a_hundred, rows_of
from tests.tools import need_package

SMALL = replace(
    Shape(),
    num_classes=12,
    per_class=4,
    dim=16,
    largest=40,
    imbalance=8,
    clients=3,
    steps=2,
    epochs=2,
)


def test_whole_round_goes_through_every_phase() -> None:
    figures = whole_round(SMALL, load_prototypes(None, SMALL))
    assert figures["images"] > 12 * 5
    assert 0 < figures["classes held"] <= 12
    # Two bytes a value and 16 for class and rank; dense would be 17 * 12 values.
    assert 0 < figures["bytes"] < figures["classes held"] * (16 + 2 * 17 * 12)
    for phase in ("clients' gradients", "mean", "synthesis", "re-training"):
        assert figures[phase] >= 0
    assert figures["loss after"] < figures["loss before"]


def test_prototypes_come_from_the_array_of_the_right_shape(tmp_path: Path) -> None:
    file = tmp_path / "features.npz"
    wanted = np.random.default_rng(0).normal(size=(12, 16)).astype(np.float16)
    np.savez(file, names=np.zeros(12), text=wanted)
    prototypes = load_prototypes(file, SMALL)
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(12))
    cosines = (prototypes * torch.from_numpy(wanted.astype(np.float32))).sum(1)
    assert (cosines > 0).all()
    np.savez(file, other=np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"'other': \(3, 4\).*\(12, 16\) is needed"):
        load_prototypes(file, SMALL)


def die(status: int) -> None:
    """End the process."""
    sys.exit(status)


def allocate(mebibytes: int) -> int:
    """Fill memory."""
    return int(np.ones(mebibytes * 2**20, dtype=np.uint8).sum())


def test_peak_memory_is_the_fresh_processs_own() -> None:
    """Half a GiB shows, and the parent's memory does not."""
    ballast = np.ones(2**30, dtype=np.uint8)
    small = in_fresh_process(allocate, 1)
    large = in_fresh_process(allocate, 512)
    assert (small[0], large[0]) == (2**20, 2**29)
    assert large[1] - small[1] == pytest.approx(0.5, abs=0.1)
    assert small[1] < 1 < peak_memory()
    del ballast


def test_a_process_that_dies_is_named() -> None:
    with pytest.raises(RuntimeError, match="die ended with exit code 3"):
        in_fresh_process(die, 3)


@pytest.mark.parametrize("rank", [0, 3])
def test_steps_and_means_take_time(rank: int) -> None:
    assert synthesis_step(replace(SMALL, steps=1, dim=512), rank) > 0
    assert server_mean(SMALL, rank) > 0


def test_picture_shows_both_growths(tmp_path: Path) -> None:
    need_package("matplotlib")
    measured = {
        (kind, size): ([float(size), 1.0, 9.0], 0.5)
        for size in (10, 100)
        for kind in ("dense", "rank 20")
    }
    plot(tmp_path / "scale.png", measured, measured)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert size_table("C", measured).splitlines()[2] == (
        "| 10 | dense | 9 (1-10) | 0.50 |"
    )


def test_phases_are_medians_without_the_first_round(tmp_path: Path) -> None:
    for name, factor in (("old", 2.0), ("new", 1.0)):
        lines = [
            {"seconds": {"clients": factor * s, "clients-training": 7.0, "checks": 1}}
            for s in (100.0, 1.0, 3.0, 2.0)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            "\n".join(map(json.dumps, lines)), "utf-8"
        )
    table = phase_table({name: tmp_path / name for name in ("old", "new")})
    assert table.splitlines() == [
        "| phase, s | old | new |",
        "| --- | --- | --- |",
        "| clients | 4.000 | 2.000 |",
        "| clients-training | 7.000 | 7.000 |",
        "| checks | 1.000 | 1.000 |",
        "| whole round | 5.000 | 3.000 |",
    ]


def test_phases_need_a_second_round(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"seconds": {}}', "utf-8")
    with pytest.raises(ValueError, match="has no second round"):
        phase_table({"only": tmp_path})


def test_round_seconds_come_from_progress_lines() -> None:
    log = (
        "INFO : something; 9.9 s, no\n"
        "round 1/2: fedavg balanced 10.1 % (1/2/3); loss 5.1; 14.0 s, 0:06 left\n"
        "round 2/2: fedavg balanced 10.1 % (1/2/3); loss 5.1; 3.5 s, 0:00 left\n"
    )
    assert round_seconds(log) == [14.0, 3.5]


def test_ten_classes_stand_for_a_hundred() -> None:
    values, labels = torch.randn(30, 8), torch.arange(30) % 10
    many, hundred = as_a_hundred((values, labels))
    assert hundred.bincount().tolist() == [3] * 100
    for c in (0, 9, 57, 99):
        assert torch.equal(many[hundred == c], values[labels == c // 10])


def test_upload_rows_count_bytes_and_keep_the_bound() -> None:
    values, labels = torch.randn(200, 32), torch.arange(200) % 10
    rows = list(rows_of("noise", (values, labels)))
    assert len(rows) == 10
    for _, _, precision, bound, _, share, _, worst, _ in rows:
        assert float(worst) >= float(bound) - 2e-5
        if bound == "1":
            assert share == {"full": "1/1.0", "half": "1/2.0"}[precision]
