"""Check that every key of the run configuration is documented, typed and read.

A key of ``[tool.flwr.app.config]`` in pyproject.toml needs a comment, one field of
`RunConfig` in clip2fl_common/config.py and code that reads this field; a file in conf/
(an experiment, or a comparison of variants) may only use keys that exist. Everything is
read from the files' text, so that the check needs no import of the app::

    python -m scripts.check_config_keys

Prints each problem with what to do about it, and exits 1 if there is one.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2fl_common.dotted_keys import flatten

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = "clip2fl_common/config.py"
PACKAGES = ("client_app", "server_app", "strategy", "clip2fl_common")
SECTION = "tool.flwr.app.config"


@dataclass(frozen=True)
class ConfigClasses:
    """What config.py declares.

    Attributes
    ----------
    keys : dict[str, tuple[str, ...]]
        Dotted key to the path of its field: ``("model", "name")``, ``("seed",)``.
    paths : dict[str, tuple[str, ...]]
        Class to the path at which `RunConfig` holds it; `RunConfig` itself: ``()``.
    """

    keys: dict[str, tuple[str, ...]]
    paths: dict[str, tuple[str, ...]]


def declared_fields(source: str) -> ConfigClasses:
    """Find the fields of `RunConfig` and of the classes nested in it."""
    fields = {
        node.name: {
            item.target.id: item.annotation
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
    paths: dict[str, tuple[str, ...]] = {"RunConfig": ()}
    leaves: list[tuple[str, ...]] = []
    for name, annotation in fields["RunConfig"].items():
        group = _class_name(annotation)
        if group in fields:
            paths[group] = (name,)
            leaves += [(name, leaf) for leaf in fields[group]]
        else:
            leaves.append((name,))
    keys = {".".join(path).replace("_", "-"): path for path in leaves}
    return ConfigClasses(keys, paths)


def key_comments(text: str) -> dict[str, str]:
    """Find each key's comment, on its line or on the lines above, in one line."""
    commented: dict[str, str] = {}
    prefix: str | None = None
    above: list[str] = []
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("["):
            name = line.partition("]")[0].strip("[ ")
            prefix = None
            if f"{name}.".startswith(f"{SECTION}."):
                prefix = name.removeprefix(SECTION).removeprefix(".")
        elif line.startswith("#"):
            above.append(line.removeprefix("#").strip())
            continue
        elif prefix is not None and line:
            value, comment = _split_comment(line)
            if comment or above:
                (key,) = flatten(tomllib.loads(value))
                commented[f"{prefix}.{key}" if prefix else key] = comment or " ".join(
                    above
                )
        above = []
    return commented


def _split_comment(line: str) -> tuple[str, str]:
    """Split a key's line where the comment starts, minding ``#`` inside strings."""
    parts = line.split("#")
    for count in range(1, len(parts)):
        try:
            tomllib.loads("#".join(parts[:count]))
        except tomllib.TOMLDecodeError:
            continue
        return "#".join(parts[:count]), "#".join(parts[count:]).strip()
    return line, ""


def _class_name(annotation: ast.expr | None) -> str:
    """Return the last part of an annotation: ``X`` for ``config.X`` and ``"X"``."""
    if isinstance(annotation, ast.Name):
        return annotation.id
    if isinstance(annotation, ast.Attribute):
        return annotation.attr
    if isinstance(annotation, ast.Constant):
        return str(annotation.value).rpartition(".")[2]
    return ""


class Reads(ast.NodeVisitor):
    """Collect the fields that a module reads.

    A variable counts as (part of) the configuration when it is annotated so or is
    assigned from such a variable; an attribute ``config`` counts as the whole.

    Parameters
    ----------
    classes : ConfigClasses
        What config.py declares.
    """

    def __init__(self, classes: ConfigClasses) -> None:
        self.fields: set[tuple[str, ...]] = set()
        self._leaves = set(classes.keys.values())
        self._paths = dict(classes.paths)
        self._variables: dict[str, tuple[str, ...]] = {}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Note a class that is imported under another name."""
        for alias in node.names:
            if alias.asname and alias.name in self._paths:
                self._paths[alias.asname] = self._paths[alias.name]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Visit a function with the variables of its own scope."""
        outer = self._variables
        self._variables = dict(outer)
        arguments = node.args
        for argument in [
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
        ]:
            # An argument hides an outer variable of the same name.
            self._variables.pop(argument.arg, None)
            self._declare(argument.arg, argument.annotation)
        self.generic_visit(node)
        inner, self._variables = self._variables, outer
        # What is stored on self is there for the other methods.
        outer.update({k: v for k, v in inner.items() if k.startswith("self.")})

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Note an annotated variable; in a class body it is one of self."""
        name = ast.unparse(node.target)
        self._declare(name, node.annotation)
        self._declare(f"self.{name}", node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Note a variable assigned from the configuration."""
        path = self._path(node.value)
        if path is not None:
            for target in node.targets:
                self._variables[ast.unparse(target)] = path
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Note a field that is read."""
        path = self._path(node)
        if path in self._leaves and isinstance(node.ctx, ast.Load):
            self.fields.add(path)
        self.generic_visit(node)

    def _declare(self, name: str, annotation: ast.expr | None) -> None:
        path = self._paths.get(_class_name(annotation))
        if path is not None:
            self._variables[name] = path

    def _path(self, node: ast.expr) -> tuple[str, ...] | None:
        """Return where in the configuration an expression stands, if there."""
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr == "from_run_config":
                return ()
            return None
        known = self._variables.get(ast.unparse(node))
        if known is None and isinstance(node, ast.Attribute):
            base = self._path(node.value)
            if base is not None:
                return (*base, node.attr)
            return () if node.attr == "config" else None
        return known


def read_fields(root: Path, classes: ConfigClasses) -> set[tuple[str, ...]]:
    """Find the fields that the app's packages read, config.py aside."""
    fields: set[tuple[str, ...]] = set()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if path != root / CONFIG_FILE:
                reads = Reads(classes)
                tree = ast.parse(path.read_text("utf-8"), str(path))
                # Twice: a method may stand above the one that sets its attribute.
                reads.visit(tree)
                reads.visit(tree)
                fields |= reads.fields
    return fields


def problems(root: Path) -> Iterator[str]:
    """Yield what is wrong with the configuration keys of the app at `root`."""
    text = (root / "pyproject.toml").read_text("utf-8")
    keys = flatten(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    classes = declared_fields((root / CONFIG_FILE).read_text("utf-8"))
    commented = key_comments(text)
    read = read_fields(root, classes)
    for key in keys:
        field = classes.keys.get(key)
        if key not in commented:
            yield f"pyproject.toml: {key}: no comment; say on the line above what it is"
        if field is None:
            yield f"pyproject.toml: {key}: no field in RunConfig; add one or drop it"
        elif field not in read:
            yield (
                f"pyproject.toml: {key}: nothing reads config.{'.'.join(field)}; "
                "use it or drop the key and the field"
            )
    for key in sorted(classes.keys.keys() - keys.keys()):
        yield f"{CONFIG_FILE}: {key}: no such key in pyproject.toml; add its default"
    for path in sorted((root / "conf").glob("*.toml")):
        yield from _unknown(path.relative_to(root), path.read_text("utf-8"), keys)


def _unknown(name: Path, text: str, keys: Mapping[str, object]) -> Iterator[str]:
    for table in _run_configurations(tomllib.loads(text)):
        for key in flatten(table):
            if key not in keys:
                problem = "no such key in pyproject.toml; correct or drop it"
                yield f"{name}: {key}: {problem}"


def _run_configurations(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tables of run configuration keys in a file: one, or a comparison's."""
    if "variants" not in content:
        yield content
        return
    yield content.get("settings", {})
    for variant in content["variants"].values():
        yield {key: value for key, value in variant.items() if key != "seeds"}


def main() -> int:
    """Print every problem and return the exit status."""
    found = list(problems(ROOT))
    for problem in found:
        print(problem)
    print(f"check_config_keys: {len(found)} problems" if found else "config keys: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
