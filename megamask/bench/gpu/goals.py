"""The goals on an H100 or H200, and whether the figures reach them. Without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megamask.bench.gpu.figures import Record
from megamask.bench.settings import COMPILED

SHARE_OF_MATMUL = "share of the matmul rate"
BESIDE_PLAIN = "time of a plain step"
BESIDE_TRAINER = "x Trainer, concatenated, bf16"
BESIDE_EAGER = "eager / token_stats"
BESIDE_PREDICTED = "measured / predicted"
ENTROPY_ERROR = "largest error of the entropy"
WAITS = "waits for the device"
"""Names of figures, or what they end or begin with."""
Verdict = Literal["reached", "missed", "not measured", "not on a GPU"]


@dataclass(frozen=True)
class Goal:
    """A bound for the figures of a part whose whole name matches ``pattern``."""

    title: str
    part: str
    pattern: str
    bound: float
    kind: Literal["at least", "at most"]
    unit: str
    counts: Literal["best", "worst"] = "best"
    """Which of several figures is compared: of variants of one thing the best, of several things the worst."""


@dataclass(frozen=True)
class JudgedGoal:
    """A goal beside what was measured."""

    goal: Goal
    verdict: Verdict
    value: float | None = None
    figure: str = ""
    """The name of the figure that counts."""


def _rate(size: str, bound: float) -> Goal:
    title = f"share of the measured matmul rate, {size}"
    return Goal(title, f"steps-{size}", rf"bert.*, {SHARE_OF_MATMUL}", bound, "at least", "share")


def _entropy(size: str, source: str, bound: float) -> Goal:
    title = f"entropy by {source}, time of a plain step, {size}"
    return Goal(title, f"entropy-{size}", f"{source}, {BESIDE_PLAIN}", bound, "at most", "x")


def _trainer(title: str, how: str) -> Goal:
    """Compiled steps are compared with a compiled Trainer only."""
    return Goal(title, "trainer", f"megamask bert, bf16{how}, {BESIDE_TRAINER}{how}", 1.8, "at least", "x")


GOALS = (
    _rate("base", 0.45),
    _rate("large", 0.50),
    _rate("xl", 0.55),
    _trainer("tokens/s beside the Trainer", ""),
    _trainer("tokens/s beside the Trainer, both compiled", COMPILED),
    *(
        _entropy(size, source, bound)
        for size in ("base", "large")
        for source, bound in (("frequency", 1.01), ("probe", 1.02), ("sidecar", 1.01), ("exact, clean", 1.40))
    ),
    Goal("statistics kernel beside eager", "statistics", rf"{BESIDE_EAGER}.*", 3.0, "at least", "x", "worst"),
    Goal("error of the entropy", "statistics", rf"token_stats.*{ENTROPY_ERROR}", 1e-3, "at most", "nats", "worst"),
    Goal(
        f"saving of 3ML and MAE-LM, {BESIDE_PREDICTED}", "late-base", rf".*, {BESIDE_PREDICTED}", 0.9, "at least",
        "x", "worst",
    ),
    Goal("waits for the device in a step", "steps-base", f"bert, {WAITS}", 1.0, "at most", "per step"),
    Goal("failed tests", "tests", "failed", 0.0, "at most", "tests"),
)  # fmt: skip


def judge_goals(records: Iterable[Record], *, on_gpu: bool) -> list[JudgedGoal]:
    """All goals beside the latest figures; ``on_gpu`` is false for figures of another device or of tiny work."""
    listed = list(records)
    return [_judge(goal, listed, on_gpu) for goal in GOALS]


def _judge(goal: Goal, records: list[Record], on_gpu: bool) -> JudgedGoal:
    if not on_gpu:
        return JudgedGoal(goal, "not on a GPU")
    matches = [
        (one.figure.value, one.figure.name)
        for one in records
        if one.part == goal.part and one.figure.value is not None and re.fullmatch(goal.pattern, one.figure.name)
    ]
    if not matches:
        return JudgedGoal(goal, "not measured")
    choose = max if (goal.kind == "at least") == (goal.counts == "best") else min
    value, name = choose(matches)
    reached = value >= goal.bound if goal.kind == "at least" else value <= goal.bound
    return JudgedGoal(goal, "reached" if reached else "missed", value, name)
