"""The output of the command: answers on standard output, the rest on standard error."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from clip2fl_common.shown import shown

# Only answers go to standard output. Names from outside are printed as text, without
# markup and emoji.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

# Longer messages are cut, since values in them may have any length.
MAX_MESSAGE = 2000


def fail(message: str, status: int) -> NoReturn:
    """Print an error and end with an exit status."""
    if len(message) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2
        message = f"{message[:half]} ... {message[-half:]}"
    err.print(f"clip2fl: {message}", style="bold red", soft_wrap=True)
    sys.exit(status)


def answer(text: str) -> None:
    """Print a line of the answer."""
    out.print(shown(text), soft_wrap=True)


def tell_lines(text: str) -> None:
    """Print an error of several lines, such as the end of a log."""
    for line in text.splitlines():
        tell(line, "bold red")


def tell(text: str, style: str | None = None) -> None:
    """Print a line to standard error."""
    err.print(shown(text), style=style, soft_wrap=True)


def answer_file(name: str, path: Path) -> None:
    """Print a file's path, on which a terminal can be clicked."""
    out.print(_linked(name, path), soft_wrap=True)


def answer_address(address: str) -> None:
    """Print the address of a page that this command serves."""
    out.print(Text("Open ").append(address, Style(link=address)), soft_wrap=True)
    # Whoever reads a pipe waits for it.
    out.file.flush()


def tell_file(name: str, path: Path) -> None:
    """Print a file's path to standard error, as `answer_file` does."""
    err.print(_linked(name, path), soft_wrap=True)


def _linked(name: str, path: Path) -> Text:
    link = Style(link=path.absolute().as_uri())
    return Text(f"{name}: ").append(shown(path), link)


def print_json(content: Any) -> None:
    """Print an answer as JSON on one line."""
    out.print(json.dumps(content), soft_wrap=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with names in the first column and numbers in the others."""
    table = Table()
    for number, name in enumerate(header):
        table.add_column(
            Text(shown(name)), justify="right" if number else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    # A table is not cut, even if it is wider than the terminal or goes to a file.
    unlimited = out.options.update(max_width=100_000)
    width = out.measure(table, options=unlimited).maximum
    Console(highlight=False, width=max(width, out.width)).print(table)
