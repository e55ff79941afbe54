"""A comparison's numbers, compared with hand-computed numbers."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_cli.runs import FinishedRun
from clip2fl_cli.summary import (
    Origin,
    class_table,
    main_table,
    markdown,
    paired_difference,
    summarise,
)
from tests.clip2fl_cli.made_up import write_run

# Two-sided 95 % quantiles of Student's t, from a printed table.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[FinishedRun]]:
    """Return two variants whose last five rounds average 30 and 34, and 36 and 44."""
    return {
        "plain": [
            write_run(tmp_path / "a1", [99, 28, 29, 30, 31, 32], seed=1),
            write_run(tmp_path / "a2", [99, 34, 34, 34, 34, 34], seed=2),
        ],
        "better": [
            write_run(tmp_path / "b1", [36] * 5, seed=1),
            write_run(tmp_path / "b2", [44] * 5, seed=2),
        ],
    }


def test_last_five_rounds_then_seeds(runs: dict[str, list[FinishedRun]]) -> None:
    plain, better = summarise(runs, "plain")
    balanced = plain.columns["balanced"]
    assert balanced is not None and balanced.deviation is not None
    assert balanced.mean == 32
    assert balanced.deviation == pytest.approx(math.sqrt(8))
    assert plain.last_round.mean == 33  # of 32 and 34
    assert plain.difference is None
    assert better.difference is not None and better.difference.interval is not None
    assert better.difference.mean == 8  # of 6 and 10
    low, high = better.difference.interval
    # 8 ± 12.706 * sqrt(8) / sqrt(2)
    assert (low, high) == pytest.approx((8 - 25.412, 8 + 25.412), abs=0.01)


@given(st.lists(st.tuples(st.floats(0, 99), st.floats(0, 99)), min_size=2, max_size=5))
def test_interval_is_students(pairs: list[tuple[float, float]]) -> None:
    values = {seed: a for seed, (a, _) in enumerate(pairs)}
    baseline = {seed: b for seed, (_, b) in enumerate(pairs)}
    found = paired_difference(values, baseline)
    differences = [a - b for a, b in pairs]
    mean = sum(differences) / len(pairs)
    variance = sum((d - mean) ** 2 for d in differences) / (len(pairs) - 1)
    margin = STUDENT[len(pairs) - 1] * math.sqrt(variance / len(pairs))
    assert found is not None and found.interval is not None
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.interval == pytest.approx((mean - margin, mean + margin), abs=0.02)


def test_only_common_seeds_are_paired() -> None:
    found = paired_difference({1: 5.0, 3: 9.0}, {2: 1.0, 3: 4.0})
    assert found is not None
    assert (found.seeds, found.mean, found.interval) == ((3,), 5.0, None)
    assert str(found) == "+5.0"
    assert paired_difference({1: 5.0}, {2: 1.0}) is None


def test_main_table(runs: dict[str, list[FinishedRun]]) -> None:
    rows = main_table(runs, "plain").splitlines()
    assert rows[0] == (
        "| variant | head | seeds | top-1 | balanced | many | medium | few "
        "| last round | difference |"
    )
    assert rows[2].startswith("| plain | fedavg | 1, 2 | 32.0 ± 2.8 |")
    assert rows[2].endswith("| 33.0 ± 1.4 | - |")
    assert rows[3].endswith("| 40.0 ± 5.7 | +8.0 [-17.4, +33.4] |")
    assert rows[4].startswith("| teacher | zero-shot | - | 91.0 |")


def test_baseline_without_runs_leaves_the_differences_out(
    runs: dict[str, list[FinishedRun]],
) -> None:
    assert [row.difference for row in summarise(runs, "another")] == [None, None]


def test_classes_stand_in_order_of_frequency(
    runs: dict[str, list[FinishedRun]],
) -> None:
    rows = class_table(runs).splitlines()
    assert rows[0] == "| variant | head | common | rare |"
    assert rows[2] == "| training images |  | 300 | 3 |"
    assert rows[3] == "| plain | fedavg | 34.0 | 32.0 |"


def test_page_names_command_and_minutes(runs: dict[str, list[FinishedRun]]) -> None:
    page = markdown(runs, "plain", "Title", Origin.here("the command"))
    assert page.startswith("# Title\n")
    assert "    the command\n" in page
    assert "Teacher: tiny." in page
    # Clients' own seconds overlap with the phase of that name.
    assert "a1 6, a2 6, b1 5, b2 5." in page


@pytest.mark.parametrize(
    ("most", "said"),
    [
        (0, "on 20 test images,"),
        (30, "on 20 test images,"),
        (8, "on 8 test images (20 after the last round),"),
    ],
)
def test_page_says_how_many_images_were_tested(
    tmp_path: Path, most: int, said: str
) -> None:
    run = write_run(tmp_path / "a", [50.0], evaluation__max_images=most)
    assert said in markdown(
        {"plain": [run]}, "plain", "Title", Origin.here("the command")
    )
