"""Dotted keys, as Flower's run configuration has them, of nested TOML tables."""

from collections.abc import Mapping


def flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Turn nested TOML tables into one level of dotted keys."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
