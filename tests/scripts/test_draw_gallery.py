"""The gallery shows what the program makes, and its pictures stay small."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip2fl_cli.report import write_run_report
from scripts.draw_gallery import (
    FIRST,
    LAST,
    OF_COMPARISON,
    OF_RUN,
    PAGE,
    PICTURES,
    copy_figures,
    shortened,
    with_output,
)
from tests.clip2fl_cli.made_up import write_run
from tests.defaults import ROOT

MOST_BYTES = 1_500_000


def test_page_shows_every_picture_and_each_is_there() -> None:
    page = PAGE.read_text("utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(assets/gallery/([^)]+)\)", page)
    assert sorted(shown) == sorted(path.name for path in PICTURES.iterdir())
    made = {f"demo-{name}.svg" for name in OF_RUN}
    made |= {f"demo-compare-{name}.svg" for name in OF_COMPARISON}
    made |= {"demo-report.png", "demo-compare-report.png", "watch.png"}
    assert set(shown) == made


def test_pictures_are_small() -> None:
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < MOST_BYTES


def test_outputs_begin_with_their_command_and_have_no_path_of_a_machine() -> None:
    page = PAGE.read_text("utf-8")
    blocks = re.findall(r"<!-- output: \w+ -->\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert block.startswith("$ clip2fl ")
        assert not re.search(r"(?<![\w.])/\w", block), block
    assert str(ROOT) not in page


def test_figures_are_those_of_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", [10.0, 20.0])
    write_run_report(run)
    (tmp_path / "copies").mkdir()
    copy_figures(run.folder, ("accuracy", "classes"), tmp_path / "copies")
    copies = {path.name: path.read_bytes() for path in (tmp_path / "copies").iterdir()}
    assert copies == {
        f"demo-{name}.svg": (run.folder / "figures" / f"{name}.svg").read_bytes()
        for name in ("accuracy", "classes")
    }


@given(st.integers(0, 30))
def test_only_rounds_in_the_middle_are_left_out(rounds: int) -> None:
    said = [f"round {n}/{rounds}: 5 clients" for n in range(1, rounds + 1)]
    output = "\n".join(["before", *said, "", "after", ""])
    left = said
    if rounds > FIRST + LAST + 1:
        left = [*said[:FIRST], "...", *said[-LAST:]]
    assert shortened(output) == "\n".join(["before", *left, "", "after", ""])


def test_one_block_changes_and_the_rest_of_the_page_stays() -> None:
    def page(run: str, status: str) -> str:
        block = "<!-- output: {} -->\n\n```text\n{}```\n"
        return f"A\n{block.format('run', run)}B\n{block.format('status', status)}C\n"

    new = with_output(page("old\n", ""), "status", "a \\1 line\nand another\n\n")
    assert new == page("old\n", "a \\1 line\nand another\n")
    assert with_output(new, "run", "new") == page("new\n", "a \\1 line\nand another\n")


def test_missing_block_is_named() -> None:
    with pytest.raises(ValueError, match="0 blocks are called 'nothing'"):
        with_output("A page\n", "nothing", "text")
