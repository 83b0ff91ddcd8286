"""Schedules start and end where they say, stay between, and go one way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.schedules import LearningRate, Schedule

MOVING = ["linear", "cosine", "step", "ramp"]
RATES = ["linear", "cosine", "wsd"]
shares = st.floats(0, 1)


def moving(kind: str, start: float, end: float) -> Schedule:
    return Schedule(kind, start, end, 0.5 if kind in ("step", "ramp") else None, 0.8 if kind == "ramp" else None)


@given(st.sampled_from(MOVING), shares, shares)
def test_a_schedule_begins_and_ends_exactly(kind: str, start: float, end: float) -> None:
    schedule = moving(kind, start, end)
    assert schedule(0.0) == start
    assert schedule(1.0) == end


@given(st.sampled_from(MOVING), shares, shares, shares, shares)
def test_a_schedule_moves_one_way_between_its_ends(kind: str, start: float, end: float, a: float, b: float) -> None:
    schedule = moving(kind, start, end)
    first, second = schedule(min(a, b)), schedule(max(a, b))
    rounding = 1e-12
    assert min(start, end) - rounding <= first <= max(start, end) + rounding
    assert (second - first) * (end - start) >= -rounding


@given(shares)
def test_what_each_kind_is(progress: float) -> None:
    assert Schedule("constant", 0.3)(progress) == 0.3
    assert moving("linear", 0.0, 1.0)(progress) == pytest.approx(progress)
    # the cosine is its own mirror image about the middle
    assert moving("cosine", 0.0, 1.0)(progress) == pytest.approx(1 - moving("cosine", 0.0, 1.0)(1 - progress))
    assert Schedule("step", 0.3, 0.1, at=0.4)(progress) == (0.3 if progress < 0.4 else 0.1)
    # a ramp from beginning to end of its stretch is the linear schedule of that stretch
    assert Schedule("ramp", 1.0, 0.1, at=0.2, until=0.7)(0.2 + 0.5 * progress) == pytest.approx(
        Schedule("linear", 1.0, 0.1)(progress)
    )


@given(shares, shares)
def test_a_ramp_rests_before_and_behind_its_stretch(start: float, end: float) -> None:
    ramp = Schedule("ramp", start, end, at=0.25, until=0.5)
    assert [ramp(progress) for progress in (0.0, 0.1, 0.25)] == [start] * 3
    assert [ramp(progress) for progress in (0.5, 0.75, 1.0)] == [end] * 3


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        (Schedule("constant", 0.0), ["ratio.start"]),
        (Schedule("constant", 1.0), ["ratio.start"]),
        (Schedule("constant", 0.3, end=0.1), ["ratio.end"]),
        (Schedule("linear", 0.3), ["ratio.end"]),
        (Schedule("linear", 1.5, -1.0, at=0.5), ["ratio.start", "ratio.end", "ratio.at"]),
        (Schedule("step", 0.3, 0.1), ["ratio.at"]),
        (Schedule("step", 0.3, 0.1, at=1.0), ["ratio.at"]),
        (Schedule("constant", float("nan")), ["ratio.start"]),
        (Schedule("ramp", 0.3, 0.1), ["ratio.at", "ratio.until"]),
        (Schedule("ramp", 0.3, 0.1, at=0.0, until=1.5), ["ratio.at", "ratio.until"]),
        (Schedule("ramp", 0.3, 0.1, at=0.5, until=0.5), ["ratio.at"]),
        (Schedule("ramp", 0.3, at=0.5, until=1.0), ["ratio.end"]),
        (Schedule("step", 0.3, 0.1, at=0.5, until=0.6), ["ratio.until"]),
        (Schedule("constant", 0.3, at=0.5, until=0.6), ["ratio.at", "ratio.until"]),
    ],
)
def test_every_problem_of_a_schedule_is_named(schedule: Schedule, names: list[str]) -> None:
    found = schedule.problems("ratio", 0, 1)
    assert len(found) == len(names)
    assert all(f"`{name}`" in sentence for name, sentence in zip(names, found, strict=True))
    assert all(moving(kind, 0.3, 0.1).problems("ratio", 0, 1) == [] for kind in MOVING)


@pytest.mark.parametrize("kind", MOVING)
def test_closed_bounds_allow_the_ends_themselves(kind: str) -> None:
    ends = moving(kind, 1.0, 0.0)
    assert ends.problems("share", 0, 1, closed=True) == []
    assert len(ends.problems("share", 0, 1)) == 2
    assert len(moving(kind, 1.1, -0.1).problems("share", 0, 1, closed=True)) == 2


@pytest.mark.parametrize("kind", RATES)
@given(st.integers(2, 2000), shares, st.floats(0, 0.5), st.floats(0.01, 0.5))
def test_a_learning_rate_rises_to_its_peak_and_falls_to_its_end(
    kind: str, steps: int, final: float, warmup: float, decay: float
) -> None:
    rate = LearningRate(kind, 2.0, final, warmup, decay if kind == "wsd" else LearningRate.decay)
    assert rate.problems("rate") == []
    values = [rate(step, steps) for step in range(steps)]
    rounding = 1e-9
    assert all(0 <= value <= 2 + rounding for value in values)
    warm = [value for step, value in enumerate(values) if (step + 1) / steps < warmup]
    rest = values[len(warm) :]
    assert warm == sorted(warm)
    assert all(later <= earlier + rounding for earlier, later in itertools.pairwise(rest))
    assert values[-1] == pytest.approx(2 * final, abs=rounding)


def test_a_warm_up_is_linear_from_nothing() -> None:
    rate = LearningRate("linear", 1.0, warmup=0.5)
    assert [rate(step, 20) for step in range(9)] == pytest.approx([(step + 1) / 10 for step in range(9)])


def test_warm_up_stable_decay_is_constant_in_the_middle() -> None:
    rate = LearningRate("wsd", 1.0, warmup=0.2, decay=0.3)
    values = [rate(step, 10) for step in range(10)]
    assert values[1:7] == [1.0] * 6
    assert values[7:] == pytest.approx([2 / 3, 1 / 3, 0])
    assert LearningRate("wsd", 1.0, warmup=0.0, decay=0.0)(9, 10) == 1.0


@pytest.mark.parametrize(
    ("rate", "names"),
    [
        (LearningRate(peak=0.0), ["peak"]),
        (LearningRate(peak=float("nan")), ["peak"]),
        (LearningRate(final=1.5, warmup=1.0), ["final", "warmup"]),
        (LearningRate("wsd", decay=1.5), ["decay", "warmup + rate.decay"]),
        (LearningRate("wsd", warmup=0.6, decay=0.6), ["warmup + rate.decay"]),
        (LearningRate("cosine", decay=0.5), ["decay"]),
    ],
)
def test_every_problem_of_a_learning_rate_is_named(rate: LearningRate, names: list[str]) -> None:
    found = rate.problems("rate")
    assert len(found) == len(names)
    assert all(f"rate.{name}" in sentence for name, sentence in zip(names, found, strict=True))
