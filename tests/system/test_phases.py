"""A run in phases: stopped in each of them it resumes bit for bit, and up to its first change it is a run without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megamask.__main__ import main
from megamask.checkpoint.format import read_tensors
from megamask.checkpoint.run_folder import RunFolder
from megamask.errors import ConfigError
from tests.system.commands import Ended, metrics, run, train

STEPS = 9
FIRST = {"length": 16, "per_step": 4, "mask_ratio": 0.3}
PHASES = [{"until": 0.34} | FIRST, {"steps": 3, "length": 32}]
"""3 steps of 4 packs of short sequences, 3 of 2 packs of longer ones, then 3 as the settings of the run say."""


def phased(data: Path, output: Path, *arguments: object, **more: object) -> Ended:
    same = {"steps": STEPS, "checkpoint__every": 1, "checkpoint__keep": 20, "validation__every": 3}
    words = [",".join(f"{name}={value}" for name, value in phase.items()) for phase in PHASES]
    return train(data, output, "--phases", *words, *arguments, **(same | more))


@pytest.fixture(scope="module")
def whole(folder: Path, data: Path) -> Path:
    ended = phased(data, folder / "phased")
    assert ended.code == 0, ended.err
    for line in (
        "steps 1 to 3: sequences of at most 16 tokens; 1,024 tokens a step; 30.0% of them masked",
        "steps 4 to 6: sequences of at most 32 tokens; 512 tokens a step",
        "steps 7 to 9: sequences of at most 64 tokens; 512 tokens a step",
        "9 steps of 512 to 1,024 tokens",
    ):
        assert line in ended.out
    return folder / "phased"


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(read_tensors(RunFolder(folder).checkpoint(step)))


def same_weights(one: Path, other: Path, step: int) -> bool:
    before, after = weights(one, step), weights(other, step)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def stopped(whole: Path, step: int, folder: Path) -> Path:
    """A copy of the run as it was after ``step`` steps."""
    copy = Path(shutil.copytree(whole, folder))
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(RunFolder(copy).checkpoint(later))
    return copy


@pytest.mark.parametrize("step", [2, 3, 5, 8])
def test_a_run_stopped_in_any_phase_resumes_bit_for_bit(whole: Path, data: Path, tmp_path: Path, step: int) -> None:
    copy = stopped(whole, step, tmp_path / "copy")
    ended = phased(data, copy)
    assert ended.code == 0 and f"resuming after step {step}" in ended.out, ended.err
    assert same_weights(whole, copy, STEPS)
    assert metrics(copy) == metrics(whole)
    totals = metrics(copy, "total/tokens", "flops/student")
    assert totals == metrics(whole, "total/tokens", "flops/student")
    assert len({value for (_, name), value in totals.items() if name == "total/tokens"}) == STEPS + 1
    state = json.loads((RunFolder(copy).checkpoint(STEPS) / "state.json").read_text())
    assert state["packs"] == 3 * 4 + 6 * 2


def test_the_first_phase_is_a_run_without_phases(whole: Path, data: Path, tmp_path: Path) -> None:
    more = {"packs__length": 16, "packs__per_step": 4, "masking__ratio__start": 0.3}
    same = {"steps": STEPS, "checkpoint__every": 3, "checkpoint__keep": 9, "validation__every": 9}
    ended = train(data, tmp_path / "plain", **same, **more)
    assert ended.code == 0, ended.err
    assert same_weights(whole, tmp_path / "plain", 3)
    assert not same_weights(whole, tmp_path / "plain", 6)


@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_step_of_any_phase_is_repeated(whole: Path, step: int) -> None:
    replayed = run(main, "replay", "--run", whole, "--step", step)
    assert replayed.code == 0 and ", 0 differ" in replayed.out, replayed.err + replayed.out


def test_only_phases_to_come_may_change(whole: Path, data: Path, tmp_path: Path) -> None:
    def resumed(step: int, words: list[str], name: str, *more: object, **settings: object) -> Ended:
        copy = stopped(whole, step, tmp_path / name)
        same = {"steps": STEPS, "checkpoint__every": 9, "validation__every": 9}
        return train(data, copy, "--phases", *words, *more, **(same | settings))

    first = "until=0.34,length=16,per_step=4,mask_ratio=0.3"
    unnamed = resumed(4, [first, "steps=4,length=32"], "unnamed")
    assert unnamed.code == ConfigError.exit_code and "`phases` is " in unnamed.err
    longer = resumed(4, [first, "steps=4,length=32"], "longer", "--change", "phases")
    assert longer.code == 0, longer.err
    assert "`phases` is " in longer.out and " from step 4 on" in longer.out
    past = resumed(
        4, ["steps=4,length=16,per_step=4,mask_ratio=0.3", "steps=3,length=32"], "past", "--change", "phases"
    )
    assert past.code == ConfigError.exit_code and "only phases after step 4" in past.err
    # the end of the first phase would move
    moved = resumed(4, [first, "steps=3,length=32"], "moved", "--change", "steps", steps=20)
    assert moved.code == ConfigError.exit_code and "only phases after step 4" in moved.err
    fixed = resumed(2, [first, "steps=3,length=32"], "fixed", "--change", "steps", steps=12)
    assert fixed.code == 0, fixed.err
