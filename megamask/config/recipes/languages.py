"""Languages of unequal size, each a source of `data` (`megamask prepare --split-by lang`)."""

from __future__ import annotations

from dataclasses import replace

from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import MixtureConfig

ALPHA = 0.3
"""The exponent with which XLM-R samples languages (Conneau et al. 2020)."""


def multilingual(base: PretrainConfig) -> PretrainConfig:
    """Languages of unequal size as sources; small ones are read more often: shares by alpha 0.3, as in XLM-R.

    XLM-R (Conneau et al. 2020): RoBERTa on 100 languages, a sentencepiece vocabulary of 250,000, 15 % of the tokens,
    80/10/10. Differs: steps and learning rate are those of the base; no dropout; single documents. The vocabulary is
    that of the shards.
    """
    return replace(base, mixture=MixtureConfig(alpha=ALPHA))


EXPERIMENTS = {"multilingual": multilingual}
