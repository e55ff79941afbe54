"""Odd values are refused with the key's name, or are harmless."""

import json
import math
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clip2fl_common.config import (
    ConfigError,
    RunConfig,
    Scalar,
    defaults,
    known_keys,
)
from clip2fl_common.config.checks import LARGEST_ARRAY_BYTES
from clip2fl_common.config.messages import shown_key
from clip2fl_common.partition import long_tail_counts, long_tail_partition
from tests.defaults import default_config

# Smallest and greatest value of each number, as the reference page states them too.
INTEGERS: dict[str, tuple[int, int]] = {
    "seed": (0, 2**32 - 1),
    "checkpoint.every": (1, 10**6),
    "checkpoint.keep": (1, 10**6),
    "dataset.image-size": (8, 1024),
    "dataset.demo-train-per-class": (1, 10**5),
    "dataset.demo-test-per-class": (1, 10**5),
    "partition.clients": (1, 10**6),
    "partition.shards": (1, 10**6),
    "federation.rounds": (1, 10**6),
    "federation.clients-per-round": (1, 10**6),
    "federation.min-replies": (0, 10**6),
    "aggregation.max-site-images": (1, 10**9),
    "model.feature-dim": (1, 16384),
    "client.epochs": (1, 10**6),
    "client.batch-size": (1, 10**6),
    "client.crop-padding": (0, 1024),
    "distillation.views": (0, 100),
    "class-gradients.draws": (1, 10**4),
    "class-gradients.samples-per-class": (1, 10**6),
    "privacy.min-class-samples": (1, 10**6),
    "synthesis.features-per-class": (1, 10**5),
    "synthesis.steps": (1, 10**6),
    "ccvr.virtual-features": (1, 10**5),
    "retraining.epochs": (1, 10**6),
    "retraining.batch-size": (1, 10**6),
    "teacher.batch-size": (1, 10**6),
    "evaluation.max-images": (0, 10**9),
    "evaluation.batch-size": (1, 10**6),
}
# The smallest value above zero; those that may be zero as well are named below.
FLOATS: dict[str, tuple[float, float]] = {
    "dataset.validation-share": (1e-3, math.nextafter(1, 0)),
    "dataset.imbalance-factor": (1.0, 1e6),
    "partition.alpha": (1e-3, 1e6),
    "evaluation.tuning-share": (1e-3, math.nextafter(1, 0)),
    "federation.round-timeout": (1e-3, 1e7),
    "aggregation.trim": (5e-324, math.nextafter(0.5, 0)),
    "aggregation.max-length-ratio": (2.0, 1e6),
    "aggregation.max-update-norm": (1e-9, 1e6),
    "aggregation.max-gradient-norm": (1e-9, 1e6),
    "client.learning-rate": (1e-9, 1e4),
    "client.learning-rate-final": (1e-9, 1e4),
    "client.learning-rate-other": (1e-9, 1e4),
    "client.momentum": (5e-324, math.nextafter(1, 0)),
    "client.weight-decay": (1e-9, 1e6),
    "client.label-weight": (1e-9, 1e6),
    "client.logit-adjustment": (1e-9, 1e6),
    "distillation.weight": (1e-9, 1e6),
    "distillation.temperature": (1e-3, 1e4),
    "fedprox.mu": (1e-9, 1e6),
    "fedavgm.momentum": (5e-324, math.nextafter(1, 0)),
    "fedavgm.learning-rate": (1e-6, 1.0),
    "ema.decay": (5e-324, math.nextafter(1, 0)),
    "head.decay": (5e-324, math.nextafter(1, 0)),
    "upload.min-cosine": (0.01, 1.0),
    "privacy.gradient-clip-norm": (1e-9, 1e6),
    "privacy.gradient-noise-multiplier": (1e-9, 1e6),
    "privacy.moment-clip-norm": (1e-9, 1e6),
    "privacy.moment-noise-multiplier": (1e-9, 1e6),
    "privacy.model-noise-multiplier": (1e-9, 1e6),
    "privacy.update-noise-multiplier": (1e-9, 1e6),
    "privacy.delta": (1e-15, math.nextafter(1, 0)),
    "synthesis.learning-rate": (1e-9, 1e4),
    "synthesis.learning-rate-final": (1e-9, 1e4),
    "synthesis.contrast-weight": (1e-9, 1e6),
    "synthesis.contrast-temperature": (1e-3, 1e4),
    "retraining.learning-rate": (1e-9, 1e4),
}
ZERO_IS_OFF = {
    "dataset.validation-share",
    "aggregation.trim",
    "aggregation.max-length-ratio",
    "aggregation.max-update-norm",
    "aggregation.max-gradient-norm",
    "client.learning-rate-final",
    "client.momentum",
    "client.weight-decay",
    "client.label-weight",
    "client.logit-adjustment",
    "distillation.weight",
    "fedprox.mu",
    "fedavgm.momentum",
    "ema.decay",
    "evaluation.tuning-share",
    "head.decay",
    "privacy.gradient-clip-norm",
    "privacy.gradient-noise-multiplier",
    "privacy.moment-clip-norm",
    "privacy.moment-noise-multiplier",
    "privacy.model-noise-multiplier",
    "privacy.update-noise-multiplier",
    "synthesis.contrast-weight",
    "synthesis.learning-rate-final",
}


# A share of something counted, or of a step: nothing is divided by it. And a
# probability, which Python accounts for in float64.
MAY_VANISH = {
    "aggregation.trim",
    "client.momentum",
    "fedavgm.momentum",
    "ema.decay",
    "head.decay",
    "privacy.delta",
}


def parse(**changes: Any) -> RunConfig:
    return RunConfig.from_run_config({**default_config(), **changes})


def refusal(changes: dict[str, Any]) -> str | None:
    """Return the error message for a configuration; None if it is accepted."""
    try:
        parse(**changes)
    except ConfigError as error:
        return str(error)
    return None


def assert_out_of_range(key: str, value: object) -> None:
    """Check that only this value is wrong, and that one line reports it."""
    message = refusal({key: value})
    assert message is not None, (key, value)
    assert message.startswith(f"run configuration: {key} = "), message
    assert "but it must be" in message
    assert len(message) < 400 and len(message.splitlines()) == 1


def assert_in_range(key: str, value: object) -> None:
    """Check that the value is accepted, or only contradicts another key."""
    message = refusal({key: value})
    assert message is None or "but it must be" not in message, message
    assert message is None or key in message


def test_every_number_has_bounds_here() -> None:
    numbers = {k for k, v in default_config().items() if type(v) in (int, float)}
    assert numbers == INTEGERS.keys() | FLOATS.keys()


@pytest.mark.parametrize("key", INTEGERS)
def test_integers_are_bounded(key: str) -> None:
    least, most = INTEGERS[key]
    assert_in_range(key, least)
    assert_in_range(key, most)
    for value in (least - 1, -1, most + 1, 2**31 * 2**31, 2**63, 10**30, -(10**30)):
        assert_out_of_range(key, value)
    # Python writes no integer of so many digits.
    assert_out_of_range(key, 10**5000)
    others = (True, False, 1.5, 1e300, math.nan, math.inf, "1", "nan", "", None, [1])
    for other in others:
        assert_out_of_range(key, other)


@pytest.mark.parametrize("key", FLOATS)
def test_floats_are_bounded(key: str) -> None:
    least, most = FLOATS[key]
    assert_in_range(key, least)
    assert_in_range(key, most)
    for value in (math.nextafter(most, math.inf), 1e30, 1e300, 1e308, math.inf):
        assert_out_of_range(key, value)
    for value in (-least, -1.0, -1e308, -math.inf, math.nan, 2**63, 10**30, 10**5000):
        assert_out_of_range(key, value)
    if least > 5e-324:
        for value in (math.nextafter(least, 0), 1e-300, 1e-320, 5e-324):
            assert_out_of_range(key, value)
    for other in (True, False, "0.5", "nan", "inf", "", None, [0.5]):
        assert_out_of_range(key, other)
    if key in ZERO_IS_OFF:
        assert_in_range(key, 0.0)
        assert_in_range(key, 0)
    else:
        assert_out_of_range(key, 0.0)
        assert_out_of_range(key, 0)


@pytest.mark.parametrize("key", sorted(FLOATS.keys() - MAY_VANISH))
def test_floats_are_normal_in_float32(key: str) -> None:
    """Products of three such values are normal numbers, too."""
    least, most = FLOATS[key]
    limits = np.finfo(np.float32)
    assert least**3 > limits.tiny
    assert most**3 < limits.max


def test_longest_wait_is_one_that_threads_take() -> None:
    assert FLOATS["federation.round-timeout"][1] < threading.TIMEOUT_MAX / 100


@pytest.mark.parametrize("alpha", FLOATS["partition.alpha"])
def test_every_alpha_gives_shares(alpha: float) -> None:
    """Most draws are finite; the partition repeats a draw that is not."""
    draws = np.random.RandomState(7).dirichlet(np.repeat(alpha, 10), 1000)
    assert np.isfinite(draws).all(axis=1).mean() > 0.9
    labels = np.repeat(np.arange(10), 50)
    parts = long_tail_partition(labels, 10, 1.0, 3, alpha, seed=7)
    assert sorted(np.concatenate(parts)) == list(range(500))


@pytest.mark.parametrize("key", [k for k, v in default_config().items() if v is False])
@pytest.mark.parametrize("value", [0, 1, 1.0, "true", None])
def test_switches_are_true_or_false(key: str, value: object) -> None:
    assert_out_of_range(key, value)


PATHS = ("run.dir", "run.resume", "dataset.root", "delivery.run")
TEXTS = [k for k, v in default_config().items() if isinstance(v, str)]


ODD_TEXTS = [
    *("/x\0y", "/x\ny", "/x\x1b[2J", "/x\x7f", "/x\u2028y", "/\ud800", "/x" * 300_000),
    *(7, True, 2.5, None, [1], {"a": 1}, [[10**5000]], b"x"),
]


@pytest.mark.parametrize("key", TEXTS)
def test_strings_are_one_short_line(key: str) -> None:
    for value in ODD_TEXTS:
        assert_out_of_range(key, value)


@pytest.mark.parametrize("key", PATHS)
def test_paths_are_absolute_and_short_enough(key: str) -> None:
    dataset: dict[str, Scalar] = (
        {"dataset.name": "cifar10"} if key == "dataset.root" else {}
    )
    for good in ("/data/ü x/\u200d", "/" + "a" * 255, "/a" * 1500, "~/runs"):
        parse(**dataset, **{key: good})
    for bad in ("/" + "a" * 256, "/a" * 1501, "/" + "ü" * 128):
        assert_out_of_range(key, bad)
    for bad in ("runs", "../runs", "~no-such-user/runs"):
        assert f"{key} = {bad!r} " in str(refusal({**dataset, key: bad}))


@pytest.mark.parametrize(
    "name",
    ["a", "A-1_b.c", "_x", "0", "a" * 128, "clip2fl-seed7", "console", "com", "a..b"],
)
def test_run_names_are_one_part_of_a_path(name: str) -> None:
    assert parse(**{"run.name": name}).run.name == name


@pytest.mark.parametrize(
    "name",
    [
        *("../../x", "/etc/x", "..", ".", ".hidden", "-rf", "a/b", "a\\b", "a b"),
        *("a" * 129, "ü", "a.", "a\n", "x\0", "~", "$HOME", "a:b", "*", "C:"),
        *("CON", "con.txt", "nul", "Com1", "lpt9.log", "PRN", "aux", "\u202ea"),
    ],
)
def test_other_run_names_are_refused(name: str) -> None:
    assert_out_of_range("run.name", name)


@pytest.mark.parametrize(
    "method", ["", "../x", "a/b", "a b", "/", ".", "-x", "1a", "a" * 65, "é", "a\n"]
)
def test_methods_can_bring_nothing_into_a_folder_name(method: str) -> None:
    assert_out_of_range("method", method)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:127"])
def test_devices(device: str) -> None:
    assert parse(device=device).device == device


@pytest.mark.parametrize(
    "device",
    # Torch takes cuda:256 for cuda:0, and cuda:255 for no device in particular.
    ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:01", "cuda:128", "cuda:256", "cpu:0"]
    + ["cuda:255", "cuda:1 ", " cpu", "mps", "meta", "cuda:９", "cuda:99999999999999"],
)
def test_other_devices_are_refused(device: str) -> None:
    assert_out_of_range("device", device)


def test_trackers_are_known_by_name() -> None:
    parse(**{"run.trackers": " wandb  mlflow "})
    for bad in ("comet", "wandb,mlflow", "mlflow mlflow", "MLFLOW"):
        assert_out_of_range("run.trackers", bad)


SITES: dict[str, Scalar] = {"dataset.name": "sites"}


def names_refused(names: str) -> str:
    """Return the error message for a list of class names."""
    return str(refusal({**SITES, "dataset.class-names": names}))


def test_class_names_of_any_language_are_accepted() -> None:
    for names in (
        "Kätzchen, 犬, it's 5 o'clock",
        # Persian writes a non-joiner within words.
        "می\u200cخواهم, गाय",
        ", ".join(f"species {n}" for n in range(10_000)),
        f"{'a' * 100}, {'ü' * 100}",
    ):
        RunConfig.from_run_config({**defaults(), **SITES, "dataset.class-names": names})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "at least two different names"),
        ("cat, cat", "'cat' is there twice"),
        ("caf\u00e9, cafe\u0301", "'café' is there twice"),
        ("big cat, big_cat", "'big cat' is there twice"),
        ("cat, ca\u200dt", "'cat' is there twice"),
        ("cat, ca\u00adt", "no folder's name"),
        ("cat, \ufeffcat", "no folder's name"),
        ("cat, ca\u202et", "no folder's name"),
        ("cat, ca\u3164t", "no folder's name"),
        ("cat, ../dog", "no folder's name"),
        ("cat, .dog", "no folder's name"),
        (f"cat, {'a' * 101}", "no folder's name"),
        (f"cat, {'犬' * 90}", "no folder's name"),
        (",".join(map(str, range(10_001))), "has 10,001 names"),
    ],
)
def test_other_class_names_are_refused(names: str, message: str) -> None:
    found = names_refused(names)
    assert "dataset.class-names" in found and message in found
    assert len(found) < 600


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        (
            {
                "dataset.name": "cifar100",
                "dataset.root": "/x",
                "synthesis.features-per-class": 10**5,
                "model.feature-dim": 2048,
            },
            4 * 100 * 10**5 * 2048,
        ),
        (
            {
                "class-gradients.draws": 10**4,
                "class-gradients.samples-per-class": 10**5,
            },
            4 * 10**9 * 512,
        ),
        (
            {
                "dataset.name": "sites",
                "dataset.class-names": ", ".join(map(str, range(10_000))),
                "upload.min-cosine": 1.0,
                "model.feature-dim": 512,
            },
            4 * 10_000**2 * 512,
        ),
        ({"client.batch-size": 10**6, "dataset.image-size": 512}, 12 * 10**6 * 520**2),
        ({"teacher.batch-size": 10**6, "dataset.image-size": 512}, 12 * 10**6 * 2**18),
        (
            {"evaluation.batch-size": 10**5, "dataset.image-size": 1024},
            12 * 10**5 * 2**20,
        ),
        (
            {"dataset.demo-test-per-class": 10**5, "dataset.image-size": 1024},
            3 * 10**6 * 2**20,
        ),
        (
            {
                "dataset.demo-train-per-class": 10**5,
                "dataset.imbalance-factor": 1.0,
                "dataset.image-size": 1024,
            },
            3 * 10**6 * 2**20,
        ),
    ],
)
def test_products_must_fit_memory(changes: dict[str, Scalar], size: int) -> None:
    """Each key alone is in range; the message names all keys and both sizes."""
    message = str(refusal(changes))
    assert len(message.splitlines()) == 1
    unnamed = ("imbalance-factor", "name", "root", "class-names")
    named = [key for key in changes if key.removeprefix("dataset.") not in unnamed]
    assert all(f"{key} = {changes[key]}" in message for key in named)
    assert f"{size:,} bytes" in message
    assert f"{LARGEST_ARRAY_BYTES:,}" in message


def test_full_batches_of_small_images_fit() -> None:
    """A batch size above the number of images means one batch of all images."""
    parse(**{f"{group}.batch-size": 10**6 for group in ("client", "evaluation")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "privacy.min-class-samples": 33,
                "class-gradients.samples-per-class": 32,
            },
            "privacy.min-class-samples = 33 is more than class-gradients.samples-per",
        ),
        (
            {"client.crop-padding": 33, "dataset.image-size": 32},
            "client.crop-padding = 33 is more than dataset.image-size = 32",
        ),
        (
            {"partition.clients": 2000},
            "partition.clients = 2000, but all classes together have only 1485",
        ),
        (
            {
                "dataset.name": "cifar100",
                "dataset.root": "/x",
                "dataset.imbalance-factor": 1.0,
                "partition.clients": 50_001,
            },
            "partition.clients = 50001, but all classes together have only 50000",
        ),
        (
            {"dataset.imbalance-factor": 1e6},
            "dataset.imbalance-factor = 1e+06 leaves no image of the rarest class",
        ),
        (
            {"client.label-weight": 0, "distillation.weight": 0},
            "client.label-weight = 0 and distillation.weight = 0",
        ),
        (
            {"client.label-weight": 0, "method": "fedprox"},
            "client.label-weight = 0, but method = 'fedprox' has no teacher",
        ),
        ({"teacher.model": "local-dir:/" + "a" * 256}, "longer than a path can be"),
        ({"teacher.model": "local-dir:~nobody-x/t"}, "names a user's home"),
        ({"run.dir": "~root/runs"}, "names a user's home: write the whole path"),
    ],
)
def test_contradictions(changes: dict[str, Scalar], message: str) -> None:
    found = str(refusal(changes))
    assert message in found
    assert len(found.splitlines()) == 1


def test_as_many_images_as_a_draw_has_may_be_asked_for() -> None:
    assert sum(long_tail_counts(600, 10, 100.0)) == 1485
    parse(
        **{
            "privacy.min-class-samples": 100,
            "class-gradients.samples-per-class": 100,
            "partition.clients": 1485,
            "client.crop-padding": 32,
        }
    )


@pytest.mark.parametrize(
    "key",
    ["", ".", "a.b.c", "run", "run.", "run.dir.x", ".dir", "x" * 10**6, "\n", "\ud800"],
)
@pytest.mark.parametrize("value", [1, "x", None, {}])
def test_odd_keys_are_named_in_one_line(key: str, value: object) -> None:
    message = str(refusal({key: value}))
    assert "is not a key of the run configuration" in message
    assert len(message.splitlines()) == 1 and len(message) < 300


def test_very_many_problems_are_counted() -> None:
    message = str(refusal({f"key{n}": n for n in range(1000)}))
    assert len(message.splitlines()) < 30
    assert message.endswith("and 980 more")


def test_odd_values_of_two_keys_are_both_named() -> None:
    message = str(refusal({"seed": [1], "client.epochs": 0, "upload.precision": "x"}))
    assert all(key in message for key in ("seed", "client.epochs", "upload.precision"))
    assert "missing" not in message


SCALARS = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(-3, 2000),
    st.integers(0, 70).map(lambda n: 2**n),
    st.floats(),
    st.floats(0, 1),
    st.text(),
    st.text("ab/.~-_:{}\\\x00\n ", max_size=12),
    st.sampled_from(["/x", "demo", "sites", "cifar10", "a, b", "mean", "few", "cuda"]),
)
CHANGES = st.dictionaries(
    st.sampled_from(known_keys()) | st.text(max_size=8), SCALARS, max_size=6
)


def check_refused_or_survives(changes: dict[str, Any]) -> None:
    """Check that each scalar is refused by name, or survives a JSON round trip."""
    try:
        config = parse(**changes)
    except ConfigError as error:
        assert any(shown_key(key) in str(error) for key in changes)
        return
    flat = config.to_flat()
    again = RunConfig.from_run_config(json.loads(json.dumps(flat, allow_nan=False)))
    assert again == config
    assert again.to_flat() == flat
    assert all(flat[key] == value for key, value in changes.items())


@given(CHANGES)
@example({"run.dir": "~\x00/x"})
@example({"federation.round-timeout": 600})
@example({"fedprox.mu": -0.0})
def test_any_scalars_are_refused_by_name_or_survive(changes: dict[str, Any]) -> None:
    check_refused_or_survives(changes)


@pytest.mark.parametrize("key", known_keys())
@given(value=SCALARS)
def test_any_scalar_of_a_key_is_refused_by_name_or_survives(
    key: str, value: Scalar
) -> None:
    check_refused_or_survives({key: value})
