"""When a run is said to stand on the unigram plateau."""

import pytest

from megamask.training.plateau import PlateauAlarm

UNIGRAM = 6.9


def reports(losses: list[float], steps: int = 100) -> list[int]:
    """The steps with a report, for a validation after every 4 of 100 steps."""
    alarm = PlateauAlarm()
    at = range(0, 4 * len(losses), 4)
    return [step for step, loss in zip(at, losses, strict=True) if alarm.sentence(step, step / steps, loss, UNIGRAM)]


def test_a_plateau_of_a_tenth_of_the_run_is_reported_once() -> None:
    assert reports([9.0, 7.2, 6.95, 6.93, 6.92, 6.92, 6.92, 6.92]) == [16]


@pytest.mark.parametrize(
    "losses",
    [
        [9.0, 8.8, 8.6, 8.4, 8.2, 8.0, 7.8],  # not there yet
        [9.0, 7.2, 6.95, 6.7, 6.5, 6.3, 6.1],  # left at once
        [float("nan")] * 9,
    ],
)
def test_a_run_that_learns_or_has_not_reached_it_is_not_reported(losses) -> None:
    assert not reports(losses)


def test_a_plateau_that_was_left_counts_from_its_new_begin() -> None:
    assert reports([7.0, 7.0, 6.5, 6.9, 6.9, 6.9, 6.9]) == [24]
