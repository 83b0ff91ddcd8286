"""Every hostile artefact through every loader that may meet it, and names of runs by the thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system import test_security


def test_no_artefact_runs_code_or_leads_away(tmp_path: Path) -> None:
    test_security.assert_harmless(tmp_path)


def test_ten_thousand_names_of_runs_reach_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_security.test_names_of_runs_reach_no_shell(tmp_path, monkeypatch, count=10_000)
