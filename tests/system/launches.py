"""Launches of pretrain.py in this process that are compared bit for bit, stopped in the middle, or broken on purpose.

What a launch is like in a process of its own holds here too: every generator of this process is put into a state that
nobody knows before it begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from megamask import pretrain
from megamask.checkpoint.format import read_state, read_tensors
from megamask.checkpoint.run_folder import RunFolder
from megamask.engine.engine import Engine
from megamask.entropy.audit import Audit
from megamask.entropy.exact import Average
from megamask.entropy.probe import Probe
from megamask.health.loss_spikes import SpikePolicy, StepDecision
from megamask.masking.masker import Masker
from megamask.masking.part_of_speech import PartOfSpeechScore
from megamask.metrics.meters import TIMING_METRICS
from megamask.objectives.mlm import MLM
from megamask.runtime import ranks
from megamask.training import loop, setup
from megamask.training import step as training
from tests.system.commands import run

"""Figures that go by a clock; all others are functions of the run."""


def digest(tensor: Tensor) -> str:
    """The hash of type, shape and every bit."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + data.tobytes()).hexdigest()


def launch(
    arguments: list[str],
    *,
    stop: int | None = None,
    kill: int | None = None,
    fault: str = "",
    plant: Mapping[str, float] | None = None,
    drop: Sequence[int] = (),
) -> dict[str, Any]:
    """What pretrain.py does with ``arguments``, on this rank.

    With ``stop``, a signal to the last rank asks the run to stop after that many steps. With ``kill``, every rank gets
    SIGKILL in that step (from 1), before its weights change. ``fault`` is one of `FAULTS`.
    Whenever a pack of ``plant`` is trained on, its loss counts so many times; the steps ``drop`` (from 0) are dropped
    whatever they are.

    Returns ``code``, ``out`` and ``err`` of the command, the micro-steps of this rank in their order as ``packs``
    (number, hash of the tokens, hash of the plan), learning rate and scale of the optimizer's groups in each step as
    ``rates``, and the hashes of weights, moments and of all else that was learnt, with which it began, as ``began``.
    """
    random.seed()
    np.random.seed()
    torch.seed()
    seen: dict[str, Any] = {"packs": [], "rates": {}, "began": {}}
    with ExitStack() as stack:
        for change in (*FAULTS[fault](), *_watched(seen, stop, kill), _planted(plant or {}), _decreed(drop)):
            stack.enter_context(change)
        ended = run(pretrain.main, *arguments)
    return {"code": ended.code, "out": ended.out, "err": ended.err} | seen


Change = AbstractContextManager[Any]


def _replaced(owner: object, name: str, make: Callable[[Callable], Callable]) -> Change:
    """``owner.name`` as ``make`` makes it of what it was."""
    return patch.object(owner, name, make(getattr(owner, name)))


def _planted(plant: Mapping[str, float]) -> Change:
    def make(real: Callable) -> Callable:
        def forward(model, batch, plan, soft=None):
            losses = real(model, batch, plan, soft)
            factor = plant.get(str(batch.number), 1.0) if model.training else 1.0
            return replace(losses, total=losses.total * factor) if factor != 1 else losses

        return forward

    return _replaced(MLM, "forward", make)


def _decreed(drop: Sequence[int]) -> Change:
    def make(real: Callable) -> Callable:
        return lambda judge, step, *given: StepDecision(moves=False) if step in drop else real(judge, step, *given)

    return _replaced(SpikePolicy, "decide", make)


def _watched(seen: dict[str, Any], stop: int | None, kill: int | None) -> Iterator[Change]:
    def train_micro(real: Callable) -> Callable:
        def watched(engine, batch, plan, *rest, **given):
            made = [plan.inputs, plan.targets, plan.labels, plan.hidden]
            seen["packs"].append([batch.number, digest(batch.tokens), "".join(map(digest, made))])
            return real(engine, batch, plan, *rest, **given)

        return watched

    def step(real: Callable) -> Callable:
        def watched(engine, rate):
            number = engine.steps
            if kill == number + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if stop == number + 1 and ranks.rank() == ranks.world() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            real(engine, rate)
            groups = engine._engine.optimizer.param_groups
            seen["rates"][str(number)] = [[float(group["lr"]).hex(), float(group["scale"])] for group in groups]

        return watched

    def train(real: Callable) -> Callable:
        def watched(parts, *rest):
            seen["began"] = {name: digest(gather()) for name, gather in parts.engine.tensors()}
            for prefix, learner in parts.trainer.learners().items():
                seen["began"] |= {prefix + name: digest(t) for name, t in learner.state_dict().items()}
            return real(parts, *rest)

        return watched

    yield _replaced(Engine, "train_micro", train_micro)
    yield _replaced(Engine, "step", step)
    yield _replaced(loop, "train_loop", train)
    yield patch.object(loop.finish, "finish_run", lambda *_: None)  # a third of a second for a picture


# ---- what came of a run


def record(output: Path, step: int) -> dict[str, str]:
    """Every figure of a run as hex, and the hash of all that its checkpoint of ``step`` holds, by name."""
    figures_by_name: dict[str, str] = {}
    for line in (output / "logs" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        at = entry.pop("step")
        figures = {f"{name} of step {at}": value for name, value in entry.items() if name not in TIMING_METRICS}
        assert not figures_by_name.keys() & figures.keys(), (
            f"told twice: {sorted(figures_by_name.keys() & figures.keys())}"
        )
        figures_by_name |= {name: "none" if value is None else float(value).hex() for name, value in figures.items()}
    return figures_by_name | kept(output, step)


def kept(output: Path, step: int) -> dict[str, str]:
    """The hash of each tensor of the checkpoint of ``step``, and its small state."""
    checkpoint = RunFolder(output).checkpoint(step)
    digests = {name: digest(tensor) for name, tensor in read_tensors(checkpoint)}
    return digests | {
        f"state: {name}": str(value) for name, value in read_state(checkpoint).items() if name != "seconds"
    }


def differences(actual: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """The names under which two records differ."""
    return sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))


# ---- what the checks must catch


def _restore(change: Callable[[str, Tensor], Tensor], steps: Callable[[int], int] = lambda steps: steps) -> Change:
    """A resume that changes each tensor on its way from the checkpoint to the engine."""

    def make(real: Callable) -> Callable:
        def restore(engine, read, *, steps: int):
            if not steps:  # of the first weights
                return real(engine, read, steps=steps)

            def changed(name: str) -> Tensor | None:
                tensor = read(name)
                return None if tensor is None else change(name, tensor)

            return real(engine, changed, steps=steps)

        return restore

    return _replaced(Engine, "restore", make)


def _steps_begin_again() -> Change:
    return _replaced(Engine, "restore", lambda real: lambda engine, read, *, steps: real(engine, read, steps=0))


def _swapped() -> Change:
    """The first two tensors of one shape are taken for each other."""

    def make(real: Callable) -> Callable:
        def restore(engine, read, *, steps: int):
            if not steps:
                return real(engine, read, steps=steps)
            shapes: dict[tuple[int, ...], str] = {}
            for name in (f"weights/{name}" for name in engine._parameters):
                value = read(name)
                assert value is not None
                other = shapes.setdefault(tuple(value.shape), name)
                if not torch.equal(read(other), value):
                    swapped = {other: name, name: other}.get
                    return real(engine, lambda name, swapped=swapped: read(swapped(name, name)), steps=steps)
            raise AssertionError("no two tensors of one shape")

        return restore

    return _replaced(Engine, "restore", make)


def _mean_of_means() -> Change:
    """Targets that differ in number from pack to pack, of which each rank counts its own alone."""

    def uneven(number: int, rows: int) -> int:
        return rows if number % 3 else rows // 2

    def make(real: Callable) -> Callable:
        budget, call = Masker.budget, Masker.__call__

        def take_step(trainer, step, batches, *, progress, **given):
            due = [budget(trainer.masker, progress, uneven(b.number, b.layout.rows), b.number) for b in batches]
            counted = patch.object(Masker, "budget", lambda self, *given: due.pop() if due else budget(self, *given))
            made = patch.object(
                Masker,
                "__call__",
                lambda self, batch, **more: call(self, batch, **more, rows=uneven(batch.number, batch.layout.rows)),
            )
            with counted, made:
                return real(trainer, step, batches, progress=progress, **given)

        return take_step

    return _replaced(loop, "take_step", make)


def _in_stretches(config, start: int, ledger: object) -> Iterator[int]:
    """Each rank has packs of its own that follow each other."""
    accumulate = config.packs.per_step // ranks.world()
    for step in range(start, config.steps):
        for micro in range(accumulate):
            yield step * config.packs.per_step + ranks.rank() * accumulate + micro


FAULTS: dict[str, Callable[[], list[Change]]] = {
    "": list,
    "dropout by the state of the generator": lambda: [
        patch.object(training, "dropout_seed", lambda *_: int(torch.randint(2**62, ())))
    ],
    "moments at zero": lambda: [_restore(lambda name, t: t if name.startswith("weights/") else torch.zeros_like(t))],
    "masters from bf16": lambda: [_restore(lambda name, t: t.bfloat16().float() if name.startswith("weights/") else t)],
    "steps of the optimizer at zero": lambda: [_steps_begin_again()],
    "what scores learnt is lost": lambda: [patch.object(PartOfSpeechScore, "load_state_dict", lambda *_: None)],
    "what sources learnt is lost": lambda: [
        patch.object(Probe, "load_state_dict", lambda *_: None),
        patch.object(Average, "load_state_dict", lambda *_: None),
        patch.object(Audit, "load_state_dict", lambda *_: None),
    ],
    "packs from the first": lambda: [
        _replaced(setup, "pack_numbers", lambda real: lambda config, start, *rest: real(config, 0, *rest))
    ],
    "two tensors swapped": lambda: [_swapped()],
    "mean of means": lambda: [_mean_of_means()],
    "packs of each rank in a stretch": lambda: [patch.object(setup, "pack_numbers", _in_stretches)],
}
"""Changes that make a resume inexact, each of which a check must find."""
