"""The state of a run as text."""

from datetime import UTC, datetime, timedelta

from clip2fl_cli.live import RunState, Site, Status
from clip2fl_cli.run_schema import Images

IMAGES = {
    Images.ALL: "the test images",
    Images.TUNING: "the images for tuning",
    None: "the sites' validation images",
}


def sentences(status: Status) -> list[str]:
    """Return the lines above the table: what runs, how far it is, its accuracy."""
    lines = [
        f"{status.name}: {status.method} on {status.dataset}, seed {status.seed}",
        _progress(status),
    ]
    for accuracy in status.accuracy.values():
        few = "-" if accuracy.few is None else f"{accuracy.few:.1f} %"
        lines.append(
            f"{accuracy.title}: balanced {accuracy.balanced:.1f} %, few-shot {few} "
            f"(round {status.accuracy_round}, on {IMAGES[status.images]})"
        )
    lines += [
        f"{site.name} has other versions than the server: {site.other_versions}"
        for site in status.sites
        if site.other_versions
    ]
    if not status.has_events:
        lines.append("the run has no events.jsonl, so its phase and sites are unknown")
    if status.unreadable:
        lines.append(f"{status.unreadable} lines of its files cannot be read")
    return lines


def _progress(status: Status) -> str:
    over = f"{status.done} of {status.rounds} rounds are over"
    if status.state is not RunState.RUNNING:
        reason = f": {status.reason}" if status.reason else ""
        return f"{status.state.value}, {over}{reason}"
    parts = [f"running, {over}"]
    if status.round is not None:
        phase = f", {status.phases[-1].name}" if status.phases else ""
        parts.append(f"round {status.round}{phase}")
    if status.seconds_left is not None:
        parts.append(f"about {_duration(status.seconds_left)} left")
    return "; ".join(parts)


def site_rows(
    status: Status, now: datetime | None = None
) -> tuple[list[str], list[list[object]]]:
    """Return the header and the rows of the table of sites or simulated clients.

    Parameters
    ----------
    status : Status
        The run's state.
    now : datetime or None
        The time from which "last seen" counts; None: the present.

    Returns
    -------
    header : list of str
    rows : list of list of object
    """
    now = now or datetime.now(UTC)
    who = "site" if status.sites_train else "client"
    header = [
        *(who, "state", "round", "images", "seconds", "MB"),
        *("accuracy, %", "left", "last seen", "reason"),
    ]
    return header, [_row(site, now) for site in status.sites]


def _row(site: Site, now: datetime) -> list[object]:
    ago = "-"
    if site.last_seen is not None:
        ago = f"{_duration(max(0.0, (now - site.last_seen).total_seconds()))} ago"
    return [
        site.name,
        site.state.value,
        "-" if site.round is None else site.round,
        "-" if site.images is None else f"{site.images:,}",
        "-" if site.seconds is None else f"{site.seconds:.1f}",
        "-" if site.bytes is None else f"{site.bytes / 1e6:.2f}",
        "-" if site.accuracy is None else f"{site.accuracy:.1f}",
        "-" if site.seconds_left is None else _duration(site.seconds_left),
        ago,
        site.reason or "-",
    ]


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
