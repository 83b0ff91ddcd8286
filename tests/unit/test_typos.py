"""Every setting, misspelt in every way: refused, and the one that was meant is named first."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from megamask import errors
from megamask.config.cli import parse_command
from megamask.config.overrides import override_settings, read_settings
from megamask.config.pretrain_config import PretrainConfig
from megamask.errors import ConfigError
from megamask.storage.old_setting_names import RENAMED
from megamask.storage.strict_json import BadRecord
from megamask.storage.strict_toml import read_toml
from tests.system.commands import flags


def keys(kind: type, prefix: str = "") -> Iterator[tuple[str, typing.Any]]:
    """Every setting with its type, and every section with its class, by walking the dataclasses."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        bare = typing.get_type_hints(kind)[field.name]
        section = dataclasses.is_dataclass(bare)
        yield prefix + field.name, bare if section else hints[field.name]
        if section:
            yield from keys(bare, f"{prefix}{field.name}.")


KEYS = dict(keys(PretrainConfig))
LEAVES = {name: kind for name, kind in KEYS.items() if not dataclasses.is_dataclass(kind)}


def typos(word: str) -> set[str]:
    """``word`` without a letter, with one twice, with two neighbours swapped, with its underscores as hyphens."""
    variants = {word[:at] + word[at + 1 :] for at in range(len(word))}
    variants |= {word[:at] + word[at] + word[at:] for at in range(len(word))}
    variants |= {word[:at] + word[at + 1] + word[at] + word[at + 2 :] for at in range(len(word) - 1)}
    return (variants | {word.replace("_", "-")}) - {word, ""}


def tree(values: dict[str, object]) -> dict:
    """{"model.depth": 2} -> {"model": {"depth": 2}}."""
    nested: dict = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        functools.reduce(lambda at, section: at.setdefault(section, {}), sections, nested)[last] = value
    return nested


def suggested(names: list[str]) -> dict[str, str]:
    """What is suggested for each name that is not known; all are given in one file."""
    with pytest.raises(ConfigError) as caught:
        override_settings(PretrainConfig(), tree(dict.fromkeys(names, 1)), "file")
    quoted = [problem.split("`") for problem in caught.value.problems]
    return {words[1]: words[5] for words in quoted if len(words) > 5 and words[4] == ". Did you mean "}


@functools.cache
def misspelt() -> dict[str, str]:
    """The keys that each typo may stand for, of which it is the typo; none that is a key itself."""
    return {
        section + dot + typo: name
        for name in KEYS
        for section, dot, last in [name.rpartition(".")]
        for typo in sorted(typos(last))
        if section + dot + typo not in KEYS
    }


def share_meant(suggestions: dict[str, str], meant: dict[str, str]) -> float:
    return sum(suggestions.get(typo) == name for typo, name in meant.items()) / len(meant)


def test_every_typo_is_refused_with_a_suggestion() -> None:
    suggestions, meant = suggested(list(misspelt())), misspelt()
    assert len(meant) > 10 * len(KEYS)
    assert not meant.keys() - suggestions.keys()


def test_suggestions_are_better_than_without_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    some = dict(list(misspelt().items())[::7])
    share = share_meant(suggested(list(some)), some)
    alike = errors._alike
    sections = {name.rpartition(".")[0] for name in KEYS}
    monkeypatch.setattr(errors, "_alike", lambda one, two: 0.0 if {one, two} <= sections else alike(one, two))
    assert share > share_meant(suggested(list(some)), some)


def test_a_key_in_another_section_is_refused_and_its_own_is_named() -> None:
    """Each key in each section that has none of its name."""
    sections = ["", *(f"{name}." for name, kind in KEYS.items() if dataclasses.is_dataclass(kind))]
    moved = {
        section + last: last for name in LEAVES for last in [name.rpartition(".")[2]] for section in sections
        if section + last not in KEYS and section + last not in RENAMED
    }  # fmt: skip
    suggestions = suggested(list(moved))
    assert not moved.keys() - suggestions.keys()
    assert all(suggestions[name].rpartition(".")[2] == last for name, last in moved.items())


def test_flags_take_hyphens_and_underscores_alike() -> None:
    config = parse_command([]).run
    given = {name: functools.reduce(getattr, name.split("."), config) for name in LEAVES}
    words = {name: value for name, value in given.items() if type(value) in (str, int, float, Path, type(Path()))}
    assert any("_" in name for name in words)
    for arguments in (flags(words), flags({name.replace("_", "-"): value for name, value in words.items()})):
        assert parse_command(arguments).run == config


# ---- values of another type


VALUES = ["yes", "1e-4", "3", "3.0", "010", "0o10", "1_000", "12:30:00", "inf", "true", "[]", "[1, 2]", "{a = 1}"]
VALUES += ['"yes"', '"1e-4"', '"3"', '"true"', "1e400", "2020-01-01"]


@functools.cache
def adapter(kind: object) -> TypeAdapter:
    return TypeAdapter(kind)


def meant(kind: object, value: object) -> tuple[object]:
    """What a value is as a ``kind`` by the rules of JSON; ValidationError if it is none."""
    return (adapter(kind).validate_json(json.dumps(value), strict=True),)


@pytest.mark.parametrize("text", VALUES)
def test_a_value_of_another_type_is_refused_and_a_right_one_is_kept(text: str, tmp_path: Path) -> None:
    """For every setting: TOML says what the value is, and the setting's own type whether it may be that."""
    path = tmp_path / "some.toml"
    path.write_text(f"value = {text}")
    try:
        value = read_toml(path)["value"]
    except BadRecord:
        path.write_text("".join(f"{name} = {text}\n" for name in LEAVES if "." not in name))
        with pytest.raises(ConfigError, match=r"some\.toml` is not TOML"):
            read_settings(path)
        return
    fits, misfits = {}, set()
    for name, kind in LEAVES.items():
        try:
            (fits[name],) = meant(kind, value)
        except ValidationError:
            misfits.add(name)
    assert misfits, "no value is right everywhere"
    with pytest.raises(ConfigError) as caught:
        override_settings(PretrainConfig(), tree(dict.fromkeys(LEAVES, value)), "file")
    named = [problem.split("`")[1] for problem in caught.value.problems]
    assert {name for name in LEAVES if any(f"{one}.".startswith(f"{name}.") for one in named)} == misfits
    if fits:
        config = override_settings(PretrainConfig(), tree(dict.fromkeys(fits, value)), "file")
        assert {name: functools.reduce(getattr, name.split("."), config) for name in fits} == fits


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ('"yes"', {bool, int, float}),
        ('"1e-4"', {bool, int, float}),
        ("1e-4", {bool, int}),
        ("[3]", {bool, int, float}),
        ("true", {int, float}),
        ("3.0", {bool, int}),
        ("3", {bool}),
    ],
)
def test_which_words_are_not_values(text: str, kinds: set[type], tmp_path: Path) -> None:
    """What the test before takes from the types, for the plainest of them, written out."""
    (tmp_path / "some.toml").write_text(f"value = {text}")
    value = read_toml(tmp_path / "some.toml")["value"]
    refused = {kind for kind, name in PLAIN.items() if _refused(name, value)}
    assert refused == kinds


PLAIN = {bool: "export", int: "steps", float: "masking.ratio.start"}
"""A setting of each kind, for which the values above are in range."""


def _refused(name: str, value: object) -> bool:
    try:
        override_settings(PretrainConfig(), tree({name: value}), "file")
    except ConfigError as error:
        return f"`{name}`" in str(error)
    return False
