"""A run that goes on otherwise, on purpose: what is named after --change is taken up, recorded and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from megamask.checkpoint.format import read_tensors
from megamask.checkpoint.run_folder import RunFolder
from megamask.errors import ConfigError
from megamask.schedules import LearningRate
from tests.system.commands import Ended, content, metrics, train
from tests.system.conftest import STEPS

LATER = 2 * STEPS


def on(data: Path, run: Path, *arguments: object, **more: object) -> Ended:
    """Go on with the finished run, to more steps."""
    same = {"steps": LATER, "checkpoint__every": 4, "checkpoint__keep": 9, "validation__every": 4}
    return train(data, run, *arguments, **(same | more))


def test_a_change_decides_every_step_from_then_on(copy: Path, data: Path) -> None:
    before = dict(read_tensors(RunFolder(copy).checkpoint(STEPS)))
    names = ["steps", "optimizer.lr.peak", "optimizer.beta1", "optimizer.beta2"]
    slow = {"optimizer__lr__peak": 1e-20, "optimizer__beta1": 0, "optimizer__beta2": 0}
    ended = on(data, copy, "--change", *names, **slow)
    assert ended.code == 0, ended.err
    assert f"`optimizer.lr.peak` is 1e-20 from step {STEPS} on; it was " in ended.out
    after = dict(read_tensors(RunFolder(copy).checkpoint(LATER)))
    for name in (name for name in after if name.startswith("weights/")):
        assert (after[name] - before[name]).abs().max() <= STEPS * 1e-20
    # without memory, the second moment is the square of the first
    firsts = [name for name in after if "exp_avg/" in name]
    assert firsts
    for name in firsts:
        assert torch.equal(after[name.replace("exp_avg/", "exp_avg_sq/")], after[name] ** 2)
    rate = LearningRate(**json.loads(RunFolder(copy).config.read_text())["optimizer"]["lr"])
    assert rate.peak == 1e-20
    rates = metrics(copy, "lr")
    assert {step for step, _ in rates} == set(range(1, LATER + 1))
    assert all(
        rates[step, "lr"] == rate.of_step((step - 1) / LATER, step / LATER) for step in range(STEPS + 1, LATER + 1)
    )
    launch = json.loads(RunFolder(copy).environment.read_text())["launches"][-1]
    assert launch["step"] == STEPS and set(launch["changes"]) - {"output", "checkpoint.keep"} == set(names)
    # the same command, requeued, has nothing more to change; nor need the first have saved before it was killed
    for step in range(STEPS + 4, LATER + 1, 4):
        shutil.rmtree(RunFolder(copy).checkpoint(step))
    again = on(data, copy, "--change", *names, **slow)
    assert again.code == 0 and "from step" not in again.out
    weights = dict(read_tensors(RunFolder(copy).checkpoint(LATER)))
    assert all(torch.equal(weights[name], after[name]) for name in after)


def test_what_is_not_named_or_may_not_change_is_refused(copy: Path, data: Path) -> None:
    before = content(copy)
    for arguments, culprits in (
        ((), ["copy holds another run", "name them after --change", "`steps` is 24 here, but 12 there."]),
        (("--change", "optimizer.lr"), ["`steps` is 24 here, but 12 there."]),
        (("--change", "stepz"), ["`stepz` is not known in `change`. Did you mean `steps`?"]),
        (("--change", "steps", "packs.per_step"), ["`change`", "'packs.per_step'", "`init`"]),
        (("--change", "steps", "optimizer"), ["`change`", "'optimizer'"]),
    ):
        ended = on(data, copy, *arguments)
        assert ended.code == ConfigError.exit_code
        assert all(culprit in ended.err for culprit in culprits), ended.err
    assert content(copy) == before
