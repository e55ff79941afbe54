"""Write the files that are generated from the schema of the run configuration.

The schema (clip2fl_common/config/schema.py) declares every key once. Generated from it
are the block of defaults in pyproject.toml that Flower reads, the reference page
docs/configuration.md, and the JSON schemas with which editors complete and check the
files in conf/::

    python -m scripts.write_configuration            # write them
    python -m scripts.write_configuration --check    # exit 1 if one is out of date
"""

import json
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from clip2fl_cli.comparison import ComparisonFile
from clip2fl_common.config import KEYS, RunConfig
from clip2fl_common.config.keys import FEW_CLASSES, Key, fields_of, kebab
from clip2fl_common.config.types import METHODS, Rule

ROOT = Path(__file__).resolve().parent.parent

BEGIN = "# `make docs` writes these keys from clip2fl_common/config/schema.py.\n"
END = "# End of what `make docs` writes.\n"
WIDTH = 88

HEAD = """# Configuration keys

Every key of a run, with its default. Files in `conf/` change some of them;
`--set 'KEY=VALUE ...'` of `clip2fl`, or `--run-config` of `flwr run`, change any.
Strings need quotes. A key that does not exist or a value that is not allowed is refused
by name.

*Read by* names the methods that read a key. A run warns of each changed key that its
method does not read. *May change on resume* tells whether an interrupted run may go on
with another value; the same keys may differ where `clip2fl compare` finds a run that is
already complete.

Editors that know TOML (Even Better TOML, Taplo) complete and check these keys in every
file whose first line is the one that the files in `conf/` have:
`#:schema ./run.schema.json`, or `#:schema ./comparison.schema.json` for a comparison.

This page is generated: `make docs` writes it, `make check` tells if it is out of date.
"""
COLUMNS = ("key", "default", "allowed", "read by", "may change on resume", "meaning")


def written(root: Path) -> dict[str, str]:
    """Return the generated files: the content by path, relative to `root`.

    Parameters
    ----------
    root : Path
        Folder of the pyproject.toml whose block is to be renewed.

    Raises
    ------
    ValueError
        If pyproject.toml lacks one of the two lines around the block.
    """
    return {
        "pyproject.toml": with_block((root / "pyproject.toml").read_text("utf-8")),
        "docs/configuration.md": page(),
        "conf/run.schema.json": _as_json(run_schema()),
        "conf/comparison.schema.json": _as_json(comparison_schema()),
    }


def groups() -> Iterator[tuple[str, list[Key]]]:
    """Yield each group's name, empty for keys without group, and its keys in order."""
    for name, keys in groupby(KEYS.values(), lambda key: key.name.rpartition(".")[0]):
        yield name, list(keys)


def with_block(text: str) -> str:
    """Return the text of pyproject.toml with the block of keys renewed."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"pyproject.toml has lost one of the lines {BEGIN.strip()!r} and "
            f"{END.strip()!r}, between which the run configuration's keys go"
        )
    return f"{before}{BEGIN}{block()}{END}{after}"


def block() -> str:
    """Return every key with its default as TOML, below a comment with its meaning."""
    parts = [""]
    for _, keys in groups():
        lines: list[str] = []
        together = len({key.methods for key in keys}) == 1
        if together and not reads_all(keys[0]):
            lines.append(f"# Read by {', '.join(keys[0].methods)}:")
        for key in keys:
            sentence = key.sentence
            if not together and not reads_all(key):
                sentence += f" Read by {', '.join(key.methods)}."
            if key.chosen:
                sentence += f" auto: {defaults_in_words(key)}."
            lines += textwrap.wrap(
                sentence,
                WIDTH,
                initial_indent="# ",
                subsequent_indent="# ",
                break_on_hyphens=False,
                break_long_words=False,
            )
            # JSON writes booleans, numbers and strings as TOML does.
            lines.append(f"{key.name} = {_as_value(key.written_default)}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, ""])


def reads_all(key: Key) -> bool:
    """Return whether every method reads a key."""
    return set(key.methods) == set(METHODS)


def defaults_in_words(key: Key) -> str:
    """Return a key's default, and other ones of methods and of many classes."""
    others = [f"{_as_value(v)} for {method}" for method, v in key.by_method.items()]
    if key.many_classes is not None:
        others.append(f"{_as_value(key.many_classes)} above {FEW_CLASSES} classes")
    return "; ".join([_as_value(key.default), *others])


def page() -> str:
    """Return the reference page."""
    parts = [HEAD]
    classes = {kebab(name): field for name, field in fields_of(RunConfig).items()}
    for name, keys in groups():
        about = classes[name].annotation.__doc__ if name else "Keys without a group."
        parts.append(f"## {name or 'General'}\n\n{str(about).strip()}\n")
        rows: list[Iterable[str]] = [COLUMNS, ["---"] * len(COLUMNS)]
        for key in keys:
            rows.append(
                (
                    f"`{key.name}`",
                    f"`{_as_value(key.default)}`"
                    if not key.chosen
                    else f"auto: {defaults_in_words(key)}",
                    allowed(key.field),
                    "all" if reads_all(key) else ", ".join(key.methods),
                    "yes" if key.may_change else "no",
                    key.sentence,
                )
            )
        parts.append("\n".join(map(_row, rows)) + "\n")
    return "\n".join(parts)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def allowed(field: FieldInfo) -> str:
    """Return the allowed values of a field, in words."""
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{_as_value(v)}`" for v in typing.get_args(field.annotation))
    bounds = [
        f"{sign} {getattr(limit, name):,.12g}"
        for limit in field.metadata
        for kind, name, sign in (
            (Gt, "gt", ">"),
            (Ge, "ge", "≥"),
            (Lt, "lt", "<"),
            (Le, "le", "≤"),
        )
        if isinstance(limit, kind)
    ]
    rules = [rule.words for rule in field.metadata if isinstance(rule, Rule)]
    if field.annotation is str and rules:
        return ", ".join(rules)
    words = {bool: "true, false", int: "integer", float: "number", str: "string"}
    assert field.annotation in words
    bounds = [*rules, *bounds]
    return ", ".join([" ".join([words[field.annotation], *bounds[:1]]), *bounds[1:]])


def run_schema() -> dict[str, Any]:
    """Return the JSON schema of a file of run configuration keys."""
    schema = _tidied(TypeAdapter(RunConfig).json_schema())
    assert isinstance(schema, dict)
    for of_key in schema["properties"].values():
        if "$ref" in of_key:  # the group's keys have their own defaults
            del of_key["default"]
    for key in KEYS.values():
        _of_key(schema, key.name)["default"] = key.written_default
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _of_key(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the JSON schema of a key within that of a file."""
    group, _, leaf = name.rpartition(".")
    if group:
        schema = schema["$defs"][schema["properties"][group]["$ref"].split("/")[-1]]
    found: dict[str, Any] = schema["properties"][leaf]
    return found


def comparison_schema() -> dict[str, Any]:
    """Return the JSON schema of a comparison's file."""
    run = run_schema()
    schema = _tidied(ComparisonFile.model_json_schema())
    assert isinstance(schema, dict)
    properties = schema["properties"]
    settings = {
        **{name: run[name] for name in ("type", "additionalProperties", "properties")},
        "description": "Run configuration keys for all variants.",
    }
    properties["settings"] = settings
    properties["variants"]["additionalProperties"] = {
        **settings,
        "description": "Run configuration keys of one variant, and seeds of its own.",
        "properties": {**run["properties"], "seeds": properties["seeds"]},
    }
    return {"$schema": run["$schema"], "$defs": run["$defs"], **schema}


def _tidied(part: Any, names: bool = False) -> Any:
    """Remove titles, which repeat names, and join the lines of each description.

    ``names`` means that the keys of ``part`` are names of properties or definitions.
    """
    if isinstance(part, list):
        return [_tidied(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        key: " ".join(value.split())
        if key == "description" and not names
        else _tidied(value, not names and key in ("properties", "$defs"))
        for key, value in part.items()
        if names or key != "title"
    }


def _as_value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _as_json(schema: dict[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False, indent=2) + "\n"


def main(root: Path = ROOT) -> int:
    """Write or check all files and return the exit status."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, content in written(root).items():
        file = root / name
        if not check:
            file.write_text(content, "utf-8")
        elif not file.is_file() or file.read_text("utf-8") != content:
            stale.append(name)
    for name in stale:
        print(f"{name} is out of date: run 'make docs' and commit it")
    if check and not stale:
        print("what is written from the configuration's schema: up to date")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
