"""Every hostile artefact through every loader that may meet it."""

from __future__ import annotations

from pathlib import Path

from tests.system.test_security import assert_harmless


def test_no_artefact_runs_code_or_leads_away(tmp_path: Path) -> None:
    assert_harmless(tmp_path)
