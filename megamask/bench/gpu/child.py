"""Processes that a measurement starts, and how they end. Without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from megamask.runtime.child_process import child_environment, end_with_parent

PATIENCE = 2.0
"""Seconds that processes have to end after a signal."""


def run_limited(arguments: Sequence[str], log: Path, seconds: float) -> str:
    """Run Python with ``arguments`` for at most ``seconds``, its output behind ``log``. What is wrong, or nothing."""
    with open(log, "ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=child_environment(), process_group=0,
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"it was stopped after {seconds:g} s"
        finally:
            _stop_group(process)
    return f"{_last_line(log, start)} (exit code {code})" if code else ""


def _stop_group(process: subprocess.Popen) -> None:
    """End the process with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    process.wait()


def _last_line(log: Path, start: int) -> str:
    with open(log, "rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
