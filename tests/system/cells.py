"""Runs that must be the same bit for bit whether they were stopped or not: recipes and combinations, and where to stop.

A cell is a run, a DeepSpeed file and a place to stop. The sizes are such that the text restarts in the middle of the
fifth of seven steps: four steps end an epoch except for a pack, and the sixth finds another file of entropies.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamask.__main__ import main
from megamask.config import cli
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.recipes import RECIPES, STARTS, find_recipe
from megamask.data.packs import Packs
from megamask.data.shard_writer import write_sidecar
from megamask.data.shards import SPLITS, Shards
from megamask.engine.ds_file import ds_problems
from tests.processes.test_engine import AUTOCAST, BF16, FP32
from tests.system.combinations import APART, ENTROPY, FACTORS, TAUGHT, Case, chosen, covering, named_by
from tests.system.commands import flags, run, text, train, training

STEPS = 7
SIZES: dict[str, object] = {
    "steps": STEPS,
    "packs.tokens": 256,
    "packs.per-step": 4,
    "model.dropout": 0.1,
    "optimizer.lr.warmup": 0.2,
    "validation.every": 4,
    "checkpoint.every": 99,
}
ENGINES = (
    {f"zero {stage}": ds for stage, ds in enumerate(FP32)}
    | {"zero 0, autocast": AUTOCAST}
    | {f"zero {stage}, bf16": ds for stage, ds in enumerate(BF16, 1)}
)
AUDIT = {"entropy.audit.every": 2}
SCORES = FACTORS["score"] | {
    "audited": ENTROPY | AUDIT | {"entropy.source": "probe"},
    "average": ENTROPY | {"entropy.source": "exact", "entropy.signal": "clean", "entropy.ema_decay": 0.9},
    "candidates": ENTROPY | {"entropy.source": "exact", "entropy.candidates": 2.0},
    "falls back": ENTROPY | AUDIT | {"entropy.source": "frequency", "entropy.audit.fall-back": "probe"}
    | {"entropy.audit.patience": 1, "entropy.audit.threshold": 0.99},
    "by a teacher": ENTROPY | {"entropy.source": "teacher", "teacher.precision": "fp32"},
}  # fmt: skip
LATER = {
    "distill.weight.kind": "step",
    "distill.weight.start": 0.0,
    "distill.weight.end": 0.5,
    "distill.weight.at": 0.3,
}
TEACHERS = FACTORS["teacher"] | {"later": TAUGHT | LATER}
STOPS = ("in the middle of an epoch", "before its last packs", "after its last pack", "after a change of schedule")
RUNS = FACTORS | {"score": SCORES, "teacher": TEACHERS}
CHOICES: dict[str, list[str]] = {"engine": [*ENGINES], "stop": [*STOPS]} | {f: [*names] for f, names in RUNS.items()}
NEVER = [("zero 3", "average"), ("zero 3, bf16", "average"), *APART]
"""An average needs whole weights."""


@dataclass(frozen=True)
class Text:
    """A text with tags, short enough that seven small steps are more than an epoch, and a model that has read it."""

    data: Path
    teacher: Path

    @classmethod
    def made(cls, folder: Path) -> Text:
        """Prepared and trained below ``folder``."""
        paths = cls(folder / "data", folder / "teacher")
        (folder / "corpus.txt").write_text(text(documents=48))
        how = ["--tokenizer", "wordpiece", "--vocab-size", 300, "--valid-share", 0.2, "--workers", 1]
        made = run(main, "prepare", "--input", folder / "corpus.txt", "--output", paths.data, *how)
        assert made.code == 0, made.err
        for split in SPLITS:
            # some, for there is no grammar in made-up words
            tags = [(part % 4).astype(np.uint8) for part in Shards.open(paths.data, split).parts]
            write_sidecar(paths.data, "tags", split, tags, {"tags": ["NOUN", "VERB", "ADJ"]})
        made = train(paths.data, paths.teacher, steps=2)
        assert made.code == 0, made.err
        return paths


@dataclass(frozen=True)
class Cell:
    """A run by the settings that make it, one of `ENGINES`, one of `STOPS`."""

    name: str
    settings: dict[str, object]
    engine: str
    stop: str
    recipe: str = ""

    def __str__(self) -> str:
        return f"{self.name} + {self.engine} + {self.stop}"


def cell(case: Case) -> Cell:
    run = {factor: choice for factor, choice in case.items() if factor in RUNS}
    return Cell(named_by(run), chosen(run, RUNS), case["engine"], case["stop"])


def combined(size: int) -> list[Cell]:
    """Cells that hold every ``size`` choices together at least once."""
    return [cell(case) for case in covering(CHOICES, size, NEVER)]


def few() -> list[Cell]:
    """As many as there are engines; the other sources of entropy are guides of test_guided.py."""
    return [cell(case) for case in covering(CHOICES | {"score": [*SCORES][: len(ENGINES)]}, 1, NEVER)]


def recipes() -> list[Cell]:
    """Each recipe that a test can make small, the engines and the places to stop in turn."""
    cells: list[Cell] = []
    for recipe in (name for name in RECIPES if name in STARTS or name.endswith("-tiny")):
        config = find_recipe(recipe)
        suits = [engine for engine, ds in ENGINES.items() if not ds_problems(config.optimizer, ds)]
        # a test has two layers
        depth: dict[str, object] = {"objective.depth": 1} if config.objective.depth else {}
        turn = len(cells)
        stop = STOPS[turn // len(suits) % len(STOPS)]
        cells.append(Cell(recipe, depth, suits[turn % len(suits)], stop, recipe))
    return cells


def arguments(cell: Cell, text: Text, output: Path) -> list[str]:
    """The command line of a cell, whose DeepSpeed file is made beside ``output``."""
    zero = output.with_suffix(".json")
    zero.write_text(json.dumps(ENGINES[cell.engine]))
    settings = cell.settings | SIZES
    config = find_recipe(cell.recipe or "tiny")
    if config.distill.active or config.entropy.source == "teacher" or "teacher.precision" in settings:
        settings["teacher.path"] = text.teacher
    recipe = ["--recipe", cell.recipe] if cell.recipe else []
    return [*training(text.data, output), *recipe, *flags(settings), "--deepspeed", str(zero)]


def place(cell: Cell, text: Text, words: list[str]) -> int:
    """The number of steps after which the run of ``words`` is stopped."""
    config = cli.parse_command(words).run
    packs = Packs(Shards.open(text.data, "train"), tokens=config.packs.tokens, length=config.packs.length, seed=1)
    before = len(packs) // config.packs.per_step
    assert len(packs) % config.packs.per_step and 2 < before < STEPS - 2, "the epoch ends in the middle of a step"
    return dict(zip(STOPS, (2, before, before + 1, change(config)), strict=True))[cell.stop]


def change(config: PretrainConfig) -> int:
    """The steps up to and with the first after the second before which a schedule moved; else the warm-up ended."""

    def at(step: int) -> tuple[float, ...]:
        masking, progress = config.masking, step / config.steps
        random_share = masking.random_share(progress) if masking.score != "uniform" else 1
        return masking.ratio(progress), random_share, config.distill.weight(progress)

    moved = [step for step in range(2, config.steps - 1) if at(step) != at(step - 1)]
    return (moved[0] if moved else math.ceil(config.optimizer.lr.warmup * config.steps)) + 1
