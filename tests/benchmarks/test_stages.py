"""The benchmarks compute what they claim to compare, also on a bare machine."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from benchmarks import published_loops
from benchmarks.measure import Comparison, comparison_table, median_and_spread
from benchmarks.stages import TINY, Logits, normalized, run_stages, seeded
from clip2fl_common.class_gradients import ClassGradient
from tests.defaults import ROOT
from tests.strategy import slow_synthesis

CPU = torch.device("cpu")


def linear_teacher(num_classes: int, device: torch.device) -> Logits:
    """Return a teacher that costs nothing."""
    matrix = torch.randn(3 * 32 * 32, num_classes, generator=seeded()).to(device)
    return lambda pixels: normalized(pixels).flatten(1) @ matrix / 50


def test_every_stage_computes_what_the_published_loops_do() -> None:
    """To 1e-4, at a size that takes seconds; the last is a whole round."""
    comparisons, text = run_stages(TINY, CPU, 1, linear_teacher)
    assert [c.stage for c in comparisons] == [
        "class gradients of a client",
        "class gradients of a client",
        "local epoch with distillation",
        "synthesis step",
        "synthesis step",
        "re-training epoch",
        "whole round, without Flower",
    ]
    for comparison in comparisons:
        if comparison.slow:
            assert comparison.difference is not None
            assert comparison.difference < 1e-4
            assert len(comparison.ratios) == 1
    assert [bool(c.slow) for c in comparisons].count(False) == 1
    assert "costs" in text


def test_benchmarks_run_without_flower_and_open_clip() -> None:
    """On a machine that holds torch and torchvision only."""
    code = """
import sys
BLOCKED = {"flwr", "ray", "open_clip", "pydantic", "platformdirs", "filelock", "typer"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not there")
sys.meta_path.insert(0, Absent())
import benchmarks.stages, benchmarks.scale, benchmarks.recorded, tests.cuda.checks
import benchmarks.federations
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_published_synthesis_is_slow_descent() -> None:
    """The yardstick itself, against loops over single rows and features."""
    features, gradients, weight, bias, text = slow_synthesis.random_problem(
        0, 4, 3, 5, {0, 2}
    )
    single = {
        c: ClassGradient(*(tensor.float() for tensor in gradient))
        for c, gradient in gradients.items()
    }
    moved = published_loops.synthesize(
        features.float(),
        single,
        weight.float(),
        bias.float(),
        text.float(),
        steps=2,
        learning_rate=0.1,
        contrast_weight=0.5,
        temperature=0.5,
    )
    expected = features
    for _ in range(2):
        expected = expected - 0.1 * slow_synthesis.synthesis_gradient(
            expected, gradients, weight, bias, text, 0.5, 0.5
        )
    torch.testing.assert_close(moved.double(), expected, atol=1e-5, rtol=0)


def test_published_retraining_learns_separable_features() -> None:
    """Each class on an axis of its own: all are right in the end."""
    features = 3 * torch.eye(4)[:, None, :].repeat(1, 6, 1)
    classifier = published_loops.retrain_classifier(
        features,
        nn.Linear(4, 4),
        epochs=60,
        batch_size=5,
        learning_rate=0.1,
        generator=seeded(),
    )
    assert torch.equal(classifier(torch.eye(4)).argmax(1), torch.arange(4))


def test_ratios_are_taken_pair_by_pair() -> None:
    comparison = Comparison("s", "C = 2", (2.0, 9.0, 4.0), (1.0, 3.0, 4.0), 1e-7)
    assert comparison.ratios == [2.0, 3.0, 1.0]
    row = comparison_table([comparison]).splitlines()[-1]
    assert row == "| s | C = 2 | 4 (2-9) | 3 (1-4) | 2 (1-3) | 1.0e-07 |"
    alone = comparison_table([Comparison("s", "n", (), (1.5,))]).splitlines()[-1]
    assert alone == "| s | n | - | 1.5 (1.5-1.5) | - | - |"


@pytest.mark.parametrize(
    ("values", "shown"),
    [([], "-"), ([0.12345], "0.123 (0.123-0.123)"), ([3, 1, 2], "2 (1-3)")],
)
def test_median_and_spread(values: list[float], shown: str) -> None:
    assert median_and_spread(values) == shown
