"""Simulations that take place in this process."""

import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Context, RecordDict

from clip2fl_cli.simulation import RunResult
from clip2fl_common.config import RunConfig
from clip2fl_common.config.dotted_keys import flatten
from server_app.app import main
from tests.conftest import be_flower
from tests.in_process_grid import InProcessGrid

RUN_ID = 4711


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the real apps without Flower's processes; return what each was asked for."""
    be_flower(tmp_path / "cache", monkeypatch)
    monkeypatch.setattr("platformdirs.user_data_dir", lambda *_: str(tmp_path / "data"))
    options: list[dict[str, Any]] = []

    def simulate(*, run_config: Path, **others: object) -> RunResult:
        options.append(others)
        flat: Any = flatten(tomllib.loads(run_config.read_text("utf-8")))
        grid = InProcessGrid(RunConfig.from_run_config(flat), 2)
        context = Context(RUN_ID, 0, {}, RecordDict(), cast(Any, flat))
        main(grid, context)
        return RunResult("finished:completed", "", "", RUN_ID)

    monkeypatch.setattr("clip2fl_cli.simulation.simulate", simulate)
    monkeypatch.setattr("clip2fl_cli.comparison.simulate", simulate)
    return options
