"""Run configurations for tests: the defaults, and small runs."""

from pathlib import Path

from clip2fl_common.config import RunConfig, Scalar, defaults

ROOT = Path(__file__).resolve().parent.parent


def default_config() -> dict[str, Scalar]:
    """Return dotted keys and their defaults for clip2fl, the default method."""
    return RunConfig.from_run_config(defaults()).to_flat()


def run_config(**changes: Scalar) -> RunConfig:
    """Return a small run's configuration; ``__`` stands for a dot, ``_`` for ``-``."""
    tiny: dict[str, Scalar] = {
        # Tests compare bits, which a GPU's kernels need not repeat.
        "device": "cpu",
        "dataset.demo-train-per-class": 20,
        "dataset.demo-test-per-class": 3,
        "dataset.imbalance-factor": 10.0,
        "partition.clients": 3,
        "federation.clients-per-round": 2,
        "federation.rounds": 2,
        "client.epochs": 1,
        "class-gradients.draws": 2,
        "synthesis.steps": 3,
        "synthesis.features-per-class": 4,
        "retraining.epochs": 5,
    }
    named = {
        key.replace("__", ".").replace("_", "-"): value
        for key, value in changes.items()
    }
    return RunConfig.from_run_config({**defaults(), **tiny, **named})
