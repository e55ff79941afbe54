"""The definition of "the same run", for resuming and for comparisons."""

import pytest

from clip2fl_common.config.same_run import differences
from tests.defaults import default_config

# Where results and the site registry lie, what watches the run, how long the server
# waits, what it keeps and whether it stops: none of it decides what comes out.
MAY_CHANGE = {
    "run.dir",
    "run.name",
    "run.resume",
    "run.trackers",
    "federation.round-timeout",
    "federation.site-registry",
    "dataset.skip-unreadable",
    "checkpoint.every",
    "checkpoint.keep",
    "delivery.signing-key",
    "delivery.run",
}


@pytest.mark.parametrize("key", default_config())
def test_a_key_counts_unless_it_may_change(key: str) -> None:
    then = default_config()
    now = {**then, key: "another"}
    expected = [] if key in MAY_CHANGE else [(key, then[key], "another")]
    assert differences(then, now) == expected


def test_a_key_newer_than_the_run_had_its_default() -> None:
    now = default_config()
    then = dict(now)
    del then["ema.decay"]
    assert differences(then, now) == []
    assert differences(then, {**now, "ema.decay": 0.5}) == [("ema.decay", 0.0, 0.5)]


def test_a_key_that_is_gone_or_unknown_is_a_difference() -> None:
    now = default_config()
    then = {**now, "client.of-old": 0.9, "a.key": 1}
    assert differences(then, now) == [
        ("a.key", 1, "nothing"),
        ("client.of-old", 0.9, "nothing"),
    ]
    assert differences(now, {**now, "a.key": 1}) == [("a.key", "nothing", 1)]
