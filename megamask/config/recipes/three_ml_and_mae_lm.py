"""[MASK] that enters late: 3ML (Liao et al. 2022), MAE-LM (Meng et al. 2024), and all four papers together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megamask.basic_types import TokenIds
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.recipes.entropy import entropy_kd_after_init
from megamask.masking.settings import Corruption
from megamask.objectives.settings import DecoderConfig, ObjectiveConfig
from megamask.schedules import Schedule


def three_ml(base: PretrainConfig) -> PretrainConfig:
    """3ML (Liao et al. 2022): 50 % masked, [MASK] enters before the last sixth of the layers, at least two.

    Not published, and chosen here: the depth, and the corruptions of the base. Differs: the last layers do the
    decoder's work.
    """
    layers = _layers(base)
    objective = ObjectiveConfig("three_ml", depth=max(1, layers - max(2, layers // 6)))
    return replace(base, objective=objective, masking=replace(base.masking, ratio=Schedule(start=0.5)))


def mae_lm(base: PretrainConfig) -> PretrainConfig:
    """MAE-LM (Meng et al. 2024): 15 % masked, all [MASK], a decoder a third as deep as the encoder (4 behind 12).

    Differs from the released run: no relative-position buckets; [CLS] and [SEP] are never hidden; exact counts; text,
    vocabulary, steps and optimizer are the base's (theirs: 2,048 x 512 tokens, 2e-4 after 10,000 of 2,000,000 steps,
    linear, betas 0.9 and 0.98, eps 1e-6, clip 2, weight decay 0.01). Own positions in `bert` alone.
    """
    decoder = DecoderConfig(max(1, _layers(base) // 3), positions="masks" if base.model.preset == "modern" else "all")
    masking = replace(base.masking, ratio=Schedule(start=0.15), corruption=Corruption(1.0, 0.0, 0.0))
    return replace(base, objective=ObjectiveConfig("mae_lm", decoder=decoder), masking=masking)


def combine_papers(base: PretrainConfig) -> PretrainConfig:
    """All methods: the probe's entropies, 3ML from 50 % down to 15 %, a teacher after a fifth; give --teacher.path."""
    config = three_ml(entropy_kd_after_init(base))
    return replace(config, masking=replace(config.masking, ratio=Schedule("linear", start=0.5, end=0.15)))


def _layers(base: PretrainConfig) -> int:
    return base.model.shape(TokenIds(1, 0, 0, 0, 0, ())).num_layers


EXPERIMENTS: dict[str, Callable[[PretrainConfig], PretrainConfig]] = {
    "three-ml": three_ml,
    "mae-lm": mae_lm,
    "together": combine_papers,
}
