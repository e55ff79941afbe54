"""Test class statistics in messages: bytes, round trip, and what the server refuses."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Array, ArrayRecord

from client_app.class_statistics import class_statistics
from clip2fl_common.messages import (
    ReplyError,
    StatisticsFormat,
    record_bytes,
    symmetric,
    upper_triangle,
)
from tests.defaults import run_config

CLASSES, WIDTH = 4, 3
FORMAT = StatisticsFormat(CLASSES, WIDTH)
Values = npt.NDArray[np.generic]


def record() -> ArrayRecord:
    """Return the record of a client with three images of class 1 and two of class 3."""
    features = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    return FORMAT.encode(class_statistics(features, torch.tensor([1, 3, 1, 1, 3])))


def changed(name: str, change: Callable[[Values], Values]) -> ArrayRecord:
    """Return the record with another array in place of one."""
    arrays = record()
    arrays[name] = Array(change(arrays[name].numpy().copy()))
    return arrays


def put(place: tuple[int, ...], value: float) -> Callable[[Values], Values]:
    def change(values: Values) -> Values:
        values[place] = value
        return values

    return change


def test_what_is_sent_arrives() -> None:
    features = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    labels = np.array([1, 3, 1, 1, 3])
    found = FORMAT.decode(record())
    assert found.classes.tolist() == [1, 3]
    assert found.counts.tolist() == [3, 2]
    assert found.images == 5
    scales = []
    for row, c in enumerate([1, 3]):
        own = features.numpy()[labels == c]
        covariance = symmetric(found.covariances[row], WIDTH).numpy()
        np.testing.assert_allclose(found.means[row], own.mean(0), rtol=1e-5)
        np.testing.assert_allclose(covariance, np.cov(own.T), rtol=1e-4, atol=1e-6)
        scales.append(np.sqrt((own.mean(0) ** 2).sum() + own.var(0, ddof=1).sum()))
    assert found.feature_scale() == pytest.approx(max(scales), rel=1e-5)


def test_client_without_enough_images_sends_no_row() -> None:
    nothing = class_statistics(torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64))
    found = FORMAT.decode(FORMAT.encode(nothing))
    assert found.classes.tolist() == []
    assert found.covariances.shape == (0, 6)
    assert found.images == 0 and found.feature_scale() == 0


def test_triangle_is_packed_row_after_row() -> None:
    matrix = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    assert upper_triangle(matrix).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(symmetric(upper_triangle(matrix), 3), matrix)


@pytest.mark.parametrize(
    ("model", "dim", "width"),
    [("resnet8-slim", 512, 64), ("resnet8-slim", 16, 16), ("resnet8", 512, 256)],
)
def test_bytes_of_a_class(model: str, dim: int, width: int) -> None:
    """D means and D (D + 1) / 2 covariances, in the narrower of the two spaces."""
    config = run_config(model__name=model, model__feature_dim=dim)
    declared = StatisticsFormat.of(config, 10)
    assert declared.width == width
    features = torch.randn(20, width, generator=torch.Generator().manual_seed(1))
    one, ten = (
        record_bytes(
            declared.encode(class_statistics(features, torch.arange(20) % classes))
        )
        for classes in (1, 10)
    )
    assert (ten - one) / 9 == declared.class_bytes
    assert declared.class_bytes == 4 * (width + width * (width + 1) // 2) + 16


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (
            changed("classes", put((0,), 3)),
            r"statistics for classes \[3, 3\]; they must",
        ),
        (
            changed("classes", put((1,), 4)),
            r"statistics for classes \[1, 4\]; they must",
        ),
        (changed("classes", lambda a: a.astype(np.int32)), "has type int32 and shape"),
        (
            changed("counts", put((1,), 0)),
            "counts has values from 0, expected 1 or more",
        ),
        (
            changed("counts", lambda a: a[:1]),
            r"counts has shape \(1,\), expected \(2,\)",
        ),
        (changed("means", put((0, 1), np.nan)), "means has values that are not finite"),
        (changed("means", put((0, 1), 1e30)), "means has values up to 1.0e.30"),
        (changed("means", lambda a: a[:, :2]), r"means has shape \(2, 2\), expected"),
        (
            changed("covariances", put((1, 3), -1.0)),
            "covariances has negative variances",
        ),
        (changed("covariances", put((0, 1), 1e6)), "larger than their variances allow"),
        (
            changed("covariances", put((0, 1), -1e6)),
            "larger than their variances allow",
        ),
        (ArrayRecord({}), r"class-statistics has the arrays \[\], expected"),
    ],
)
def test_impossible_statistics_are_refused(arrays: ArrayRecord, reason: str) -> None:
    with pytest.raises(ReplyError, match=reason):
        FORMAT.decode(arrays)
