"""Progress by steps and by the clock of rank 0, which the tests turn themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.time_budget import parse_duration, time_budget_problems
from megamask.runtime import ranks
from megamask.schedules import LearningRate
from megamask.training.progress import Progress


@given(st.integers(1, 50), st.floats(0, 200), st.sampled_from([None, "60s"]))
def test_step_and_seconds_of_a_checkpoint_give_the_progress(step: int, used: float, budget: str | None):
    resumed = Progress(50, budget, used)
    assert resumed.then(step, used) == resumed.at(step) == Progress(50, budget).then(step, used)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def trained(progress: Progress, clock: Clock, step: int, durations: list[float]) -> list[tuple[int, float]]:
    """Number and progress of the steps that are taken, each of the next duration; the run may end before they do."""
    values = []
    for duration in durations:
        if progress.over(step):
            break
        progress.tick()
        assert progress.began(step) < 1  # so that the learning rate of every step is above its end
        values.append((step, progress.at(step)))
        clock.time += duration
        step += 1
    return values


@pytest.mark.parametrize(
    ("text", "value"),
    [("24h", 86400.0), ("90m", 5400.0), ("1.5d", 129600.0), ("30s", 30.0), ("0.5h", 1800.0), ("0s", 0.0)],
)
def test_durations_are_parsed(text: str, value: float) -> None:
    assert parse_duration(text) == value


@pytest.mark.parametrize(
    "text", ["", "24", "h", "-1h", "1e3s", "inf", "nan", "nans", "1h30m", "24 h", "24H", "٣h", "0h"]
)
def test_a_bad_duration_is_refused_with_a_sentence(text: str) -> None:
    (sentence,) = time_budget_problems(text)
    assert sentence.startswith("`time_budget` must be a time above 0") and sentence.endswith(f"but is {text!r}.")
    assert time_budget_problems(None) == time_budget_problems("1s") == []


@given(st.integers(1, 500))
def test_without_a_budget_progress_is_the_share_of_the_steps(steps: int) -> None:
    clock = Clock()
    progress = Progress(steps, now=clock)
    values = trained(progress, clock, 0, [5.0] * (steps + 3))
    assert values == [(step, step / steps) for step in range(steps)]
    assert progress.left is None and progress.ending(steps) == ""


@given(st.lists(st.floats(0.01, 30), min_size=5, max_size=100), st.floats(10, 500))
def test_a_budget_ends_the_run_at_its_deadline_with_the_last_rate(durations: list[float], budget: float) -> None:
    clock, rate = Clock(), LearningRate(final=0.1)
    progress = Progress(10**6, f"{budget:.3f}s", now=clock)
    values = trained(progress, clock, 0, [*durations, *[30.0] * 50])
    shares = [share for _, share in values]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    # the step that the deadline found is the last, and the only one at the end
    assert all(share < 1 for share in shares[:-1])
    assert rate(shares[-1]) == pytest.approx(rate.peak * rate.final)
    # the last step has the rate of where the one before it began, and so it moves
    begin = shares[-2] if len(shares) > 1 else 0.0
    assert progress.began(len(values) - 1) == pytest.approx(begin, abs=1e-5)
    assert rate.of_step(progress.began(len(values) - 1), 1.0) >= rate.peak * rate.final
    assert "is used up" in progress.ending(len(values))


@given(st.lists(st.floats(0.1, 5), min_size=30, max_size=30), st.integers(1, 25), st.floats(0, 1e6))
def test_time_in_the_queue_does_not_count(durations: list[float], stop: int, waited: float) -> None:
    clock = Clock()
    whole = trained(Progress(10**6, "40s", now=clock), clock, 0, durations)
    again = Clock()
    first = Progress(10**6, "40s", now=again)
    values = trained(first, again, 0, durations[:stop])
    used = first.used
    again.time += waited
    second = Progress(10**6, "40s", used=used, now=again)
    if not first.over(len(values)) and used < 40:
        values += trained(second, again, len(values), durations[stop:])
        assert [step for step, _ in values] == [step for step, _ in whole]
        assert [share for _, share in values] == pytest.approx([share for _, share in whole])
    else:
        assert second.over(len(values)) or used < 40


def test_steps_end_a_run_with_a_budget_too() -> None:
    clock = Clock()
    progress = Progress(10, "1h", now=clock)
    values = trained(progress, clock, 0, [1.0] * 20)
    assert values == [(step, step / 10) for step in range(10)] and progress.at(10) == 1
    assert "Raise `steps`" in progress.ending(10)


def test_all_ranks_use_the_clock_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = [Clock(), Clock()]
    both = [Progress(100, "100s", now=clock) for clock in clocks]
    clocks[0].time += 25
    clocks[1].time += 60
    messages: list[torch.Tensor] = []
    for rank, progress in enumerate(both):  # what each would send
        monkeypatch.setattr(ranks, "is_main", lambda rank=rank: rank == 0)
        monkeypatch.setattr(ranks, "sum", lambda value: messages.append(value) or value)
        progress.tick()
    for progress in both:
        monkeypatch.setattr(ranks, "sum", lambda value: torch.stack(messages[:2]).sum())
        progress.tick()
        assert progress.at(0) == 0.25
