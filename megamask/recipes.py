"""Experiments by name: one function each, saying only what differs from the defaults. The docstring is the help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megamask import ranks
from megamask.config import CheckpointConfig, PacksConfig, PretrainConfig, ValidationConfig
from megamask.engine.optimizer import OptimizerConfig
from megamask.errors import ConfigError, unknown
from megamask.masking.corrupt import Corruption
from megamask.masking.masker import MaskingConfig
from megamask.model.shape import ModelConfig
from megamask.schedules import LearningRate, Schedule


def tiny() -> PretrainConfig:
    """The smallest model on two cores in three minutes: the first run, on English that the machine holds."""
    return PretrainConfig(
        output=Path("runs/tiny"),
        steps=600,
        # a pack for each rank, so that the same command runs on any number of GPUs
        packs=PacksConfig(tokens=2048, length=128, per_step=ranks.world()),
        # most layers look at near words alone: a small model learns these first anyway, and far sooner so
        model=ModelConfig(preset="modern", size="tiny", global_every=4, local_window=8),
        masking=MaskingConfig(Schedule(start=0.2), corruption=Corruption(1.0, 0.0, 0.0)),
        optimizer=OptimizerConfig(rate=LearningRate("cosine", peak=3e-3)),
        validation=ValidationConfig(every=50, packs=8),
        checkpoint=CheckpointConfig(every=200),
    )


def small() -> PretrainConfig:
    """A small modern encoder at sequence length 128, for an hour of two cores or minutes of a GPU; Muon."""
    return PretrainConfig(
        output=Path("runs/small"),
        steps=1100,
        packs=PacksConfig(tokens=4096, length=128, per_step=2),
        model=ModelConfig(preset="modern", size="small", global_every=3, local_window=16),
        masking=MaskingConfig(Schedule(start=0.2), corruption=Corruption(1.0, 0.0, 0.0)),
        optimizer=OptimizerConfig("muon", LearningRate("cosine", peak=2e-3), muon_rate=10, clip=0.0),
        validation=ValidationConfig(every=50, packs=16),
        checkpoint=CheckpointConfig(every=100),
    )


def random() -> PretrainConfig:
    """BERT's masking at base size: 15 % of the tokens at random, 80/10/10 (Devlin et al. 2019), on a GPU."""
    return PretrainConfig(
        output=Path("runs/random"),
        steps=100_000,
        packs=PacksConfig(tokens=16384, length=512, per_step=8),
        model=ModelConfig(preset="bert", size="base", dropout=0.1),
        masking=MaskingConfig(Schedule(start=0.15)),
        optimizer=OptimizerConfig(rate=LearningRate(peak=5e-4, warmup=0.06)),
        validation=ValidationConfig(every=1000, packs=64),
        checkpoint=CheckpointConfig(every=1000),
    )


def whole_word() -> PretrainConfig:
    """`random`, but words are masked whole."""
    return replace(random(), output=Path("runs/whole-word"), masking=MaskingConfig(Schedule(start=0.15), "word"))


def span() -> PretrainConfig:
    """`random`, but spans of words are masked (lengths of SpanBERT, Joshi et al. 2020)."""
    return replace(random(), output=Path("runs/span"), masking=MaskingConfig(Schedule(start=0.15), "span"))


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "tiny": tiny,
    "small": small,
    "random": random,
    "whole-word": whole_word,
    "span": span,
}
"""Every recipe by the name that `--recipe` takes."""


def named(name: str) -> PretrainConfig:
    """The configuration of a recipe; ConfigError with the nearest name for one that is not there."""
    if name not in RECIPES:
        raise ConfigError(unknown(name, RECIPES, "the recipes"))
    return RECIPES[name]()


def summary(name: str) -> str:
    """The first line of what a recipe says of itself."""
    return (RECIPES[name].__doc__ or "").splitlines()[0]
