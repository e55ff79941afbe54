"""Write docs/configuration.md: every key with default, allowed values and meaning.

Defaults and meanings come from ``[tool.flwr.app.config]`` in pyproject.toml, allowed
values from the types in clip2fl_common/config.py::

    python -m scripts.configuration_page            # write it
    python -m scripts.configuration_page --check    # exit 1 if it is out of date
"""

import dataclasses
import json
import sys
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from clip2fl_common.config import RunConfig
from clip2fl_common.config_types import Rule
from clip2fl_common.dotted_keys import flatten
from scripts.check_config_keys import key_comments

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"

HEAD = """# Configuration keys

Every key of a run, with the default that stands in `[tool.flwr.app.config]` of
pyproject.toml (the demo). Files in `conf/` change some of them; `--set 'KEY=VALUE ...'`
of `clip2fl`, or `--run-config` of `flwr run`, change any.
Strings need quotes. A key that does not exist or a value that is not allowed is refused
by name.

This page is generated: `make docs` writes it, `make check` tells if it is out of date.
"""


def page(text: str) -> str:
    """Return the page.

    Parameters
    ----------
    text : str
        Content of pyproject.toml.

    Returns
    -------
    str
    """
    defaults = flatten(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    meanings = key_comments(text)
    parts = [HEAD]
    for title, about, keys in groups():
        parts.append(f"## {title}\n\n{about}\n")
        lines = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
        for key, allowed in keys.items():
            default = json.dumps(defaults[key], ensure_ascii=False)
            cells = (f"`{key}`", f"`{default}`", allowed, meanings[key])
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def groups() -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Yield title, description and keys (with what is allowed) of each group."""
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    alone: dict[str, str] = {}
    nested = []
    for name, hint in hints.items():
        key = name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            fields = typing.get_type_hints(hint, include_extras=True)
            keys = {
                f"{key}.{leaf.replace('_', '-')}": allowed(of_leaf)
                for leaf, of_leaf in fields.items()
            }
            nested.append((key, str(hint.__doc__).strip(), keys))
        else:
            alone[key] = allowed(hint)
    yield "General", "Keys without a group.", alone
    yield from nested


def allowed(hint: object) -> str:
    """Return what a type allows, in words."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in typing.get_args(hint))
    limits: list[object] = []
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extras = typing.get_args(hint)
        for extra in extras:
            limits += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    words = {bool: "true, false", int: "integer", float: "number", str: "string"}
    assert isinstance(hint, type)
    bounds = [
        f"{sign} {getattr(limit, name):,.12g}"
        for limit in limits
        for kind, name, sign in (
            (Gt, "gt", ">"),
            (Ge, "ge", "≥"),
            (Lt, "lt", "<"),
            (Le, "le", "≤"),
        )
        if isinstance(limit, kind)
    ]
    rules = [limit.words for limit in limits if isinstance(limit, Rule)]
    if hint is str and rules:
        return ", ".join(rules)
    bounds = [*rules, *bounds]
    return ", ".join([" ".join([words[hint], *bounds[:1]]), *bounds[1:]])


def main() -> int:
    """Write or check the page and return the exit status."""
    wanted = page((ROOT / "pyproject.toml").read_text("utf-8"))
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted, "utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text("utf-8") == wanted:
        print("docs/configuration.md: up to date")
        return 0
    print("docs/configuration.md is out of date: run 'make docs' and commit it")
    return 1


if __name__ == "__main__":
    sys.exit(main())
