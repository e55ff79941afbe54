"""The state of a run in Prometheus' text format, version 0.0.4.

The format is a few lines of text
(https://prometheus.io/docs/instrumenting/exposition_formats/), so this module writes it
itself. All numbers are gauges. A number that is not known is left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from clip2fl_cli.live import RunState, Site, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Gauge:
    """A metric with its samples.

    Attributes
    ----------
    name : str
        Its name, without the prefix ``clip2fl_``.
    help : str
        A sentence about it, on one line.
    samples : iterable of tuple of mapping and number
        Labels and value of each sample; a value of None is left out.
    """

    name: str
    help: str
    samples: Iterable[tuple[Mapping[str, str], float | None]]

    def __str__(self) -> str:
        """Return its lines, or an empty string without a sample."""
        name = f"clip2fl_{self.name}"
        lines = [
            f"{name}{_labels(labels)} {_number(value)}\n"
            for labels, value in self.samples
            if value is not None
        ]
        if not lines:
            return ""
        return f"# HELP {name} {self.help}\n# TYPE {name} gauge\n{''.join(lines)}"


def exposition(status: Status) -> str:
    """Return a run's state as text for Prometheus.

    Parameters
    ----------
    status : Status
        The run's state.

    Returns
    -------
    str
        Every sample has the label ``run``, the name of the run's folder.
    """
    run = {"run": status.name}
    named = {
        **{"method": status.method, "dataset": status.dataset},
        "seed": str(status.seed),
    }
    accuracies = [
        ({**run, "head": head, "classes": classes}, value)
        for head, found in status.accuracy.items()
        for classes, value in (("all", found.balanced), ("few-shot", found.few))
    ]
    gauges = [
        Gauge("run_info", "What runs; always 1.", [({**run, **named}, 1)]),
        Gauge(
            "run_state",
            "1 for the state in which the run is, else 0.",
            [
                ({**run, "state": state.value}, int(status.state is state))
                for state in RunState
            ],
        ),
        Gauge("rounds", "Number of rounds of the run.", [(run, status.rounds)]),
        Gauge("rounds_over", "Number of rounds that are over.", [(run, status.done)]),
        Gauge("round", "The round that is being computed.", [(run, status.round)]),
        Gauge(
            "phase_seconds",
            "Seconds of each phase of the current or last round.",
            [({**run, "phase": p.name}, p.seconds) for p in status.phases],
        ),
        Gauge(
            "elapsed_seconds",
            "Seconds since the run started or resumed.",
            [(run, status.elapsed)],
        ),
        Gauge(
            "left_seconds",
            "Estimate of the seconds until the run ends.",
            [(run, status.seconds_left)],
        ),
        Gauge(
            "accuracy_percent",
            "Mean accuracy over classes in the last round with one, by head.",
            accuracies,
        ),
        Gauge(
            "unreadable_lines",
            "Lines of the run's files that cannot be read.",
            [(run, status.unreadable)],
        ),
        *_site_gauges(run, status.sites),
    ]
    return "".join(map(str, gauges))


def _site_gauges(run: Mapping[str, str], sites: Iterable[Site]) -> list[Gauge]:
    labelled = [({**run, "site": str(site.name)}, site) for site in sites]
    return [
        Gauge(
            "site_state",
            "1 for the state in which a site or simulated client is.",
            [({**own, "state": s.state.value}, 1) for own, s in labelled],
        ),
        Gauge(
            "site_last_seen_timestamp_seconds",
            "When the server last heard from it, in Unix time.",
            [
                (own, None if s.last_seen is None else s.last_seen.timestamp())
                for own, s in labelled
            ],
        ),
        Gauge(
            "site_round",
            "The last round in which it was asked.",
            [(own, s.round) for own, s in labelled],
        ),
        Gauge(
            "site_images",
            "Training images of its last accepted reply.",
            [(own, s.images) for own, s in labelled],
        ),
        Gauge(
            "site_work_seconds",
            "Its own working time for its last accepted reply.",
            [(own, s.seconds) for own, s in labelled],
        ),
        Gauge(
            "site_reply_bytes",
            "Size of its last accepted reply.",
            [(own, s.bytes) for own, s in labelled],
        ),
        Gauge(
            "site_accuracy_percent",
            "Balanced accuracy of the delivered head on its own validation images.",
            [(own, s.accuracy) for own, s in labelled],
        ),
        Gauge(
            "site_left_seconds",
            "Estimate of the seconds until it replies.",
            [(own, s.seconds_left) for own, s in labelled],
        ),
    ]


def _labels(labels: Mapping[str, str]) -> str:
    escaped = (
        value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for value in labels.values()
    )
    pairs = (f'{name}="{value}"' for name, value in zip(labels, escaped, strict=True))
    return f"{{{','.join(pairs)}}}"


def _number(value: float) -> str:
    # repr is exact, and Prometheus reads it as Go's ParseFloat does.
    return repr(value)
