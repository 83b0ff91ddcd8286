"""Types of settings in the words of JSON."""

from __future__ import annotations

from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from megamask.errors import must, shown_value, unknown
from megamask.errors.json_types import json_kind, type_rule
from megamask.model.shape import ModelConfig


class Stage(IntEnum):
    NONE = 0
    ALL = 3


EXAMPLES = {
    "true": ("true",), "3": ("3", "number"), "0.5": ("a number",), '"a"': ("text", "'a'"), "[1]": ("list",),
    "{}": ("table", "object"), "null": ("null",),
}  # fmt: skip
"""Values in JSON, and the words of which a rule has one if it allows them."""


@pytest.mark.parametrize(
    ("hint", "rule"),
    [
        (bool, "be true or false"),
        (int | None, "be a whole number or null"),
        (Annotated[float, Ge(0)] | None, "be a number or null"),
        (Literal["a", "b", "c"], "be 'a', 'b' or 'c'"),
        (Path | None, "be text or null"),
        (tuple[int, ...] | None, "be a list or null"),
        (Stage, "be 0 or 3"),
        (ModelConfig, "be a table of settings"),
        (dict[str, int], "be an object"),
    ],
)
def test_the_rule_of_a_type_names_every_value_that_json_may_have(hint: Any, rule: str) -> None:
    assert type_rule(hint) == rule
    for text, words in EXAMPLES.items():
        with suppress(ValidationError):
            TypeAdapter(hint).validate_json(text, strict=True)
            assert any(word in rule for word in words), text


@pytest.mark.parametrize(("value", "kind"), [([], "a list"), ({}, "an object"), (None, "null"), (1.5, "a number")])
def test_values_are_shown_as_json_has_them(value: object, kind: str) -> None:
    assert json_kind(value) == kind
    assert must("x", "be text", True) == "`x` must be text, but is true."
    assert must("x", "be text", None) == "`x` must be text, but is null."
    assert shown_value("a") == "'a'" and shown_value([True, "a"]) == '[true, "a"]'
    assert len(shown_value([0] * 1000)) == 80


def test_a_long_list_of_names_is_cut_to_the_nearest() -> None:
    many = [f"section.name_{letter}" for letter in "abcdefghijklmnop"]
    assert unknown("section.name_q", many).endswith("?")
    sentence = unknown("zzz", many)
    assert "The nearest are" in sentence and sentence.count("section.") == 5
    assert unknown("zzz", many[:3]).count("section.") == 3
    assert unknown("ZERO2", ["zero1", "zero2"]).endswith("Did you mean `zero2`?")
