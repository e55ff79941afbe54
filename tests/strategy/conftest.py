"""What tests of strategies need of Flower."""

import pytest

from tests.flower_private import act_as_flower_process


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be what Flower takes for one of its processes, which messages ask for."""
    act_as_flower_process(monkeypatch.setattr)
