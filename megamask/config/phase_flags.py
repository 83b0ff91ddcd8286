"""A phase as a word of the command line: an inline table of TOML without its braces, such as until=0.9,length=128."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Annotated, Any

import tyro
from pydantic import TypeAdapter, ValidationError

from megamask.config.settings import PhaseConfig
from megamask.errors import ConfigError, must, unknown
from megamask.errors.setting_rules import field_problem, setting_of


def read_phase(word: str) -> PhaseConfig:
    """The phase that ``word`` names. ConfigError with every unknown name, and every value of a wrong type or size."""
    try:
        values = tomllib.loads(f"phase = {{{word}}}")["phase"]
        return _schema().validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(*(_problem(each, word) for each in error.errors(include_url=False))) from None
    except (ValueError, TypeError):  # TypeError: a date, which JSON does not have
        rule = "contain names with their values, such as until=0.9,length=128 or steps=500,shares=[0.7,0.3]"
        raise ConfigError(must("phases", rule, word)) from None


def phase_word(values: Mapping[str, Any]) -> str:
    """The word from which `read_phase` reads the phase with these ``values`` by name."""
    named = {name: value for name, value in values.items() if value is not None}
    return ",".join(f"{name}={json.dumps(value, separators=(',', ':'))}" for name, value in named.items())


def phase_flag_problems(arguments: Iterable[str]) -> list[str]:
    """Sentences for words behind the flag `phases` that are not phases."""
    problems: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            inside = name == "--phases"
            if not inside or not equals:
                continue
            argument = value
        if inside:
            try:
                read_phase(argument)
            except ConfigError as error:
                problems += error.problems
    return problems


def _problem(error: Any, word: str) -> str:
    if error["type"] == "unexpected_keyword_argument":
        known = [each.name for each in fields(PhaseConfig)]
        return unknown(str(error["loc"][-1]), known, f"`phases` ({word})")
    name = setting_of(PhaseConfig, error)
    return f"`phases` ({word}): {field_problem(PhaseConfig, error, name)}"


@cache
def _schema() -> TypeAdapter:
    return TypeAdapter(PhaseConfig)


Phase = Annotated[
    PhaseConfig,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PHASE",
        instance_from_str=lambda words: read_phase(words[0]),
        is_instance=lambda value: isinstance(value, PhaseConfig),
        str_from_instance=lambda phase: [phase_word(asdict(phase))],
    ),
]
"""A phase that tyro reads from one word."""
