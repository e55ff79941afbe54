"""Properties of a key besides its type: readers, defaults, and when it may change."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from clip2fl_common.config.types import METHODS, Scalar

AUTO = "auto"
"""The value of a key whose default depends on the method or on the number of classes,
until these are known."""

FEW_CLASSES = 50
"""Up to this number of classes the published settings are the defaults of all keys."""


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
    """Marks a key whose default differs for some methods, or with many classes.

    Flower's block of defaults then has ``"auto"``, for which a run takes the default of
    its method and number of classes. A value that is written in its place always
    counts.

    Parameters
    ----------
    by_method : mapping of str to (bool, int, float or str), or None
        The defaults of those methods; all others have the field's default.
    many_classes : bool, int, float, str or None
        The default with more than `FEW_CLASSES` classes; None: the same as with few.
        Where it is given, the key is ``"auto"`` until the classes are known
        (`RunConfig.for_classes`). The field's type says what it is afterwards.
    """

    def __init__(
        self,
        by_method: Mapping[str, Scalar] | None = None,
        *,
        many_classes: Scalar | None = None,
    ) -> None:
        self.by_method = by_method or {}
        self.many_classes = many_classes

    def __get_pydantic_core_schema__(
        self, source: type, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Let ``"auto"`` wait for the number of classes."""
        schema = handler(source)
        if self.many_classes is None:
            return schema
        return core_schema.no_info_wrap_validator_function(
            lambda value, checked: value if value == AUTO else checked(value), schema
        )

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
    many_classes : bool, int, float, str or None
        The default with many classes, if it is another (`DefaultOf`).
    """

    name: str
    default: Scalar
    sentence: str
    field: FieldInfo
    methods: tuple[str, ...]
    may_change: bool
    by_method: Mapping[str, Scalar]
    many_classes: Scalar | None

    def default_of(self, method: object, classes: int | None = None) -> Scalar:
        """Return the default of a method with a number of classes.

        Parameters
        ----------
        method : object
            Its name; it may be one that the schema knows not.
        classes : int or None
            Number of classes; None: few.
        """
        if isinstance(method, str) and method in self.by_method:
            return self.by_method[method]
        if self.many_classes is not None and (classes or 0) > FEW_CLASSES:
            return self.many_classes
        return self.default

    @property
    def chosen(self) -> bool:
        """Return whether the default depends on the method or on the classes."""
        return bool(self.by_method) or self.many_classes is not None

    @property
    def written_default(self) -> Scalar:
        """Return the default as configurations have it before the choice is made."""
        return AUTO if self.chosen else self.default


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
        own = DefaultOf()
        for mark in field.metadata:
            if isinstance(mark, ReadBy):
                readers = mark.methods
            elif isinstance(mark, MayChange):
                changes = True
            elif isinstance(mark, DefaultOf):
                own = mark
        key = f"{prefix}{kebab(name)}"
        if dataclasses.is_dataclass(field.annotation):
            assert isinstance(field.annotation, type)
            yield from keys_of(field.annotation, f"{key}.", readers, changes)
        else:
            sentence = " ".join((field.description or "").split())
            yield Key(
                key,
                field.default,
                sentence,
                field,
                readers,
                changes,
                own.by_method,
                own.many_classes,
            )
