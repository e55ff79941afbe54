"""Fixtures that tests of strategies need from Flower."""

import pytest

from tests.flower_private import act_as_flower_process


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Identify as one of Flower's processes, as messages require."""
    act_as_flower_process(monkeypatch.setattr)
