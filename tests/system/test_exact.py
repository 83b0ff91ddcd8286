"""A run that was stopped and resumed is bit for bit the run that was not; and what that rests on."""

from __future__ import annotations

import copy
import functools
import random
import re
import shutil
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megamask.checkpoint import resume
from megamask.config import cli
from megamask.config.pretrain_config import MAY_DIFFER_ON_RESUME, PacksConfig, PretrainConfig, as_dict
from megamask.data.loader import Loader
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.errors import REQUEUE, ConfigError
from megamask.health.loss_spikes import SkippedPacks
from megamask.runtime import ranks
from megamask.storage.dotted import flatten
from megamask.training.setup import pack_numbers
from tests.system import cells
from tests.system.cells import SCORES, STEPS, STOPS, Cell, Text, arguments, place
from tests.system.commands import flags, train
from tests.system.launches import differences, digest, launch, record


@dataclass(frozen=True)
class Stopped:
    """A cell's run on one rank: never stopped, and stopped but not yet gone on with."""

    cell: Cell
    text: Text
    folder: Path
    step: int
    whole: dict
    """What the launch was that nobody stopped."""

    def resumed(self, name: str = "stopped", fault: str = "") -> list[str]:
        """What differs between the run never stopped and a copy, ``name``, of the other that is gone on with."""
        if name != "stopped":
            shutil.copytree(self.folder / "stopped", self.folder / name)
        with eager():
            result = launch(arguments(self.cell, self.text, self.folder / name), fault=fault)
        assert result["code"] == 0, result["err"]
        assert f"resuming after step {self.step} of {STEPS}" in result["out"]
        problems = differences(record(self.folder / name, STEPS), record(self.folder / "whole", STEPS))
        problems += ["packs and plans"] * (result["packs"] != self.whole["packs"][-len(result["packs"]) :])
        return problems + [
            f"rate of step {step}" for step, rate in result["rates"].items() if rate != self.whole["rates"][step]
        ]


def stopped(cell: Cell, text: Text, folder: Path, fault: str = "") -> Stopped:
    """The cell's run twice, under ``fault``."""
    folder.mkdir()
    words = [arguments(cell, text, folder / name) for name in ("whole", "stopped")]
    step = place(cell, text, words[0])
    with eager():
        whole, half = launch(words[0], fault=fault), launch(words[1], stop=step, fault=fault)
    assert whole["code"] == 0, whole["err"]
    assert half["code"] == REQUEUE, half["err"]
    assert f"Stopped after step {step} of {STEPS}, as requested." in half["out"]
    rate = cli.parse_command(words[0]).run.optimizer.lr
    for number, groups in whole["rates"].items():
        assert all(
            lr == (rate.of_step(int(number) / STEPS, (int(number) + 1) / STEPS) * scale).hex() for lr, scale in groups
        )
    return Stopped(cell, text, folder, step, whole)


def eager() -> AbstractContextManager:
    """Muon compiles its iteration for every shape, which takes longer than all the rest."""
    return torch.compiler.set_stance("force_eager")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.made(tmp_path_factory.mktemp("exact"))


@pytest.mark.parametrize("cell", cells.few(), ids=str)
def test_a_run_that_was_stopped_is_the_run_that_was_not(cell: Cell, text: Text, tmp_path: Path) -> None:
    assert stopped(cell, text, tmp_path / "runs").resumed() == []


# ---- the check finds what is wrong


def control(engine: str, score: str) -> Cell:
    settings = SCORES[score] | {"masking.unit": "word"}
    return Cell(score, settings, engine, STOPS[2])


@pytest.mark.parametrize(
    ("score", "faults"),
    [
        (
            "part of speech",
            [
                "moments at zero",
                "masters from bf16",
                "steps of the optimizer at zero",
                "packs from the first",
                "what scores learnt is lost",
            ],
        ),
        ("probe", ["what sources learnt is lost"]),
    ],
)
def test_what_a_resume_forgets_is_found(score: str, faults: list[str], text: Text, tmp_path: Path) -> None:
    problems = stopped(control("zero 2, bf16", score), text, tmp_path / "runs")
    for fault in faults:
        differing = problems.resumed(fault, fault)
        assert any(name.startswith("weights/") for name in differing), fault
        assert f"train/loss of step {STEPS}" in differing, fault
    assert problems.resumed() == []


def test_dropout_by_the_state_of_a_generator_is_found(text: Text, tmp_path: Path) -> None:
    fault = "dropout by the state of the generator"
    differing = stopped(control("zero 1", "uniform"), text, tmp_path / "runs", fault).resumed(fault=fault)
    assert f"train/loss of step {STEPS}" in differing


# ---- what it rests on


@pytest.mark.parametrize("world", [1, 2, 4])
def test_packs_continue_in_order_over_epochs_wherever_a_run_stops(
    world: int, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = Packs(Shards.open(text.data, "train"), tokens=256, length=64, seed=1)
    config = PretrainConfig(steps=3 * len(packs) // 4, packs=PacksConfig(256, 64, 4))
    straight = [digest(packs.batch(number).tokens) for number in range(4 * config.steps)]
    epochs = [straight[at : at + len(packs)] for at in range(0, 3 * len(packs) - 4, len(packs))]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(epochs[0])) == len(packs)

    loader, tokens_read = Loader(packs), []
    monkeypatch.setattr(ranks, "world", lambda: world)
    stops = sorted(random.sample(range(1, config.steps), 6))
    for start, stop in pairwise([0, *stops, config.steps]):
        read = []
        for rank in range(world):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            batches = loader.batches(pack_numbers(config, start, SkippedPacks()))
            # the loader has read ahead when the run stops
            read.append([digest(next(batches).tokens) for _ in range((stop - start) * 4 // world)])
            batches.close()
        tokens_read += [tokens for together in zip(*read, strict=True) for tokens in together]
    assert tokens_read == straight


def test_a_resume_with_changed_settings_names_each_of_them(tmp_path: Path) -> None:
    settings = as_dict(PretrainConfig())
    with closing(resume.open_run(tmp_path, settings)) as start:
        (start.run.checkpoints / "step-1").mkdir(parents=True)  # a folder without a step may be taken over
    names = [
        name
        for name in flatten(settings)
        if name.split(".")[0] not in MAY_DIFFER_ON_RESUME and name not in MAY_DIFFER_ON_RESUME
    ]
    assert len(names) > 50 and {"packs.per_step", "optimizer.lr.peak", "optimizer.beta2", "seed"} < set(names)
    for name in names:
        changed = copy.deepcopy(settings)
        *sections, last = name.split(".")
        functools.reduce(dict.__getitem__, sections, changed)[last] = "another"
        with pytest.raises(ConfigError, match=re.escape(f"`{name}` is 'another' here, but ")):
            resume.open_run(tmp_path, changed, may_differ=MAY_DIFFER_ON_RESUME)


def test_the_command_names_each_setting_of_the_optimizer_that_was_changed(text: Text) -> None:
    changed = {
        "optimizer.lr.peak": 1e-3,
        "optimizer.beta1": 0.8,
        "optimizer.beta2": 0.9,
        "optimizer.max_grad_norm": 2.0,
    }
    changed |= {"optimizer.eps": 1e-5, "optimizer.weight-decay": 0.1, "packs.per-step": 4}
    ended = train(text.data, text.teacher, *flags(changed), steps=2)
    assert ended.code == ConfigError.exit_code
    assert all(f"`{name.replace('-', '_')}` is {value} here, but " in ended.err for name, value in changed.items())
