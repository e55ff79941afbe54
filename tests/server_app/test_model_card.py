"""The card of a delivered model says what a run's files say, and escapes names."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from clip2fl_common.data.datasets import Normalization
from server_app.delivery import ModelCard
from server_app.foreign_files import ForeignFileError
from server_app.model_card import ListedSite, card_text, model_card
from server_app.signed_model import plain_name

MADE = datetime(2026, 11, 27, 15, 30, tzinfo=UTC)
CLASSES = ("cat", "<b>*dog*</b>|[x](http://evil)", "fox")
CARD = ModelCard(
    "resnet8", 16, CLASSES, 32, Normalization((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)), {}
)
ACCURACY = {
    "top1": None,
    "balanced": 55.0,
    "many": 70.0,
    "medium": 40.0,
    "few": None,
    "per_class": [70.0, 40.0, None],
}


def reports(per_class: dict[str, list[float | None]]) -> dict[str, Any]:
    """Return what the last line says of sites with these accuracies."""
    return {
        name: {"evaluation": {"accuracy": {"retrained": {"per_class": own}}}}
        for name, own in per_class.items()
    }


def write_run(folder: Path, last: dict[str, Any]) -> Path:
    """Write the two files of a run of two rounds."""
    folder.mkdir()
    facts = {
        "config": {
            "method": "clip2fl",
            "seed": 7,
            "federation.clients-per-round": 2,
            "run.dir": "/secret",
        },
        "code": "c0de",
        "commit": "abc-dirty",
        "versions": {"torch": "2.15.0"},
        "teacher": {"name": "demo", "fingerprint": "f1", "zero_shot": None},
    }
    (folder / "config.json").write_text(json.dumps(facts))
    lines = [
        {"round": 1, "clients": ["a", "b"], "accuracy": {}, "privacy": {}},
        {"round": 2, "clients": ["b", "c"], **last},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    return folder


@pytest.fixture
def card(tmp_path: Path) -> dict[str, Any]:
    """Return the card of a run with everything in it."""
    last = {
        "accuracy": {
            "retrained": ACCURACY,
            "fedavg": {**ACCURACY, "balanced": 1.0},
        },
        "accuracy_median_site": {"retrained": {**ACCURACY, "balanced": 45.0}},
        "privacy": {
            "updates": {"epsilon_round": 1.0, "epsilon_total": 3.25, "delta": 1e-5}
        },
    }
    last["sites"] = reports(
        {"b": [70, 40, None], "c": [60, 30, None], "d": [80, 50, None]}
    )
    sites = [ListedSite("north", 1234, {0: 80, 2: 30}), ListedSite("west", None, {})]
    return model_card(write_run(tmp_path / "run", last), "run", CARD, MADE, sites)


def test_card_has_the_figures_of_the_run(card: dict[str, Any]) -> None:
    assert card["training"] == {
        "method": "clip2fl",
        "rounds": 2,
        "clients_per_round": 2,
        "seed": 7,
    }
    assert card["sites"] == {
        "trained": 3,
        "listed": [
            {
                "name": "north",
                "images": 1234,
                "balanced": 55.0,
                "per_class": {"cat": 80, "fox": 30},
            },
            {"name": "west", "images": None, "balanced": None, "per_class": {}},
        ],
    }
    # Of the classifier that is delivered, which comes first.
    assert card["accuracy"] == {
        "balanced": 55.0,
        "many": 70.0,
        "medium": 40.0,
        "few": None,
        "per_class": [
            {"class": name, "accuracy": value}
            for name, value in zip(CLASSES, [70.0, 40.0, None], strict=True)
        ],
    }
    assert card["accuracy_median_site"] == 45.0
    assert card["privacy"] == {"updates": {"epsilon": 3.25, "delta": 1e-5}}
    assert card["teacher"] == {"name": "demo", "fingerprint": "f1"}
    assert card["code"] == {"commit": "abc-dirty", "fingerprint": "c0de"}
    assert card["versions"] == {"torch": "2.15.0"}
    assert any(limit.endswith("for: fox.") for limit in card["limits"])
    assert "/secret" not in json.dumps(card)


def test_text_has_the_same_figures_and_no_foreign_markup(card: dict[str, Any]) -> None:
    text = card_text(card)
    for part in (
        *("3 sites", "2 rounds", "`f1`", "abc-dirty", "torch 2.15.0"),
        *("| *balanced* | 55.0 |", "| *balanced, at the median site* | 45.0 |"),
        *("| cat | 70.0 |", "| fox | - |", "| north | 1,234 | 55.0 |"),
        *("| west | - | - |", "updates: epsilon 3.25 at delta 1e-05"),
    ):
        assert part in text
    assert "\\<b\\>\\*dog\\*\\</b\\>\\|\\[x\\](http://evil)" in text
    # No bracket and no column of the class's name acts as markup.
    assert not re.search(r"(?<!\\)<b>|(?<!\\)\[x(?<!\\)\]", text)
    assert all(line.count("|") - line.count("\\|") in (0, 3, 4)
               for line in text.splitlines())  # fmt: skip


FOUR: dict[str, list[float | None]] = {
    "a": [80, 10, None],
    "b": [60, 20, 50],
    "c": [40, 30, None],
    "d": [20, None, None],
}


@pytest.mark.parametrize(
    ("sites", "listed", "given", "balanced"),
    [
        # The third class is one site's own.
        ("abcd", "", [50, 20, None], 35),
        # Listed: the mean would tell what is left.
        ("abcd", "a", [50, None, None], 50),
        ("abcd", "ab", [None, None, 50], 50),
        ("abcd", "abcd", [50, 20, 50], 40),
        ("abcd", "abc", [None, 20, 50], 35),
        ("ab", "a", [None, None, None], None),
        ("ab", "", [None, None, None], None),
        ("b", "b", [60, 20, 50], 130 / 3),
    ],
)
def test_no_mean_tells_the_accuracy_of_an_unlisted_site(
    tmp_path: Path,
    sites: str,
    listed: str,
    given: list[float | None],
    balanced: float | None,
) -> None:
    own = {name: FOUR[name] for name in sites}
    columns = [[x for x in c if x is not None] for c in zip(*own.values(), strict=True)]
    means = [sum(column) / len(column) if column else None for column in columns]
    accuracy = {**ACCURACY, "per_class": means}
    last = {
        "accuracy": {"retrained": accuracy},
        "accuracy_median_site": {"retrained": {**accuracy, "balanced": 33.0}},
        "sites": reports(own),
    }
    folder = write_run(tmp_path / "run", last)
    named = [ListedSite(name, 1, {}) for name in listed]
    card = model_card(folder, "run", CARD, MADE, named)
    assert [c["accuracy"] for c in card["accuracy"]["per_class"]] == given
    assert card["accuracy"]["balanced"] == (balanced and pytest.approx(balanced))
    assert card["accuracy"]["few"] == given[2]
    others = len(set(sites) - set(listed))
    assert card["accuracy_median_site"] == (33.0 if others in (0, 3, 4) else None)
    hidden = [
        name
        for name, mean, shown in zip(CLASSES, means, given, strict=True)
        if mean is not None and shown is None
    ]
    limits = [text for text in card["limits"] if "does not list" in text]
    assert len(limits) == bool(hidden)
    assert all(text.endswith(f"for: {', '.join(hidden)}.") for text in limits)


@pytest.mark.parametrize("known", [True, False])
def test_class_of_few_sites_in_a_secure_sum_is_not_given(
    tmp_path: Path, known: bool
) -> None:
    by_class = {"sites_by_class": [3, 2, 0]} if known else {}
    last = {
        "accuracy": {"retrained": ACCURACY},
        "sites": {},
        "summed_evaluation": {"sites": 3, "images": 60, **by_class},
    }
    folder = write_run(tmp_path / "run", last)
    card = model_card(folder, "run", CARD, MADE, ())
    assert [c["accuracy"] for c in card["accuracy"]["per_class"]] == [
        *(70.0 if known else None, None, None)
    ]


def test_card_without_its_earlier_one_says_that_listed_sites_are_not_known(
    tmp_path: Path,
) -> None:
    card = model_card(
        write_run(tmp_path / "run", {"accuracy": {}}), "r", CARD, MADE, None
    )
    assert card["sites"] == {"trained": 3, "listed": None}
    text = card_text(card)
    assert "Which of them allow this card to list them is not known." in text


def test_card_of_a_run_without_teacher_accuracy_and_noise(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"accuracy": {}})
    facts = json.loads((folder / "config.json").read_text())
    del facts["teacher"], facts["commit"]
    (folder / "config.json").write_text(json.dumps(facts))
    card = model_card(folder, "run", CARD, MADE, ())
    assert card["teacher"] is card["accuracy"] is card["code"]["commit"] is None
    text = card_text(card)
    assert "**Teacher.** None." in text and "Commit unknown" in text
    assert "no differential privacy is claimed" in text
    assert "No site has reported an accuracy." in text
    assert "0 allow this card to list them" in text


def test_damaged_run_is_refused_by_file_and_field(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"accuracy": {}})
    (folder / "metrics.jsonl").write_text('{"round": "x"}\n')
    with pytest.raises(ForeignFileError, match=r"metrics.jsonl: round"):
        model_card(folder, "run", CARD, MADE, ())


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("clip2fl-sites-seed7-42", "clip2fl-sites-seed7-42"),
        ("Lauf 3, größer", "Lauf-3-gr-er"),
        ("..", "run"),
        ("-x", "x"),
        ("a" * 80, "a" * 64),
    ],
)
def test_any_folders_name_becomes_a_plain_name(name: str, plain: str) -> None:
    assert plain_name(name) == plain
