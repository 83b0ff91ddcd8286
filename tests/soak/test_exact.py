"""Every recipe, and every pair of choices with every engine and every place to stop, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes.moves import Jobs, Twice
from tests.system import cells
from tests.system.cells import ENGINES, Cell, Text
from tests.system.test_exact import stopped


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.made(tmp_path_factory.mktemp("exact"))


@pytest.mark.parametrize("cell", [*cells.recipes(), *cells.combined(2)], ids=str)
def test_a_run_that_was_stopped_is_the_run_that_was_not(cell: Cell, text: Text, tmp_path: Path) -> None:
    assert stopped(cell, text, tmp_path / "runs").resumed() == []


def test_the_cells_hold_every_pair_of_an_engine_and_a_score() -> None:
    pairs = {(cell.engine, cell.name.split(" + ")[1]) for cell in cells.combined(2)}
    wanted = {(engine, score) for engine in ENGINES for score in cells.SCORES} - set(cells.NEVER)
    assert pairs == wanted


def test_two_ranks_resume_bit_for_bit(run_ranks, text: Text, tmp_path: Path) -> None:
    jobs = Jobs(text, tmp_path)
    # of two ranks each step has two packs for each, so that micro-steps are accumulated too
    twice = [Twice.added(cell, jobs) for cell in cells.combined(1)]
    results = jobs.run(run_ranks, timeout=3600)
    by_cell = {str(run.cell): run.differences(results) for run in twice}
    print(f"{len(by_cell)} cells on two ranks, {sum(map(bool, by_cell.values()))} that differ")
    assert {name: names for name, names in by_cell.items() if names} == {}
