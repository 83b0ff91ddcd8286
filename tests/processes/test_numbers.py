"""What is no number reaches no weight and no checkpoint, on whatever rank it arises; copies that differ are seen."""

from __future__ import annotations

from tests.processes.conftest import RunRanks
from tests.processes.numbers_worker import BAD, GUILTY, PLACES
from tests.processes.test_engine import BF16, FP32

CELLS = [FP32[0], BF16[0], BF16[1], FP32[3]]
"""Each stage; tests/soak has each in every precision."""
FEW = [FP32[0], BF16[1], FP32[3]]


def assert_numbers(run_ranks: RunRanks, cells: list[dict], few: list[dict], times: int, world: int = 2) -> None:
    """Everything that `numbers_worker` tries, on ``world`` ranks of which one is at fault."""
    said = run_ranks(world, "numbers_worker:everything", cells=cells, few=few, times=times, timeout=900)
    tried = 0
    for cell, answers in enumerate(zip(*(rank["poisoned"] for rank in said), strict=True)):
        tried += assert_dropped(cells[cell], list(zip(*answers, strict=True)))
    published = seen = false = 0
    for rank in said:
        # the negative controls: unjudged, the weights are spoilt; unasked, the other ranks would not know
        assert rank["unjudged"]["poison"] and not rank["unjudged"]["together"]
        published += sum(cell["published"] for cell in rank["spoilt"])
        seen += sum(cell["seen"] for cell in rank["flipped"])
        false += sum(cell["false"] for cell in rank["flipped"])
        assert all(cell["tried"] >= 12 for cell in rank["spoilt"])
    assert [rank["unjudged"]["mine"] for rank in said] == [rank != GUILTY for rank in range(world)]
    # at stage 3 there are no copies
    copies = sum(cell["zero_optimization"]["stage"] < 3 for cell in few)
    assert (published, seen, false) == (0, world * copies * times, 0)
    spoilt = sum(cell["tried"] for cell in said[0]["spoilt"])
    print(
        f"{tried} steps with what is no number in {len(cells)} cells: 0 moved a weight; {spoilt} spoilt states: "
        f"0 published; {copies * times} flipped bits: all seen, {copies * times} looks without one: 0 alarms"
    )


def assert_dropped(cell: dict, answers: list[tuple[dict, ...]]) -> int:
    """All ranks decide alike, nothing moves, and the line says of what and where; how many steps were tried."""
    *steps, after = answers
    # and the next step is that of a run in which nothing was wrong
    assert all(answer["same"] for answer in after), cell
    assert len(steps) == len(PLACES) * len(BAD)
    for number, said in enumerate(steps):
        place, line = PLACES[number // len(BAD)], said[0]["said"]
        assert all(answer == said[0] for answer in said), (cell, place)
        assert not said[0]["moves"] and said[0]["same"], (cell, place)
        assert f"Step {number + 2} was dropped" in line and "(packs " in line
        assert "the gradient of " in line or place == "loss", (cell, line)
        if place != "gradient":
            assert f"on rank {GUILTY}" in line and "on rank 0" not in line, (cell, line)
        assert ("what the teacher says of pack" in line) == (place == "teacher"), (cell, line)
    return len(steps)


def test_what_is_no_number_moves_nothing_and_a_flipped_bit_is_seen(run_ranks: RunRanks) -> None:
    assert_numbers(run_ranks, CELLS, FEW, times=100)
