"""A trace of some training steps by torch.profiler, for Perfetto or chrome://tracing; rank 0 only.

Tracing slows a step down and does not change its results. Without steps to trace it costs nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megamask.runtime import ranks

WARM_UP = 5
"""Steps of a launch before the first that is traced: they compile, allocate and fill caches."""


class StepProfiler:
    """Traces ``count`` steps of a launch that begins after step ``first``, and writes them to ``folder``."""

    def __init__(self, folder: Path, count: int, first: int):
        self._folder, self._step, self._start = folder, first, first + WARM_UP
        self._message = ""
        self._profile: torch.profiler.profile | None = None
        if count and ranks.is_main():
            schedule = torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=count, repeat=1)
            self._profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write, record_shapes=True)
            self._profile.start()

    def advance(self) -> str:
        """Count a step that was taken. Returns where the trace is once it is written, else an empty text."""
        self._step += 1
        if self._profile:
            self._profile.step()
        return self._take_message()

    def close(self) -> str:
        """Stop. Returns where the trace of the steps so far is, if it was not written before, else an empty text."""
        if self._profile:
            self._profile.stop()
            if not self._message and self._step <= self._start:
                self._message = f"No step was traced: the launch took no more than the {WARM_UP} steps of the warm-up."
        return self._take_message()

    def _write(self, profile: torch.profiler.profile) -> None:
        path = self._folder / f"profile-steps-{self._start + 1}-{self._step}.json.gz"
        try:
            profile.export_chrome_trace(str(path))
            self._message = f"trace of steps {self._start + 1} to {self._step}: {path}"
        except OSError as error:
            self._message = f"The trace cannot be written to {path}: {error.strerror}. Training continues."

    def _take_message(self) -> str:
        if self._message:
            self._profile = None
        message, self._message = self._message, ""
        return message
