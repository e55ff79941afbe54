"""Reports: every section is there, with the numbers of the run's files."""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clip2fl_cli.figures import (
    COLOURS,
    DASHES,
    GREY,
    Curve,
    by_class,
    over_rounds,
    principal_plane,
    styled,
)
from clip2fl_cli.report import write_comparison_report, write_run_report
from clip2fl_cli.run_schema import Images
from clip2fl_cli.runs import FinishedRun, RunError
from tests.clip2fl_cli.html_page import Page
from tests.clip2fl_cli.made_up import accuracy, write_run

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
    for head in ("retrained", "fedavg"):
        for column, title in COLUMNS.items():
            expected = [exact(line["accuracy"][head][column]) for line in lines]
            assert accuracy.column(f"{head} {title}") == expected

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
    assert costs.column("bytes of class gradients") == [exact(n) for n in gradients]

    results = page.tables["results"]
    assert results.texts[0][:2] == ["clip2fl, retrained head", "last round"]
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
        ("retrained head", run, "retrained"),
        ("fedavg head", run, "fedavg"),
        ("run fedavg", runs["fedavg"], "fedavg"),
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
    diagonal = {row[0]: row for row in confusion.texts}
    for c, name in enumerate(run.class_names):
        hits = int(diagonal[name][confusion.header.index(name)])
        share = run.rounds[-1]["accuracy"]["retrained"]["per_class"][c]
        assert 100 * hits / 3 == pytest.approx(share, abs=1e-3)  # 3 test images each


def test_configuration_is_whole(run: FinishedRun, page: Page) -> None:
    table = page.tables["configuration-table"]
    stored = json.loads((run.folder / "config.json").read_text("utf-8"))["config"]
    assert {row[0]: json.loads(row[1]) for row in table.texts} == stored


def test_page_is_self_contained_and_pictures_lie_beside_it(
    run: FinishedRun, page: Page
) -> None:
    assert len(page.images) == len(PICTURES)
    for image in page.images:
        assert str(image["src"]).startswith("data:image/svg+xml;base64,")
        assert image["alt"]
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
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
    assert "fedavg has no federated features." in text
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
    page = Page(write_comparison_report(tmp_path, "x", copies, "fedavg"))
    assert page.sections == [*SECTIONS, "runs"]
    results = page.tables["results"]
    rows = [(variant, head) for variant, run in runs.items() for head in run.heads]
    assert [tuple(row[:2]) for row in results.texts[:-1]] == rows
    own = [runs[variant].last(head, "balanced") for variant, head in rows]
    assert results.column("balanced")[:-1] == [exact(value) for value in own]
    baseline = runs["fedavg"].last("fedavg", "balanced")
    assert own[0] is not None and baseline is not None
    assert results.texts[0][2] == f"{own[0] - baseline:+.1f}"
    last = page.tables["accuracy-runs"]
    finals = [runs[v].rounds[-1]["accuracy"][h]["balanced"] for v, h in rows]
    assert last.column("balanced") == [exact(value) for value in finals]
    differing = page.tables["differences-table"]
    assert differing.header == ["variant", "method"]
    assert differing.texts == [[v, json.dumps(v)] for v in runs]
    links = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert links == [f"./{variant}-seed7/report.html" for variant in runs]


def test_lines_differ_in_colour_or_dashes() -> None:
    """There are as many styles as pairs of colour and dashes."""
    pairs = len(COLOURS) * len(DASHES)
    assert len({tuple(styled(n).values()) for n in range(pairs)}) == pairs


def test_curves_aside_are_grey_and_share_an_entry_of_the_legend() -> None:
    values = {"a": 1.0, "b": 2.0, "c": 3.0}
    curves = [Curve(label, np.full((1, 3), value)) for label, value in values.items()]
    per_class = {label: [value] for label, value in values.items()}
    aside = ["a", "c"]
    rounds = over_rounds({"first": curves, "second": curves}, aside)
    classes = by_class(per_class, ["the class"], [5], aside)
    # The values of one are on its y axis, of the other on its x axis.
    for figure, direction in ((rounds, 1), (classes, 0)):
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["b", "2 others"]
        for axis in figure.axes:
            drawn = {
                float(np.asarray(line.get_xydata())[0, direction]): line.get_color()
                for line in axis.lines
            }
            assert drawn == {1.0: GREY, 2.0: COLOURS[0], 3.0: GREY}


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
    assert "In grey, here and below: v03, v02." in page
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
    assert page.tables["results"].column("balanced")[:2] == ["40.0", "40.0"]
    rounds = page.tables["accuracy-rounds"]
    assert rounds.column("fedavg balanced") == ["10.0", "20.0", None, None]
    assert rounds.column("retrained balanced") == [None, "40.0", None, None]
    assert "No round has a loss." in (run.folder / "report.html").read_text("utf-8")


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
    assert page.tables["results"].column("balanced")[:3] == ["49.0", "44.0", "50.0"]
    assert page.tables["accuracy-rounds"].values[1][1:] == ["49.0"] * 5
    file = write_comparison_report(tmp_path, "x", runs, "plain")
    assert said in file.read_text("utf-8")
    results = Page(file).tables["results"]
    assert results.column("balanced")[:2] == ["44.0", "64.0"]
    assert results.column("balanced, all images")[:2] == ["45.0", "65.0"]
    assert [len(row) for row in results.texts] == [len(results.header)] * 3
