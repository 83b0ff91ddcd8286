"""Several processes through megamask.runtime.ranks, and the helper that starts them."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_gets_the_same_values(run_ranks, world: int) -> None:
    results = run_ranks(world, "ranks_worker:sums", start=2.5)
    values = [2.5 + rank for rank in range(world)]
    assert [answer["rank"] for answer in results] == list(range(world))
    assert [answer["mine"] for answer in results] == values
    for answer in results:
        assert answer["sum"] == sum(values)
        assert answer["maximum"] == max(values)
        assert answer["gathered"] == list(range(world))
        assert answer["stopped"] == [True, True]


def test_a_rank_that_fails_ends_all_and_is_quoted(run_ranks) -> None:
    with pytest.raises(AssertionError, match=r"(?s)a rank failed.*rank 1.*the last rank cannot go on"):
        run_ranks(2, "ranks_worker:fail_on_last")


def test_ranks_that_hang_are_ended_and_quoted(run_ranks) -> None:
    with pytest.raises(AssertionError, match=r"(?s)did not end within.*rank 0, exit code -9.*asleep.*rank 1.*asleep"):
        run_ranks(2, "sleep_worker:sleep", timeout=5)
