"""Schedules: progress in [0, 1] -> a value; phases: step or pack number -> the phase of the run that it is in.

Pure functions, so a resumed run needs no state for them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Gt, Lt
from pydantic import FiniteFloat

from megamask.errors import must
from megamask.errors.setting_rules import OnlyFor, Share, ShareBelowOne

Phase = Literal["warmup", "decay"]
"""A turning point of the learning rate: the end of its warm-up, or the beginning of its decay."""


@dataclass(frozen=True)
class Schedule:
    """A value that moves over the run, such as the share of masked tokens."""

    kind: Literal["constant", "linear", "cosine", "step", "ramp"] = "constant"
    """How the value moves from `start` to `end`: `linear` and `cosine` over the whole run, `step` at once at `at`,
    `ramp` linearly from `at` to `until`."""
    start: FiniteFloat = 0.15
    """The value at progress 0."""
    end: Annotated[FiniteFloat | None, OnlyFor("kind", "linear", "cosine", "step", "ramp")] = None
    """The value after the move, until progress 1 or `back`."""
    at: Annotated[float | Phase | None, OnlyFor("kind", "step", "ramp")] = None
    """Progress at which the value changes (`step`, in (0, 1)) or begins to change (`ramp`, in (0, 1]); or a phase of
    the learning rate: `warmup` is the end of its warm-up, `decay` the beginning of its decay."""
    until: Annotated[float | Phase | None, OnlyFor("kind", "ramp")] = None
    """Progress at which the ramp ends, in (0, 1] and after `at`, or a phase."""
    back: Annotated[float | Phase | None, OnlyFor("kind", "step", "ramp")] = None
    """Progress at which the value returns to `start` at once, in (0, 1) and after the move, or a phase; None: it stays
    at `end`."""

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]. A schedule that names phases must be ``resolved`` first."""
        if self.kind == "constant":
            return self.start
        assert self.end is not None
        share = self._share(progress)
        return (1 - share) * self.start + share * self.end  # exact at both ends

    def _share(self, progress: float) -> float:
        """How much of the way from `start` to `end` is done, in [0, 1]."""
        if self.kind == "linear":
            return progress
        if self.kind == "cosine":
            return (1 - math.cos(math.pi * progress)) / 2
        assert self.at is not None and not isinstance(self.at, str), "`resolved` turns a phase into a number"
        if self.back is not None:
            assert not isinstance(self.back, str), "`resolved` turns a phase into a number"
            if progress >= self.back:
                return 0.0
        if self.kind == "step":
            return float(progress >= self.at)
        assert self.until is not None and not isinstance(self.until, str), "`resolved` turns a phase into a number"
        return min(1.0, max(0.0, (progress - self.at) / (self.until - self.at)))

    @property
    def lowest(self) -> float:
        """The lowest value of the run."""
        return self.start if self.end is None else min(self.start, self.end)

    def resolved(self, rate: LearningRate) -> Schedule:
        """The schedule with numbers for the phases of ``rate`` that `at` and `until` name."""
        turns = self.at, self.until, self.back
        at, until, back = (rate.phase(turn) if isinstance(turn, str) else turn for turn in turns)
        return replace(self, at=at, until=until, back=back)

    def range_problems(
        self, name: str, low: float, high: float, *, closed: bool = False, touch: bool = False
    ) -> list[str]:
        """Sentences for values outside the open interval (low, high).

        ``closed`` allows ``low`` and ``high`` themselves; ``touch`` allows ``low`` for a value that is reached only
        for a moment, at an end of `linear` or `cosine`.
        """
        interval = f"[{low:g}, {high:g}]" if closed else f"({low:g}, {high:g})"
        values = {part: value for part in ("start", "end") if (value := getattr(self, part)) is not None}
        return [
            must(f"{name}.{part}", f"lie in {interval}", value)
            for part, value in values.items()
            if math.isfinite(value)
            and not (low <= value <= high if closed else low < value < high)
            and not (touch and self.kind in ("linear", "cosine") and value == low)
        ]

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        problems = []
        if self.kind != "constant" and self.end is None:
            problems.append(f"`{name}.end` must be given when `{name}.kind` is {self.kind!r}, but is missing.")
        if self.kind == "step" and not (_is_progress(self.at) and self.at != 1):
            problems.append(must(f"{name}.at", "lie in (0, 1) when the kind is 'step'", self.at))
        if self.kind == "ramp":
            turns = {"at": self.at, "until": self.until}
            wrong = {part: value for part, value in turns.items() if not _is_progress(value)}
            rule = "lie in (0, 1] when the kind is 'ramp'"
            problems += [must(f"{name}.{part}", rule, value) for part, value in wrong.items()]
            if not wrong and self.at >= self.until:  # type: ignore[operator]
                problems.append(must(f"{name}.at", f"lie before `{name}.until` ({self.until})", self.at))
        return problems + self._back_problems(name)

    def _back_problems(self, name: str) -> list[str]:
        """Sentences for a return that is not after the move."""
        move = {"step": "at", "ramp": "until"}.get(self.kind)
        if self.back is None or move is None:
            return []
        if not _is_progress(self.back) or self.back == 1:
            return [must(f"{name}.back", "lie in (0, 1)", self.back)]
        moved = getattr(self, move)
        if _is_progress(moved) and self.back <= moved:  # type: ignore[operator]
            return [must(f"{name}.back", f"lie after `{name}.{move}` ({moved})", self.back)]
        return []


def _is_progress(turn: float | Phase | None) -> bool:
    return not isinstance(turn, str) and turn is not None and 0 < turn <= 1


@dataclass(frozen=True)
class LearningRate:
    """The learning rate: a linear warm-up from 0, then one of three ways down."""

    kind: Literal["linear", "cosine", "wsd"] = "linear"
    """After warm-up: linear or cosine decay to `final`, or warm-up-stable-decay (constant, then linear decay)."""
    peak: Annotated[float, Gt(0), Lt(10)] = 1e-3
    """The highest learning rate."""
    final: Share = 0.0
    """The learning rate after the last step, as a share of `peak`."""
    warmup: ShareBelowOne = 0.05
    """Share of the run spent warming up."""
    decay: Annotated[Share, OnlyFor("kind", "wsd")] = 0.2
    """Share of the run spent decaying at the end."""

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
        """Sentences for what two settings cannot do together."""
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            return [must(f"{name}.warmup + {name}.decay", "be at most 1", self.warmup + self.decay)]
        return []


@dataclass(frozen=True)
class RunPhase:
    """Steps of a run, one after the other, that have the same number of packs, length of sequences and mixture."""

    first_step: int
    per_step: int
    """Packs of a step."""
    length: int
    """Longest sequence in tokens."""
    mask_ratio: float | None = None
    """Share of the tokens that are targets; None: as the schedule of the run says."""
    shares: tuple[float, ...] | None = None
    """Share of each source of a mixture; None: as the settings of the mixture say."""
    alpha: float | None = None
    """The exponent that gives the shares instead."""


class RunPhases:
    """The phases of a run, by step, by pack number and by text number. A look-up is a bisection in their starts.

    A step of a phase reads its ``per_step`` packs where the step before it ended, so a pack number belongs to one step
    and to one phase, on any number of ranks.
    """

    def __init__(self, phases: Sequence[RunPhase], masks_per_text: int = 1):
        """``phases`` in order, the first from step 0 on; the last has no end. Each text is in ``masks_per_text`` packs
        of its step, which divides the packs of every step."""
        assert phases[0].first_step == 0 and all(phase.per_step % masks_per_text == 0 for phase in phases)
        self.phases, self.masks_per_text = tuple(phases), masks_per_text
        self.first_steps = [phase.first_step for phase in phases]
        self.first_packs = [0]
        for phase, following in zip(self.phases, self.phases[1:], strict=False):
            steps = following.first_step - phase.first_step
            self.first_packs.append(self.first_packs[-1] + steps * phase.per_step)
        self.first_texts = [pack // masks_per_text for pack in self.first_packs]

    @classmethod
    def single(cls, per_step: int, length: int = 0, masks_per_text: int = 1) -> RunPhases:
        """A run in which all steps are alike."""
        return cls([RunPhase(0, per_step, length)], masks_per_text)

    def at_step(self, step: int) -> RunPhase:
        """The phase of ``step`` (from 0)."""
        return self.phases[bisect_right(self.first_steps, step) - 1]

    def at_pack(self, number: int) -> RunPhase:
        """The phase of pack ``number``."""
        return self.phases[bisect_right(self.first_packs, number) - 1]

    def before(self, step: int) -> tuple[RunPhase, ...]:
        """The phases that have begun before ``step``."""
        return tuple(phase for phase in self.phases if phase.first_step < step)

    def packs_before(self, step: int) -> int:
        """The packs of the steps below ``step``: the number of its first pack."""
        index = bisect_right(self.first_steps, step) - 1
        return self.first_packs[index] + (step - self.first_steps[index]) * self.phases[index].per_step

    def text_of(self, number: int) -> int:
        """The number of the text in pack ``number``: the same, unless a step shows each text several times."""
        index = bisect_right(self.first_packs, number) - 1
        inside = number - self.first_packs[index]
        return self.first_texts[index] + text_number(inside, self.phases[index].per_step, self.masks_per_text)


def text_number(number: int, per_step: int, masks_per_text: int) -> int:
    """The number of the text in pack ``number``: each step has ``per_step`` packs, ``masks_per_text`` of each text."""
    if masks_per_text == 1:
        return number
    step, place = divmod(number, per_step)
    texts = per_step // masks_per_text
    return step * texts + place % texts
