"""Nested settings, as in JSON, and their dotted names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """{"model": {"depth": 2}} -> {"model.depth": 2}."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_under(name: str, names: Iterable[str]) -> bool:
    """Whether the dotted ``name`` is one of ``names`` or below one: "log.every" is below "log"."""
    return any(name == other or name.startswith(other + ".") for other in names)


def names_in(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of all values and tables."""
    names = []
    for key, value in tree.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, dict):
            names += names_in(value, f"{prefix}{key}.")
    return names


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over`` in place of its own, table by table."""
    result = dict(base)
    for key, value in over.items():
        tables = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if tables else value
    return result
