"""An old PyTorch is refused with a message before anything is read."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.errors import ConfigError
from megamask.runtime import versions

ROOT = Path(__file__).parents[3]
NOWHERE = "/nowhere/at/all"


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cu128", "2.13.1", "2.14.0.dev20261101", "3.0"])
def test_a_new_version_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: version)
    versions.check_torch()


@pytest.mark.parametrize("version", ["2.10.2", "2.9.1+cpu", "2.2", "1.13.1", "", "strange"])
def test_an_old_or_unknown_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: version)
    with pytest.raises(ConfigError, match=r"PyTorch must be 2\.11 or newer, but is "):
        versions.check_torch()


def test_the_oldest_version_is_that_of_pyproject() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = ".".join(map(str, versions.OLDEST))
    (requirement,) = (one for one in requirements if one.startswith("torch>"))
    assert requirement.startswith(f"torch>={oldest},")
    assert versions.OLDEST >= (2, 10), "CVE-2026-24747"


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "--teacher.path", NOWHERE],
        ["export", "--run", NOWHERE, "--output", NOWHERE],
        ["import", "--model", NOWHERE, "--output", NOWHERE],
        ["annotate", "entropy", "--data", NOWHERE, "--teacher", NOWHERE],
        ["annotate", "targets", "--teacher.path", NOWHERE],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_check_the_version_first(arguments, monkeypatch, capsys) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "2.9.1")
    assert main(arguments) == ConfigError.exit_code
    assert capsys.readouterr().err.startswith("PyTorch must be 2.11 or newer, but is 2.9.1.")
