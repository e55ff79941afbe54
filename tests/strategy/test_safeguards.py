"""Test when a model counts as bad, and how many clients are left to train then."""

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from clip2fl_common import messages
from strategy.events import Events
from strategy.outliers import LengthRule
from strategy.recovery import MOST_EMPTY
from strategy.replies import ReplyCheck, Verdicts
from strategy.requests import Requests
from strategy.safeguards import NoRepliesError, Safeguards
from strategy.site_clients import SiteClients
from tests.strategy.messages import client_plan
from tests.strategy.site_nodes import Nodes


def safeguards(sites: int, min_replies: int = 0, least: int = 1) -> Safeguards:
    """Return the safeguards of a run of sites, all of them connected."""
    clients = SiteClients(sites, 7, 1000)
    clients.refresh(Nodes({node: f"site-{node}" for node in range(1, sites + 1)}))
    return Safeguards(clients, LengthRule(0), min_replies, least, noisy_gradients=False)


@pytest.mark.parametrize(
    ("sites", "min_replies", "diverged", "masked", "expected"),
    [
        (3, 0, 1, 0, False),  # the other two are silent, or their replies are unusable
        (3, 0, 1, 2, False),  # two masked sums are too few for a sum
        (3, 0, 2, 0, True),
        (3, 0, 2, 1, True),
        (3, 1, 1, 0, True),  # one reply makes a model here
        (4, 4, 3, 1, True),  # one hostile site does not hold the run
        (4, 4, 2, 0, False),
        (9, 3, 3, 6, False),  # one of six did not sign the set to be summed
        (1, 0, 1, 0, True),
    ],
)
def test_as_many_as_make_a_model_decide_that_it_is_bad(
    sites: int, min_replies: int, diverged: int, masked: int, expected: bool
) -> None:
    verdicts = Verdicts(diverged=diverged, masked=masked)
    assert safeguards(sites, min_replies).poisoned(verdicts) == expected


def test_simulated_client_decides_alone() -> None:
    """Simulated clients that are silent are broken, not away."""
    simulated = Safeguards(client_plan(), LengthRule(0), 0, 1, noisy_gradients=False)
    assert simulated.poisoned(Verdicts(diverged=1))


@pytest.mark.parametrize(("least", "expected"), [(1, 2), (3, 3)])
def test_after_going_back_a_sum_has_enough_parties(least: int, expected: int) -> None:
    """All three sites made the bad model."""
    guard = safeguards(3, least=least)
    numbers = guard.sample(1)
    guard._recovery.note(1, dict.fromkeys(numbers, 1.0))
    guard._recovery.leave_out(2)
    assert len(numbers) == 3 and len(guard.sample(2)) == expected


@pytest.mark.usefixtures("federation_process")
@pytest.mark.parametrize("sites", [True, False])
def test_simulation_ends_when_a_process_that_trains_is_killed(sites: bool) -> None:
    """Flower would give most clients to the dead process, which fails them at once."""
    plan = client_plan()
    guard = Safeguards(plan, LengthRule(0), 0, 1, noisy_gradients=False)
    guard = safeguards(3) if sites else guard
    requests = Requests(plan, Events(), 60.0)
    content = RecordDict({messages.CONFIG: ConfigRecord({messages.ROUND: 1})})
    asked = requests.address(content, [0, 1], MessageType.TRAIN)
    replies = [Message(Error(0, "The actor died"), reply_to=asked[0])]
    check = ReplyCheck({}, requests.asked, [])
    if sites:
        assert guard.judge(1, check, replies, requests).dropped
        return
    with pytest.raises(NoRepliesError, match=r"has ended by itself.*The actor died"):
        guard.judge(1, check, replies, requests)


def test_a_site_that_trains_alone_in_the_first_round_does_not_end_the_run() -> None:
    """Its GPU may be broken. Five such rounds in a row are a fault of the run."""
    guard = safeguards(3, min_replies=1)
    verdicts = Verdicts(diverged=1)
    for server_round in range(1, MOST_EMPTY):
        assert guard.poisoned(verdicts)
        assert guard.go_back(server_round, verdicts, lambda _: None, str) is None
    with pytest.raises(NoRepliesError, match=r"no earlier model; lower client\.learn"):
        guard.go_back(MOST_EMPTY, verdicts, lambda _: None, str)
    simulated = Safeguards(client_plan(), LengthRule(0), 0, 1, noisy_gradients=False)
    with pytest.raises(NoRepliesError):
        simulated.go_back(1, verdicts, lambda _: None, str)
