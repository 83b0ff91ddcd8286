"""Every recipe and every file of ds_configs/ trains, made small enough for a test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from megamask.config.recipes import RECIPES, STARTS, find_recipe
from megamask.engine.ds_file import ds_problems, read_ds_config
from megamask.errors.setting_rules import settings_problems
from megamask.model.shape import SIZES, ModelConfig
from megamask.pretrain import main
from tests.batches import IDS
from tests.system.commands import ROOT, metrics, run, train

# teachers and files on NVMe have their own tests
OTHERS = {*(ROOT / "ds_configs").glob("teacher_*.json"), ROOT / "ds_configs" / "zero3_nvme.json"}
FILES = sorted({*(ROOT / "ds_configs").glob("*.json")} - OTHERS)


@pytest.fixture(autouse=True)
def eager():
    """Muon compiles its iteration for every shape, which takes longer than all the rest; its own tests do that."""
    with torch.compiler.set_stance("force_eager"):
        yield


def trained(data: Path, output: Path, *arguments: object) -> None:
    ended = train(data, output, *arguments, steps=3)
    assert ended.code == 0, ended.err
    losses = metrics(output, "train/loss")
    assert [step for step, _ in losses] == [1, 2, 3]
    assert all(0 < loss < 2 * math.log(300) for loss in losses.values())


# the sizes of an experiment differ in what a test makes small anyway
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name in STARTS or name.endswith("-tiny")])
def test_a_recipe_trains(recipe: str, data: Path, tagged: Path, finished: Path, tmp_path: Path) -> None:
    config = find_recipe(recipe)
    # where Muon or LAMB need a stage of ZeRO, there is one that suits
    suits = next(p for p in FILES if not ds_problems(config.optimizer, read_ds_config(p)))
    teacher = ["--teacher.path", finished] if config.distill.active or config.entropy.source == "teacher" else []
    # a test has two layers
    depth = ["--objective.depth", 1] if config.objective.depth else []
    text = tagged if config.masking.score == "part_of_speech" else data
    trained(text, tmp_path / "run", "--recipe", recipe, "--deepspeed", suits, *teacher, *depth)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_deepspeed_file_trains(file: Path, data: Path, tmp_path: Path) -> None:
    trained(data, tmp_path / "run", "--deepspeed", file)


def test_without_a_deepspeed_file_it_trains(data: Path, tmp_path: Path) -> None:
    trained(data, tmp_path / "run")


@pytest.mark.parametrize("preset", get_args(get_type_hints(ModelConfig)["preset"]))
@pytest.mark.parametrize("size", SIZES)
def test_every_preset_and_size_resolves(preset: str, size: str) -> None:
    ended = run(main, "--model.preset", preset, "--model.size", size, "--print-config")
    assert ended.code == 0, ended.err
    config = ModelConfig(preset=preset, size=size)
    assert settings_problems(config) == []
    shape = config.shape(IDS)
    assert shape.hidden_size == 64 * shape.num_heads
    assert (shape.num_layers, shape.hidden_size) == SIZES[size]
