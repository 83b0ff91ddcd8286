"""Masking ratio decay and part-of-speech weights (Yang, Zhang, Zhao 2023; repository mutonix/better_masking)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megamask.config.pretrain_config import PretrainConfig
from megamask.schedules import Schedule


def mrd_linear(base: PretrainConfig) -> PretrainConfig:
    """Masking ratio decay, linear (`desc` of the released code): 30 % of the tokens down to 0 (then one per pack)."""
    return replace(base, masking=replace(base.masking, ratio=Schedule("linear", 0.3, 0.0)))


def mrd_cosine(base: PretrainConfig) -> PretrainConfig:
    """Masking ratio decay, cosine (`cosine` of the released code): 32 % of the tokens down to 2 %."""
    return replace(base, masking=replace(base.masking, ratio=Schedule("cosine", 0.32, 0.02)))


def ptw(base: PretrainConfig) -> PretrainConfig:
    """Whole words; parts of speech with a high loss are masked more often (PTW); give --data with tags.

    Differs: an exact budget, drawn in proportion to the weights; losses are means over all ranks.
    """
    # no random share: before anything is learned all weights are equal
    return replace(
        base, masking=replace(base.masking, unit="word", score="part_of_speech", random_share=Schedule(start=0.0))
    )


def mrd_ptw(base: PretrainConfig) -> PretrainConfig:
    """ptw under the cosine decay of mrd-cosine, with a cosine learning rate, as in the released code."""
    config = mrd_cosine(ptw(base))
    rate = replace(config.optimizer.lr, kind="cosine")
    return replace(config, optimizer=replace(config.optimizer, lr=rate))


EXPERIMENTS: dict[str, Callable[[PretrainConfig], PretrainConfig]] = {
    "mrd-linear": mrd_linear,
    "mrd-cosine": mrd_cosine,
    "ptw": ptw,
    "mrd-ptw": mrd_ptw,
}
