"""Whole federations, with the real ServerApp and ClientApp in one process."""

import json
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, RecordDict

from clip2fl_common.config import Scalar
from server_app.app import main
from tests.defaults import run_config
from tests.in_process_grid import InProcessGrid, Tamper


def federate(
    folder: Path,
    method: str = "clip2fl",
    nodes: int = 2,
    tamper: Tamper | None = None,
    **changes: Scalar,
) -> InProcessGrid:
    """Run a tiny federation into a folder."""
    config = run_config(
        method=method,
        run__dir=str(folder.parent),
        run__name=folder.name,
        **changes,
    )
    grid = InProcessGrid(config, nodes, order_seed=nodes, tamper=tamper)
    context = Context(1, 0, {}, RecordDict(), cast(Any, config.to_flat()))
    main(grid, context)
    return grid


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without its timings."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    for line in rounds:
        del line["seconds"]
    return rounds
