"""The setting `data`: one folder, or several with shares or without; every problem at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.config.checks import config_problems
from megamask.config.cli import parse_command, show_config
from megamask.config.settings import MixtureConfig
from megamask.config.sources import data_folders, source_names
from megamask.errors import ConfigError
from megamask.errors.setting_rules import settings_problems


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    wiki, books = tmp_path / "wiki", tmp_path / "books"
    wiki.mkdir()
    books.mkdir()
    return wiki, books


def problems(*words: object) -> str:
    """What the command line, or else the check of its configuration, refuses."""
    try:
        return "\n".join(config_problems(parse_command([str(word) for word in words]).run))
    except ConfigError as error:
        return str(error)


def test_shares_are_split_from_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    wiki, books = folders
    run = parse_command(["--data", f"{wiki}=0.6", f"{books}=0.4"]).run
    assert (run.data, run.mixture.shares) == (folders, (0.6, 0.4))
    assert run == parse_command(["--data", str(wiki), str(books), "--mixture.shares", "0.6", "0.4"]).run
    (tmp_path / "shown.json").write_text(show_config(run))
    assert parse_command(["--config", str(tmp_path / "shown.json")]).run == run
    (tmp_path / "own.json").write_text(json.dumps({"data": [f"{wiki}=0.6", f"{books}=0.4"]}))
    assert parse_command(["--config", str(tmp_path / "own.json")]).run == run


def test_one_folder_stays_a_path_and_several_may_have_no_share(folders: tuple[Path, Path]) -> None:
    assert parse_command(["--data", "shards"]).run.data == Path("shards")
    run = parse_command(["--data", *map(str, folders), "--mixture.alpha", "0.3"]).run
    assert (run.data, run.mixture.shares, run.mixture.alpha) == (folders, None, 0.3)
    assert config_problems(run) == []


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        (("=x", "=1"), "a finite number behind ="),
        (("=nan", "=1"), "finite"),
        (("=inf", "=1"), "finite"),
        (("=-0.5", "=1"), "`mixture.shares.0` must be 0 or more"),
        (("=0", "=0"), "`mixture.shares` must have a sum above 0"),
        (("=0.5", ""), "a share for each folder or for none"),
    ],
)
def test_a_share_that_cannot_be_used_is_a_sentence(folders, shares: tuple[str, str], sentence: str) -> None:
    words = [f"{folder}{share}" for folder, share in zip(folders, shares, strict=True)]
    assert sentence in problems("--data", *words)


def test_every_problem_is_found_at_once(folders: tuple[Path, Path]) -> None:
    wiki, books = folders
    words = ("--data", wiki, f"{books}/../wiki", books, "absent", "--seed", "-1", "--mixture.shares", 1, 2)
    text = problems(*words)
    assert f"names {wiki} twice" in text and "absent is not a folder" in text and "`seed`" in text
    assert "a share for each of the 4 folders" in text


def test_a_setting_without_effect_is_an_error(folders: tuple[Path, Path]) -> None:
    wiki, books = folders
    assert "no effect with a single folder" in problems("--data", wiki, "--mixture.alpha", 0.3)
    assert "no effect with a single folder" in problems("--data", wiki, "--mixture.shares", 1)
    assert "no effect with a single folder" in problems("--data", f"{wiki}=1")
    assert "no effect with `mixture.shares`" in problems("--data", f"{wiki}=1", f"{books}=1", "--mixture.alpha", 0.3)
    moving = ("--mixture.alpha-end", 0.5)
    assert "no effect with a single folder" in problems("--data", wiki, *moving)
    assert "`mixture.alpha_end` has no effect with `mixture.shares`" in problems(
        "--data", f"{wiki}=1", f"{books}=1", *moving
    )
    both = ("--data", wiki, books, *moving)
    assert "`mixture.alpha_end` has no effect: it equals `mixture.alpha`" in problems(*both, "--mixture.alpha", 0.5)
    assert "`mixture.alpha_end` moves with the number of steps" in problems(*both, "--time-budget", "1h")
    twice = problems("--data", f"{wiki}=1", f"{books}=1", "--mixture.shares", 1, 2)
    assert "`data` has shares, and so has `mixture.shares`" in twice


def test_folders_joined_by_a_comma_are_told_apart(folders: tuple[Path, Path]) -> None:
    wiki, books = folders
    for words in (f"{wiki}=0.5,{books}=0.5", f"{wiki},{books}"):
        text = problems("--data", words)
        assert "separate several folders by spaces" in text and "alone" not in text


def test_names_of_sources_differ() -> None:
    assert source_names([Path("a/wiki"), Path("b/books")]) == ["wiki", "books"]
    assert source_names([Path("wiki/shards"), Path("books/shards")]) == ["wiki/shards", "books/shards"]
    assert data_folders(None) == () and data_folders("a") == (Path("a"),) and data_folders(["a", "b"])[1] == Path("b")


def test_a_share_that_is_not_finite_has_one_sentence() -> None:
    problems = settings_problems(MixtureConfig(shares=(float("nan"), 1.0)), "mixture")
    assert problems == ["`mixture.shares.0` must be finite, but is nan."]
