"""Schedules: progress in [0, 1] -> a value. Pure functions, so a resumed run needs no state for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megamask.errors import must


@dataclass(frozen=True)
class Schedule:
    """A value that moves over the run, such as the share of masked tokens."""

    kind: Literal["constant", "linear", "cosine", "step", "ramp"] = "constant"
    """How the value moves from `start` to `end`; `step` jumps at `at`, `ramp` is linear from `at` to `until`."""
    start: float = 0.15
    """The value at progress 0."""
    end: float | None = None
    """The value at progress 1; needed by every kind but `constant`, and refused there."""
    at: float | None = None
    """Progress of the jump, in (0, 1), or where the ramp begins, in (0, 1]; for `step` and `ramp` alone."""
    until: float | None = None
    """Progress at which the ramp ends, in (0, 1] and behind `at`; for `ramp` alone."""

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]."""
        if self.kind == "constant":
            return self.start
        assert self.end is not None
        if self.kind == "step":
            assert self.at is not None
            return self.start if progress < self.at else self.end
        share = self._share(progress)
        # written as a mix so that progress 0 and 1 give start and end exactly
        return (1 - share) * self.start + share * self.end

    def _share(self, progress: float) -> float:
        """How much of the way from `start` to `end` is gone."""
        if self.kind == "linear":
            return progress
        if self.kind == "cosine":
            return (1 - math.cos(math.pi * progress)) / 2
        assert self.at is not None and self.until is not None
        return min(1.0, max(0.0, (progress - self.at) / (self.until - self.at)))

    def problems(self, name: str, low: float, high: float, *, closed: bool = False) -> list[str]:
        """Sentences for what is wrong, if the values must lie in the open interval (low, high).

        ``closed`` allows ``low`` and ``high`` themselves.
        """
        found = []
        interval = f"[{low:g}, {high:g}]" if closed else f"({low:g}, {high:g})"
        for part in ("start", "end"):
            value = getattr(self, part)
            if value is not None and not (low <= value <= high if closed else low < value < high):
                found.append(must(f"{name}.{part}", f"lie in {interval}", value))
        if self.kind == "constant" and self.end is not None:
            found.append(f"`{name}.end` has no effect on a constant schedule. Remove it or set `{name}.kind`.")
        if self.kind != "constant" and self.end is None:
            found.append(f"`{name}.end` must be given when `{name}.kind` is {self.kind!r}, but is missing.")
        return found + self._problems_of_turns(name)

    def _problems_of_turns(self, name: str) -> list[str]:
        """Sentences for what is wrong with `at` and `until`."""
        found = []
        if self.kind == "step" and (self.at is None or not 0 < self.at < 1):
            found.append(must(f"{name}.at", "lie in (0, 1) when the kind is 'step'", self.at))
        if self.kind == "ramp":
            turns = {"at": self.at, "until": self.until}
            wrong = {part: value for part, value in turns.items() if value is None or not 0 < value <= 1}
            found += [must(f"{name}.{part}", "lie in (0, 1] when the kind is 'ramp'", v) for part, v in wrong.items()]
            if not wrong and self.at >= self.until:  # type: ignore[operator]
                found.append(must(f"{name}.at", f"lie before `{name}.until` ({self.until})", self.at))
        if self.kind not in ("step", "ramp") and self.at is not None:
            found.append(f"`{name}.at` has an effect on a 'step' or 'ramp' schedule alone. Remove it.")
        if self.kind != "ramp" and self.until is not None:
            found.append(f"`{name}.until` has an effect on a 'ramp' schedule alone. Remove it.")
        return found


@dataclass(frozen=True)
class LearningRate:
    """The learning rate: a linear warm-up from 0, then one of three ways down."""

    kind: Literal["linear", "cosine", "wsd"] = "linear"
    """After warm-up: linear or cosine decay to `final`, or warm-up-stable-decay (constant, then linear decay)."""
    peak: float = 1e-3
    """The highest learning rate."""
    final: float = 0.0
    """The learning rate at the end, as a share of `peak`."""
    warmup: float = 0.05
    """Share of all steps spent warming up."""
    decay: float = 0.2
    """Share of all steps spent decaying at the end; for `wsd` alone."""

    def __call__(self, step: int, steps: int) -> float:
        """The learning rate of ``step`` (from 0) in a run of ``steps``."""
        done = (step + 1) / steps
        if done < self.warmup:
            return self.peak * done / self.warmup
        if self.kind == "wsd":
            left = min(1.0, (1 - done) / self.decay) if self.decay else 1.0
        else:
            left = (1 - done) / (1 - self.warmup)
            if self.kind == "cosine":
                left = (1 - math.cos(math.pi * left)) / 2
        return self.peak * (self.final + (1 - self.final) * left)

    def problems(self, name: str) -> list[str]:
        """Sentences for what is wrong."""
        found = []
        if not 0 < self.peak < 10:
            found.append(must(f"{name}.peak", "lie in (0, 10)", self.peak))
        if not 0 <= self.final <= 1:
            found.append(must(f"{name}.final", "lie in [0, 1]", self.final))
        if not 0 <= self.warmup < 1:
            found.append(must(f"{name}.warmup", "lie in [0, 1)", self.warmup))
        if not 0 <= self.decay <= 1:
            found.append(must(f"{name}.decay", "lie in [0, 1]", self.decay))
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            found.append(must(f"{name}.warmup + {name}.decay", "be at most 1", self.warmup + self.decay))
        if self.kind != "wsd" and self.decay != LearningRate.decay:
            found.append(f"`{name}.decay` has an effect on the kind 'wsd' alone. Remove it.")
        return found
