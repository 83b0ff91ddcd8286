"""The wheel, installed into a folder and used outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megamask.__main__ import FIRST_RUN, SUBCOMMANDS
from tests.system.commands import ROOT, Ended, clean


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the installed package. A copy of the sources is built, so the checkout stays as it is."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("megamask", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    flags = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", target, source]
    subprocess.run(command, check=True, cwd=source)
    return target


def outside(installed: Path, folder: Path, *arguments: object) -> Ended:
    """The installed command `megamask`, started in another folder."""
    command = [installed / "bin" / "megamask", *arguments]
    env = clean() | {"PYTHONPATH": str(installed)}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def test_the_wheel_holds_every_source_and_deepspeed_file(installed: Path) -> None:
    def files(folder: Path) -> set[Path]:
        paths = (path.relative_to(folder) for suffix in ("py", "json") for path in folder.rglob(f"*.{suffix}"))
        return {path for path in paths if "__pycache__" not in path.parts}

    packaged = {Path("ds_configs") / path.name for path in (ROOT / "ds_configs").iterdir()}
    assert files(installed / "megamask") == files(ROOT / "megamask") | packaged


def test_help_and_recipes_are_shown(installed: Path, tmp_path: Path) -> None:
    shown = outside(installed, tmp_path, "--help")
    assert shown.code == 0 and all(f"  {name} " in shown.out for name in SUBCOMMANDS), shown.err
    listed = outside(installed, tmp_path, "pretrain", "--list-recipes")
    assert listed.code == 0 and {"tiny", "bert"} <= {line.split()[0] for line in listed.out.splitlines()}, listed.err


def test_the_first_run_is_configured(installed: Path, tmp_path: Path) -> None:
    shown = outside(installed, tmp_path, "pretrain", *FIRST_RUN, "--print-config")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["time_budget"] == "4m"
    wrong = outside(installed, tmp_path, "pretrain", "--deepspeed", "zero5", "--print-config")
    assert wrong.code == 2 and "zero2_offload" in wrong.err
    assert not os.listdir(tmp_path)
