"""A long run uses no more memory and files over time, and its watchdog reports nothing.

Takes MEGAMASK_ENDURANCE_SECONDS, by default two hours.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.processes import forked

SECONDS = float(os.environ.get("MEGAMASK_ENDURANCE_SECONDS", "7200"))


def test_memory_and_open_files_do_not_grow(apart: forked.Apart, tmp_path: Path) -> None:
    answer = apart("faults_worker:enduring", tmp_path, seconds=SECONDS, timeout=20.0)
    assert answer["codes"] == [75, 75], answer["printed"]
    for rank, usage in enumerate(answer["usage"]):
        quarter = len(usage) // 4  # the first is for warming up
        (before, files_before), (after, files_after) = (
            (max(memory for memory, _ in part), max(files for _, files in part))
            for part in (usage[quarter : 2 * quarter], usage[-quarter:])
        )
        print(
            f"\nrank {rank}, {answer['step']:,} steps in {len(usage)} s: {before / 1e6:.1f} MB, then {after / 1e6:.1f};"
            f" {files_before} files, then {files_after}"
        )
        assert after < 1.05 * before
        assert files_after <= files_before
