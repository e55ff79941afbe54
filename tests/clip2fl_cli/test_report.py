"""Reports: every section is there, with the numbers of the run's files."""

import json
import re
import shutil
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from clip2fl import Run
from clip2fl_cli.app import _report_run
from clip2fl_cli.colours import (
    DASHES,
    IN_BACKGROUND,
    METHODS,
    SERIES,
    VARIABLES,
    Colour,
    styled,
    styles,
)
from clip2fl_cli.comparison_report import write_comparison_report
from clip2fl_cli.feature_plane import (
    LABEL_HEIGHT,
    label_shifts,
    principal_plane,
    shares_of_distances,
)
from clip2fl_cli.figures import Curve, Points, by_class, over_rounds, three_digits
from clip2fl_cli.report import PROTECTED, write_run_report
from clip2fl_cli.run_schema import Images
from clip2fl_cli.runs import FinishedRun, RunError
from clip2fl_cli.summary import Failure
from clip2fl_common.config import defaults
from clip2fl_common.protection import PROTECTED_FIELDS
from clip2fl_common.provenance import ALL_CODE, code_fingerprint
from strategy.privacy_ledger import PrivacyLedger
from tests.clip2fl_cli.html_page import Page
from tests.clip2fl_cli.made_up import accuracy, change_facts, write_run
from tests.defaults import run_config

SECTIONS = [
    "results",
    "accuracy",
    "classes",
    "clients",
    "features",
    "losses",
    "costs",
    "confusion",
    "configuration",
]
PICTURES = [
    section for section in SECTIONS if section not in ("results", "configuration")
]
HEADS = {"retrained": "re-trained head", "fedavg": "the model's own head"}
COLUMNS = {"top1": "top-1", "balanced": "balanced", "many": "many", "few": "few"}


def copied(run: FinishedRun, folder: Path) -> FinishedRun:
    """Return the same run in another folder."""
    shutil.copytree(run.folder, folder)
    return FinishedRun.read(folder)


@pytest.fixture(scope="module")
def run(
    runs: dict[str, FinishedRun], tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """Return a run of CLIP2FL in a folder of its own, with its report."""
    run = copied(runs["clip2fl"], tmp_path_factory.mktemp("reported") / "a-run")
    write_run_report(run, runs["fedavg"])
    return run


@pytest.fixture(scope="module")
def page(run: FinishedRun) -> Page:
    """Return the report's page."""
    return Page(run.folder / "report.html")


def exact(value: float | int | None) -> str | None:
    """Return what ``data-value`` must be."""
    return None if value is None else json.dumps(value)


def test_run_report_has_every_section_with_the_numbers_of_the_run(
    run: FinishedRun, page: Page
) -> None:
    assert page.sections == SECTIONS
    lines = [
        json.loads(line)
        for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    ]

    accuracy = page.tables["accuracy-rounds"]
    assert accuracy.column("round") == ["1", "2"]
    for head, name in HEADS.items():
        for column, title in COLUMNS.items():
            expected = [exact(line["accuracy"][head][column]) for line in lines]
            assert accuracy.column(f"{name}: {title}") == expected

    losses = page.tables["losses-rounds"]
    for name, title in (
        ("client", "client (total)"),
        ("gradient_matching", "gradient matching"),
        ("prototype_contrast", "prototype contrast"),
    ):
        assert losses.column(title) == [exact(line["losses"][name]) for line in lines]

    costs = page.tables["costs-rounds"]
    for phase in ("clients", "synthesis", "evaluation", "clients-training"):
        expected = [exact(line["seconds"][phase]) for line in lines]
        assert costs.column(f"s {phase}") == expected
    assert costs.column("bytes up") == [exact(line["bytes"]["up"]) for line in lines]
    gradients = [sum(line["bytes"]["class_gradients"]) for line in lines]
    assert costs.column("bytes of statistics") == [exact(n) for n in gradients]

    results = page.tables["results-table"]
    assert results.texts[0][0] == "re-trained head, last round"
    assert results.texts[1][0] == "re-trained head, mean of both rounds"
    final = lines[-1]["accuracy"]["retrained"]
    assert results.column("balanced")[0] == exact(final["balanced"])
    assert results.column("few")[0] == exact(final["few"])
    mean = statistics.fmean(
        line["accuracy"]["retrained"]["balanced"] for line in lines
    )  # of all, since there are fewer than five
    assert results.column("balanced")[1] == exact(mean)
    teacher = run.facts["teacher"]["zero_shot"]["balanced"]
    assert results.column("balanced")[-1] == exact(teacher)


def test_classes_stand_by_frequency_against_fedavg(
    run: FinishedRun, runs: dict[str, FinishedRun], page: Page
) -> None:
    table = page.tables["classes-table"]
    counts = run.facts["train_images_per_class"]
    assert table.column("training images") == [
        str(count) for count in sorted(counts, reverse=True)
    ]
    names = [row[0] for row in table.texts]
    for title, other, head in (
        ("CLIP2FL, re-trained head", run, "retrained"),
        ("CLIP2FL, the model's own head", run, "fedavg"),
        ("baseline FedAvg", runs["fedavg"], "fedavg"),
    ):
        for name, value in zip(names, table.column(title), strict=True):
            c = run.class_names.index(name)
            expected = statistics.fmean(
                line["accuracy"][head]["per_class"][c] for line in other.rounds
            )
            assert value == exact(expected)


def test_clients_and_confusion_are_the_artifacts(run: FinishedRun, page: Page) -> None:
    tables = page.tables
    held = load_file(run.folder / "artifacts.safetensors")["clients_by_class"]
    for c, name in enumerate(run.class_names):
        assert tables["clients-table"].column(name) == [
            str(n) for n in held[:, c].tolist()
        ]
    confusion = tables["confusion-table"]
    assert confusion.column("test images") == ["3"] * len(run.class_names)
    for row, name in enumerate(line[0] for line in confusion.texts):
        percent = confusion.column(name)[row]
        c = run.class_names.index(name)
        share = run.rounds[-1]["accuracy"]["retrained"]["per_class"][c]
        assert float(str(percent)) == pytest.approx(share, abs=1e-3)
        assert sum(
            float(str(value)) for value in confusion.values[row][1:-1]
        ) == pytest.approx(100)


def test_configuration_is_whole_and_shows_what_was_changed(
    run: FinishedRun, page: Page
) -> None:
    table = page.tables["configuration-table"]
    stored = json.loads((run.folder / "config.json").read_text("utf-8"))["config"]
    assert {row[0]: json.loads(row[1]) for row in table.texts} == stored
    usual = defaults()
    assert page.tables["changed-table"].texts == [
        [key, json.dumps(value), json.dumps(usual[key])]
        for key, value in stored.items()
        if value != usual[key] and not key.startswith("run.")
    ]


def test_versions_name_the_code_of_client_and_server(
    run: FinishedRun, page: Page
) -> None:
    found = dict(page.tables["versions-table"].texts)
    assert found["client and server code"] == code_fingerprint(packages=ALL_CODE)
    assert found["client code"] == code_fingerprint()


def test_comparison_report_warns_of_runs_of_different_code(tmp_path: Path) -> None:
    runs = {name: [write_run(tmp_path / name, [60.0])] for name in ("one", "two")}
    change_facts(tmp_path / "two", all_code="f00")
    write = partial(write_comparison_report, tmp_path, "x", baseline="one")
    assert "Different code" not in write(runs=runs).read_text("utf-8")
    runs["two"] = [FinishedRun.read(tmp_path / "two")]
    text = write(runs=runs).read_text("utf-8")
    assert "(client and server code unknown: one; f00: two)" in text
    assert "Client and server code: f00." in text


def test_headline_has_the_numbers_of_the_last_round(
    run: FinishedRun, runs: dict[str, FinishedRun], page: Page
) -> None:
    last = (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
    delivered = json.loads(last)["accuracy"]["retrained"]
    facts = json.loads((run.folder / "config.json").read_text("utf-8"))
    teacher = facts["teacher"]["zero_shot"]["balanced"]
    assert page.numbers == {
        "balanced accuracy": exact(delivered["balanced"]),
        "on rare (few-shot) classes": exact(delivered["few"]),
        "its teacher demo, zero-shot": exact(teacher),
    }
    baseline = runs["fedavg"].rounds[-1]["accuracy"]["fedavg"]["balanced"]
    assert page.headline == (
        f"CLIP2FL reaches {delivered['balanced']:.1f} % balanced, "
        f"{delivered['few']:.1f} % on rare classes; its teacher {teacher:.1f} %; "
        f"the baseline FedAvg {baseline:.1f} %."
    )


def test_headline_leaves_out_what_a_run_does_not_have(tmp_path: Path) -> None:
    """Without rare classes and a teacher, other numbers take their places."""
    run = write_run(tmp_path / "run", [50.0])
    del run.facts["teacher"]
    run.rounds[-1]["accuracy"]["fedavg"] |= {"few": None, "top1": 60.0, "many": 70.0}
    page = Page(write_run_report(run))
    assert page.headline == "FedAvg reaches 50.0 % balanced."
    assert page.numbers == {
        "balanced accuracy": "50.0",
        "top-1 accuracy": "60.0",
        "on frequent (many-shot) classes": "70.0",
    }


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (1, "the only round"),
        (2, "both rounds"),
        (3, "all 3 rounds"),
        (5, "all 5 rounds"),
        (6, "the last 5 rounds"),
    ],
)
def test_words_fit_the_number_of_rounds(
    tmp_path: Path, rounds: int, expected: str
) -> None:
    """A short run does not claim a mean of five rounds."""
    run = write_run(tmp_path / "x-seed1", [40.0] * rounds)
    text = write_run_report(run).read_text("utf-8")
    assert f"ean of {expected}" in text
    assert ("last 5" in text) == (rounds > 5)
    names = [
        row[0] for row in Page(run.folder / "report.html").tables["results-table"].texts
    ]
    mean = f"the model's own head, mean of {expected}"
    assert (mean in names) == (rounds > 1)  # one round is its own mean
    text = write_comparison_report(tmp_path, "x", {"x": [run]}, "x").read_text("utf-8")
    assert f"mean of {expected} ±" in text
    assert ("last 5" in text) == (rounds > 5)


def test_hover_shows_values(run: FinishedRun, page: Page) -> None:
    lines = [
        f"{title}: {run.rounds[0]['accuracy'][head]['balanced']:.1f}"
        for title, head in (
            ("CLIP2FL, re-trained head", "retrained"),
            ("CLIP2FL, the model's own head", "fedavg"),
        )
    ]
    (hint,) = [h for h in page.hints if h.startswith("\n".join(["round 1", *lines]))]
    assert hint.splitlines()[-1].startswith("teacher demo: ")
    true, predicted = run.class_names[0], run.class_names[1]
    matrix = run.artifacts["confusion.retrained"]
    count, total = int(matrix[0, 1]), int(matrix[0].sum())
    assert (
        f"true class {true}, predicted class {predicted}: "
        f"{100 * count / total:.1f} % ({count} images)"
    ) in page.hints


def test_page_is_self_contained_and_pictures_lie_beside_it(
    run: FinishedRun, page: Page
) -> None:
    assert len(page.figures) == len(PICTURES)
    assert all(page.figures)
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
    text = (run.folder / "report.html").read_text("utf-8")
    assert "://" not in text
    assert "<script" not in text
    assert not re.search(r"url\((?!#)|@import", text)
    # Parts of a drawing refer to parts of the same drawing.
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert {one or other for one, other in used} <= set(ids)
    for name in PICTURES:
        with Image.open(run.folder / "figures" / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] > 600
        assert pixels.std() > 5, name  # something is drawn
        svg = (run.folder / "figures" / f"{name}.svg").read_text("utf-8")
        assert "<svg" in svg


def test_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [50.0, 60.0])
    first = write_run_report(run).read_bytes()
    assert write_run_report(run).read_bytes() == first


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", [50.0], teacher__prompt="<script>alert(1)</script>{class}"
    )
    html = write_run_report(run).read_text("utf-8")
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_method_without_features_and_old_run_say_so(tmp_path: Path) -> None:
    """The report of a run without artifacts has all sections."""
    page = write_run_report(write_run(tmp_path / "run", [50.0, 60.0]))
    assert Page(page).sections == SECTIONS
    text = page.read_text("utf-8")
    assert "FedAvg has no federated features." in text
    assert text.count("The run is of a version that did not keep it.") == 2


def test_privacy_spent_is_told_with_the_results(tmp_path: Path) -> None:
    """The report shows the epsilon in total, for the worst case, and per round."""
    run = write_run(tmp_path / "run", [10.0, 20.0])
    assert "differential privacy" not in write_run_report(run).read_text("utf-8")
    run.rounds[-1]["privacy"] = {
        "class_gradients": {
            "epsilon_round": 1.256,
            "epsilon_total": 7.994,
            "delta": 1e-05,
        }
    }
    page = write_run_report(run).read_text("utf-8")
    assert "(7.99, 1e-05)-differential privacy for the client asked most often" in page
    assert "1.26 a round" in page


def test_comparison_report(runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    copies = {
        variant: [copied(run, tmp_path / f"{variant}-seed7")]
        for variant, run in runs.items()
    }
    failures = [Failure("clip2fl", 9, "out of memory")]
    file = write_comparison_report(tmp_path, "x", copies, "fedavg", failures)
    page = Page(file)
    assert page.sections == [*SECTIONS, "runs"]
    own = {
        variant: runs[variant].last(run.heads[0], "balanced")
        for variant, run in runs.items()
    }
    ranked = sorted(own, key=lambda variant: -(own[variant] or 0.0))
    results = page.tables["results-table"]
    assert [row[0] for row in results.texts] == [
        *ranked,
        "clip2fl",  # the failure
        "teacher demo, zero-shot",
    ]
    assert results.texts[3][-1] == "failed: seed 9: out of memory"
    assert "1 run failed: clip2fl, seed 9: out of memory." in file.read_text("utf-8")
    assert results.column("balanced")[:3] == [exact(own[variant]) for variant in ranked]
    baseline, best = own["fedavg"], own[ranked[0]]
    assert baseline is not None and best is not None
    differences = {
        row[0]: row[results.header.index("difference")] for row in results.texts[:3]
    }
    assert differences == {
        variant: "-" if variant == "fedavg" else f"{value - baseline:+.1f}"
        for variant, value in own.items()
        if value is not None
    }
    for title, cost in (
        ("minutes", lambda run: run.wall_seconds() / 60),
        (
            "MB up",
            lambda run: statistics.fmean(r["bytes"]["up"] for r in run.rounds) / 1e6,
        ),
    ):
        assert [float(str(v)) for v in results.column(title)[:3]] == pytest.approx(
            [cost(runs[variant]) for variant in ranked]
        )
    assert page.numbers["balanced accuracy"] == exact(best)
    few = runs[ranked[0]].last(runs[ranked[0]].heads[0], "few")
    assert page.numbers["on rare (few-shot) classes"] == exact(few)
    assert page.headline.startswith(
        f"{ranked[0]} has the highest balanced accuracy: {best:.1f} %, {few:.1f} % on"
    )
    others = page.tables["others"]
    assert [(row[0], row[others.header.index("head")]) for row in others.texts] == [
        (variant, "the model's own head") for variant in ("clip2fl", "creff")
    ]
    rows = [(variant, head) for variant, run in runs.items() for head in run.heads]
    last = page.tables["accuracy-runs"]
    finals = [runs[v].rounds[-1]["accuracy"][h]["balanced"] for v, h in rows]
    assert last.column("balanced") == [exact(value) for value in finals]
    differing = page.tables["differences-table"]
    assert differing.header == ["variant", "method"]
    assert differing.texts == [[v, json.dumps(v)] for v in runs]
    links = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert links == [f"./{variant}-seed7/report.html" for variant in runs]


def test_a_method_has_the_same_colour_in_all_figures(
    runs: dict[str, FinishedRun], page: Page, tmp_path: Path
) -> None:
    """In the figures of a comparison, and in the report of a run."""
    copies = {
        variant: [copied(run, tmp_path / f"{variant}-seed7")]
        for variant, run in runs.items()
    }
    comparison = Page(write_comparison_report(tmp_path, "x", copies, "fedavg"))
    expected = {variant: f"var(--series-{METHODS.index(variant)})" for variant in runs}
    # Ranking, accuracy, classes, losses.
    complete = [c for c in comparison.colours if expected.keys() <= c.keys()]
    assert len(complete) == 4
    for colours in complete:
        assert {variant: colours[variant] for variant in runs} == expected
    named = {
        "CLIP2FL": "clip2fl",
        "CLIP2FL, re-trained head": "clip2fl",
        "CLIP2FL, the model's own head": "clip2fl",
        "baseline FedAvg": "fedavg",
    }
    found = [
        (label, colour)
        for colours in page.colours
        for label, colour in colours.items()
        if label in named
    ]
    assert {label for label, _ in found} == named.keys()
    assert all(colour == expected[named[label]] for label, colour in found)


def test_colours_are_those_of_methods_whatever_else_is_compared() -> None:
    fixed = styles({method: method for method in METHODS})
    assert len({style.colour for style in fixed.values()}) == len(METHODS)
    some = styles({"own": "new", "fedavg": "fedavg", "b": "creff", "c": "creff"})
    assert some["fedavg"] == fixed["fedavg"]
    assert some["b"] == fixed["creff"]  # the only method of this name's
    assert len(set(some.values())) == 4


@given(st.lists(st.sampled_from([*METHODS, "new", "other"]), max_size=25))
def test_no_two_names_have_the_same_style(methods: list[str]) -> None:
    names = {f"{method}-{n}": method for n, method in enumerate(methods)}
    assert len(set(styles(names).values())) == len(names)


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2.2."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return the contrast of WCAG 2.2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["ink", "muted"])
def test_text_can_be_read_on_both_backgrounds(name: str) -> None:
    """WCAG wants 4.5 for text."""
    surface = VARIABLES["surface"]
    assert contrast(VARIABLES[name].light, surface.light) >= 4.5
    assert contrast(VARIABLES[name].dark, surface.dark) >= 4.5


@pytest.mark.parametrize("colour", SERIES)
def test_lines_can_be_seen_on_both_backgrounds(colour: Colour) -> None:
    """WCAG wants 3 for graphics; the lightest of Okabe and Ito have 2 on white."""
    surface = VARIABLES["surface"]
    assert contrast(colour.light, surface.light) >= 2
    assert contrast(colour.dark, surface.dark) >= 4.5


def test_lines_differ_in_colour_or_dashes() -> None:
    """There are as many styles as pairs of colour and dashes."""
    pairs = len(SERIES) * len(DASHES)
    assert len({(styled(n).colour, styled(n).dash) for n in range(pairs)}) == pairs


def test_curves_aside_are_grey_and_share_an_entry_of_the_legend() -> None:
    values = {"a": 1.0, "b": 2.0, "c": 3.0}
    style_of = {"a": IN_BACKGROUND, "b": styled(0), "c": IN_BACKGROUND}
    curves = [
        Curve(label, np.full((1, 3), value), style_of[label])
        for label, value in values.items()
    ]
    points = [
        Points(label, [value], style_of[label]) for label, value in values.items()
    ]
    rounds = over_rounds({"first": curves, "second": curves})
    classes = by_class(points, ["the class"], [5])
    grey, blue = IN_BACKGROUND.colour.light, SERIES[0].light
    # The values of one are on its y axis, of the other on its x axis.
    for chart, direction in ((rounds, 1), (classes, 0)):
        assert [key.label for key in chart.keys] == ["b", "2 others"]
        figure = chart.figure()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["b", "2 others"]
        for axis in figure.axes:
            drawn = {
                float(np.asarray(line.get_xydata())[0, direction]): line.get_color()
                for line in axis.lines
            }
            assert drawn == {1.0: grey, 2.0: blue, 3.0: grey}


def test_panels_of_accuracy_share_their_axis() -> None:
    curves = [[Curve("a", np.full((1, 3), value), styled(0))] for value in (5.0, 60.0)]
    chart = over_rounds({"one": curves[0], "other": curves[1]}, top=70)
    limits = {part.figure.axes[0].get_ylim() for part in chart.parts()}
    assert len(limits) == 1
    assert limits == {axis.get_ylim() for axis in chart.figure().axes}


def test_curve_bridges_rounds_without_a_value() -> None:
    values = np.array([[1.0, np.nan, 3.0, np.nan]])
    (part,) = over_rounds({"": [Curve("a", values, styled(0))]}).parts()
    (line,) = part.figure.axes[0].lines
    assert np.asarray(line.get_xydata()).tolist() == [[1, 1], [3, 3]]
    assert list(part.hints.values()) == [
        "round 1\na: 1",
        "round 2",
        "round 3\na: 3",
        "round 4",
    ]


def test_labels_of_close_markers_do_not_cover_one_another() -> None:
    places = np.array([[100.0, 100.0], [103.0, 101.0], [101.0, 108.0], [99.0, 92.0]])
    texts = ["circle", "square", "pentagon", "star"]
    labels = [
        (x + dx, y + dy, 2.4 * len(text))
        for (x, y), (dx, dy), text in zip(
            places, label_shifts(places, texts), texts, strict=True
        )
    ]
    for n, (x, y, half) in enumerate(labels):
        for other_x, other_y, other_half in labels[:n]:
            apart = abs(x - other_x) >= half + other_half
            assert apart or abs(y - other_y) >= LABEL_HEIGHT


def test_minutes_of_shared_training_are_no_cost(
    runs: dict[str, FinishedRun], tmp_path: Path
) -> None:
    copies = {
        variant: [copied(run, tmp_path / f"{variant}-seed7")]
        for variant, run in runs.items()
    }
    for shared in (False, True):
        copies["clip2fl"][0].facts["shared_training"] = shared
        file = write_comparison_report(tmp_path, "x", copies, "fedavg")
        assert ("minutes" in Page(file).tables["results-table"].header) is not shared
        assert ("Minutes a run" in file.read_text("utf-8")) is not shared
        assert ("trained only once" in file.read_text("utf-8")) is shared


def test_of_many_variants_the_baseline_and_the_best_are_in_colour(
    tmp_path: Path,
) -> None:
    """The baseline comes first, then variants with two seeds, then accuracy."""
    accuracy = {f"v{n:02}": float(n) for n in range(12)}
    runs = {
        variant: [write_run(tmp_path / f"{variant}-seed1", [value], seed=1)]
        for variant, value in accuracy.items()
    }
    runs["v01"].append(write_run(tmp_path / "v01-seed2", [1.0], seed=2))
    page = write_comparison_report(tmp_path, "x", runs, "v00").read_text("utf-8")
    assert "In grey, here and below: v02, v03." in page
    few = {variant: runs[variant] for variant in list(runs)[:10]}
    assert "In grey" not in write_comparison_report(
        tmp_path, "x", few, "v00"
    ).read_text("utf-8")


def test_what_is_no_complete_run_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [50.0])
    with pytest.raises(RunError, match="is no run's folder: it has no config.json"):
        FinishedRun.read(tmp_path)
    (run.folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match="holds a run that did not end"):
        FinishedRun.read(run.folder)


def test_plane_shows_what_separates_classes() -> None:
    """Two class means differ in one direction; noise fills the others."""
    rng = np.random.default_rng(0)
    features = rng.normal(scale=0.1, size=(2, 50, 20))
    features[0, :, 3] += 5
    features[1, :, 3] -= 5
    prototypes = np.eye(20)[[3, 7]]
    points, of_text = principal_plane(features, prototypes)
    means = points.mean(axis=1)
    spread = points.std(axis=1).max()
    assert np.linalg.norm(means[0] - means[1]) > 20 * spread
    assert of_text is not None
    assert shares_of_distances(features, prototypes) == pytest.approx([1, 1], abs=0.02)
    # Two centred prototypes lie on one line: the plane holds their whole distance.
    assert np.linalg.norm(of_text[0] - of_text[1]) == pytest.approx(2**0.5)


def test_thousand_classes_give_a_page_of_reasonable_size(
    runs: dict[str, FinishedRun], tmp_path: Path
) -> None:
    """A confusion matrix of a million cells is a picture, not a table."""
    run = copied(runs["fedavg"], tmp_path / "run")
    assert run.artifacts  # read before there are more classes
    classes, clients = 1000, 30
    rng = np.random.default_rng(0)
    run.facts["class_names"] = [f"class {c}" for c in range(classes)]
    run.facts["train_images_per_class"] = rng.integers(5, 500, classes).tolist()
    for line in run.rounds:
        line["accuracy"]["fedavg"]["per_class"] = rng.uniform(0, 100, classes).tolist()
    run.artifacts["clients_by_class"] = torch.ones(clients, classes, dtype=torch.int64)
    run.artifacts["confusion.fedavg"] = torch.eye(classes, dtype=torch.int64)
    file = write_run_report(run)
    page = Page(file)
    assert page.sections == SECTIONS
    assert len(page.tables["classes-table"].texts) == classes
    assert not {"clients-table", "confusion-table"} & set(page.tables)
    assert file.stat().st_size < 4_000_000


def rewritten(run: FinishedRun, *accuracies: dict[str, object]) -> FinishedRun:
    """Return the run with other heads in its rounds."""
    for line, heads in zip(run.rounds, accuracies, strict=True):
        line["accuracy"] = heads
        line["losses"] = {}
    text = "\n".join(json.dumps(line) for line in run.rounds)
    (run.folder / "metrics.jsonl").write_text(text)
    return FinishedRun.read(run.folder)


def test_rounds_that_no_site_evaluated_are_left_out(tmp_path: Path) -> None:
    """The last round is included; and a head may appear after the first round."""
    run = rewritten(
        write_run(tmp_path / "run", [0.0] * 4),
        {"fedavg": accuracy(10.0)},
        {"retrained": accuracy(40.0), "fedavg": accuracy(20.0)},
        {},
        {},
    )
    assert run.heads == ["retrained", "fedavg"]
    assert run.last("retrained", "balanced") == 40.0
    assert run.last("fedavg", "balanced") == 15.0
    assert run.per_class("fedavg") == [15.0, 17.0]
    assert run.final("fedavg")["top1"] == 20.0
    page = Page(write_run_report(run))
    assert page.sections == SECTIONS
    assert page.tables["results-table"].column("balanced")[:2] == ["40.0", "40.0"]
    rounds = page.tables["accuracy-rounds"]
    assert rounds.column("the model's own head: balanced") == [
        "10.0",
        "20.0",
        None,
        None,
    ]
    assert rounds.column("re-trained head: balanced") == [None, "40.0", None, None]
    assert "No round has a loss." in (run.folder / "report.html").read_text("utf-8")


def test_held_out_images_need_no_field_in_rounds_without_an_accuracy(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", [50.0, 60.0], evaluation__tuning_share=0.2)
    first, last = (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    parts = {"accuracy_tuning", "accuracy_held_out"}
    kept = {k: v for k, v in json.loads(first).items() if k not in parts}
    lines = [json.dumps({**kept, "accuracy": {}}), last]
    (run.folder / "metrics.jsonl").write_text("\n".join(lines), "utf-8")
    read = FinishedRun.read(run.folder).on(Images.HELD_OUT)
    page = Page(write_run_report(read))
    assert page.tables["results-table"].column("balanced")[0] == "59.0"


def test_summed_sites_need_no_names_and_no_sum_in_each_round(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [50.0, 60.0], aggregation__secure=True)
    file = run.folder / "metrics.jsonl"
    first, last = file.read_text("utf-8").splitlines()
    summed = {"sites": 3, "images": 40}
    more = {"summed_evaluation": summed, "clients": ["site-a", 7]}
    file.write_text(f"{first}\n{json.dumps({**json.loads(last), **more})}", "utf-8")
    report = write_run_report(FinishedRun.read(run.folder))
    assert "the sum of 3 sites with 40 validation" in report.read_text("utf-8")
    table = Page(report).tables["sites-table"]
    assert [row[:2] for row in table.texts] == [["7", "1"], ["site-a", "1"]]


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 4, 3), (3, 1, 1), (2, 1, 5)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_features_of_any_number_of_dimensions_are_drawn(
    shape: tuple[int, int, int], value: float
) -> None:
    features = np.full(shape, value)
    points, prototypes = principal_plane(features, features[:, 0])
    assert points.shape == (*shape[:2], 2)
    assert np.isfinite(points).all()
    assert prototypes is not None
    assert np.isfinite(prototypes).all()


def test_reports_are_of_the_held_out_images(tmp_path: Path) -> None:
    """Held out: 1 point below the accuracy on all images, which stands beside it."""
    whole = {
        name: [write_run(tmp_path / name, values, evaluation__tuning_share=0.2)]
        for name, values in (("plain", [40.0, 50.0]), ("better", [60.0, 70.0]))
    }
    runs = {name: [run.on(Images.HELD_OUT) for run in g] for name, g in whole.items()}
    said = "16 test images that had no part in choosing settings; balanced accuracy on"
    file = write_run_report(runs["plain"][0])
    assert said in file.read_text("utf-8")
    page = Page(file)
    results = page.tables["results-table"]
    assert results.column("balanced")[:3] == ["49.0", "44.0", "50.0"]
    assert page.tables["accuracy-rounds"].values[1][1:] == ["49.0"] * 5
    file = write_comparison_report(tmp_path, "x", runs, "plain")
    assert said in file.read_text("utf-8")
    results = Page(file).tables["results-table"]
    assert results.column("balanced")[:2] == ["64.0", "44.0"]
    assert results.column("balanced, all images")[:2] == ["65.0", "45.0"]
    assert [len(row) for row in results.texts] == [len(results.header)] * 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4567, "0.457"), (3.94, "3.94"), (99.94, "99.9"), (1521.4, "1,521"), (0, "0")],
)
def test_seconds_are_never_a_power_of_ten(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_each_privacy_mechanism_has_words() -> None:
    accounts: set[str] = set()
    for noise in (
        "privacy__model_noise_multiplier",
        "privacy__update_noise_multiplier",
    ):
        privacy = run_config(
            privacy__gradient_clip_norm=1.0,
            privacy__gradient_noise_multiplier=1.0,
            privacy__moment_clip_norm=1.0,
            privacy__moment_noise_multiplier=1.0,
            aggregation__max_update_norm=1.0,
            **{noise: 1.0},
        ).privacy
        accounts |= PrivacyLedger.of(privacy, PROTECTED_FIELDS).spent().keys()
    assert accounts == set(PROTECTED)


def test_plane_of_many_directions_holds_little() -> None:
    """Twenty orthogonal class means: the plane holds two of nineteen directions."""
    features = np.eye(20)[:, None, :]
    (share,) = shares_of_distances(features, None)
    assert share == pytest.approx(2 / 19)


def test_variant_of_fewer_seeds_is_not_called_the_best(tmp_path: Path) -> None:
    """At seed 1, which all have, it is worse than the baseline."""
    values = {"base": [70.0, 60.0, 61.0], "good": [72.0, 64.0, 65.0], "one": [69.0]}
    runs = {
        name: [
            write_run(tmp_path / f"{name}{seed}", [value], seed=seed)
            for seed, value in enumerate(found, start=1)
        ]
        for name, found in values.items()
    }
    page = write_comparison_report(tmp_path, "x", runs, "base").read_text("utf-8")
    text = page.replace("&nbsp;", " ")
    assert "good has the highest balanced accuracy of the 2 variants with 3 seeds" in (
        text
    )
    assert "the best balanced accuracy of those with the most seeds" in text


def test_model_that_was_not_evaluated_is_not_said_to_be_what_is_shown(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", [60.0, 70.0, 80.0])
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"accuracy": {}}
    (run.folder / "metrics.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps(last)])
    )
    page = write_run_report(FinishedRun.read(run.folder)).read_text("utf-8")
    text = page.replace("&nbsp;", " ")
    assert "in round 2, the last that was evaluated" in text
    assert "The last round was not evaluated." in text


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"shot_groups": {"rule": "rank", "many": [0], "medium": [], "few": [1]}},
            "other many-, medium- and few-shot classes",
        ),
        ({"test_images": 30}, "has 30 test images, but"),
    ],
)
def test_report_sets_no_run_against_one_of_another_test(
    tmp_path: Path, facts: dict[str, object], said: str
) -> None:
    """Few-shot accuracy would be of other classes, as with another imbalance factor."""
    for name in ("a", "b"):
        write_run(tmp_path / name, [50.0])
    change_facts(tmp_path / "b", **facts)
    with pytest.raises(RunError, match=said):
        Run(tmp_path / "a").report(Run(tmp_path / "b"))


def test_every_way_to_a_runs_report_shows_the_held_out_images(tmp_path: Path) -> None:
    """Of which `write_run` makes accuracy 1 point lower than on all images."""
    folder = write_run(tmp_path / "a", [60.0], evaluation__tuning_share=0.2).folder
    for write in (lambda: _report_run(folder), Run(folder).report):
        write()
        text = (folder / "report.html").read_text("utf-8").replace("&nbsp;", " ")
        assert "reaches 59.0 % balanced" in text and "teacher 90.0 %" in text
        (folder / "report.html").unlink()
    with pytest.raises(RunError, match="other test images are held out"):
        Run(folder).report(Run(write_run(tmp_path / "b", [50.0]).folder))
