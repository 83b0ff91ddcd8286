"""Schedules: progress in [0, 1] -> a value. Pure functions, so a resumed run needs no state for them.

``released`` has the nine ways in which the code of "Learning Better Masking for Better Language Model Pre-training"
(Yang, Zhang, Zhao 2023; repository mutonix/better_masking) moves the masking ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from megamask.errors import Removable, must

Phase = Literal["warmup", "decay"]
"""A turning point of the learning rate: the end of its warm-up, or the beginning of its decay."""
RESTING = ("constant", "step", "ramp")
"""Kinds that stay at an end for a while; the others only pass."""
TURNING = ("step", "ramp", "triangle", "cosine_square")
"""Kinds that turn at `at`."""
BENT = ("triangle", "cosine_square")
"""Kinds that go by `middle`."""


@dataclass(frozen=True)
class Schedule:
    """A value that moves over the run, such as the share of masked tokens."""

    kind: Literal[
        "constant", "linear", "cosine", "step", "ramp", "square_above", "square_below", "triangle", "cosine_square"
    ] = "constant"
    """How the value moves from `start` to `end`; `step` jumps at `at`, `ramp` is linear from `at` to `until`. The
    square of the progress: `square_above` goes slowly first, `square_below` fast. By way of `middle`, at `at`:
    `triangle` linearly, `cosine_square` by a cosine and then as square_above."""
    start: float = 0.15
    """The value at progress 0."""
    end: float | None = None
    """The value at progress 1; needed by every kind but `constant`, and refused there."""
    at: float | Phase | None = None
    """Progress of the turn or jump, in (0, 1), or where the ramp begins, in (0, 1]; or a phase of the learning rate:
    `warmup` is the end of its warm-up, `decay` the beginning of its decay. For `step`, `ramp`, `triangle` and
    `cosine_square` alone."""
    until: float | Phase | None = None
    """Progress at which the ramp ends, in (0, 1] and behind `at`, or a phase; for `ramp` alone."""
    middle: float | None = None
    """The value at the turn; for `triangle` and `cosine_square` alone."""

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]. A schedule that names phases must be ``tied`` first."""
        if self.kind == "constant":
            return self.start
        assert self.end is not None
        if self.kind == "step":
            return self.start if progress < self._turn else self.end
        if self.kind in BENT:
            return self._bent(progress)
        return _mix(self.start, self.end, self._share(progress))

    @property
    def _turn(self) -> float:
        assert self.at is not None and not isinstance(self.at, str), "tied() makes a number of a phase"
        return self.at

    def _share(self, progress: float) -> float:
        """How much of the way from `start` to `end` is gone."""
        if self.kind == "linear":
            return progress
        if self.kind == "cosine":
            return _cosine(progress)
        if self.kind == "square_above":
            return progress**2
        if self.kind == "square_below":
            return 1 - (1 - progress) ** 2
        assert self.until is not None and not isinstance(self.until, str), "tied() makes a number of a phase"
        return min(1.0, max(0.0, (progress - self._turn) / (self.until - self._turn)))

    def _bent(self, progress: float) -> float:
        """The value of a schedule that goes by `middle`."""
        assert self.end is not None and self.middle is not None
        linear = self.kind == "triangle"
        if progress < self._turn:
            gone = progress / self._turn
            return _mix(self.start, self.middle, gone if linear else _cosine(gone))
        gone = (progress - self._turn) / (1 - self._turn)
        return _mix(self.middle, self.end, gone if linear else gone**2)

    def tied(self, rate: LearningRate) -> Schedule:
        """The schedule with numbers for the phases of ``rate`` that `at` and `until` name."""
        at, until = (rate.phase(turn) if isinstance(turn, str) else turn for turn in (self.at, self.until))
        return replace(self, at=at, until=until)

    def problems(self, name: str, low: float, high: float, *, closed: bool = False, touch: bool = False) -> list[str]:
        """Sentences for what is wrong, if the values must lie in the open interval (low, high).

        ``closed`` allows ``low`` and ``high`` themselves; ``touch`` allows ``low`` where the value only passes by.
        """
        found = []
        interval = f"[{low:g}, {high:g}]" if closed else f"({low:g}, {high:g})"
        for part in ("start", "end", "middle"):
            value = getattr(self, part)
            if value is None or (touch and self.kind not in RESTING and value == low):
                continue
            if not (low <= value <= high if closed else low < value < high):
                found.append(must(f"{name}.{part}", f"lie in {interval}", value))
        if self.kind == "constant" and self.end is not None:
            cure = f"Remove it or set `{name}.kind`."
            found.append(Removable(f"{name}.end", "has no effect on a constant schedule", None, cure))
        if self.kind != "constant" and self.end is None:
            found.append(f"`{name}.end` must be given when `{name}.kind` is {self.kind!r}, but is missing.")
        if self.kind in BENT and self.middle is None:
            found.append(f"`{name}.middle` must be given when `{name}.kind` is {self.kind!r}, but is missing.")
        if self.kind not in BENT and self.middle is not None:
            why = "has an effect on a 'triangle' or 'cosine_square' schedule alone"
            found.append(Removable(f"{name}.middle", why, None))
        return found + self._problems_of_turns(name)

    def _problems_of_turns(self, name: str) -> list[str]:
        """Sentences for what is wrong with `at` and `until`."""
        found = []
        if self.kind in TURNING and self.kind != "ramp" and not (_lies(self.at) and self.at != 1):
            found.append(must(f"{name}.at", f"lie in (0, 1) when the kind is {self.kind!r}", self.at))
        if self.kind == "ramp":
            turns = {"at": self.at, "until": self.until}
            wrong = {part: value for part, value in turns.items() if not _lies(value)}
            found += [must(f"{name}.{part}", "lie in (0, 1] when the kind is 'ramp'", v) for part, v in wrong.items()]
            if not wrong and self.at >= self.until:  # type: ignore[operator]
                found.append(must(f"{name}.at", f"lie before `{name}.until` ({self.until})", self.at))
        if self.kind not in TURNING and self.at is not None:
            kinds = ", ".join(repr(kind) for kind in TURNING)
            found.append(Removable(f"{name}.at", f"has an effect on the kinds {kinds} alone", None))
        if self.kind != "ramp" and self.until is not None:
            found.append(Removable(f"{name}.until", "has an effect on a 'ramp' schedule alone", None))
        return found


def _mix(start: float, end: float, share: float) -> float:
    """``start`` exactly at share 0, ``end`` exactly at share 1."""
    return (1 - share) * start + share * end


def _cosine(progress: float) -> float:
    return (1 - math.cos(math.pi * progress)) / 2


def _lies(turn: float | Phase | None) -> bool:
    return not isinstance(turn, str) and turn is not None and 0 < turn <= 1


Mode = Literal[
    "desc", "cosine", "asc", "square_above", "square_below", "poly_asc", "poly_desc", "lin_warm_decay", "other"
]
"""Values of `masking_mode` of the released code; `other` is what it does for any other word."""


def released(mode: Mode, ratio: float = 0.15, warm: float | Phase = 0.08) -> Schedule:
    """The masking ratio under ``mode`` of the released code, about ``ratio`` = p.

    `desc` and `cosine` are the paper's linear and cosine masking ratio decay. Linear, asc and the triangle poly_asc
    keep the mean at p; cosine, as released, lies 0.02 higher (and square_above and poly_desc 0.01), so that it does
    not come near 0. ``warm`` is where lin_warm_decay turns: after 80,000 steps in the code, 0.08 of its million; or a
    phase of the learning rate. `other` does not depend on p.
    Source: repository mutonix/better_masking, data_utils.py. Differs: progress is that of a run, in 64 steps (see
    `megamask.masking`); where the ratio is 0 a pack still has one target, as there each example has.
    """
    top = 2 * ratio
    schedules = {
        "desc": Schedule("linear", top, 0.0),
        "cosine": Schedule("cosine", top + 0.02, 0.02),
        "asc": Schedule("linear", 0.0, top),
        "square_above": Schedule("square_above", top + 0.01, 0.01),
        "square_below": Schedule("square_below", top, 0.0),
        "poly_asc": Schedule("triangle", 0.0, 0.0, at=0.5, middle=top),
        "poly_desc": Schedule("triangle", top + 0.01, top + 0.01, at=0.5, middle=0.01),
        "lin_warm_decay": Schedule("triangle", 0.0, 0.0, at=warm, middle=top),
        "other": Schedule("cosine_square", 0.3, 0.01, at=0.4, middle=0.1),
    }
    return schedules[mode]


@dataclass(frozen=True)
class LearningRate:
    """The learning rate: a linear warm-up from 0, then one of three ways down."""

    kind: Literal["linear", "cosine", "wsd"] = "linear"
    """After warm-up: linear or cosine decay to `final`, or warm-up-stable-decay (constant, then linear decay)."""
    peak: float = 1e-3
    """The highest learning rate."""
    final: float = 0.0
    """The learning rate that is reached after the last step, as a share of `peak`."""
    warmup: float = 0.05
    """Share of the run spent warming up."""
    decay: float = 0.2
    """Share of the run spent decaying at the end; for `wsd` alone."""

    def of_step(self, begin: float, end: float) -> float:
        """The learning rate of the step from progress ``begin`` to ``end``, both in [0, 1].

        It warms up by where the step ends and decays by where it begins, so the first and the last step move weights.
        """
        return self(end) if end <= self.warmup else self(max(begin, self.warmup))

    def __call__(self, done: float) -> float:
        """The learning rate at progress ``done``, in [0, 1]."""
        if done < self.warmup:
            return self.peak * done / self.warmup
        if self.kind == "wsd":
            left = min(1.0, (1 - done) / self.decay) if self.decay else 1.0
        else:
            left = (1 - done) / (1 - self.warmup)
            if self.kind == "cosine":
                left = (1 - math.cos(math.pi * left)) / 2
        return self.peak * (self.final + (1 - self.final) * left)

    def phase(self, name: Phase) -> float:
        """The progress at which warm-up ends, or decay begins: for `linear` and `cosine` that is the same."""
        return 1 - self.decay if name == "decay" and self.kind == "wsd" else self.warmup

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
            why = "has an effect on the kind 'wsd' alone"
            found.append(Removable(f"{name}.decay", why, LearningRate.decay))
        return found
