"""Folders of made-up runs that are still running."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from strategy.events import What
from tests.clip2fl_cli.made_up import write_run

BEGIN = datetime(2026, 11, 27, 12, tzinfo=UTC)


def after(seconds: float) -> datetime:
    """Return a time after the beginning."""
    return BEGIN + timedelta(seconds=seconds)


def tell(folder: Path, at: float, what: What, number: int, **more: Any) -> None:
    """Append an event to a folder's file."""
    event = {"time": after(at).isoformat(), "what": what, "round": number, **more}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def unfinished(folder: Path, over: int, rounds: int, **config: Any) -> Path:
    """Write a run of some rounds, of which the first ``over`` ones have ended."""
    write_run(folder, [10.0 * n for n in range(1, rounds + 1)], **config)
    (folder / "model.safetensors").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("".join(f"{x}\n" for x in lines[:over]))
    return folder


@contextmanager
def used(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, as a run does."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def two_rounds_and_a_half(folder: Path) -> None:
    """Write the events of 2 rounds of 30 and 20 seconds and of half a round."""
    tell(folder, 0, What.RUN_STARTED, 0)
    for number, start, end in ((1, 1, 31), (2, 31, 51)):
        tell(folder, start, What.ROUND_STARTED, number)
        tell(folder, start, What.PHASE, number, phase="clients")
        for site in ("a", "b"):
            tell(folder, start, What.ASKED, number, site=site)
            own = {"images": 10 * number, "seconds": 2.5, "bytes": 1000}
            tell(folder, end - 2, What.ACCEPTED, number, site=site, **own)
        tell(folder, end - 1, What.PHASE, number, phase="evaluation")
        tell(folder, end, What.ROUND_ENDED, number)
    tell(folder, 51, What.ROUND_STARTED, 3)
    tell(folder, 51, What.PHASE, 3, phase="clients")
    tell(folder, 52, What.ASKED, 3, site="b")
    tell(folder, 52, What.ASKED, 3, site="c")
    tell(folder, 57, What.DROPPED, 3, site="c", reason="not finite")
    tell(folder, 58, What.AWAY, 3, site="a")
    tell(folder, 59, What.REFUSED, 3, site="node 7", reason="no key")
