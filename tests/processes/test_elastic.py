"""A run goes on in any ZeRO stage on any number of ranks: the same packs under the same masks, the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes.moves import BOUND, HALF, Jobs, Place, Twice, apart, figures, moved, outcome
from tests.system.cells import SCORES, STEPS, STOPS, Cell, Text

MOVES = [
    (Place("zero 0", 1), Place("zero 3", 2)),
    (Place("zero 3", 2), Place("zero 1", 4)),
    (Place("zero 1", 4), Place("zero 3", 1)),
    (Place("zero 2", 1), Place("zero 0", 4)),
    (Place("zero 3", 4), Place("zero 2", 2)),
    (Place("zero 1", 2), Place("zero 1", 1)),
]
"""From each stage and to each, and every change of the number of ranks."""
LEARNING = [
    Cell("part of speech", SCORES["part of speech"] | {"masking.unit": "word"}, "zero 3", STOPS[3]),
    Cell("token type", SCORES["token type"], "zero 1", STOPS[1]),
    Cell("corrected", SCORES["corrected"], "zero 2", STOPS[0]),
    Cell("audited", SCORES["audited"], "zero 1, bf16", STOPS[0]),
    Cell("falls back", SCORES["falls back"], "zero 2", STOPS[2]),
]
"""What scores and sources learn is summed over ranks."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.made(tmp_path_factory.mktemp("elastic"))


def test_a_run_resumes_in_another_stage_on_another_number_of_ranks(run_ranks, text: Text, tmp_path: Path) -> None:
    assert [outcome_of for outcome_of in moved(run_ranks, text, tmp_path, MOVES) if not outcome_of.exact] == []


def test_two_ranks_resume_bit_for_bit_and_what_a_move_gets_wrong_is_found(
    run_ranks, text: Text, tmp_path: Path
) -> None:
    jobs, one, two = Jobs(text, tmp_path), Place("zero 0", 1), Place("zero 2", 2)
    whole = jobs.add("whole", one)
    jobs.add("half", one, stop=HALF)
    went = {}
    for fault in ("", "two tensors swapped", "packs of each rank in a stretch"):
        copy = [str(tmp_path / "half"), str(tmp_path / f"two {fault}")]
        went[fault] = jobs.add(f"two {fault}", two, copy=copy, fault=fault)
    for place in (one, two):
        jobs.add(f"means {place.world}", place, fault="mean of means")
    twice = [Twice.added(cell, jobs) for cell in LEARNING]
    results = jobs.run(run_ranks)
    assert {str(run.cell): run.differences(results) for run in twice if run.differences(results)} == {}
    outcomes = {
        f: outcome(results[at], tmp_path / f"two {f}", results[whole], tmp_path / "whole") for f, at in went.items()
    }
    assert outcomes[""].exact
    swapped = outcomes["two tensors swapped"]
    assert len(swapped.tensors) == 2 and swapped.loss > BOUND
    stretched = outcomes["packs of each rank in a stretch"]
    # sorted they would be the same, and so are the losses
    assert stretched.packs and not stretched.tensors and stretched.loss <= BOUND
    means = [figures(tmp_path / f"means {world}", "train/loss") for world in (1, 2)]
    assert means[0].keys() == means[1].keys() == set(range(1, STEPS + 1))
    assert apart(*means) > 10 * BOUND
