"""Settings to start from: the models and runs that experiments then change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import CheckpointConfig, PacksConfig, ValidationConfig
from megamask.engine.settings import OptimizerConfig
from megamask.masking.settings import MaskingConfig
from megamask.model.shape import ModelConfig
from megamask.runtime import launch_environment
from megamask.schedules import LearningRate, Schedule

MUON = OptimizerConfig(
    "muon", LearningRate("cosine", peak=2e-3), muon_lr_scale=10.0, weight_decay=0.3, max_grad_norm=0.0
)
"""Of the optimizers that were tried, the one with which small models leave the unigram plateau soonest.

Every update of Muon has the same size, so without much weight decay the matrices grow, and a model with large weights
needs a higher learning rate for fine-tuning than is usual (docs/measurements.md).
"""


def tiny() -> PretrainConfig:
    """The smallest model on two cores in four minutes: the first run, on English text found on the machine; Muon.

    With AdamW, a model leaves the unigram plateau within these steps on some texts only; with Muon within 100 steps.
    Targets are 80/10/10: all [MASK] lowers the masked loss, but makes frozen features worse (docs/studies/README.md).
    """
    return PretrainConfig(
        output=Path("runs/tiny"),
        steps=600,
        # a pack for each rank, so that the same command runs on any number of GPUs
        packs=PacksConfig(tokens=2048, length=128, per_step=launch_environment.world()),
        # most layers have local attention: a small model learns local patterns first, and learns them sooner this way
        model=ModelConfig(preset="modern", size="tiny", global_every=4, local_window=8),
        masking=MaskingConfig(Schedule(start=0.2)),
        optimizer=MUON,
        validation=ValidationConfig(every=50, packs=8),
        checkpoint=CheckpointConfig(every=200),
    )


def small() -> PretrainConfig:
    """A small modern encoder at sequence length 128, for an hour on two cores or minutes on a GPU; Muon."""
    return PretrainConfig(
        output=Path("runs/small"),
        steps=1100,
        packs=PacksConfig(tokens=4096, length=128, per_step=2),
        model=ModelConfig(preset="modern", size="small", global_every=3, local_window=16),
        masking=MaskingConfig(Schedule(start=0.2)),
        optimizer=MUON,
        validation=ValidationConfig(every=50, packs=16),
        checkpoint=CheckpointConfig(every=100),
    )


def bert() -> PretrainConfig:
    """BERT at base size on a GPU: 15 % random tokens, 80/10/10 (Devlin et al. 2019), with a higher learning rate."""
    return PretrainConfig(
        output=Path("runs/bert"),
        steps=100_000,
        packs=PacksConfig(tokens=16384, length=512, per_step=8),
        model=ModelConfig(preset="bert", size="base", dropout=0.1),
        masking=MaskingConfig(Schedule(start=0.15)),
        optimizer=OptimizerConfig(lr=LearningRate(peak=5e-4, warmup=0.06)),
        validation=ValidationConfig(every=1000, packs=64),
        checkpoint=CheckpointConfig(every=1000),
    )


def roberta() -> PretrainConfig:
    """RoBERTa at base size on a GPU: one token type, no dropout; text from `prepare --tokenizer bpe`.

    Liu et al. 2019: the encoder, 15 % of the tokens, 80/10/10, a new mask at each visit. 3ML starts from it, too
    (Liao et al. 2022). Differs: steps and learning rate are those of `bert`; no dropout.
    """
    base = bert()
    return replace(base, output=Path("runs/roberta"), model=ModelConfig(preset="roberta", size="base"))


def albert() -> PretrainConfig:
    """ALBERT at base size on a GPU: 12 layers with the same weights, a token table of width 128, no dropout.

    Lan et al. 2020, of whose base model version 2 has no dropout. Differs: no sentence order prediction; single tokens
    instead of n-grams; AdamW, of which the shared layer gets the sum of 12 gradients, with a lower peak, a longer
    warm-up and clipping instead of LAMB; exact GELU.
    """
    base = bert()
    return replace(
        base,
        output=Path("runs/albert"),
        model=ModelConfig(preset="bert", size="base", layer_groups=1, embedding_size=128),
        optimizer=OptimizerConfig(lr=LearningRate(peak=2e-4, warmup=0.1), max_grad_norm=1.0),
    )


def albert_tiny() -> PretrainConfig:
    """ALBERT for half an hour on one core: 4 layers of width 256 with the same weights, a token table of 128; Muon.

    Leaves the unigram plateau after 3.4 million of its 10 million tokens: all layers are global (docs/measurements.md).
    """
    return PretrainConfig(
        output=Path("runs/albert-tiny"),
        steps=2440,
        packs=PacksConfig(tokens=2048, length=128, per_step=2 * launch_environment.world()),
        model=ModelConfig("bert", num_layers=4, hidden_size=256, num_heads=4, layer_groups=1, embedding_size=128),
        masking=MaskingConfig(Schedule(start=0.2)),
        optimizer=replace(MUON, lr=replace(MUON.lr, warmup=0.1), weight_decay=0.1),
        validation=ValidationConfig(every=40, packs=8),
        checkpoint=CheckpointConfig(every=400),
    )


def entropy_base() -> PretrainConfig:
    """The settings of the authors' public checkpoints: 12 x 768, batch 96 of 512, AdamW, 1e-4 after 10,000 steps.

    25 epochs of WikiText-103 are 59,500 steps. Not published, and chosen here: 80/10/10, which their library does
    unless told otherwise. With these settings a small model may never leave the unigram plateau.
    """
    return PretrainConfig(
        output=Path("runs/paper"),
        steps=59_500,
        seed=10,
        packs=PacksConfig(tokens=6144, length=512, per_step=8),
        model=ModelConfig(preset="bert", size="base", dropout=0.1),
        masking=MaskingConfig(Schedule(start=0.15)),
        optimizer=OptimizerConfig(
            lr=LearningRate(peak=1e-4, warmup=10_000 / 59_500), weight_decay=0.0, max_grad_norm=1.0
        ),
        validation=ValidationConfig(every=1000, packs=64),
        checkpoint=CheckpointConfig(every=1000),
    )


def entropy_small() -> PretrainConfig:
    """Their small size, 4 x 512 with feed-forward blocks of 3072; batch 200, so 28,600 steps for 25 epochs."""
    base = entropy_base()
    return replace(
        base,
        steps=28_600,
        packs=PacksConfig(tokens=12_800, length=512, per_step=8),
        model=ModelConfig("bert", num_layers=4, hidden_size=512, num_heads=8, intermediate_size=3072, dropout=0.1),
        optimizer=replace(base.optimizer, lr=LearningRate(peak=1e-4, warmup=10_000 / 28_600)),
    )


def two_cores() -> PretrainConfig:
    """For two cores: the tiny model, Muon; leaves the unigram plateau within 0.2 million tokens."""
    base = tiny()
    return replace(
        base,
        packs=replace(base.packs, per_step=4 * launch_environment.world()),
        steps=150,
        model=ModelConfig(preset="modern", size="tiny", global_every=3, local_window=16),
        checkpoint=CheckpointConfig(every=50),
    )


def decay_base() -> PretrainConfig:
    """Their base size: BERT base uncased, batch 256 of 512, a million steps, 2e-4 after 10,000, linear, 80/10/10.

    Weight decay 0.01, norms clipped at 1, seed 11081. Differs: random initial weights (their MRD script starts from
    BERT's; name those by `init`); whole documents in packs of 8 full sequences, where they throw second halves away;
    exact budgets, ratios in 64 steps; bf16 or fp32 as the DeepSpeed file says, there fp16.
    """
    return PretrainConfig(
        output=Path("runs/decay"),
        steps=1_000_000,
        seed=11_081,
        packs=PacksConfig(tokens=16_384, length=512, per_step=8),
        model=ModelConfig(preset="bert", size="base", dropout=0.1),
        masking=MaskingConfig(Schedule(start=0.15)),
        optimizer=OptimizerConfig(lr=LearningRate(peak=2e-4, warmup=0.01), weight_decay=0.01, max_grad_norm=1.0),
        validation=ValidationConfig(every=1000, packs=64),
        checkpoint=CheckpointConfig(every=1000),
    )
