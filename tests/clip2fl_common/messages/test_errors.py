"""Reasons of errors in words."""

from collections.abc import Iterator

import pytest
from flwr.app import Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_common.messages import DATA_ERROR, DIVERGED, SITE_REFUSES, error_reason
from tests.flower_private import act_as_flower_process


@pytest.fixture(autouse=True, scope="module")
def flower_process() -> Iterator[None]:
    """Be what Flower takes for one of its processes."""
    with pytest.MonkeyPatch.context() as patch:
        act_as_flower_process(patch.setattr)
        yield


def failed(reason: str) -> Message:
    """Return an error of a node."""
    return Message(Error(2, reason), reply_to=Message(RecordDict(), 7, "train"))


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("<class 'client_app.images.SiteError'>:<'no such class'>", "no such class"),
        ("<class 'clip2fl_common.data.x.DataError'>:<'it's bad'>", "it's bad"),
        ("<class 'KeyError'>:<''x''>", "KeyError: 'x'"),
        ("<class 'torch.cuda.OutOfMemoryError'>:<'full'>", "OutOfMemoryError: full"),
        ("<class 'MemoryError'>:<'a\nb'>", r"MemoryError: a\nb"),
        ("Error: Node Unavailable", "Error: Node Unavailable"),
        ("<class 'x'>:<'y", "<class 'x'>:<'y"),
        ("", ""),
    ],
)
def test_text_of_an_exception_stands_alone(reason: str, said: str) -> None:
    assert error_reason(failed(reason)) == said


@given(st.text(max_size=500))
def test_any_reason_is_one_short_line(reason: str) -> None:
    for text in (reason, f"<class 'client_app.x.Y'>:<'{reason}'>"):
        found = error_reason(failed(text))
        assert found.isprintable() and len(found) <= 310


def test_codes_are_the_documented_numbers() -> None:
    """Nodes and servers of other releases send and expect them."""
    assert (DATA_ERROR, SITE_REFUSES, DIVERGED) == (1001, 1002, 1003)
