"""Test the record of what a site has answered, on its disk."""

import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client_app.own_site import state_folder
from client_app.site_ledger import FILE, HeldImages, LedgerError, SiteLedger
from client_app.site_policy import SitePolicy, SiteRefusal, policy_file
from clip2fl_common import messages
from tests.conftest import be_flower
from tests.site_folders import write_site
from tests.site_node import KINDS, SiteNode, site_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use another cache than the user's; identify as one of Flower's processes."""
    be_flower(tmp_path / "cache", monkeypatch)


def rules(folder: Path, text: str) -> SitePolicy:
    """Return a policy."""
    path = folder / "policy.toml"
    path.write_text(text, "utf-8")
    return policy_file(path)


def test_many_at_once_get_no_more_than_is_allowed(tmp_path: Path) -> None:
    """Each message has its own process; here it has its own connection."""
    policy = rules(tmp_path, "max-rounds = 30")

    def ask(_: int) -> bool:
        try:
            SiteLedger(tmp_path / "state").count("1", "train", policy, "cat, owl")
        except SiteRefusal as refusal:
            assert "max-rounds is 30" in str(refusal)
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(60))) == 30


def test_looking_and_counting_are_one_step(tmp_path: Path) -> None:
    """No other writer may begin between the look and the count."""
    ledger = SiteLedger(tmp_path)
    with ledger._open():
        other = sqlite3.connect(ledger.path, timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()


def test_many_at_once_choose_one_set(tmp_path: Path) -> None:
    policy = rules(tmp_path, "min-class-samples = 3\ngradient-samples = 5")
    images = held(range(2**63, 2**63 + 40))

    def ask(_: int) -> list[int]:
        ledger = SiteLedger(tmp_path / "state")
        return ledger.gradient_images(images, 3, policy)["cat"]

    with ThreadPoolExecutor(8) as pool:
        chosen = list(pool.map(ask, range(20)))
    assert len(chosen[0]) == 5 and chosen == [chosen[0]] * 20


def held(digests: range) -> dict[str, HeldImages]:
    """Return images of one class."""
    return {"cat": HeldImages(digests, frozenset(digests))}


def test_choice_is_by_chance_that_no_server_knows(tmp_path: Path) -> None:
    policy = rules(tmp_path, "min-class-samples = 3\ngradient-samples = 5")
    sets = {
        tuple(
            SiteLedger(tmp_path / f"{i}").gradient_images(held(range(500)), 3, policy)[
                "cat"
            ]
        )
        for i in range(5)
    }
    assert len(sets) == 5


def test_too_small_a_class_fixes_nothing(tmp_path: Path) -> None:
    """The class is answered with all its images once it has grown."""
    ledger = SiteLedger(tmp_path)
    policy = rules(tmp_path, "min-class-samples = 3\ngradient-samples = 5")
    assert ledger.gradient_images(held(range(2)), 3, policy) == {}
    assert ledger.gradient_images(held(range(4)), 5, policy) == {}
    assert len(ledger.gradient_images(held(range(9)), 5, policy)["cat"]) == 5


def test_set_smaller_than_a_new_bound_is_not_answered(tmp_path: Path) -> None:
    ledger = SiteLedger(tmp_path)
    first = rules(tmp_path, "min-class-samples = 3\ngradient-samples = 3")
    assert len(ledger.gradient_images(held(range(9)), 3, first)["cat"]) == 3
    raised = rules(tmp_path, "min-class-samples = 4")
    assert ledger.gradient_images(held(range(9)), 4, raised) == {}
    again = rules(tmp_path, "min-class-samples = 4\ngradient-cuts = 2")
    assert len(ledger.gradient_images(held(range(9)), 4, again)["cat"]) == 6


def test_only_the_nodes_user_may_read_it(tmp_path: Path) -> None:
    SiteLedger(tmp_path / "state").runs()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    for path in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def damage(path: Path, kind: str) -> None:
    """Damage a ledger."""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(b"\x00garbage" * 1000)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("kind", ["empty", "garbage", "cut", "folder"])
def test_damaged_ledger_is_not_begun_anew(tmp_path: Path, kind: str) -> None:
    ledger = SiteLedger(tmp_path / "state")
    policy = rules(tmp_path, "max-runs = 1")
    ledger.count("1", "train", policy, "cat, owl")
    damage(ledger.path, kind)
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"ledger\.sqlite, cannot be used"):
            ledger.count("2", "train", policy, "cat, owl")


@pytest.mark.parametrize(
    "rule",
    [{"min_class_samples": 2}, {"max_runs": 9}, {"max_rounds": 9}, {}],
)
@pytest.mark.parametrize("kind", ["empty", "garbage", "unwritable"])
def test_site_with_budgets_answers_nothing_without_its_ledger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rule: dict[str, int], kind: str
) -> None:
    """A site without budgets warns; each run then divides the images anew."""
    folder = write_site(tmp_path / "private", {"circle": 12, "star": 12})
    state = tmp_path / "state"
    if kind == "unwritable":
        state.write_text("a file in the way")
    else:
        state.mkdir()
        damage(state / FILE, kind)
    node = SiteNode(folder, {"site_state": str(state), **rule})
    for message in KINDS:
        caplog.clear()
        reply = node.ask(message, site_run())
        assert str(state) in caplog.text
        assert reply.has_error() == bool(rule)
        if rule:
            assert reply.error.code == messages.SITE_REFUSES
            assert str(reply.error.reason) == (
                "the site's record of what it has answered cannot be used; the site's "
                "own log says more"
            )


def test_ledger_is_the_data_folders_whatever_its_path(tmp_path: Path) -> None:
    """``site-state`` moves it."""
    folder = write_site(tmp_path / "private", {"circle": 12, "star": 12})
    (tmp_path / "link").symlink_to(folder)
    SiteNode(folder, {"max_runs": 1}).ask("train", site_run(), run=1)
    place = state_folder({}, folder)
    assert place.parent == tmp_path / "cache" / "sites"
    assert (place / FILE).is_file()
    other = SiteNode(tmp_path / "link", {"max_runs": 1})
    assert other.ask("train", site_run(), run=2).has_error()
    moved = {"max_runs": 1, "site_state": str(tmp_path / "state" / "deep")}
    assert not SiteNode(folder, moved).ask("train", site_run(), run=2).has_error()
    assert (tmp_path / "state" / "deep" / FILE).is_file()
