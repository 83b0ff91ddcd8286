"""The file of figures: what counts, what is finished, what a stopped machine leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.bench.gpu.figures import END, NEEDS_CUDA, Figure, FigureFile, end_of_part, read_figures
from megamask.bench.gpu.settings import GpuBenchConfig

GPU, OTHER, CPU = {"gpu": "H200", "cpu": "x"}, {"gpu": "A100", "cpu": "x"}, {"gpu": None, "cpu": "x"}
FULL, TINY = GpuBenchConfig(), GpuBenchConfig(size="tiny")
SPEED = Figure("speed", 2.0, "tokens/s", {"rows": 8})
FAILED, ABSENT = Figure("speed", error="out of memory"), Figure("speed", error=NEEDS_CUDA)


def write(file: FigureFile, part: str, *figures: Figure) -> None:
    """A whole part."""
    for figure in (*figures, end_of_part(figures, 1.0)):
        file.add(part, figure, 0.5)


def test_a_line_has_all_that_says_what_was_measured(tmp_path: Path) -> None:
    file = FigureFile(tmp_path / "new" / "figures.jsonl", GPU, FULL)
    file.add("steps-base", SPEED, 1.5)
    line = json.loads(file.path.read_text())
    assert (line["part"], line["name"], line["value"], line["unit"]) == ("steps-base", "speed", 2.0, "tokens/s")
    assert line["setting"] == {"rows": 8} and line["machine"] == GPU and line["seconds"] == 1.5
    assert [one.figure for one in file.records()] == [SPEED]


@pytest.mark.parametrize(
    ("figures", "finished"), [([SPEED], True), ([ABSENT], True), ([FAILED], False), ([SPEED, FAILED], False)]
)
def test_a_part_is_finished_if_no_figure_failed(tmp_path: Path, figures: list[Figure], finished: bool) -> None:
    file = FigureFile(tmp_path / "figures.jsonl", GPU, FULL)
    for figure in figures:
        file.add("zero", figure, 0.0)
    assert not file.finished()
    write(file, "zero", *figures)
    assert file.finished() == ({"zero"} if finished else set())


def test_figures_of_other_machines_and_sizes_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    write(FigureFile(path, GPU, FULL), "zero", SPEED)
    for machine, config in ((OTHER, FULL), (CPU, FULL), (GPU, TINY), (GPU, GpuBenchConfig(data=Path("x")))):
        assert not FigureFile(path, machine, config).records()
    assert FigureFile(path, GPU, FULL).finished() == {"zero"}


def test_the_newest_figure_counts_and_success_ends_a_failure(tmp_path: Path) -> None:
    file = FigureFile(tmp_path / "figures.jsonl", GPU, FULL)
    write(file, "zero", SPEED, Figure("ZeRO 3", error="out of memory"))
    assert ("zero", "ZeRO 3") in file.latest()
    write(file, "zero", Figure("speed", 3.0, "tokens/s"))
    assert {name: one.figure.value for (_, name), one in file.latest().items()} == {"speed": 3.0, END: 1.0}


@pytest.mark.parametrize("left", [b'{"part": "zero", "na', b"nonsense\n", b'{"part": 1}\n', b"[]\n"])
def test_a_line_that_cannot_be_read_is_counted_and_costs_no_other(tmp_path: Path, left: bytes) -> None:
    file = FigureFile(tmp_path / "figures.jsonl", GPU, FULL)
    write(file, "zero", SPEED)
    with open(file.path, "ab") as end:
        end.write(left)
    write(file, "late-base", SPEED)
    records, bad = read_figures(file.path)
    assert (len(records), bad, file.finished()) == (4, 1, {"zero", "late-base"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_a_failure(tmp_path: Path, value: float) -> None:
    file = FigureFile(tmp_path / "figures.jsonl", GPU, FULL)
    file.add("zero", Figure("speed", value, "tokens/s"), 0.0)
    (record,) = file.records()
    assert record.figure.value is None and str(value) in record.figure.error and record.figure.failed
