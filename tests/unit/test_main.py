"""The command `megamask`: its subcommands, and what it says to a wrong one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

from megamask.__main__ import SUBCOMMANDS, find_subcommand, main
from megamask.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_names_of_functions_and_settings_exist(name: str) -> None:
    command = SUBCOMMANDS[name]
    for target in filter(None, (command.function, command.settings)):
        module, _, attribute = target.partition(":")
        target = getattr(import_module(f"megamask.{module}"), attribute)
        assert is_dataclass(target) or callable(target)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_subcommand(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name, command in SUBCOMMANDS.items():
        assert any(line.startswith(f"{name} ") and line.endswith(f" {command.summary}") for line in lines)


def test_annotate_without_a_form_lists_both(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["annotate"], ["annotate", "--help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert [name for name in SUBCOMMANDS if f"  {name} " in out] == ["annotate entropy", "annotate targets"]


@pytest.mark.parametrize(
    ("typed", "nearest"), [("pretain", "pretrain"), ("exprot", "export"), ("annotate targest", "annotate targets")]
)
def test_a_mistyped_subcommand_gets_the_nearest(typed: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed.split()) == ConfigError.exit_code
    assert capsys.readouterr().err == f"`{typed}` is not known. Did you mean `{nearest}`?\n"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("evaluate exp", "'exp' has no flag before it. Write `--model`"),
        ("inspect runs/mine --json", "'runs/mine' has no flag before it. Write `--run`"),
        ("study --data shards first", "Write it first: a flag such as --data takes all words after it."),
    ],
)
def test_a_word_without_its_flag_gets_the_cure(typed: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed.split()) == ConfigError.exit_code
    assert words in capsys.readouterr().err


def test_a_subcommand_is_found_by_its_whole_words() -> None:
    assert find_subcommand(["annotate", "entropy", "--data", "x"]) == ("annotate entropy", ["--data", "x"])
    assert find_subcommand(["exporter"]) == (None, ["exporter"])
    assert find_subcommand(["--recipe", "export"]) == (None, ["--recipe", "export"])


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_usage_names_the_command_as_typed(name: str) -> None:
    command = [sys.executable, "-m", "megamask", *name.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: megamask {name} [-h]")


def test_a_flag_of_the_deepspeed_launcher_may_come_first() -> None:
    """`deepspeed --module megamask pretrain` puts it before the subcommand."""
    command = [sys.executable, "-m", "megamask", "--local_rank=0", "pretrain", "--list-recipes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "tiny" in done.stdout


@pytest.mark.parametrize("arguments", [["pretrain", "--list-recipes"], ["pretrain"], ["doctor", "--list-recipes"]])
def test_a_wrong_launch_is_a_message_and_not_a_traceback(arguments: list[str]) -> None:
    environment = os.environ | {"RANK": "x", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}
    command = [sys.executable, "-m", "megamask", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split()[3] for line in done.stderr.splitlines()] == ["RANK", "MASTER_PORT"]
