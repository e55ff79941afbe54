import pytest

from clip2fl_common.schedule import step_size


@pytest.mark.parametrize(
    ("final", "expected"),
    [(0.0, [8.0, 8.0, 8.0, 8.0]), (1.0, [8.0, 4.0, 2.0, 1.0]), (8.0, [8.0] * 4)],
)
def test_step_size_is_geometric(final: float, expected: list[float]) -> None:
    """From 8 to 1 in four rounds it halves; 0 switches the schedule off."""
    assert [step_size(8.0, final, n, 4) for n in (1, 2, 3, 4)] == pytest.approx(
        expected
    )
    assert step_size(8.0, final, 1, 1) == 8.0
