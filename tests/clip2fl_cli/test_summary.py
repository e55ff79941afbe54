"""A comparison's numbers, compared with hand-computed numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_cli.comparison_report import write_comparison_report
from clip2fl_cli.run_schema import Images
from clip2fl_cli.runs import FinishedRun, RunError, chosen_images
from clip2fl_cli.summary import (
    Origin,
    class_table,
    main_table,
    markdown,
    paired_difference,
    refuse_unlike,
    summarise,
    teachers,
)
from clip2fl_cli.wording import last_rounds
from tests.clip2fl_cli.made_up import change_facts, write_run

# Two-sided 95 % quantiles of Student's t, from a printed table.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[FinishedRun]]:
    """Return two variants whose last five rounds average 30 and 34, and 36 and 44."""
    return {
        "plain": [
            write_run(tmp_path / "a1", [99, 28, 29, 30, 31, 32], seed=1),
            write_run(tmp_path / "a2", [99, 34, 34, 34, 34, 34], seed=2),
        ],
        "better": [
            write_run(tmp_path / "b1", [36] * 5, seed=1),
            write_run(tmp_path / "b2", [44] * 5, seed=2),
        ],
    }


def test_last_five_rounds_then_seeds(runs: dict[str, list[FinishedRun]]) -> None:
    plain, better = summarise(runs, "plain")
    balanced = plain.columns["balanced"]
    assert balanced is not None and balanced.deviation is not None
    assert balanced.mean == 32
    assert balanced.deviation == pytest.approx(math.sqrt(8))
    assert plain.last_round.mean == 33  # of 32 and 34
    assert plain.difference is None
    assert better.difference is not None and better.difference.interval is not None
    assert better.difference.mean == 8  # of 6 and 10
    low, high = better.difference.interval
    # 8 ± 12.706 * sqrt(8) / sqrt(2)
    assert (low, high) == pytest.approx((8 - 25.412, 8 + 25.412), abs=0.01)


@given(st.lists(st.tuples(st.floats(0, 99), st.floats(0, 99)), min_size=2, max_size=5))
def test_interval_is_students(pairs: list[tuple[float, float]]) -> None:
    values = {seed: a for seed, (a, _) in enumerate(pairs)}
    baseline = {seed: b for seed, (_, b) in enumerate(pairs)}
    found = paired_difference(values, baseline)
    differences = [a - b for a, b in pairs]
    mean = sum(differences) / len(pairs)
    variance = sum((d - mean) ** 2 for d in differences) / (len(pairs) - 1)
    margin = STUDENT[len(pairs) - 1] * math.sqrt(variance / len(pairs))
    assert found is not None and found.interval is not None
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.interval == pytest.approx((mean - margin, mean + margin), abs=0.02)


def test_only_common_seeds_are_paired() -> None:
    found = paired_difference({1: 5.0, 3: 9.0}, {2: 1.0, 3: 4.0})
    assert found is not None
    assert (found.seeds, found.mean, found.interval) == ((3,), 5.0, None)
    assert str(found) == "+5.0"
    assert paired_difference({1: 5.0}, {2: 1.0}) is None


def test_main_table(runs: dict[str, list[FinishedRun]]) -> None:
    rows = main_table(runs, "plain").splitlines()
    assert rows[0] == (
        "| variant | head | seeds | top-1 | balanced | many | medium | few "
        "| last round | difference | few-shot difference |"
    )
    assert rows[2].startswith("| plain | fedavg | 1, 2 | 32.0 ± 2.8 |")
    assert rows[2].endswith("| 33.0 ± 1.4 | - | - |")
    assert rows[3].endswith("| +8.0 [-17.4, +33.4] | +8.0 [-17.4, +33.4] |")
    assert rows[4].startswith("| teacher | zero-shot | - | 91.0 |")


def test_few_shot_difference_is_of_few_shot_accuracy(
    runs: dict[str, list[FinishedRun]],
) -> None:
    for run, rare in zip(runs["better"], (60.0, None), strict=True):
        for line in run.rounds:
            line["accuracy"]["fedavg"]["few"] = rare
    better = summarise(runs, "plain")[1]
    assert better.difference is not None and better.difference.mean == 8
    # The second seed has no few-shot accuracy; the first has 30 in the baseline.
    assert str(better.few_difference) == "+30.0"


def test_baseline_without_runs_leaves_the_differences_out(
    runs: dict[str, list[FinishedRun]],
) -> None:
    assert [row.difference for row in summarise(runs, "another")] == [None, None]


def test_classes_stand_in_order_of_frequency(
    runs: dict[str, list[FinishedRun]],
) -> None:
    rows = class_table(runs).splitlines()
    assert rows[0] == "| variant | head | common | rare |"
    assert rows[2] == "| training images |  | 300 | 3 |"
    assert rows[3] == "| plain | fedavg | 34.0 | 32.0 |"


def test_many_classes_are_rows_and_are_not_all_listed(
    runs: dict[str, list[FinishedRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip2fl_cli.summary.FEW_CLASSES", 1)
    rows = class_table(runs).splitlines()
    assert rows[0].startswith("| class | training images | plain, fedavg | ")
    assert rows[2].startswith("| common | 300 | 34.0 | ")
    assert rows[3].startswith("| rare | 3 | 32.0 | ")
    for group in runs.values():
        for run in group:
            run.facts["shot_groups"]["many"] = [1, 0, 2]
    page = markdown(runs, "plain", "Title", Origin.here("the command"))
    assert "\nmany = classes [1] and 2 more, medium = [" in page


def test_page_names_command_and_minutes(runs: dict[str, list[FinishedRun]]) -> None:
    page = markdown(runs, "plain", "Title", Origin.here("the command"))
    assert page.startswith("# Title\n")
    assert "    the command\n" in page
    assert "Teacher: tiny." in page
    # Clients' own seconds overlap with the phase of that name.
    assert "a1 6, a2 6, b1 5, b2 5." in page
    runs["better"][0].facts["shared_training"] = True
    shared = markdown(runs, "plain", "Title", Origin.here("the command"))
    assert "trained only once" in shared and "a1 6" not in shared


def test_page_warns_of_runs_of_different_code(
    runs: dict[str, list[FinishedRun]],
) -> None:
    def page() -> str:
        return markdown(runs, "plain", "Title", Origin.here("the command"))

    assert "Client code: abc.\n" in page()  # all runs are of an early version
    for group in runs.values():
        for run in group:
            run.facts["all_code"] = "f00"
    assert "Client code: abc. Client and server code: f00.\n" in page()
    runs["better"][1].facts["all_code"] = "ba5"
    changed = page()
    assert "Client and server code: ba5, f00.\n" in changed
    assert "\nDifferent code made these runs" in changed
    assert "(client and server code f00: a1, a2, b1; ba5: b2)" in changed
    del runs["plain"][0].facts["all_code"]
    assert "(client and server code unknown: a1; f00: a2, b1; ba5: b2)" in page()


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ((3, 3), "all 3 rounds"),
        ((2, 3), "all rounds"),
        ((5, 30), "the last 5 rounds"),
        ((3, 30), "the last 5 rounds, or all of a shorter run"),
        ((30, 3), "the last 5 rounds, or all of a shorter run"),
        ((30, 31), "the last 5 rounds"),
    ],
)
def test_mean_of_the_last_rounds_in_words(
    tmp_path: Path, rounds: tuple[int, int], said: str
) -> None:
    runs = [write_run(tmp_path / str(n), [50.0] * n) for n in set(rounds)]
    assert last_rounds(runs) == said


def test_page_and_report_say_which_rounds_are_averaged(tmp_path: Path) -> None:
    lengths = {"one": 3, "two": 30}
    runs = {
        name: [write_run(tmp_path / name, [50.0] * n)] for name, n in lengths.items()
    }
    page = markdown(runs, "one", "Title", Origin.here("the command"))
    report = write_comparison_report(tmp_path, "x", runs, "one").read_text("utf-8")
    assert "mean of\nthe last 5 rounds, or all of a shorter run (±" in page
    said = "ean of the last 5 rounds, or all of a shorter run"
    # In results and classes.
    assert report.replace("&nbsp;", " ").count(said) >= 3
    note = "Variants have different numbers of rounds: one 3, two 30."
    assert note in page and note in report
    same = markdown({"two": runs["two"]}, "two", "Title", Origin.here("the command"))
    assert "different numbers" not in same and "shorter" not in same


@pytest.mark.parametrize(
    ("most", "said"),
    [
        (0, "on 20 test images,"),
        (30, "on 20 test images,"),
        (8, "on 8 drawn test images (20 after the last round),"),
    ],
)
def test_page_says_how_many_images_were_tested(
    tmp_path: Path, most: int, said: str
) -> None:
    run = write_run(tmp_path / "a", [50.0, 50.0], evaluation__max_images=most)
    assert said in markdown(
        {"plain": [run]}, "plain", "Title", Origin.here("the command")
    )


def divided(
    folder: Path, images: Images, most: int = 0
) -> dict[str, list[FinishedRun]]:
    """Return two variants on a part of the test images; balanced 30 and 40 on all."""
    return {
        name: [
            write_run(
                folder / f"{name}{seed}",
                [value + 2 * seed] * 2,
                seed=seed,
                evaluation__tuning_share=0.2,
                evaluation__max_images=most,
            ).on(images)
            for seed in (1, 2)
        ]
        for name, value in (("plain", 27.0), ("better", 37.0))
    }


def test_table_is_of_the_held_out_images_with_all_beside(tmp_path: Path) -> None:
    """Held out: 1 point below; all images stand in a column of their own."""
    runs = divided(tmp_path, Images.HELD_OUT)
    rows = main_table(runs, "plain").splitlines()
    assert rows[0].endswith(
        "| few | last round | all images | difference | few-shot difference |"
    )
    mean, whole = "29.0 ± 1.4", "30.0 ± 1.4"
    cells = [mean] * 6
    assert (
        rows[2] == f"| plain | fedavg | 1, 2 | {' | '.join(cells)} | {whole} | - | - |"
    )
    ten = "+10.0 [+10.0, +10.0]"
    assert rows[3].endswith(f"| 39.0 ± 1.4 | 40.0 ± 1.4 | {ten} | {ten} |")
    assert rows[4].endswith("| 90.0 | 90.0 | 91.0 | - | - |")
    classes = class_table(runs).splitlines()
    assert classes[3] == "| plain | fedavg | 31.0 | 29.0 |"


def test_table_for_tuning_does_not_show_the_others(tmp_path: Path) -> None:
    rows = main_table(divided(tmp_path, Images.TUNING), "plain").splitlines()
    assert rows[0].endswith("| few | last round | difference | few-shot difference |")
    assert rows[2].endswith("| 34.0 ± 1.4 | - | - |")
    assert rows[4].endswith("| 95.0 | 95.0 | - | - |")


def test_all_images_of_divided_runs_are_as_without_a_share(
    tmp_path: Path, runs: dict[str, list[FinishedRun]]
) -> None:
    found = divided(tmp_path, Images.HELD_OUT)
    back = {
        name: [run.on(Images.ALL) for run in group] for name, group in found.items()
    }
    rows = main_table(back, "plain").splitlines()
    assert rows[0] == main_table(runs, "plain").splitlines()[0]
    assert rows[2].endswith("| 30.0 ± 1.4 | - | - |")


@pytest.mark.parametrize(
    ("images", "most", "said"),
    [
        (
            Images.HELD_OUT,
            0,
            "had no part in choosing settings; balanced accuracy on all 20 beside them",
        ),
        (
            Images.HELD_OUT,
            8,
            "settings (before the last round, those of them among 8 drawn images); bal",
        ),
        (Images.TUNING, 0, "on 4 test images on which settings are chosen, mean"),
        (Images.ALL, 0, "on 20 test images, mean"),
    ],
)
def test_page_says_on_which_images(
    tmp_path: Path, images: Images, most: int, said: str
) -> None:
    runs = divided(tmp_path, images, most)
    assert said in markdown(runs, "plain", "Title", Origin.here("the command"))


def test_held_out_images_are_shown_if_all_runs_have_the_same(tmp_path: Path) -> None:
    """A mixed table would show images on which some settings were chosen."""
    plain = write_run(tmp_path / "a", [50.0])
    fifth, same, other = (
        write_run(tmp_path / name, [50.0], evaluation__tuning_share=share)
        for name, share in (("b", 0.2), ("c", 0.2), ("d", 0.3))
    )
    assert chosen_images([plain]) is Images.ALL
    assert chosen_images([fifth, same]) is Images.HELD_OUT
    assert chosen_images([fifth, same], Images.TUNING) is Images.TUNING
    assert chosen_images([fifth, plain, other], Images.ALL) is Images.ALL
    for mixed in ([fifth, plain], [plain, fifth], [fifth, other]):
        with pytest.raises(RunError, match="other test images are held out.*all"):
            chosen_images(mixed)
    with pytest.raises(RunError, match="--images tuning: .*share = 0.*not divided"):
        chosen_images([plain], Images.TUNING)


@pytest.mark.parametrize("change", ["missing", "another head", "short"])
def test_run_without_a_part_is_damaged(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "a"
    write_run(folder, [50.0], evaluation__tuning_share=0.2)
    file = folder / "metrics.jsonl"
    line = json.loads(file.read_text())
    if change == "missing":
        del line["accuracy_held_out"]
    elif change == "short":
        line["accuracy_held_out"]["fedavg"]["per_class"].pop()
    else:
        line["accuracy_held_out"] = {"x": line["accuracy_held_out"]["fedavg"]}
    file.write_text(json.dumps(line))
    with pytest.raises(RunError, match=r"line 1: accuracy_held_out"):
        FinishedRun.read(folder)


def test_run_that_did_not_count_its_parts(tmp_path: Path) -> None:
    """The first runs with a share wrote neither counts nor the teacher's accuracy."""
    write_run(tmp_path / "a", [50.0], evaluation__tuning_share=0.2)
    file = tmp_path / "a" / "config.json"
    facts = json.loads(file.read_text())
    del facts["test_images_tuning"], facts["test_images_held_out"]
    del facts["teacher"]["zero_shot_tuning"], facts["teacher"]["zero_shot_held_out"]
    file.write_text(json.dumps(facts))
    run = FinishedRun.read(tmp_path / "a")
    sizes = [run.on(part).facts["test_images"] for part in Images]
    assert sizes == [20, 16, 4]
    rows = main_table({"plain": [run.on(Images.HELD_OUT)]}, "plain").splitlines()
    assert len(rows) == 3  # no row of the teacher


def test_other_groups_are_no_few_shot_difference(
    runs: dict[str, list[FinishedRun]],
) -> None:
    """As of another long tail: class 0 would be few-shot in one run only."""
    refuse_unlike(runs)
    other = next(reversed(runs.values()))[0]
    groups = other.facts["shot_groups"]
    groups["many"], groups["few"] = groups["few"], groups["many"]
    with pytest.raises(RunError, match="compare runs of the same long tail"):
        refuse_unlike(runs)


@pytest.mark.parametrize(
    ("config", "facts", "said"),
    [
        ({}, {"test_images": 30}, "has 30 test images, but .*a has 20: compare runs"),
        (
            {"evaluation__max_images": 8},
            {},
            "has 8 test images in rounds before the last, but .*a has 20: ",
        ),
        ({}, {"test_images_held_out": 15}, "has 15 held-out test images, but .* 16: "),
    ],
)
def test_runs_on_other_test_images_are_not_compared(
    tmp_path: Path, config: dict[str, Any], facts: dict[str, int], said: str
) -> None:
    """As of a data set that has grown between two invocations."""
    write_run(tmp_path / "a", [50.0], evaluation__tuning_share=0.2)
    write_run(tmp_path / "b", [60.0], evaluation__tuning_share=0.2, **config)
    change_facts(tmp_path / "b", **facts)
    runs = [
        FinishedRun.read(tmp_path / name).on(Images.HELD_OUT) for name in ("a", "b")
    ]
    with pytest.raises(RunError, match=said):
        refuse_unlike({"a": runs[:1], "b": runs[1:]})


def test_numbers_of_test_images_that_make_no_difference_are_compared(
    tmp_path: Path,
) -> None:
    """20 of 20 images are all; shares do not matter where all images are shown."""
    one = write_run(tmp_path / "a", [50.0], evaluation__max_images=20)
    other = write_run(tmp_path / "b", [50.0], evaluation__tuning_share=0.2)
    refuse_unlike({"a": [one], "b": [other]})


def test_a_teacher_with_two_prompts_has_two_accuracies(
    runs: dict[str, list[FinishedRun]],
) -> None:
    first, *_, last = (run for group in runs.values() for run in group)
    (name,) = teachers(runs)
    last.facts["config"]["teacher.prompt"] = "{class}"
    last.facts["teacher"] = {**first.facts["teacher"], "zero_shot": {"top1": 1.0}}
    prompt = first.facts["config"]["teacher.prompt"]
    found = teachers(runs)
    assert list(found) == [f"{name}, {prompt}", f"{name}, {{class}}"]
    assert found[f"{name}, {{class}}"] == {"top1": 1.0}
