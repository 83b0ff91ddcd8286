"""The settings of masking; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import FiniteFloat

from megamask.errors import must
from megamask.errors.setting_rules import (
    Count,
    NotNegative,
    OnlyFor,
    Positive,
    Share,
    ShareBelowOne,
    ShareInside,
    removable,
)
from megamask.schedules import Schedule

Unit = Literal["token", "word", "span"]
Strategy = Literal["high", "low", "middle", "both", "proportional"]
STEPS = 64
"""Schedules change their values in this many steps over the run, so that a run has few shapes."""


@dataclass(frozen=True)
class Corruption:
    """Shares of the targets; they add up to 1. BERT (Devlin et al. 2019) has 0.8, 0.1, 0.1."""

    mask: Share = 0.8
    """Share of the targets replaced by [MASK]."""
    random: Share = 0.1
    """Share of the targets replaced by a random token that is not special."""
    unchanged: Share = 0.1
    """Share of the targets that stay unchanged in the input and are predicted too."""
    random_from: Literal["vocabulary", "source"] = "vocabulary"
    """How random tokens are drawn. `vocabulary`: every token with the same probability. `source`: in a mixture, as
    often as they occur in the train text of the pack's source, such as its language."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what the settings cannot do together."""
        total = self.mask + self.random + self.unchanged
        if abs(total - 1) > 1e-9:
            return [must(f"{name}.mask + {name}.random + {name}.unchanged", "be 1", round(total, 9))]
        if self.random == 0:
            return removable(self, ["random_from"], name, f"has no effect while `{name}.random` is 0")
        return []

    def counts(self, targets: int) -> tuple[int, int]:
        """How many of ``targets`` become [MASK] and how many a random token; the rest stay."""
        masks = round(self.mask * targets)
        return masks, min(round(self.random * targets), targets - masks)


@dataclass(frozen=True)
class EntropyScoreConfig:
    """How entropies decide which pieces are masked first."""

    strategy: Strategy = "high"
    """high: pieces that the model is unsure of, the main case of the paper; low: the opposite; middle and both: pieces
    whose rank by entropy in the sequence is near the middle, or near either end; proportional: pieces are drawn without
    replacement, each with a probability in proportion to its entropy to the power 1 / `temperature`. For this, the
    lowest entropy of a sequence with negative values (margins) is subtracted from all of them, and the smallest value
    is a millionth of a nat."""
    temperature: NotNegative = 0.25
    """Temperature of the Gumbel noise added to the score; 0 masks exactly the tokens with the highest scores, like the
    top 15 % of the paper. Standardised scores, and those of middle and both, have a spread of 1 in each sequence, so
    the temperature is in units of that spread; under proportional it is the inverse of the exponent. The default has
    noise: greedy masks concentrate on the rarest tokens, and with noise every piece has a probability above 0, which
    the importance correction needs. On synthetic entropies (gamma of shape 2, 15 % masked), high at 0.25 keeps 0.96 of
    the gain of the top tokens over random ones, at 0.5 0.85, at 1 0.60."""
    standardise: Annotated[bool, OnlyFor("strategy", "high", "low")] = True
    """Whether high and low use (entropy - mean) / standard deviation over the maskable pieces of the sequence, so that
    one temperature means the same in hard and in easy documents. The share of the masks that a sequence gets does not
    depend on it. Flat sequences give 0. The other strategies use ranks or proportions, which it would not change."""
    skip_top: ShareBelowOne = 0.0
    """Share of the pieces of each sequence with the highest entropies that are taken last, because they may be noise,
    typos or identifiers. 0 as in the paper; useful values are 0.01 to 0.02. If no other pieces are left they are taken,
    so the budget stays exact. Tokens that `random_share` masks at random ignore it."""
    shuffle: Literal["no", "pack", "type"] = "no"
    """A control: the same entropies at wrong tokens, permuted over all maskable tokens of a pack, or among tokens with
    the same id, which keeps the effect of the token and removes that of its context."""
    effective_sample_size: ShareInside | None = None
    """Adapts the temperature, from `temperature` on, so that the weights of `masking.correction` 1 would leave this
    share of the targets as the effective sample size, such as 0.8. None: the temperature is fixed."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        if self.strategy == "proportional" and self.temperature == 0:
            rule, cure = "be above 0 under the strategy 'proportional'", "Use 'high' for the highest entropies."
            return [must(f"{name}.temperature", rule, self.temperature, cure)]
        if self.effective_sample_size is not None and self.temperature == 0:
            rule = f"be above 0 with `{name}.effective_sample_size`, which adapts it"
            return [must(f"{name}.temperature", rule, self.temperature)]
        return []


@dataclass(frozen=True)
class PartOfSpeechScoreConfig:
    """How the losses of part-of-speech tags become weights."""

    momentum: ShareBelowOne = 0.999
    """Decay factor of the running loss of a tag, for each step in which it had targets. Running losses start at 0."""
    sharpness: Positive = 2.0
    """The weight of a tag is sigmoid(sharpness x (loss - mean over tags) / standard deviation over tags)."""
    temperature: Positive = 1.0
    """Temperature of the noise of the selection: pieces are drawn in proportion to weight to the power 1 / temperature.
    1 as in the paper; large values are close to random whole words."""


@dataclass(frozen=True)
class TokenTypeScoreConfig:
    """How the predictions of each token of the vocabulary become weights."""

    signal: Literal["accuracy", "loss"] = "accuracy"
    """The value of a token type: `accuracy`: the share of its targets that were not predicted (hard); `loss`: their
    mean loss (soft)."""
    every: Count = 200
    """Steps between updates of the values, each from the targets of all these steps. Masks are random until the
    first."""
    momentum: ShareBelowOne = 0.2
    """Decay factor of the value of a type, for each update in which it had targets."""
    floor: Positive = 0.005
    """Lowest value of a type, as 1 - accuracy or in nats: a type that is always predicted is still drawn."""
    temperature: Positive = 1.0
    """Temperature of the noise of the selection: tokens are drawn in proportion to value to the power 1 / temperature;
    1 as in the paper."""


@dataclass(frozen=True)
class MaskingConfig:
    """How many tokens are masked, in which pieces, which first, and what replaces them."""

    ratio: Schedule = field(default_factory=lambda: Schedule(start=0.3))
    """Share of the tokens of a pack that are targets."""
    unit: Unit = "token"
    """The pieces that are masked whole: tokens, words, or spans of words."""
    score: Literal["uniform", "entropy", "part_of_speech", "token_type"] = "uniform"
    """Which pieces are masked first: `uniform`: random masking; `entropy`: by the entropies of `entropy.source`;
    `part_of_speech`: by the losses of each tag (PTW), for text with tags; `token_type`: by the predictions of each
    token of the vocabulary (AMLM)."""
    corruption: Corruption = field(default_factory=Corruption)
    """What replaces the targets in the input."""
    entropy: Annotated[EntropyScoreConfig, OnlyFor("score", "entropy")] = field(default_factory=EntropyScoreConfig)
    """The score `entropy`."""
    part_of_speech: Annotated[PartOfSpeechScoreConfig, OnlyFor("score", "part_of_speech")] = field(
        default_factory=PartOfSpeechScoreConfig
    )
    """The score `part_of_speech`."""
    token_type: Annotated[TokenTypeScoreConfig, OnlyFor("score", "token_type")] = field(
        default_factory=TokenTypeScoreConfig
    )
    """The score `token_type`."""
    random_share: Annotated[Schedule, OnlyFor("score", "entropy", "part_of_speech", "token_type")] = field(
        default_factory=lambda: Schedule("ramp", 1.0, 0.1, at=0.05, until=0.15)
    )
    """Share of the targets chosen at random instead of by the score. 1 is random masking, which is needed at first:
    the entropies of a new model carry no information (cold start). Later, random targets keep the probability of every
    token above 0, so that estimates from targets hold for all tokens."""
    correction: Annotated[Share, OnlyFor("score", "entropy", "part_of_speech", "token_type")] = 0.0
    """Importance correction: the loss of a target has the weight (M / (T pi))^correction, where pi is its inclusion
    probability, and M of T maskable tokens are targets. 1: the expected loss is that of random targets; 0: no weights.
    The log has the effective sample size as a share of the targets."""
    max_weight: Annotated[FiniteFloat, Ge(1)] | None = None
    """The largest weight of a target under `correction`; larger ones are clipped and counted, which adds a bias. None:
    no limit. A `random_share` of r already limits weights to about 1 / r."""

    def targets(self, progress: float, rows: int, ratio: float | None = None) -> int:
        """Targets in a pack of ``rows`` at ``progress``: at least one. ``ratio``: instead of that of the schedule."""
        return max(1, round((self.ratio(coarse(progress)) if ratio is None else ratio) * rows))

    def most_targets(self, rows: int, steps: int | None = None) -> int:
        """The largest number of targets of a pack of ``rows`` in a run of ``steps``; None: in a run of any length."""
        return max(self.numbers_of_targets(rows, steps))

    def numbers_of_targets(self, rows: int, steps: int | None = None) -> set[int]:
        """The numbers of targets that packs of ``rows`` have in a run of ``steps``; None: in a run of any length."""
        if steps is None or steps >= 2 * STEPS:  # then every value is reached
            return {self.targets(stage / STEPS, rows) for stage in range(STEPS + 1)}
        return {self.targets(step / steps, rows) for step in range(steps)}

    def problems(self, name: str) -> list[str]:
        """Sentences for schedules whose values are out of range."""
        problems = self.ratio.range_problems(f"{name}.ratio", 0, 1, touch=True)
        problems += self.random_share.range_problems(f"{name}.random_share", 0, 1, closed=True)
        return problems + self._correction_problems(name)

    def _correction_problems(self, name: str) -> list[str]:
        """Sentences for a correction by probabilities that are 0 or only approximate."""
        if not self.correction:
            return removable(self, ["max_weight"], name, f"has no effect while `{name}.correction` is 0")
        if self.score == "uniform":
            return []  # without effect, as its field says
        problems = []
        if self.unit == "span":
            cure = "The probabilities of spans are only approximate: in a test the weighted loss was off by up to 5 %."
            problems.append(must(f"{name}.unit", f"be 'token' or 'word' with `{name}.correction`", "span", cure))
        top_only = self.score == "entropy" and (self.entropy.temperature == 0 or self.entropy.skip_top > 0)
        if top_only and not self.random_share.lowest > 0:
            rule = f"stay above 0 with `{name}.correction`, because with `{name}.entropy` some tokens are never chosen"
            cure = f"Raise its end, or set `{name}.entropy.temperature` above 0 and `{name}.entropy.skip_top` to 0."
            problems.append(must(f"{name}.random_share", rule, self.random_share.lowest, cure))
        return problems


def coarse(progress: float) -> float:
    """``progress`` in whole stages of `STEPS`."""
    return round(progress * STEPS) / STEPS
