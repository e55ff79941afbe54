"""Test that rules which cannot be read or understood forbid every run."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import be_flower
from tests.site_folders import write_site
from tests.site_node import KINDS, SiteNode, policy, refusal, site_run, works


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use another cache than the user's; identify as one of Flower's processes."""
    be_flower(tmp_path / "cache", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a site's images."""
    return write_site(tmp_path / "private", {"circle": 12, "star": 6})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is not there"),
        ("min-class-sample = 4", "did you mean min-class-samples?"),
        ("min-class-samples = 0", "min-class-samples = 0, but it must be"),
        ("min-class-samples = true", "valid integer"),
        ("max-clip-norm = nan", "max-clip-norm"),
        ("validation-share = 1.5", "validation-share = 1.5"),
        ("teachers = ['xyz']", "teachers.0 = 'xyz'"),
        ("teachers = 'abcdefabcdef'", "teachers"),
        ("teacher-folders = ['relative']", "teacher-folders.0"),
        ("max-runs = 1979-05-27", "not JSON serializable"),
        ("[privacy]\nmin-class-samples = 4", "privacy is no rule"),
        ("min-class-samples = 4\ngradient-samples = 3", "is less than"),
        ("gradient-cuts = 2", "no effect unless min-class-samples is 2 or more"),
        ("min-class-samples = ", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("#" + "x" * 2**20, "larger than 1 MiB"),
        ("folder", "is not there, or no file"),
    ],
)
def test_unusable_policy_refuses_every_run(
    tmp_path: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    text: str | bytes | None,
    said: str,
) -> None:
    path = tmp_path / "policy.toml"
    if text == "folder":
        path.mkdir()
    elif text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    for kind in KINDS:
        caplog.clear()
        reply = SiteNode(folder, {"policy": str(path)}).ask(kind, site_run())
        reason = refusal(reply)
        assert reason == (
            "the site's own rules are not usable; the site's own log says more"
        )
        assert said in caplog.text and "no run is answered" in caplog.text


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"min_class_sample": 4}, "min-class-sample is no rule and no key of a site"),
        ({"min_class_samples": "4"}, "min-class-samples = '4', but it must be"),
        ({"min_class_samples": 2.5}, "min-class-samples = 2.5, but it must be"),
        ({"partition_id": 1}, "partition-id is no rule and no key of a site"),
        ({"policy": "policy.toml"}, "is no absolute path"),
        ({"policy": 3}, "is no absolute path"),
        ({"site_state": "state"}, "is no absolute path"),
    ],
)
def test_unusable_node_configuration_refuses_every_run(
    folder: Path, caplog: pytest.LogCaptureFixture, rules: dict[str, Any], said: str
) -> None:
    assert "rules are not usable" in refusal(
        SiteNode(folder, rules).ask("train", site_run())
    )
    assert said in caplog.text


def test_rule_in_two_places_must_be_the_same(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = policy(tmp_path, min_class_samples=4, teachers="ab" * 6)
    same = {**named, "min_class_samples": 4, "teachers": "ab" * 6}
    works(SiteNode(folder, same).ask("train", site_run()))
    other = {**named, "min_class_samples": 2}
    refusal(SiteNode(folder, other).ask("train", site_run()))
    assert "say it once" in caplog.text


def test_policy_that_others_may_change_is_named(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = policy(tmp_path, min_class_samples=4)
    Path(named["policy"]).chmod(0o664)
    works(SiteNode(folder, named).ask("query", site_run()))
    assert "can be changed by other users" in caplog.text
    caplog.clear()
    Path(named["policy"]).chmod(0o644)
    works(SiteNode(folder, named).ask("query", site_run()))
    assert "can be changed" not in caplog.text
