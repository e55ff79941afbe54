"""A figure as part of an HTML page: it follows the page's colours and has hover texts.

matplotlib writes SVG for a file of its own. This module writes the drawing again, with
permitted elements and attributes only, and without the parts that a page does not need.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from xml.sax.saxutils import escape, quoteattr

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from clip2fl_cli.colours import VARIABLES

# Hints are groups of shapes with this name and a number.
HINT = "hint-"
_ELEMENTS = frozenset("svg g path use text tspan defs clipPath rect image".split())
_ATTRIBUTES = frozenset(
    "viewBox d x y width height transform clip-path style href id".split()
)
# Declarations of `style` that have an effect, apart from colours.
_WITHOUT_EFFECT = {"font-family", "stroke-dashoffset", "stroke-miterlimit"}
_VARIABLE_OF = {colour.light: f"var(--{name})" for name, colour in VARIABLES.items()}
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_REFERENCE = re.compile(r"^(?:url\()?#([\w.-]+)\)?$")


def inline(figure: Figure, hints: Mapping[str, str], prefix: str, title: str) -> Markup:
    """Return a figure as an ``svg`` element for a page.

    Parameters
    ----------
    figure : Figure
        A figure in the light colours of `clip2fl_cli.colours`.
    hints : mapping of str to str
        Hover text of each group, by matplotlib's ``gid``, which begins with `HINT`.
    prefix : str
        Begins the ids of this figure, because ids are unique in a page.
    title : str
        Name of the figure for screen readers.

    Returns
    -------
    Markup
        Colours are CSS variables, and text has the page's font.
    """
    drawn = io.BytesIO()
    # As text, labels follow the page's font, and can be searched and copied.
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None}, facecolor="none")
    root = ElementTree.fromstring(drawn.getvalue())
    used = {
        match[1]
        for element in root.iter()
        for value in element.attrib.values()
        if (match := _REFERENCE.match(value))
    }
    parts: list[str] = []
    _write(root, parts, hints, prefix, used)
    name = f' role="img" aria-label={quoteattr(title)}'
    return Markup("".join(parts).replace("<svg", f"<svg{name}", 1))


def _write(
    element: ElementTree.Element,
    parts: list[str],
    hints: Mapping[str, str],
    prefix: str,
    used: set[str],
) -> None:
    tag = element.tag.rpartition("}")[2]
    if tag not in _ELEMENTS or (tag == "path" and not element.get("d")):
        return
    hint = hints.get(element.get("id", ""))
    attributes = ['class="hint"'] if hint is not None else []
    for name, value in element.attrib.items():
        bare = name.rpartition("}")[2]
        if bare not in _ATTRIBUTES or (tag == "svg" and bare != "viewBox"):
            continue
        if bare == "id" and value not in used:
            continue
        if bare == "style":
            value = _style(value)
            if not value:
                continue
        elif bare == "id":
            value = f"{prefix}-{value}"
        elif match := _REFERENCE.match(value):
            value = value.replace(match[1], f"{prefix}-{match[1]}")
        elif bare == "href":
            value = "".join(value.split())  # base64 with line breaks
        else:
            value = " ".join(_NUMBER.sub(_rounded, value).split())
            if value.startswith("rotate(-0 "):
                continue
        attributes.append(f"{bare}={quoteattr(value)}")
    content: list[str] = []
    if hint is not None:
        content.append(f"<title>{escape(hint)}</title>")
    if element.text and element.text.strip():
        content.append(escape(element.text))
    for child in element:
        _write(child, content, hints, prefix, used)
    if tag in ("g", "defs") and not content:
        return
    if tag == "g" and not attributes:
        parts += content
        return
    parts.append(f"<{' '.join([tag, *attributes])}>{''.join(content)}</{tag}>")


def _style(text: str) -> str:
    declarations = []
    for declaration in text.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            # "9px 'DejaVu Sans', ..." or "bold 9px ...": without the family.
            size = re.search(r"[\d.]+px", value)
            weight = "font-weight:600;" if value.startswith(("bold", "600")) else ""
            declarations.append(f"{weight}font-size:{size[0] if size else '9px'}")
        elif name and name not in _WITHOUT_EFFECT:
            value = _NUMBER.sub(_rounded, value)
            declarations.append(f"{name}:{_VARIABLE_OF.get(value, value)}")
    return ";".join(declarations)


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
