"""What the report says about packs, columns and nodes agrees with the settings and with what a run would have."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.doctor.checks import examine
from megamask.doctor.report import planned_memory, report_lines
from megamask.doctor.settings import parse_doctor_command
from megamask.doctor.step_memory import PlannedMemory

SIZES = {"packs.length": 64, "packs.per-step": 4, "model.num-layers": 3, "model.hidden-size": 64}
FLAGS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def words(text: Path, output: Path, *more: str) -> list[str]:
    return ["--data", str(text), "--output", str(output), *FLAGS, *more]


def plan_of(text: Path, output: Path, *more: str) -> PlannedMemory:
    command = parse_doctor_command(words(text, output, *more))
    examined = examine(command)
    assert examined.text and examined.model and not examined.problems
    return planned_memory(command, examined, examined.text, examined.model)


def report_of(text: Path, output: Path, *more: str) -> str:
    command = parse_doctor_command(words(text, output, *more))
    return "\n".join(report_lines(command, examine(command)))


def test_larger_packs_of_the_reference_have_the_scores_of_all_pairs(text: Path, tmp_path: Path) -> None:
    flags = ("--model.attention", "reference", "--packs.tokens")
    small, large = (plan_of(text, tmp_path / "run", *flags, tokens) for tokens in ("128", "512"))
    assert small.with_tokens(512).pack.scores == large.pack.scores


@pytest.mark.parametrize("on", [False, True])
def test_the_column_of_the_run_is_marked(text: Path, tmp_path: Path, on: bool) -> None:
    flags = ("--packs.tokens", "256", *(("--model.activation-checkpointing",) if on else ()))
    report = report_of(text, tmp_path / "run", *flags)
    assert ("with activation checkpointing (as given)" in report) == on
    assert ("plain (as given)" in report) != on


def test_the_ranks_of_a_node_share_its_host(text: Path, tmp_path: Path) -> None:
    flags = ("--packs.tokens", "256", "--gpus", "4", "--deepspeed", "zero3_offload")
    for nodes, ranks in (("1", "4 ranks"), ("2", "2 ranks"), ("4", "1 rank")):
        assert f"host of a node with {ranks}: " in report_of(text, tmp_path / "run", *flags, "--nodes", nodes)
    assert "host of a node" not in report_of(text, tmp_path / "run", "--packs.tokens", "256")


def test_no_pack_is_larger_than_the_text_for_validation(text: Path, tmp_path: Path) -> None:
    report = report_of(text, tmp_path / "run", "--packs.tokens", "256", "--gpus", "1", "--gpu-memory", "80GB")
    assert "a pack can have at most 700 tokens" in report
