"""Goals beside figures, and the page that shows both."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from megamask.bench.gpu.figures import NEEDS_CUDA, Figure, Record
from megamask.bench.gpu.goals import BESIDE_EAGER, BESIDE_PLAIN, GOALS, SHARE_OF_MATMUL, judge_goals
from megamask.bench.gpu.page import render_page, value_text
from megamask.bench.gpu.parts import PARTS

MACHINE = {"gpu": "NVIDIA <H200>", "cpu": "x", "cores": 2, "python": "3.12", "versions": {"torch": "2.11"}}


def record(part: str, name: str, value: float | None, unit: str = "x", error: str = "", size: str = "full") -> Record:
    """A line about a GPU."""
    return Record(part, Figure(name, value, unit, error=error), MACHINE["gpu"], {"size": size}, "now", MACHINE)


def verdicts(*records: Record) -> dict[str, tuple[str, float | None]]:
    """By the title of the goal, of those that were measured."""
    judged = judge_goals(records, on_gpu=True)
    return {one.goal.title: (one.verdict, one.value) for one in judged if one.verdict != "not measured"}


def test_every_goal_is_about_a_part() -> None:
    assert {goal.part for goal in GOALS} <= PARTS.keys()
    assert len({goal.title for goal in GOALS}) == len(GOALS)


def test_of_variants_the_best_counts_and_of_several_things_the_worst() -> None:
    eager, compiled = (
        record("steps-base", f"{name}, {SHARE_OF_MATMUL}", value, "share")
        for name, value in (("bert", 0.40), ("bert, compiled", 0.46))
    )
    assert verdicts(eager) == {"share of the measured matmul rate, base": ("missed", 0.40)}
    assert verdicts(eager, compiled) == {"share of the measured matmul rate, base": ("reached", 0.46)}
    narrow, wide = (record("statistics", f"{BESIDE_EAGER}, width {n}", value) for n, value in ((768, 4.0), (2048, 2.0)))
    assert verdicts(narrow) == {"statistics kernel beside eager": ("reached", 4.0)}
    assert verdicts(narrow, wide) == {"statistics kernel beside eager": ("missed", 2.0)}


def test_compiled_steps_are_compared_with_a_compiled_trainer_only() -> None:
    base = "x Trainer, concatenated, bf16"
    eager = record("trainer", f"megamask bert, bf16, {base}", 1.7)
    compiled = record("trainer", f"megamask bert, bf16, compiled, {base}, compiled", 1.9)
    mixed = record("trainer", f"megamask bert, bf16, compiled, {base}", 9.0)
    plain = record("trainer", f"megamask bert, bf16, plain PyTorch, {base}", 9.0)
    assert verdicts(eager, compiled, mixed, plain) == {
        "tokens/s beside the Trainer": ("missed", 1.7),
        "tokens/s beside the Trainer, both compiled": ("reached", 1.9),
    }


@pytest.mark.parametrize(("value", "verdict"), [(1.019, "reached"), (1.02, "reached"), (1.021, "missed")])
def test_a_bound_counts_as_reached(value: float, verdict: str) -> None:
    found = verdicts(record("entropy-base", f"probe, {BESIDE_PLAIN}", value))
    assert found == {"entropy by probe, time of a plain step, base": (verdict, value)}


def test_figures_that_are_not_of_a_gpu_reach_nothing() -> None:
    listed = [record("entropy-base", f"probe, {BESIDE_PLAIN}", 1.0)]
    assert {one.verdict for one in judge_goals(listed, on_gpu=False)} == {"not on a GPU"}
    assert {one.verdict for one in judge_goals([], on_gpu=True)} == {"not measured"}


class Tags(HTMLParser):
    """The open tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.names.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_the_page_shows_every_part_goal_figure_and_error(size: str) -> None:
    records = [
        record("ceilings", "matmul <bf16>", 7.9e14, "FLOP/s", size=size),
        record("ceilings", "part", 3.0, "s", size=size),
        record("zero", "ZeRO 3", None, error="out of <memory>", size=size),
    ]
    page = render_page(records, bad=2)
    tags = Tags()
    tags.feed(page)
    assert not tags.open and not tags.names & {"script", "link", "img"} and "http" not in page
    shown = [*(part.title for part in PARTS.values()), *(goal.title for goal in GOALS)]
    shown += ["matmul <bf16>", "790 TFLOP/s", "out of <memory>", "NVIDIA <H200>", "cannot be read: 2"]
    assert [text for text in shown if text not in tags.text] == []
    assert ("not of a GPU at full size" in tags.text) == (size == "tiny")


def test_the_page_of_nothing_names_every_part() -> None:
    assert all(part.title.replace("'", "&#x27;") in render_page([]) for part in PARTS.values())


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.4567, "share", "45.7%"),
        (7.884e14, "FLOP/s", "788.4 TFLOP/s"),
        (4.3e12, "B/s", "4.3 TB/s"),
        (512.0, "B", "512 B"),
        (0.00123, "s", "1.23 ms"),
        (2e-9, "s", "0.002 µs"),
        (412345.6, "tokens/s", "412,346 tokens/s"),
        (1.0171, "x", "1.017 x"),
        (0.0, "tests", "0 tests"),
    ],
)
def test_values_are_shown_in_the_unit_that_a_reader_expects(value: float, unit: str, shown: str) -> None:
    assert value_text(Figure("", value, unit)) == shown


def test_without_a_value_the_error_is_shown() -> None:
    assert value_text(Figure("", error=NEEDS_CUDA)) == NEEDS_CUDA
