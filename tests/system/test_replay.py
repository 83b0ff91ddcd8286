"""A repeated step has the metrics of the log, and a changed log is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.checkpoint.run_folder import RunFolder
from tests.system.commands import Ended, content, run, train
from tests.system.conftest import STEPS


def again(folder: Path, step: int, *more: object) -> Ended:
    """The output of the tool for a step; the run folder must stay as it is."""
    before = content(folder)
    ended = run(main, "replay", "--run", folder, "--step", step, *more)
    assert content(folder) == before
    return ended


def plant(folder: Path, step: int, name: str) -> float:
    """Change the last bit of a figure in the log; what it says now."""
    path = folder / "logs" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (line,) = [line for line in lines if line["step"] == step and name in line]
    line[name] *= 1 + 2**-52
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return line[name]


@pytest.mark.parametrize("step", [3, 11])
def test_a_repeated_step_is_the_same_and_a_changed_log_is_reported(copy: Path, step: int) -> None:
    same = again(copy, step)
    assert same.code == 0, same.err + same.out
    assert f"step {step}: " in same.out and ", 0 differ" in same.out
    name = ("train/loss", "grad_norm")[step % 2]
    wrong = plant(copy, step, name)
    result = again(copy, step)
    assert result.code == 1, result.err
    assert f"step {step}: {name} is {wrong} in the log, but " in result.out and ", 1 differ" in result.out


def test_a_step_that_cannot_be_repeated_is_a_sentence(copy: Path, tmp_path: Path) -> None:
    assert "has no metrics of step 13" in (ended := again(copy, STEPS + 1)).err and ended.code == 2
    assert "has no metrics of step 0" in again(copy, 0).err
    for folder, words in ((tmp_path, "holds no run"), (tmp_path / "nowhere", "is not a folder")):
        assert words in (ended := again(folder, 1)).err and ended.code == 4


def test_steps_before_a_change_of_settings_are_refused(copy: Path, data: Path) -> None:
    changed = {"optimizer__lr__peak": 1e-4, "steps": STEPS + 2, "validation__every": 99, "checkpoint__keep": 9}
    assert train(data, copy, "--change", "steps", "optimizer.lr.peak", **changed).code == 0
    assert "changed at step" in (ended := again(copy, 10)).err and ended.code == 2
    assert again(copy, STEPS + 1).code == 0


def assert_replays(data: Path, folder: Path, *words: object, count: int) -> None:
    """Each step of a run that was stopped between two log lines, and lost a checkpoint, is the same again."""
    more = {"steps": count, "checkpoint__every": 5, "checkpoint__keep": 99, "log__every": 3, "validation__every": 4}
    assert train(data, folder, *words, **more).code == 0
    run_folder = RunFolder(folder)
    for step in (step for step in run_folder.steps() if step > 5):
        run_folder.rename_unused(run_folder.checkpoint(step), "newer")
    assert train(data, folder, *words, **more).code == 0
    for step in range(1, count + 1):
        ended = again(folder, step)
        assert ended.code == 0, (step, ended.out, ended.err)
    print(f"{count} steps repeated: 0 differ")


def test_every_step_of_a_run_with_interruptions_is_repeated(data: Path, tmp_path: Path) -> None:
    assert_replays(data, tmp_path / "run", count=7)
