"""A whole run of sites, of which one has rules that the run does not meet."""

from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Context, RecordDict

from server_app.app import main
from tests.conftest import be_flower
from tests.in_process_grid import InProcessGrid
from tests.site_folders import write_site
from tests.site_node import site_run
from tests.test_sites import metrics

NAMES = ("north", "east", "west")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep out of the user's cache, and do not wait."""
    be_flower(tmp_path / "cache", monkeypatch)
    for name in ("grid.POLL_S", "site_clients.WAIT_S", "site_clients.ASK_AGAIN_S"):
        monkeypatch.setattr(f"strategy.{name}", 0.0)


def run_with(tmp_path: Path, rules: dict[str, Any], name: str) -> set[str]:
    """Run two rounds; ``east`` has rules. Return who trained."""
    nodes = [
        {
            "data-path": str(
                write_site(tmp_path / f"private-{i}", {"circle": 9, "star": 9}, 99 * i)
            ),
            "site": site,
            **(rules if site == "east" else {}),
        }
        for i, site in enumerate(NAMES)
    ]
    config = site_run(
        run__dir=str(tmp_path), run__name=name, federation__clients_per_round=2
    )
    grid = InProcessGrid(config, len(nodes), node_configs=nodes)
    main(grid, Context(1, 0, {}, RecordDict(), cast(Any, config.to_flat())))
    lines = metrics(tmp_path / name)
    assert len(lines) == 2
    return {client for line in lines for client in line["clients"]}


def test_run_goes_on_without_the_site_that_refuses_it(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    """The server's log says why, before the site was asked for anything."""
    trained = run_with(tmp_path, {"min-noise-multiplier": 1.0}, "run")
    assert trained == {"north", "west"}
    reason = "gradient-noise-multiplier = 0, and the site's min-noise-multiplier is 1"
    assert any(
        "does not take part" in line and reason in line for line in flower_log.messages
    )


def test_site_stops_answering_when_its_budget_is_spent(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    spent = {"max-rounds": 2}
    run_with(tmp_path, spent, "first")
    flower_log.clear()
    run_with(tmp_path, spent, "second")  # the same run's id, as the grid has only one
    assert any("its max-rounds is 2" in line for line in flower_log.messages)
