"""The documentation site builds strictly, and its pages load nothing from elsewhere."""

import doctest
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.defaults import ROOT

# Attributes whose file a browser loads without being asked.
LOADED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}


class Resources(HTMLParser):
    """Collects what a page loads by itself, and where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if LOADED.get(tag) in given:
            self.loaded.append(given[LOADED[tag]])


def resources(page: Path) -> Resources:
    found = Resources()
    found.feed(page.read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a strictly built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """No font, script, style or picture of another machine."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        for address in resources(page).loaded:
            assert not re.match(r"[a-z]+:|//", address), f"{page.name}: {address}"
            # The error page has addresses from the site's root.
            if page.name != "404.html":
                file = page.parent / address.partition("?")[0]
                assert file.is_file(), f"{page.name}: {address}"
    for style in site.rglob("*.css"):
        imported = re.findall(
            r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", style.read_text()
        )
        assert not [i for i in imported if re.match(r"https?:|//", i)], style


def test_links_between_pages_lead_to_files(site: Path) -> None:
    """To measured results as well, which lie outside docs/."""
    outside = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for link in resources(page).links:
            if re.match(r"[a-z]+:|#", link):
                continue
            file = (page.parent / link.partition("#")[0]).resolve()
            assert file.is_file(), f"{page.name}: {link}"
            outside += "/repository/benchmarks/results/" in str(file)
    assert outside > 10


def test_api_pages_have_signatures_and_docstrings(site: Path) -> None:
    """Read from the sources, without importing them."""
    page = (site / "api" / "data.html").read_text("utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert "imbalance_factor: float" in text
    assert "For each client the indices into labels of its samples" in text


@pytest.mark.parametrize("name", ["data", "models", "client", "server"])
def test_examples_print_what_the_page_shows(name: str) -> None:
    page = ROOT / "docs" / "api" / f"{name}.md"
    text = re.sub(r"^```.*$", "", page.read_text("utf-8"), flags=re.M)
    examples = doctest.DocTestParser().get_doctest(text, {}, name, str(page), 0)
    assert examples.examples
    outputs: list[str] = []
    results = doctest.DocTestRunner().run(examples, out=outputs.append)
    assert results.failed == 0, "".join(outputs)
