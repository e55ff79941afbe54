"""The content of a report's page, read by the standard library's parser."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class Table:
    """A table: texts and exact values of its cells, row by row."""

    header: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    values: list[list[str | None]] = field(default_factory=list)

    def column(self, title: str) -> list[str | None]:
        """Return the exact values below a title."""
        place = self.header.index(title)
        return [row[place] for row in self.values]


class Page(HTMLParser):
    """Sections, tables by their id, pictures and all addresses of a page.

    Parameters
    ----------
    file : Path
        The page.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.tables: dict[str, Table] = {}
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.headings: dict[str, str] = {}
        self._open: list[str] = []
        self._table = Table()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the start of an element."""
        found = dict(attrs)
        self._open.append(tag)
        if tag == "section":
            self.sections.append(str(found["id"]))
        elif tag == "table":
            self._table = self.tables[str(found["id"])] = Table()
        elif tag == "th":
            self._table.header.append("")
        elif tag == "tr":
            self._table.texts.append([])
            self._table.values.append([])
        elif tag == "td":
            self._table.texts[-1].append("")
            self._table.values[-1].append(found.get("data-value"))
        elif tag == "img":
            self.images.append(found)
        for name in ("src", "href"):
            if found.get(name):
                self.addresses.append(str(found[name]))

    def handle_endtag(self, tag: str) -> None:
        """Drop the header row, which has no cells."""
        if tag == "thead":
            self._table.texts.clear()
            self._table.values.clear()

    def handle_data(self, data: str) -> None:
        """Add text to the current cell or heading."""
        tag = self._open[-1] if self._open else ""
        if tag == "th":
            self._table.header[-1] += data.strip()
        elif tag == "td" or (tag == "a" and self._table.texts and data.strip()):
            if self._table.texts and self._table.texts[-1]:
                self._table.texts[-1][-1] += data.strip()
        elif tag == "h2" and data.strip():
            self.headings[self.sections[-1]] = data.strip()
