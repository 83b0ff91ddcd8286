"""A run that goes on and on holds no more than it did, and its watchdog finds nothing.

For MEGAMASK_ENDURANCE_SECONDS, two hours if not set.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.processes import forked

SECONDS = float(os.environ.get("MEGAMASK_ENDURANCE_SECONDS", "7200"))


def test_a_run_holds_no_more_memory_or_files_as_it_goes_on(apart: forked.Apart, tmp_path: Path) -> None:
    found = apart("faults_worker:enduring", tmp_path, seconds=SECONDS, hangs_after=20.0)
    assert found["codes"] == [75, 75], found["said"]
    for rank, held in enumerate(found["held"]):
        quarter = len(held) // 4  # the first is for warming up
        (before, files_before), (after, files_after) = (
            (max(memory for memory, _ in part), max(files for _, files in part))
            for part in (held[quarter : 2 * quarter], held[-quarter:])
        )
        print(
            f"\nrank {rank}, {found['step']:,} steps in {len(held)} s: {before / 1e6:.1f} MB, then {after / 1e6:.1f}; "
            f"{files_before} files, then {files_after}"
        )
        assert after < 1.05 * before
        assert files_after <= files_before
