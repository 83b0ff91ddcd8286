"""A trace holds the steps that were asked for, and its message names the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megamask.metrics.step_profiler import WARM_UP, StepProfiler


def profiled(folder: Path, count: int, steps: int, first: int = 0) -> list[str]:
    """The messages of a profiler, of each of ``steps`` steps and of its end."""
    profiler = StepProfiler(folder, count, first)
    messages = []
    for _ in range(steps):
        torch.ones(2, 2) @ torch.ones(2, 2)
        messages.append(profiler.advance())
    return [*messages, profiler.close()]


def traced_steps(path: Path) -> set[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)
    return {event["name"] for event in events if event["name"].startswith("ProfilerStep")}


@pytest.mark.parametrize("first", [0, 40])
def test_the_steps_after_the_warm_up_are_traced(first: int, tmp_path: Path) -> None:
    messages = profiled(tmp_path, 2, WARM_UP + 4, first)
    path = tmp_path / f"profile-steps-{first + WARM_UP + 1}-{first + WARM_UP + 2}.json.gz"
    assert [message for message in messages if message] == [messages[WARM_UP + 1]]
    assert messages[WARM_UP + 1].endswith(str(path))
    assert len(traced_steps(path)) == 2 and list(tmp_path.iterdir()) == [path]


def test_a_launch_that_ends_early_leaves_the_steps_so_far(tmp_path: Path) -> None:
    *before, last = profiled(tmp_path, 10, WARM_UP + 2)
    assert not any(before)
    assert f"steps {WARM_UP + 1} to {WARM_UP + 2}" in last
    assert len(list(tmp_path.iterdir())) == 1


def test_a_launch_that_ends_in_the_warm_up_says_so(tmp_path: Path) -> None:
    *before, last = profiled(tmp_path, 10, WARM_UP - 1)
    assert not any(before) and last.startswith("No step was traced")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "rank"), [(0, "0"), (2, "1")])
def test_nothing_is_traced_without_steps_or_on_other_ranks(
    count: int, rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not any(profiled(tmp_path, count, WARM_UP + 4))
    assert not list(tmp_path.iterdir())
