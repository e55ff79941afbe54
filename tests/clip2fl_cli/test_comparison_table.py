"""A comparison's table: its page comes back from it, and the committed one's too."""

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clip2fl_cli import results
from clip2fl_cli.comparison import Comparison
from clip2fl_cli.comparison_table import read_compared, rounds_csv
from clip2fl_cli.results import redraw, write_results
from clip2fl_cli.run_schema import Images
from clip2fl_cli.runs import FinishedRun, RunError
from clip2fl_cli.summary import Failure
from server_app.foreign_files import ForeignFileError
from tests.clip2fl_cli.commands import run
from tests.clip2fl_cli.made_up import accuracy, write_run
from tests.defaults import ROOT

PAGE = ROOT / "benchmarks" / "results" / "2026-11-26-photos-compare.md"


def edited(made: FinishedRun, number: int, **fields: Any) -> FinishedRun:
    """Replace fields of a line of a run's metrics, and read the run again."""
    file = made.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().split("\n")]
    lines[number - 1] |= fields
    file.write_text("\n".join(map(json.dumps, lines)))
    return FinishedRun.read(made.folder)


def values(made: FinishedRun) -> list[dict[str, Any]]:
    """Return a run's rounds as the table keeps them: class gradients added up."""
    return [
        {
            "test_images": None,
            "privacy": {},
            **line,
            "bytes": {
                "down": line["bytes"]["down"],
                "up": line["bytes"]["up"],
                "class_gradients": [sum(line["bytes"].get("class_gradients", []))],
            },
        }
        for line in made.rounds
    ]


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[FinishedRun]]:
    """Two variants with all that a run may have or lack."""
    place = tmp_path / "x"
    holes = {**accuracy(1 / 3), "few": None, "top1": None, "per_class": [0.1, None]}
    plain = [
        write_run(place / f"plain-seed{seed}", [10.0, 20.1, 30.7 + seed], seed=seed)
        for seed in (1, 2)
    ]
    # No site has evaluated, an early line without some fields, one with all.
    plain[0] = edited(plain[0], 1, accuracy={})
    spent = {"epsilon_round": 0.1, "epsilon_total": 1e-7, "delta": 1e-05}
    plain[0] = edited(
        plain[0],
        2,
        losses={"client": -2.5e-300, "gradient_matching": 7},
        bytes={"up": 2**40, "down": 0, "class_gradients": [3, 4]},
        privacy={"updates": spent},
        test_images=8,
    )
    both = write_run(
        place / 'odd, "name"-seed1', [40.0, 50.0, 60.0], client__epochs=9, ema__decay=0
    )
    for number in (2, 3):
        heads = {"re,\x1b[2J\r\ntrained": holes, "fedavg": accuracy(5e-324)}
        both = edited(both, number, accuracy=heads, seconds={"a\nb": 1e-9})
    return {"plain": plain, 'odd, "name"': [both]}


def written(
    runs: dict[str, list[FinishedRun]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Write a comparison's results without reports; return its folder."""
    monkeypatch.setattr(results, "write_run_report", lambda *_: None)
    monkeypatch.setattr(results, "rewrite_report", lambda folder: folder)
    place = runs["plain"][0].folder.parent
    failures = [Failure("plain", 3, "out of memory"), Failure("third", 1, "a|b")]
    write_results(Comparison("x", "plain", place, ()), runs, "the command", failures)
    return place


def test_page_from_the_table_equals_the_page_from_the_folders(
    runs: dict[str, list[FinishedRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder, its name, the date and the machine may differ."""
    place = written(runs, monkeypatch)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for ending in ("csv", "json"):
        name = elsewhere / f"2026-01-01-x.{ending}"
        name.write_bytes((place / f"comparison.{ending}").read_bytes())
    monkeypatch.setattr("os.cpu_count", lambda: 77)
    again = redraw(elsewhere / "2026-01-01-x.csv")
    page = (place / "comparison.md").read_text()
    assert "| plain | fedavg | 1, 2 |" in page
    assert "failed: seed 3: out of memory" in page
    assert "77 cores" not in page
    assert again.markdown == page
    assert f"{again.json}\n" == (place / "comparison.json").read_text()


def test_rounds_come_back_number_by_number(
    runs: dict[str, list[FinishedRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_compared(written(runs, monkeypatch) / "comparison.csv").runs
    assert [*found] == [*runs]
    for variant, group in runs.items():
        for one, other in zip(group, found[variant], strict=True):
            for line, back in zip(values(one), values(other), strict=True):
                names = ("losses", "seconds", "accuracy")
                # A name with line breaks is read back in its escaped form.
                shown = json.loads(json.dumps(line).replace("a\\nb", "a\\\\nb"))
                assert {n: back[n] for n in names} == {n: shown[n] for n in names}
                assert [*back["accuracy"]] == [*line["accuracy"]]
                for name in ("round", "test_images", "privacy", "bytes"):
                    assert back[name] == line[name]
            assert other.facts["teacher"] == one.facts["teacher"]
            own = {"run.dir", "run.name", "run.resume", "run.trackers"}
            assert other.config == {k: v for k, v in one.config.items() if k not in own}


def test_table_is_one_row_a_run_and_round(runs: dict[str, list[FinishedRun]]) -> None:
    rows = [*csv.DictReader(rounds_csv(runs).splitlines())]
    assert [(row["variant"], row["seed"], row["round"]) for row in rows] == [
        *(("plain", seed, number) for seed in "12" for number in "123"),
        *(('odd, "name"', "1", number) for number in "123"),
    ]
    assert rows[0]["accuracy.fedavg.balanced"] == ""
    assert rows[2]["accuracy.fedavg.per_class.1"] == "33.7"
    assert rows[1]["bytes.class_gradients"] == "7"
    assert rows[1]["privacy.updates.delta"] == "1e-05"


def test_json_holds_each_shared_setting_once(
    runs: dict[str, list[FinishedRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = json.loads((written(runs, monkeypatch) / "comparison.json").read_text())
    assert recorded["shared_facts"]["class_names"] == ["rare", "common"]
    assert recorded["facts"]["plain-seed1"] == {
        "config": {"client.epochs": 5, "ema.decay": 0.0, "seed": 1}
    }
    # Equal numbers of another type are not shared: 0 would come back as 0.0.
    assert recorded["facts"]['odd, "name"-seed1'] == {
        "config": {"client.epochs": 9, "ema.decay": 0, "seed": 1}
    }


@pytest.mark.parametrize("as_json", [False, True])
def test_report_of_a_table_prints_and_writes_nothing(
    runs: dict[str, list[FinishedRun]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    place = written(runs, monkeypatch)
    before = sorted(place.rglob("*"))
    options = ["--json"] if as_json else []
    assert run(monkeypatch, "report", place / "comparison.csv", *options) == 0
    kept = place / f"comparison.{'json' if as_json else 'md'}"
    assert capsys.readouterr().out.strip() == kept.read_text().strip()
    assert sorted(place.rglob("*")) == before


def table_of(page: str, first: str) -> list[list[str]]:
    """Return the cells of the Markdown table whose header begins so."""
    lines = iter(page.split("\n"))
    header = next(line for line in lines if line.startswith(f"| {first} |"))
    rows = [header]
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(line)
    return [row[2:-2].split(" | ") for row in rows]


def test_committed_page_is_the_one_of_its_table() -> None:
    """Compare both tables and the text below them; the text above is hand-written."""
    page, drawn = PAGE.read_text("utf-8"), redraw(PAGE.with_suffix(".csv")).markdown
    begin = "| variant | head | seeds |"
    assert page[page.index(begin) :] == drawn[drawn.index(begin) :]
    beside = PAGE.with_suffix(".json").read_text("utf-8")
    assert f"{redraw(PAGE.with_suffix('.csv')).json}\n" == beside


def cell(found: Sequence[float]) -> str:
    """Return a mean and its sample deviation as the page writes them."""
    mean = f"{sum(found) / len(found):.1f}"
    return f"{mean} ± {statistics.stdev(found):.1f}" if len(found) > 1 else mean


def test_means_and_spreads_of_the_committed_page_come_out_of_its_table() -> None:
    """Compute the means with a CSV reader only: last five of 60 rounds, then seeds."""
    with PAGE.with_suffix(".csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 44 * 60
    page = PAGE.read_text("utf-8")
    checked = 0
    _, _, *stated = table_of(page, "variant | head | seeds")
    per_class = {
        (row[0], row[1]): row[2:] for row in table_of(page, "variant | head | airplane")
    }
    for variant, head, seeds, *cells in stated:
        if variant == "teacher":
            continue
        last: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            if row["variant"] == variant and int(row["round"]) > 55:
                last.setdefault(row["seed"], []).append(row)
        assert [*last] == seeds.split(", ")

        def of_seeds(column: str, found: Any = last, head: str = head) -> list[float]:
            return [
                sum(float(row[f"accuracy.{head}.{column}"]) for row in five) / 5
                for five in found.values()
            ]

        columns = ("top1", "balanced", "many", "medium", "few")
        assert cells[:5] == [cell(of_seeds(column)) for column in columns]
        final = [float(f[-1][f"accuracy.{head}.balanced"]) for f in last.values()]
        assert cells[5] == cell(final)
        assert per_class[variant, head] == [
            f"{statistics.fmean(of_seeds(f'per_class.{c}')):.1f}" for c in range(10)
        ]
        checked += 1
    assert checked == len(stated) - 1 == 48


@pytest.fixture
def divided(tmp_path: Path) -> dict[str, list[FinishedRun]]:
    """Two variants with a tuning share."""
    place = tmp_path / "x"
    return {
        name: [
            write_run(
                place / f"{name}-seed{seed}",
                [value, value + seed, value + 2 * seed],
                seed=seed,
                evaluation__tuning_share=0.2,
            )
            for seed in (1, 2)
        ]
        for name, value in (("plain", 30.0), ("better", 40.0))
    }


def test_table_holds_the_accuracy_on_all_three_sets(
    divided: dict[str, list[FinishedRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = written(divided, monkeypatch) / "comparison.csv"
    first = next(csv.DictReader(table.read_text().splitlines()))
    for field, value in (("", "30.0"), ("_tuning", "34.0"), ("_held_out", "29.0")):
        assert first[f"accuracy{field}.fedavg.balanced"] == value
    found = read_compared(table).runs
    for name, group in divided.items():
        for one, other in zip(group, found[name], strict=True):
            for line, back in zip(one.rounds, other.rounds, strict=True):
                for field in ("accuracy", "accuracy_tuning", "accuracy_held_out"):
                    assert back[field] == line[field]


def test_page_of_each_set_comes_back_from_the_table(
    divided: dict[str, list[FinishedRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a choice, the page is the comparison's own: of the held-out images."""
    place = written(divided, monkeypatch)
    page = (place / "comparison.md").read_text()
    assert "16 test images that had no part in choosing settings; bal" in page
    table = place / "comparison.csv"
    assert redraw(table).markdown == page
    assert f"{redraw(table).json}\n" == (place / "comparison.json").read_text()
    balanced = {}
    for images in Images:
        numbers = json.loads(redraw(table, images).json)
        assert numbers["images"] == images
        row = numbers["rows"][0]
        balanced[images] = row["columns"]["balanced"]["mean"]
        assert ("all_images" in row) == (images is Images.HELD_OUT)
    assert balanced == pytest.approx(
        {Images.ALL: 31.5, Images.HELD_OUT: 30.5, Images.TUNING: 35.5}
    )


def test_page_keeps_the_images_that_the_comparison_was_made_with(
    divided: dict[str, list[FinishedRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = written(divided, monkeypatch)
    comparison = Comparison("x", "plain", place, ())
    made = write_results(comparison, divided, "command", (), Images.TUNING)
    assert "on 4 test images on which settings are chosen" in made.results.markdown
    assert redraw(place / "comparison.csv") == made.results


def test_table_without_a_part_is_refused(
    divided: dict[str, list[FinishedRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = written(divided, monkeypatch) / "comparison.csv"
    whole = table.read_text()
    table.write_text(whole.replace("accuracy_held_out.fedavg.per_class.1", "x"))
    with pytest.raises(ForeignFileError, match=r"1 columns of accuracy_held_out\.fed"):
        redraw(table)
    table.write_text(whole.replace(",29.0,29.0,29.0,29.0,29.0,29.0,31.0", "," * 7, 1))
    with pytest.raises(ForeignFileError, match=r"round 1 of .*accuracy_held_out must"):
        redraw(table)


def test_runs_with_and_without_a_share_are_not_mixed(
    divided: dict[str, list[FinishedRun]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the accuracy on all images is the same in all of them."""
    divided["third"] = [write_run(tmp_path / "x" / "third-seed1", [50.0] * 3)]
    with pytest.raises(RunError, match="other test images are held out"):
        written(divided, monkeypatch)
    place = tmp_path / "x"
    comparison = Comparison("x", "plain", place, ())
    made = write_results(comparison, divided, "command", (), Images.ALL)
    assert "on 20 test images, mean" in made.results.markdown
    assert redraw(place / "comparison.csv") == made.results


@pytest.mark.parametrize("images", ["tuning", "all", None])
def test_report_shows_the_wanted_images(
    divided: dict[str, list[FinishedRun]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    images: str | None,
) -> None:
    table = written(divided, monkeypatch) / "comparison.csv"
    options = ["--images", images] if images else []
    assert run(monkeypatch, "report", table, *options) == 0
    expected = redraw(table, Images(images) if images else None).markdown
    assert capsys.readouterr().out.strip() == expected.strip()
