"""Cells are written whole, read as they were, and compared; the table says what is behind its numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.errors import ConfigError, DataError
from megamask.evaluation.cells import (
    cell_path,
    check_output,
    differences,
    read_cell,
    read_cells,
    results_lines,
    write_cell,
)
from megamask.evaluation.outcome import Cell, CellKey
from megamask.evaluation.table import comparability_note, results_table

KEY = CellKey("run", "sst2", "fine_tuned", 1, "first")
CELL = Cell(
    KEY, "ok", "", 0.75, {"accuracy": 0.75}, (1.0, 0.0, 1.0, 1.0), (1.0, 0.0, 1.0, 0.0),
    {"train_examples": 20.0, "test_examples": 4.0, "test_examples_in_train": 1.0}, {"max_length": 128, "rates": [0.1]},
    {"sst2.jsonl": "0" * 64}, "1" * 64, {"torch": "2"}, "megamask evaluate", 1.5, "json_lines",
)  # fmt: skip


@pytest.mark.parametrize("model", ["run", "arm/seed-1", "..", ".hidden", "org/a b", "é"])
def test_a_cell_is_read_as_it_was_written(tmp_path: Path, model: str) -> None:
    cell = replace(CELL, key=replace(KEY, model=model))
    write_cell(tmp_path, cell)
    assert read_cell(cell_path(tmp_path, cell.key)) == cell
    assert read_cells(tmp_path) == {cell.key: cell}
    assert cell_path(tmp_path, cell.key).parent.parent == tmp_path / "cells"


def test_every_part_of_the_key_has_a_file_of_its_own(tmp_path: Path) -> None:
    others = (replace(KEY, task="rte"), replace(KEY, mode="frozen"), replace(KEY, seed=2), replace(KEY, variant="mean"))
    keys = {KEY, *others, replace(KEY, model="other")}
    for key in keys:
        write_cell(tmp_path, replace(CELL, key=key))
    assert read_cells(tmp_path).keys() == keys


def test_nan_survives_in_a_file_that_is_json(tmp_path: Path) -> None:
    cell = replace(CELL, predictions=(math.nan, 1.0), metrics={"loss": math.inf, "texts": 3.0}, state="collapsed")
    write_cell(tmp_path, cell)
    assert "NaN" not in cell_path(tmp_path, KEY).read_text()
    back = read_cell(cell_path(tmp_path, KEY))
    assert math.isnan(back.predictions[0]) and math.isnan(back.metrics["loss"]) and back.metrics["texts"] == 3


def test_a_record_that_calls_metrics_figures_is_read(tmp_path: Path) -> None:
    cell = replace(CELL, metrics={"loss": math.nan, "texts": 3.0})
    write_cell(tmp_path, cell)
    path = cell_path(tmp_path, KEY)
    written = path.read_text()
    assert '"metrics"' in written and '"figures"' not in written
    path.write_text(written.replace('"metrics"', '"figures"'))
    old = read_cell(path)
    assert math.isnan(old.metrics["loss"]) and old.metrics["texts"] == 3
    assert replace(old, metrics=CELL.metrics) == CELL


def test_damaged_cells_are_all_named(tmp_path: Path) -> None:
    for number, content in enumerate(("{", "{}", "[]")):
        path = cell_path(tmp_path, replace(KEY, seed=number))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    with pytest.raises(DataError) as error:
        read_cells(tmp_path)
    assert len(error.value.problems) == 3 and all("seed-" in problem for problem in error.value.problems)
    assert all(problem.endswith("Delete it to compute it again.") for problem in error.value.problems)


def test_differences_name_both_values() -> None:
    assert not differences(CELL.settings, {"max_length": 128, "rates": (0.1,)})
    assert differences(CELL.settings, {"max_length": 64, "rates": [0.1], "epochs": 3}) == [
        "`max_length` was 128 and is 64", "`epochs` was absent and is 3",
    ]  # fmt: skip


def test_a_folder_in_place_of_the_results_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"`output` must be a folder in which results\.jsonl is a file"):
        check_output(tmp_path)


def test_results_have_no_lists_of_examples() -> None:
    (line,) = results_lines([CELL]).splitlines()
    record = json.loads(line)
    assert record["score"] == 0.75 and record["key"]["task"] == "sst2" and not {"predictions", "labels"} & record.keys()


def test_the_table_shows_means_spreads_collapses_and_failures() -> None:
    second = replace(CELL, key=replace(KEY, seed=2), score=0.5, state="collapsed", reason="all predictions are 1")
    failed = replace(CELL, key=replace(KEY, task="rte"), score=None, state="failed", reason="no memory", metrics={})
    majority = replace(CELL, key=CellKey("reference", "sst2", "reference", 0, "majority"), score=0.5)
    table = results_table([majority, CELL, second, failed])
    assert "| run | fine tuned first | 62.5 ± 17.7 (2)† | ‡ |" in table
    assert "|  | reference: majority | 50.0 |  |" in table
    assert "- run, fine tuned first, SST-2, seed 2: all predictions are 1" in table
    assert "- run, fine tuned first, RTE, seed 1: no memory" in table
    assert "in train too, ignoring case and punctuation: SST-2 1." in table


def test_local_splits_are_not_compared_with_published_scores() -> None:
    note = comparability_note([CELL])
    assert "not with published ones" in note and "SST-2 20 / 4" in note and note in results_table([CELL])
    assert not comparability_note([replace(CELL, layout="official"), replace(CELL, state="failed")])
