"""Entropy-aware masking (Srinivasagan et al. 2026): experiments and controls, each a change of some base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megamask.config.pretrain_config import PretrainConfig
from megamask.entropy.settings import AuditConfig, EntropyConfig
from megamask.masking.settings import EntropyScoreConfig, TokenTypeScoreConfig
from megamask.schedules import Schedule
from megamask.teacher.settings import DistillConfig

COLD = Schedule("ramp", start=1.0, end=0.15, at=0.1, until=0.2)
"""Random masking in the first tenth of the run, entropies from the second on, 15 % of the masks random to the end."""


CORRECTED_TEMPERATURE = 1.5
"""At this temperature, the weights of the importance correction leave about 0.8 of the targets."""


def _guided(base: PretrainConfig, entropy: EntropyConfig, random_share: Schedule, **score: object) -> PretrainConfig:
    strategy = EntropyScoreConfig(**score)  # type: ignore[arg-type]
    masking = replace(base.masking, score="entropy", entropy=strategy, random_share=random_share)
    return replace(base, entropy=entropy, masking=masking)


def random(base: PretrainConfig) -> PretrainConfig:
    """Control: the same run under random masks."""
    return base


def random_kd(base: PretrainConfig) -> PretrainConfig:
    """Control: distillation from the first step under random masks, without entropies; give --teacher.path."""
    return replace(base, distill=DistillConfig(weight=Schedule(start=0.5)))


def adaptive(base: PretrainConfig) -> PretrainConfig:
    """Control: mask the token types that were predicted worst so far (AMLM, Edman and Fraser 2025), at no cost.

    Differs: the rate of the base instead of 40 % down to 15 %; updates after a tenth of the run at the latest.
    """
    every = max(1, min(200, base.steps // 10))
    masking = replace(
        base.masking,
        score="token_type",
        token_type=TokenTypeScoreConfig(every=every),
        random_share=Schedule(start=0.0),
    )
    return replace(base, masking=masking)


def whole_word(base: PretrainConfig) -> PretrainConfig:
    """Control: whole words are masked, at random."""
    return replace(base, masking=replace(base.masking, unit="word"))


def span(base: PretrainConfig) -> PretrainConfig:
    """Control: random spans of words (lengths of SpanBERT, Joshi et al. 2020)."""
    return replace(base, masking=replace(base.masking, unit="span"))


def frequency(base: PretrainConfig) -> PretrainConfig:
    """Control: the rarest tokens are masked; what entropy masking must beat."""
    return _guided(base, EntropyConfig("frequency"), COLD)


def shuffled_entropy(base: PretrainConfig) -> PretrainConfig:
    """Control: entropy-self-probe with entropies shuffled among tokens of the same id: rarity without context."""
    return _guided(base, EntropyConfig("probe"), COLD, shuffle="type")


def entropy_teacher(base: PretrainConfig) -> PretrainConfig:
    """Mask the tokens of which a teacher that reads the clean text is least sure; give --teacher.path."""
    return _guided(base, EntropyConfig("teacher", signal="clean"), Schedule(start=0.0), temperature=0.0)


def entropy_self(base: PretrainConfig) -> PretrainConfig:
    """Self-masking: mask the tokens of which the model itself is least sure (clean text), after a random phase."""
    return _guided(base, EntropyConfig("exact", signal="clean"), COLD, temperature=0.0)


def entropy_self_probe(base: PretrainConfig) -> PretrainConfig:
    """Self-masking at little cost: a probe predicts how unsure the model will be of a masked token."""
    return _guided(base, EntropyConfig("probe", audit=AuditConfig(every=min(200, base.steps // 3))), COLD)


def entropy_self_probe_corrected(base: PretrainConfig) -> PretrainConfig:
    """entropy-self-probe with weaker preference, and losses weighted by inverse probability: no shifted prior."""
    config = entropy_self_probe(base)
    # an effective sample of about 0.8 of the targets
    score = replace(config.masking.entropy, temperature=CORRECTED_TEMPERATURE)
    return replace(config, masking=replace(config.masking, entropy=score, correction=1.0))


def entropy_self_probe_random_end(base: PretrainConfig) -> PretrainConfig:
    """entropy-self-probe with random masks in the last fifth of the run, so that the prior can move back."""
    config = entropy_self_probe(base)
    ending = replace(COLD, back=0.8)
    return replace(config, masking=replace(config.masking, random_share=ending))


def entropy_kd_complete(base: PretrainConfig) -> PretrainConfig:
    """entropy-self-probe with distillation from the first step ("complete transfer"); give --teacher.path."""
    return replace(entropy_self_probe(base), distill=DistillConfig(weight=Schedule(start=0.5)))


def entropy_kd_after_init(base: PretrainConfig) -> PretrainConfig:
    """entropy-self-probe with distillation after a fifth ("transfer after initialization"); give --teacher.path."""
    later = Schedule("step", start=0.0, end=0.5, at=0.2)
    return replace(entropy_self_probe(base), distill=DistillConfig(weight=later))


EXPERIMENTS: dict[str, Callable[[PretrainConfig], PretrainConfig]] = {
    "entropy-teacher": entropy_teacher,
    "entropy-self": entropy_self,
    "entropy-self-probe": entropy_self_probe,
    "entropy-self-probe-corrected": entropy_self_probe_corrected,
    "entropy-self-probe-random-end": entropy_self_probe_random_end,
    "entropy-kd-complete": entropy_kd_complete,
    "entropy-kd-after-init": entropy_kd_after_init,
}
CONTROLS: dict[str, Callable[[PretrainConfig], PretrainConfig]] = {
    "random": random,
    "random-kd": random_kd,
    "adaptive": adaptive,
    "whole-word": whole_word,
    "span": span,
    "frequency": frequency,
    "shuffled-entropy": shuffled_entropy,
}


def contrast(config: PretrainConfig, strategy: str) -> PretrainConfig:
    """The same experiment under another strategy."""
    score_config = replace(config.masking.entropy, strategy=strategy)  # type: ignore[arg-type]
    return replace(config, masking=replace(config.masking, entropy=score_config))
