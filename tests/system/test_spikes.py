"""Whole runs with a pack that spoils its step: left out, gone back from, or the end; and runs with a budget of time."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megamask.batch import Losses, MaskPlan, PackedBatch
from megamask.checkpoint.format import read_state, read_tensors
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.engine.engine import Engine
from megamask.objectives.mlm import MLM
from megamask.training import loop, setup
from megamask.training.progress import Progress
from megamask.training.saving import RunSaver
from tests.system.commands import metrics, train
from tests.system.test_story import assert_same_run, tensors

STEPS = 24
SPIKES = {"spikes__window": 8, "spikes__sigma": 20.0}
EVERY = {"checkpoint__every": 6, "checkpoint__keep": 9, "validation__every": STEPS, "steps": STEPS}
REWIND = {"spikes__policy": "rewind", "spikes__rewind_steps": 3} | SPIKES | EVERY


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch):
    """``plant(pack, factor)``: whenever this pack is trained on, its loss counts so many times."""
    forward, planted = MLM.forward, dict[int, float]()

    def spoilt(self, batch: PackedBatch, plan: MaskPlan, soft=None) -> Losses:
        losses = forward(self, batch, plan, soft)
        factor = planted.get(batch.number, 1.0) if self.training else 1.0
        return replace(losses, total=losses.total * factor) if factor != 1 else losses

    monkeypatch.setattr(MLM, "forward", spoilt)
    return planted.__setitem__


def killed(monkeypatch: pytest.MonkeyPatch, data: Path, output: Path, at: int, **more: object) -> None:
    """A run that dies like a killed one at the ``at``-th move of its weights."""

    class Kill(BaseException):
        pass

    move, moves = Engine.step, iter(range(10**6))

    def step(self, rate: float) -> None:
        if next(moves) == at:
            raise Kill
        move(self, rate)

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(Engine, "step", step)
        train(data, output, **more)


def differ(one: Path, other: Path) -> bool:
    """Whether two runs ended with other weights."""
    ours, theirs = tensors(one, STEPS), tensors(other, STEPS)
    return any(not torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith("weights/"))


def test_a_spike_is_dropped_and_the_run_resumes_bit_for_bit(
    data: Path, tmp_path: Path, plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(2 * 15 + 1, 100.0)
    settings = {"spikes__policy": "skip"} | SPIKES | EVERY
    whole, again = tmp_path / "whole", tmp_path / "again"
    ended = train(data, whole, **settings)
    assert ended.code == 0, ended.err
    assert ended.out.count("is a spike") == 1 and "Step 16 is a spike: its loss" in ended.out
    # the spike comes after the resume: what the judge had seen must be in the checkpoint
    killed(monkeypatch, data, again, 14, **settings)
    assert train(data, again, **settings).code == 0
    assert_same_run(again, whole, STEPS)
    state = read_state(RunFolder(whole).checkpoint(STEPS))
    assert state["optimizer_steps"] == STEPS - 1 and state["judge"]["dropped"] == 1
    # negative control: only reported, the spike moves the weights
    assert train(data, tmp_path / "log", **SPIKES, **EVERY).code == 0
    assert differ(whole, tmp_path / "log")


def begin_with_ledger(run: Path, other: Path, step: int, shift: int) -> None:
    """A run that begins at a checkpoint of another, knowing which packs that one left out after it went back there."""
    source, begun = RunFolder(other).checkpoint(step), RunFolder(run)
    begun.checkpoints.mkdir(parents=True)
    shutil.copy(other / "config.json", begun.config)
    state = read_state(source)
    state["judge"] |= {"ledger": [[step, shift]], "rewinds": 1}
    state["packs"] = 2 * (step + shift)
    save_checkpoint(begun, step, dict(read_tensors(source)), state)


def test_a_rewound_run_is_the_run_that_started_with_its_ledger(
    data: Path, tmp_path: Path, plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(2 * 16, 100.0)
    whole, again, reference = tmp_path / "whole", tmp_path / "again", tmp_path / "reference"
    ended = train(data, whole, **REWIND)
    assert ended.code == 0, ended.err
    assert "Rewound from step 17 to step 12 (rewind 1 of 3). Packs 24 to 33 will be skipped." in ended.out
    # with the same text it would spike again
    assert ended.out.count("is a spike") == 1
    state = read_state(RunFolder(whole).checkpoint(STEPS))
    assert state["judge"]["ledger"] == [[12, 5]] and state["packs"] == 2 * (STEPS + 5)
    assert RunFolder(whole).steps() == [24, 18, 13, 12, 6]

    begin_with_ledger(reference, whole, 12, shift=5)
    ended = train(data, reference, **REWIND)
    assert ended.code == 0 and "resuming after step 12" in ended.out, ended.err
    ours, theirs = tensors(whole, STEPS), tensors(reference, STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    figures = metrics(reference)
    assert {key: value for key, value in metrics(whole).items() if key[0] > 12} == figures

    # killed after it went back and before it saved that: it goes back once more, to the same end
    killed(monkeypatch, data, again, 16, **REWIND)
    assert RunFolder(again).steps()[0] == 12
    assert train(data, again, **REWIND).code == 0
    assert_same_run(again, whole, STEPS)


def test_a_run_rewinds_only_to_old_checkpoints_and_at_most_max_rewinds_times(data: Path, tmp_path: Path, plant) -> None:
    for step in (8, 14, 15, 16, 17, 18, 19):
        plant(2 * step, 100.0)
    settings = REWIND | {"spikes__rewind_steps": 4, "spikes__max_rewinds": 1, "spikes__sigma": 6.0}
    ended = train(data, tmp_path / "run", **settings)
    assert ended.code == 0, ended.err
    assert "No checkpoint is 4 steps old, so the run does not rewind." in ended.out
    assert ended.out.count("Rewound from step") == 1


def test_nonfinite_steps_end_a_run_with_code_5_and_keep_its_checkpoints(data: Path, tmp_path: Path, plant) -> None:
    plant(2 * 3, math.nan)
    for step in range(9, 12):
        plant(2 * step + 1, math.inf)
    settings = {"spikes__max_nonfinite_in_row": 3} | EVERY
    ended = train(data, tmp_path / "run", **settings)
    assert ended.code == 5
    assert "Step 4 was dropped, its weights did not move: the loss of pack 6 on rank 0" in ended.out
    assert "Step 12 was dropped" in ended.err and "the last of 3 such steps in a row" in ended.err
    run = RunFolder(tmp_path / "run")
    assert run.steps() == [6]
    assert all(tensor.isfinite().all() for _, tensor in read_tensors(run.checkpoint(6)))
    assert read_state(run.checkpoint(6))["optimizer_steps"] == 5
    # only the metrics of a dropped step are NaN
    figures = metrics(run.path, "train/loss", "skipped_steps")
    assert figures[4, "train/loss"] is None and figures[4, "skipped_steps"] == 1
    assert all(figures[step, "train/loss"] > 0 for step in range(1, 9) if step != 4)
    # the same command goes on from there, and ends in the same way
    assert train(data, run.path, **settings).code == 5
    # the bound may be another when a run goes on
    assert train(data, run.path, **settings | {"spikes__max_nonfinite_in_row": 4}).code == 0


def test_a_run_that_is_to_stop_saves_before_it_evaluates(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher kills the ranks 30 seconds after Ctrl-C, and an evaluation may take longer."""
    order, take = [], loop.take_step

    def stopped(trainer: object, step: int, *given: object, **more: object) -> object:
        if step == 3:
            os.kill(os.getpid(), 15)
        return take(trainer, step, *given, **more)

    def evaluate(parts: object, step: int, *given: object) -> object:
        order.append(("evaluate", step))
        return evaluates(parts, step, *given)

    def save(saver: object, parts: object, step: int, **more: object) -> object:
        order.append(("save", step))
        return saves(saver, parts, step, **more)

    evaluates, saves = loop.evaluate, RunSaver.save
    monkeypatch.setattr(loop, "take_step", stopped)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(RunSaver, "save", save)
    ended = train(data, tmp_path / "run", steps=6, validation__every=2, checkpoint__every=2)
    assert ended.code == 75, ended.err
    assert order == [("evaluate", 0), ("evaluate", 2), ("save", 2), ("save", 4), ("evaluate", 4)]


def test_a_time_budget_ends_a_run_with_the_last_rate_across_requeues(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(setup, "Progress", partial(Progress, now=lambda: float(next(ticks))))
    output, settings = tmp_path / "run", {"time_budget": "60s", "checkpoint__every": 5, "steps": 10**6}
    taken = []
    take = loop.take_step

    def stopped(trainer: object, step: int, *given: object, **more: object) -> object:
        taken.append((step, more["progress"], more["rate"]))
        if step == 12 and len(taken) == 13:
            os.kill(os.getpid(), 15)
        return take(trainer, step, *given, **more)

    monkeypatch.setattr(loop, "take_step", stopped)
    first = train(data, output, **settings)
    assert first.code == 75 and "Stopped after step 13" in first.out, first.err
    used = read_state(RunFolder(output).checkpoint(13))["seconds"]
    assert 0 < used < 60
    ended = train(data, output, export=True, **settings)
    assert ended.code == 0, ended.err
    assert "`time_budget` is used up after" in ended.out and (output / "export" / "model.safetensors").is_file()

    steps, shares, rates = zip(*taken, strict=True)
    assert list(steps) == list(range(len(steps)))
    assert list(shares) == sorted(shares) and shares[-2] < shares[-1] == 1
    assert shares[13] == pytest.approx((used + 1) / 60)
    # the rate decays by where a step begins, so the last step still moves the weights
    peak = rates.index(max(rates))
    assert list(rates[peak:]) == sorted(rates[peak:], reverse=True) and 0 < rates[-1] < rates[-2]
    # the record holds what the clock decided
    lines = [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]
    kept = {line["step"]: line["progress"] for line in lines if "progress" in line}
    assert kept == {step + 1: pytest.approx(max(share, (step + 1) / 10**6)) for step, share, _ in taken}
    state = read_state(RunFolder(output).checkpoint(len(steps)))
    assert state["seconds"] >= 60
    # a run whose time is used up has nothing left to do
    again = train(data, output, **settings)
    assert again.code == 0 and len(taken) == len(steps)
    refused = train(data, output, **settings | {"time_budget": "2h"})
    assert refused.code == 2 and "`time_budget`" in refused.err
    assert "be a time above 0 with one of the units" in train(data, output, time_budget="soon").err
