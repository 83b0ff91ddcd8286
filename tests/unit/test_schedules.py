"""Schedules start and end where they say, stay between, and go one way."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.recipes import find_recipe
from megamask.errors.setting_rules import settings_problems
from megamask.masking.masker import STEPS, Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.schedules import LearningRate, Schedule
from tests.batches import IDS, pack

MOVING = ["linear", "cosine", "step", "ramp"]
RATES = ["linear", "cosine", "wsd"]
shares = st.floats(0, 1)


def moving(kind: str, start: float, end: float) -> Schedule:
    return Schedule(kind, start, end, 0.5 if kind in ("step", "ramp") else None, 0.8 if kind == "ramp" else None)


def named(problems: list[str]) -> list[str]:
    """The settings that the sentences begin with, in order."""
    return sorted(problem.split("`")[1] for problem in problems)


def wrong(schedule: Schedule, **bounds: bool) -> list[str]:
    """The settings that are wrong in a schedule of values in (0, 1)."""
    return named(schedule.range_problems("ratio", 0, 1, **bounds) + settings_problems(schedule, "ratio"))


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
    assert wrong(schedule) == sorted(names)
    assert all(wrong(moving(kind, 0.3, 0.1)) == [] for kind in MOVING)


@pytest.mark.parametrize("kind", MOVING)
def test_closed_bounds_allow_the_ends_themselves(kind: str) -> None:
    ends = moving(kind, 1.0, 0.0)
    assert ends.range_problems("share", 0, 1, closed=True) == []
    assert len(ends.range_problems("share", 0, 1)) == 2
    assert len(moving(kind, 1.1, -0.1).range_problems("share", 0, 1, closed=True)) == 2


@pytest.mark.parametrize("kind", RATES)
@given(st.integers(2, 2000), shares, st.floats(0, 0.5), st.floats(0.01, 0.5))
def test_a_learning_rate_rises_to_its_peak_and_falls_to_its_end(
    kind: str, steps: int, final: float, warmup: float, decay: float
) -> None:
    rate = LearningRate(kind, 2.0, final, warmup, decay if kind == "wsd" else LearningRate.decay)
    assert settings_problems(rate, "rate") == []
    values = [rate.of_step(step / steps, (step + 1) / steps) for step in range(steps)]
    rounding = 1e-9
    assert all(0 <= value <= 2 + rounding for value in values)
    warm = [value for step, value in enumerate(values) if (step + 1) / steps < warmup]
    rest = values[len(warm) :]
    assert warm == sorted(warm)
    assert all(later <= earlier + rounding for earlier, later in itertools.pairwise(rest))
    assert rate(1.0) == pytest.approx(2 * final, abs=rounding)
    assert rate.of_step(1.0, 1.0) == rate(1.0)

    def later(step: int) -> float:
        return rate((step + 1) / steps)  # the rate where a step ends

    # a decaying step has the rate at which it begins: that at which the step before it ended
    decaying = [step for step in range(1, steps) if step / steps >= warmup]
    assert all(values[step] == later(step - 1) for step in decaying)
    assert all(value > 0 for value in values)


def test_a_warm_up_is_linear_from_nothing() -> None:
    rate = LearningRate("linear", 1.0, warmup=0.5)
    values = [rate.of_step(step / 20, (step + 1) / 20) for step in range(9)]
    assert values == pytest.approx([(step + 1) / 10 for step in range(9)])


def test_warm_up_stable_decay_is_constant_in_the_middle() -> None:
    rate = LearningRate("wsd", 1.0, warmup=0.2, decay=0.3)
    values = [rate.of_step(step / 10, (step + 1) / 10) for step in range(10)]
    assert values[1:8] == pytest.approx([1.0] * 7)
    assert values[8:] == pytest.approx([2 / 3, 1 / 3])
    assert LearningRate("wsd", 1.0, warmup=0.0, decay=0.0)(1.0) == 1.0


@pytest.mark.parametrize(
    ("rate", "names"),
    [
        (LearningRate(peak=0.0), ["rate.peak"]),
        (LearningRate(peak=float("nan")), ["rate.peak"]),
        (LearningRate(final=1.5, warmup=1.0), ["rate.final", "rate.warmup"]),
        (LearningRate("wsd", decay=1.5), ["rate.decay", "rate.warmup + rate.decay"]),
        (LearningRate("wsd", warmup=0.6, decay=0.6), ["rate.warmup + rate.decay"]),
        (LearningRate("cosine", decay=0.5), ["rate.decay"]),
    ],
)
def test_every_problem_of_a_learning_rate_is_named(rate: LearningRate, names: list[str]) -> None:
    assert named(settings_problems(rate, "rate")) == sorted(names)


# ---- masking ratio decay

DECAYS = {  # each with its formula in the released code of the paper, for progress x
    "mrd-linear": (Schedule("linear", 0.3, 0.0), lambda x: 0.3 * (1 - x)),
    "mrd-cosine": (Schedule("cosine", 0.32, 0.02), lambda x: 0.15 * (1 + math.cos(math.pi * x)) + 0.02),
}


@pytest.mark.parametrize("recipe", DECAYS)
@given(progress=shares)
def test_masking_ratio_decay_follows_its_formula(recipe: str, progress: float) -> None:
    schedule, formula = DECAYS[recipe]
    assert find_recipe(recipe).masking.ratio == schedule
    for x in (0.0, progress, 1.0):
        assert schedule(x) == pytest.approx(formula(x), abs=1e-12)


def test_linear_decay_has_the_mean_ratio_and_cosine_slightly_more() -> None:
    grid = [step / 1000 for step in range(1001)]
    linear, cosine = (schedule for schedule, _ in DECAYS.values())
    assert statistics.mean(map(linear, grid)) == pytest.approx(0.15)
    assert statistics.mean(map(cosine, grid)) == pytest.approx(0.17)


@pytest.mark.parametrize("recipe", DECAYS)
def test_a_decaying_ratio_has_few_exact_budgets(recipe: str) -> None:
    """Of a masker that took all steps, one that begins anywhere, and the schedule itself on its 64 steps."""
    steps, rows = 1000, 4096
    schedule, formula = DECAYS[recipe]
    config = MaskingConfig(schedule)
    assert settings_problems(config, "masking") == []
    whole = Masker(config, IDS)
    budgets = [whole.budget(step / steps, rows) for step in range(steps)]
    assert len(set(budgets)) <= STEPS + 1
    assert budgets[0] == max(1, round(formula(0.0) * rows))
    assert budgets[-1] == max(1, round(formula(1.0) * rows))
    for step in range(0, steps, 37):
        assert Masker(config, IDS).budget(step / steps, rows) == budgets[step]
        batch = pack([60, 61, 62], number=step)
        plan = whole(batch, progress=step / steps, rng=PackRng(1, step))
        assert len(plan.targets) == whole.budget(step / steps, batch.layout.rows)


@given(st.floats(0.01, 0.5), st.floats(0.01, 0.4))
def test_schedules_turn_with_the_learning_rate(warmup: float, decay: float) -> None:
    wsd, cosine = LearningRate("wsd", 1.0, warmup=warmup, decay=decay), LearningRate("cosine", 1.0, warmup=warmup)
    jump = Schedule("step", 0.3, 0.15, at="decay")
    steps = 1000
    for rate in (wsd, cosine):
        resolved = jump.resolved(rate)
        # the ratio falls where the rate begins to
        values = [rate((step + 1) / steps) for step in range(steps)]
        last_peak = max(step for step in range(steps) if values[step] >= max(values) * (1 - 1e-9))
        assert resolved(max(0.0, last_peak / steps - 0.002)) == 0.3 and resolved(last_peak / steps + 0.003) == 0.15
        assert resolved.resolved(rate) == resolved
    ramp = Schedule("ramp", 1.0, 0.1, at="warmup", until="decay")
    assert ramp.resolved(wsd) == Schedule("ramp", 1.0, 0.1, at=warmup, until=1 - decay)


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        # a phase that nobody resolved to a learning rate
        (Schedule("step", 0.3, 0.1, at="warmup"), ["ratio.at"]),
        (Schedule("ramp", 0.3, 0.1, at=0.2, until="decay"), ["ratio.until"]),
        # resting at nothing is not passing by
        (Schedule("step", 0.3, 0.0, at=0.5), ["ratio.end"]),
        (Schedule("ramp", 0.3, 0.0, at=0.5, until=0.6), ["ratio.end"]),
        (Schedule("constant", 0.0), ["ratio.start"]),
        (Schedule("linear", 0.3, -0.1), ["ratio.end"]),
    ],
)
def test_a_bound_may_be_touched_for_a_moment_only(schedule: Schedule, names: list[str]) -> None:
    assert wrong(schedule, touch=True) == sorted(names)
    assert wrong(Schedule("linear", 0.3, 0.0), touch=True) == []
    assert wrong(Schedule("linear", 0.3, 0.0)) == ["ratio.end"]


@given(shares, shares)
def test_a_schedule_that_goes_back_has_its_first_value_again(start: float, end: float) -> None:
    for schedule in (Schedule("step", start, end, at=0.2, back=0.75), Schedule("ramp", start, end, 0.2, 0.5, 0.75)):
        plain = Schedule(schedule.kind, start, end, schedule.at, schedule.until)
        for progress in (0.0, 0.1, 0.3, 0.6, 0.74):
            assert schedule(progress) == plain(progress)
        assert [schedule(progress) for progress in (0.75, 0.9, 1.0)] == [start] * 3


def test_a_return_can_be_a_phase_and_must_lie_behind_the_move() -> None:
    rate = LearningRate("wsd", decay=0.25)
    assert Schedule("step", 1.0, 0.1, at=0.3, back="decay").resolved(rate).back == 0.75
    assert wrong(Schedule("ramp", 0.3, 0.1, 0.2, 0.5, 0.9)) == []
    for back in (0.0, 0.4, 0.5, 1.0):
        assert wrong(Schedule("ramp", 0.3, 0.1, 0.2, 0.5, back)) == ["ratio.back"]
    assert wrong(Schedule("step", 0.3, 0.1, at=0.5, back=0.5)) == ["ratio.back"]
    assert wrong(Schedule("linear", 0.3, 0.1, back=0.5)) == ["ratio.back"]
