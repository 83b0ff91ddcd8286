"""Rules that stand beside a setting, and the sentences for settings that break them; without torch.

A rule about one setting is metadata of its field: a range of ``annotated_types``, which pydantic checks, or `OnlyFor`.
A class of settings has a method ``problems`` for what two of its settings cannot do together, and nothing else.
`settings_problems` finds the problems of all three kinds.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from megamask.errors import Removable, must, unknown
from megamask.errors.json_types import bare_type, type_rule, union_members

Count = Annotated[int, Ge(1)]
"""A number of things, at least one."""
CountOrZero = Annotated[int, Ge(0)]
Share = Annotated[FiniteFloat, Ge(0), Le(1)]
"""A part of a whole."""
ShareBelowOne = Annotated[FiniteFloat, Ge(0), Lt(1)]
ShareInside = Annotated[FiniteFloat, Gt(0), Lt(1)]
Positive = Annotated[FiniteFloat, Gt(0)]
NotNegative = Annotated[FiniteFloat, Ge(0)]
RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of", "too_short"}
"""The types of pydantic's errors about a range."""


class OnlyFor:
    """Metadata of a setting that has an effect only while ``other``, a setting beside it, has one of ``values``.

    Without values: only while the other one is given, so neither None, 'none' nor empty.
    """

    def __init__(self, other: str, *values: object):
        self.other, self.values = other, values

    def allows(self, settings: object) -> bool:
        """Whether the setting has an effect among ``settings``, the section that it is in."""
        value = getattr(settings, self.other)
        return value in self.values if self.values else value not in (None, "none", ())

    def reasons(self, settings: object, name: str) -> tuple[str, str]:
        """Why the setting has no effect among ``settings``, whose section is ``name``, and the cure."""
        other = f"{name}.{self.other}".lstrip(".")
        if not self.values:
            return f"has no effect without `{other}`", "Remove it or set that."
        why = f"has no effect with `{other}` {getattr(settings, self.other)!r}, only with {_either(self.values)}"
        return why, f"Remove it or change `{other}`."

    def rule(self, section: str) -> str:
        """The condition for --help; ``section`` is that of the setting, with a dot, or empty."""
        other = f"`{section}{self.other}`"
        return f"only for {other} {_either(self.values)}" if self.values else f"only with {other}"


def settings_problems(settings: object, name: str = "") -> list[str]:
    """Sentences for what is wrong with a dataclass of settings and its sections; ``name`` stands before their names."""
    return _range_problems(settings, name) + list(_section_problems(settings, name))


def rule(hint: object) -> str:
    """The range that the annotation of a setting declares, as the end of "must ...": "lie in [0, 1)"; else ''."""
    bounds = {type(item): item for item in metadata(hint)}
    low = next((_number(getattr(bounds[kind], key)) for kind, key in ((Ge, "ge"), (Gt, "gt")) if kind in bounds), None)
    high = next((_number(getattr(bounds[kind], key)) for kind, key in ((Le, "le"), (Lt, "lt")) if kind in bounds), None)
    rules = []
    if low is not None and high is not None:
        rules.append(f"lie in {'[' if Ge in bounds else '('}{low}, {high}{']' if Le in bounds else ')'}")
    elif low is not None:
        rules.append(f"be above {low}" if Gt in bounds else "be 0 or more" if low == "0" else f"be at least {low}")
    elif high is not None:
        rules.append(f"be {'at most' if Le in bounds else 'below'} {high}")
    if MultipleOf in bounds:
        divisor = bounds[MultipleOf].multiple_of
        rules.append(("" if rules else "be ") + ("even" if divisor == 2 else f"a multiple of {divisor}"))
    if MinLen in bounds:
        rules.append(f"name at least {bounds[MinLen].min_length}")
    return " and ".join(rules)


def setting_of(kind: Any, error: Any) -> str:
    """The dotted name of the setting that one of pydantic's errors about the dataclass ``kind`` is about."""
    return _place(kind, error)[0]


def field_problem(kind: Any, error: Any, name: str) -> str:
    """The sentence for one of pydantic's errors about the dataclass ``kind``; ``name`` is that of the setting."""
    hint = _place(kind, error)[1]
    if error["type"] == "missing":
        return f"`{name}` is missing."
    if error["type"] == "unexpected_keyword_argument":
        return unknown(str(error["loc"][-1]), _hints(bare_type(hint)), f"`{name}`")
    if error["type"] == "finite_number":
        return must(name, "be finite", error["input"])
    return must(name, rule(hint) if error["type"] in RANGE_ERRORS else type_rule(hint), error["input"])


def _place(kind: Any, error: Any) -> tuple[str, Any]:
    """The name and the annotation of the field, or of the item of a list or table, that an error is about."""
    name, hint = "", kind
    for part in error["loc"]:
        inner = next((_item(member, part) for member in union_members(hint) if _item(member, part) is not None), None)
        if inner is None:
            break
        name, hint = f"{name}.{part}".lstrip("."), inner
    return name, hint


def _item(kind: Any, key: object) -> Any:
    """The annotation of a field of a dataclass, or of the items of a list, tuple or table; None if there is none."""
    if get_origin(kind) in (tuple, list) and isinstance(key, int):
        items = [item for item in get_args(kind) if item is not ...]
        return items[min(key, len(items) - 1)]
    return get_args(kind)[1] if get_origin(kind) is dict else _hints(kind).get(str(key))


def metadata(hint: object) -> list[Any]:
    """What ``Annotated`` adds to a type or to the members of a union."""
    if get_origin(hint) is Annotated:
        inner, *items = get_args(hint)
        return metadata(inner) + items
    if get_origin(hint) in (Union, types.UnionType):
        return [item for member in get_args(hint) for item in metadata(member)]
    return []


def _range_problems(settings: object, name: str) -> list[str]:
    kind: Any = type(settings)
    try:
        _adapter(kind).validate_python(asdict(settings))  # type: ignore[call-overload]
    except ValidationError as error:
        prefix = f"{name}." if name else ""
        return [field_problem(kind, each, prefix + setting_of(kind, each)) for each in error.errors(include_url=False)]
    return []


def _section_problems(settings: Any, name: str) -> Iterator[str]:
    """What `OnlyFor` and the methods ``problems`` find, section by section, but not inside one without effect."""
    kind: Any = type(settings)
    if hasattr(settings, "problems"):
        yield from settings.problems(name)
    for field, hint in _hints(kind).items():
        value = getattr(settings, field)
        conditions = [item for item in metadata(hint) if isinstance(item, OnlyFor) and not item.allows(settings)]
        if conditions and value != default_of(kind, field):
            yield from removable(settings, [field], name, *conditions[0].reasons(settings, name))
        elif is_dataclass(value):
            yield from _section_problems(value, f"{name}.{field}".lstrip("."))


def removable(settings: object, names: Iterable[str], name: str, why: str, cure: str = "Remove it.") -> list[str]:
    """A sentence for each of the fields ``names`` of the dataclass ``settings`` that does not have its default."""
    defaults = {field: default_of(type(settings), field) for field in names}
    return [
        Removable(f"{name}.{field}".lstrip("."), why, default, cure)
        for field, default in defaults.items()
        if getattr(settings, field) != default
    ]


def default_of(kind: type, field: str) -> object:
    """The default of a field of a dataclass; MISSING if it has none."""
    (definition,) = (each for each in fields(kind) if each.name == field)
    return definition.default if definition.default_factory is MISSING else definition.default_factory()


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The annotations of the fields of a dataclass; of anything else none."""
    if not is_dataclass(kind):
        return {}
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _either(values: tuple[object, ...]) -> str:
    return " or ".join(", ".join(map(repr, some)) for some in (values[:-1], values[-1:]) if some)


def _number(value: Any) -> str:
    """A bound as a reader writes it: 0.5, 2**31."""
    large = isinstance(value, int) and value >= 2**20 and value & (value - 1) == 0
    return f"2**{value.bit_length() - 1}" if large else f"{value:g}"
