"""Test the budget of epsilon that a site's own rules set for all its answers."""

import math
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_app.policy_check import check_ledger, check_policy
from client_app.site_ledger import LedgerError, SiteLedger
from client_app.site_policy import SitePolicy, SiteRefusal
from clip2fl_common.config import RunConfig, Scalar
from clip2fl_common.epsilon import answers_within, cost, epsilon
from clip2fl_common.messages import CLASS_STATISTICS
from tests.conftest import be_flower
from tests.site_folders import write_site
from tests.site_node import SiteNode, refusal, site_run

DELTA = 1e-5


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use another cache than the user's; identify as one of Flower's processes."""
    be_flower(tmp_path / "cache", monkeypatch)


def noisy_run(**changes: Scalar) -> RunConfig:
    """Return a run with noise on all that its clients send."""
    return site_run(
        **{
            "privacy__model_noise_multiplier": 4.0,
            "aggregation__max_update_norm": 0.01,
            "privacy__gradient_noise_multiplier": 3.0,
            "privacy__gradient_clip_norm": 1.0,
            **changes,
        }
    )


def slow_epsilon(multiplier: float, delta: float = DELTA) -> float:
    """Return the epsilon of one release, by Renyi orders from 1.01 to 1,000.

    Renyi divergence a / (2 z^2) of Gaussians (Mironov 2017), and the conversion of
    Canonne, Kamath and Steinke (2020, Proposition 12).
    """
    return min(
        a / (2 * multiplier**2) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a in (1 + 0.01 * 1.002**i for i in range(5800))
    )


@given(multipliers=st.lists(st.floats(0.5, 20), min_size=1, max_size=30))
def test_cost_adds_up_as_renyi_divergences_do(multipliers: list[float]) -> None:
    """The order that gives the least epsilon is the same for all: add, then convert."""
    total = cost(multipliers)
    assert total == pytest.approx(math.fsum(1 / (z * z) for z in multipliers))
    found = epsilon(total**-0.5, 1, DELTA)
    # The accountant tries fewer orders, so it may give a little more, never less.
    least = slow_epsilon(total**-0.5)
    assert least * (1 - 1e-6) <= found <= 1.02 * least + 1e-3


@given(
    most=st.floats(0.1, 50),
    multiplier=st.floats(0.5, 50),
)
def test_number_of_answers_is_the_greatest_that_stays_within(
    most: float, multiplier: float
) -> None:
    answers = answers_within(most, cost([multiplier]), DELTA)
    assert epsilon(multiplier, answers, DELTA) <= most * (1 + 1e-9)
    assert epsilon(multiplier, answers + 1, DELTA) >= most * (1 - 1e-9)


def test_answers_are_counted_over_runs_until_the_budget_is_spent(
    tmp_path: Path,
) -> None:
    """Two things of multipliers 4 and 3 are one of 2.4: how often fits is computed."""
    most = 1.01 * slow_epsilon(2.4 / math.sqrt(3))
    write_site(tmp_path / "images", {"circle": 4, "ring": 4})
    node = SiteNode(tmp_path / "images", rules={"max_epsilon": most})
    for run in (1, 1, 2):
        assert not node.ask("train", noisy_run(), run=run).has_error()
    text = refusal(node.ask("train", noisy_run(), run=2))
    assert text.startswith("the site's answers have spent epsilon = ")
    assert f"its max-epsilon is {most:g}" in text
    # The server is told so in answer to its first question already.
    assert refusal(node.ask("query", noisy_run(), run=3)) == text
    # Less noise costs more, more noise less.
    more = noisy_run(
        privacy__model_noise_multiplier=400.0,
        privacy__gradient_noise_multiplier=400.0,
    )
    assert not node.ask("train", more, run=3).has_error()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"privacy__model_noise_multiplier": 0.0}, "model"),
        ({"privacy__gradient_noise_multiplier": 0.0}, "gradient"),
        (
            {"head__delivered": "discriminant", "privacy__moment_clip_norm": 1.0},
            "moment",
        ),
    ],
)
def test_everything_that_is_sent_needs_noise(
    changes: dict[str, Scalar], key: str, tmp_path: Path
) -> None:
    write_site(tmp_path / "images", {"circle": 4, "ring": 4})
    node = SiteNode(tmp_path / "images", rules={"max_epsilon": 100.0})
    for kind in ("query", "train"):
        assert refusal(node.ask(kind, noisy_run(**changes))) == (
            f"the run has privacy.{key}-noise-multiplier = 0, and the site has a "
            "max-epsilon, which needs noise on all that is sent"
        )


def test_request_for_more_than_the_configuration_says_is_refused(
    tmp_path: Path,
) -> None:
    """The configuration is FedAvg's, but the request asks for statistics."""
    write_site(tmp_path / "images", {"circle": 4, "ring": 4})
    node = SiteNode(tmp_path / "images", rules={"max_epsilon": 100.0})
    run = noisy_run(method="fedavg", privacy__gradient_noise_multiplier=0.0)
    assert not node.ask("train", run, reply_fields=[]).has_error()
    asked = node.ask("train", run, reply_fields=[CLASS_STATISTICS])
    assert "to which no noise is added" in refusal(asked)
    gradients = node.ask("train", run, reply_fields=["class-gradients"])
    assert "gradient-noise-multiplier = 0" in refusal(gradients)


def test_many_at_once_spend_no_more_than_is_allowed(tmp_path: Path) -> None:
    policy = SitePolicy(max_epsilon=5.0)
    each = cost([10.0])
    allowed = answers_within(5.0, each, DELTA)

    def ask(_: int) -> bool:
        try:
            SiteLedger(tmp_path).spend(each, policy, keep=True)
        except SiteRefusal:
            return False
        return True

    assert 5 < allowed < 150
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(allowed + 20))) == allowed
    ledger = SiteLedger(tmp_path)
    assert ledger.spent(policy) == pytest.approx(epsilon(10.0, allowed, DELTA))
    # To look does not spend.
    with pytest.raises(SiteRefusal):
        ledger.spend(each, policy, keep=False)
    ledger.spend(cost([1e5]), policy, keep=False)
    assert ledger.spent(policy) == pytest.approx(epsilon(10.0, allowed, DELTA))


@pytest.mark.parametrize("value", ["much", None, -1.0, math.inf])
def test_damaged_account_refuses_everything(
    value: float | str | None, tmp_path: Path
) -> None:
    policy, ledger = SitePolicy(max_epsilon=5.0), SiteLedger(tmp_path)
    ledger.spend(0.1, policy, keep=True)
    connection = sqlite3.connect(ledger.path)
    with connection:
        connection.execute(
            "UPDATE fact SET value = ? WHERE name = 'privacy-cost'", (value,)
        )
    connection.close()
    with pytest.raises(LedgerError, match="privacy-cost is"):
        ledger.spend(0.1, policy, keep=True)


def test_without_the_rule_nothing_is_counted(tmp_path: Path) -> None:
    write_site(tmp_path / "images", {"circle": 4, "ring": 4})
    rules = {"site-state": str(tmp_path / "state")}
    node = SiteNode(tmp_path / "images", rules=rules)
    assert not node.ask("train", site_run()).has_error()
    assert SiteLedger(tmp_path / "state").spent(SitePolicy(max_epsilon=1.0)) == 0


def test_doctor_says_what_is_spent_and_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("max-epsilon = 8.0\n", "utf-8")
    SiteLedger(tmp_path / "state").spend(
        cost([3.0]), SitePolicy(max_epsilon=8.0), keep=True
    )
    finding = check_ledger(tmp_path / "state", path)
    assert finding.text.endswith(f"epsilon = {epsilon(3.0, 1, DELTA):.4g} of 8")
    answers = answers_within(8.0, cost([3.0, 4.0]), DELTA)
    found = [f for f in check_policy(path, noisy_run()) if f.check == "epsilon"]
    assert [f.level for f in found] == ["ok"]
    assert f"allows {answers} answers" in found[0].text
    weak = noisy_run(
        privacy__model_noise_multiplier=0.1, privacy__gradient_noise_multiplier=0.1
    )
    [finding] = [f for f in check_policy(path, weak) if f.check == "epsilon"]
    assert finding.level == "problem" and "allows 0 answers" in finding.text
