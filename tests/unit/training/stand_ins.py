"""Objects and functions that stand in for those of a run."""

from __future__ import annotations

from typing import TypeVar

from megamask.hf import Exported

Kind = TypeVar("Kind")


def bare(kind: type[Kind], **given: object) -> Kind:
    """What passes for a ``kind`` and has no more than is given."""
    instance = object.__new__(kind)
    vars(instance).update(given)
    return instance


def fails(error: Exception):
    def act(*_: object, **__: object) -> Exported:
        raise error

    return act
