"""Hooks of the documentation site: pages outside docs/ become pages of the site.

Pages link to files of the repository that lie outside docs/, such as measured results.
Each Markdown file that is reached this way is added to the site under ``repository/``;
a folder stands for its README.md, and any other file is copied.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ADDED = "repository"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file outside docs/ that pages lead to, directly or by another."""
    waiting = [
        DOCS / file.src_uri for file in files.documentation_pages() if file.src_dir
    ]
    seen: set[Path] = set()
    while waiting:
        source = waiting.pop()
        for target in linked_files(source):
            if target.is_relative_to(DOCS) or target in seen:
                continue
            seen.add(target)
            address = site_path(target)
            if target.suffix == ".md":
                waiting.append(target)
                files.append(
                    File.generated(
                        config,
                        address,
                        content=target.read_text("utf-8"),
                        inclusion=InclusionLevel.NOT_IN_NAV,
                    )
                )
            else:
                files.append(File.generated(config, address, abs_src_path=str(target)))
    return files


def on_page_markdown(
    markdown: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Point links that cross the border of docs/ to the pages of the site."""
    source = source_path(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = resolved(source, link[2])
        if target is None:
            return link[0]
        up = "../" * page.file.src_uri.count("/")
        return f"{link[1]}{up}{site_path(target)}{link[3]}"

    return LINK.sub(moved, markdown)


def linked_files(source: Path) -> Iterator[Path]:
    """Yield the repository's files that a Markdown file links to."""
    for link in LINK.finditer(source.read_text("utf-8")):
        target = resolved(source, link[2])
        if target is not None:
            yield target


def resolved(source: Path, link: str) -> Path | None:
    """Return the file of the repository that a link leads to, a folder's README.md.

    None stands for an address on the web and for a file that is not there, which the
    strict build then names.
    """
    if re.match(r"[a-z]+:", link):
        return None
    target = (source.parent / link).resolve()
    if target.is_dir():
        target /= "README.md"
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def site_path(target: Path) -> str:
    """Return the place of a repository's file among the site's sources."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return f"{ADDED}/{target.relative_to(ROOT).as_posix()}"


def source_path(src_uri: str) -> Path:
    """Return the repository's file behind a source of the site."""
    inside = Path(src_uri)
    if inside.parts[0] == ADDED:
        return ROOT / inside.relative_to(ADDED)
    return DOCS / inside
