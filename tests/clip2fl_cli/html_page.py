"""The content of a report's page, read by the standard library's parser."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

_COLOUR = re.compile(r"var\(--(?:series-\d|aside)\)")


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
    """Sections, tables by their id, figures, headline and all addresses of a page.

    Parameters
    ----------
    file : Path
        The page.

    Attributes
    ----------
    numbers : dict of str to str
        Exact values of the large numbers on top, by their label.
    figures : list of str
        Alternative texts of the figures.
    colours : list of dict of str to str
        For each figure, the CSS variable of each entry of its legend and of each bar.
    hints : list of str
        Hover texts.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.tables: dict[str, Table] = {}
        self.headline = ""
        self.numbers: dict[str, str] = {}
        self.figures: list[str] = []
        self.colours: list[dict[str, str]] = []
        self.hints: list[str] = []
        self._text = ""  # the last text of a list, a term or a hover text
        self._colour = ""
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
        elif tag == "figure":
            self.figures.append(str(found["aria-label"]))
            self.colours.append({})
        elif tag == "dd":
            self.numbers[self._text] = str(found["data-value"])
        elif tag == "g" and found.get("class") == "hint":
            self.hints.append("")
        elif tag == "path" and (match := _COLOUR.search(str(found.get("style")))):
            self._colour = match[0]
            # A bar: a coloured shape right after its hover text.
            if self._text and self._open[-2] == "g":
                self.colours[-1][self._text.partition(":")[0]] = self._colour
        if tag in ("g", "li"):
            self._text = ""
        for name in ("src", "href"):
            if found.get(name):
                self.addresses.append(str(found[name]))

    def handle_endtag(self, tag: str) -> None:
        """Leave an element, and drop the header row, which has no cells."""
        while self._open and self._open.pop() != tag:
            pass  # an element without an end, such as meta
        if tag == "g":
            self._text = ""
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
        elif tag == "title" and "g" in self._open:
            self.hints[-1] += data
            self._text = self.hints[-1]
        elif tag == "li":
            self.colours[-1][data.strip()] = self._colour
        elif tag == "dt":
            self._text = data.strip()
        elif tag == "p" and not self.headline:
            self.headline = data.strip().replace("\N{NO-BREAK SPACE}", " ")
        elif tag == "h2" and data.strip():
            self.headings[self.sections[-1]] = data.strip()
