"""Properties of a key besides its type: which methods read it, when it may change."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from clip2fl_common.config.types import METHODS, Scalar

AUTO = "auto"
"""The value of a key whose default depends on the method, until the method is known."""


class ReadBy:
    """Marks a key, or a group of keys, that only some methods read.

    Parameters
    ----------
    *methods : str
        Names of those methods. The mark of a field overrides the mark of its group.
    """

    def __init__(self, *methods: str) -> None:
        self.methods = methods


class DefaultOf:
    """Marks a key whose default differs for some methods.

    Flower's block of defaults then has ``"auto"``, for which a run takes the method's
    own default. A value that is written in its place always counts.

    Parameters
    ----------
    by_method : mapping of str to (bool, int, float or str)
        The defaults of those methods; all others have the field's default.
    """

    def __init__(self, by_method: Mapping[str, Scalar]) -> None:
        self.by_method = by_method

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Allow ``"auto"`` to editors too."""
        return {"anyOf": [handler(schema), {"const": AUTO}]}


class MayChange:
    """Marks a key, or a group of keys, that may change when a run is resumed.

    Such a key decides where results are stored, how long the server waits or what it
    keeps, but does not change the results.
    """


@dataclass(frozen=True)
class Key:
    """One key of the run configuration.

    Attributes
    ----------
    name : str
        With dots and hyphens, as Flower's run configuration has it.
    default : bool, int, float or str
        Its default for all methods but those of ``by_method``.
    sentence : str
        Its meaning, on one line.
    field : FieldInfo
        Its type and bounds.
    methods : tuple of str
        The methods among `METHODS` that read it.
    may_change : bool
        Whether it may change when a run is resumed.
    by_method : mapping of str to (bool, int, float or str)
        Other defaults, by method (`DefaultOf`).
    """

    name: str
    default: Scalar
    sentence: str
    field: FieldInfo
    methods: tuple[str, ...]
    may_change: bool
    by_method: Mapping[str, Scalar]

    def default_of(self, method: object) -> Scalar:
        """Return the default of a method; it may be one that the schema knows not."""
        if isinstance(method, str) and method in self.by_method:
            return self.by_method[method]
        return self.default

    @property
    def written_default(self) -> Scalar:
        """Return the default as configurations have it before the method is known."""
        return AUTO if self.by_method else self.default


def kebab(name: str) -> str:
    """Return a field's name as a key spells it."""
    return name.replace("_", "-")


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """Return the fields of one of the schema's classes by name."""
    assert is_pydantic_dataclass(cls)
    return cls.__pydantic_fields__


def keys_of(
    cls: type,
    prefix: str = "",
    methods: tuple[str, ...] = METHODS,
    may_change: bool = False,
) -> Iterator[Key]:
    """Yield the keys that a class of the schema declares, groups included, in order.

    Parameters
    ----------
    cls : type
        A pydantic dataclass. Each field has a default and, unless it is a group, a
        docstring.
    prefix : str
        Prefix of each name.
    methods : tuple of str
        Methods that read the keys, unless a field says otherwise.
    may_change : bool
        Whether all keys may change when a run is resumed, regardless of their fields.

    Yields
    ------
    Key
    """
    for name, field in fields_of(cls).items():
        readers = methods
        changes = may_change
        by_method: Mapping[str, Scalar] = {}
        for mark in field.metadata:
            if isinstance(mark, ReadBy):
                readers = mark.methods
            elif isinstance(mark, MayChange):
                changes = True
            elif isinstance(mark, DefaultOf):
                by_method = mark.by_method
        key = f"{prefix}{kebab(name)}"
        if dataclasses.is_dataclass(field.annotation):
            assert isinstance(field.annotation, type)
            yield from keys_of(field.annotation, f"{key}.", readers, changes)
        else:
            sentence = " ".join((field.description or "").split())
            yield Key(key, field.default, sentence, field, readers, changes, by_method)
