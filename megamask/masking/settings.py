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
"""Moving schedules move in this many steps from 0 to 1 over the run, so that a run has few shapes."""


@dataclass(frozen=True)
class Corruption:
    """Shares of the targets; they add up to 1. BERT (Devlin et al. 2019) has 0.8, 0.1, 0.1."""

    mask: Share = 0.8
    """Share of the targets replaced by [MASK]."""
    random: Share = 0.1
    """Share of the targets replaced by a random token that is not special."""
    unchanged: Share = 0.1
    """Share of the targets left unchanged, but predicted."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what the settings cannot do together."""
        total = self.mask + self.random + self.unchanged
        if abs(total - 1) > 1e-9:
            return [must(f"{name}.mask + {name}.random + {name}.unchanged", "be 1", round(total, 9))]
        return []

    def counts(self, targets: int) -> tuple[int, int]:
        """How many of ``targets`` become [MASK] and how many a random token; the rest stay."""
        masks = round(self.mask * targets)
        return masks, min(round(self.random * targets), targets - masks)


@dataclass(frozen=True)
class EntropyScoreConfig:
    """How entropy decides which pieces are masked first."""

    strategy: Strategy = "high"
    """high: what the model is unsure of, the idea of the method and its paper's main case; low: the contrast; middle
    and both: pieces whose rank of entropy in the sequence is near the middle, or near either end; proportional: drawn
    without replacement, the next piece with a chance in proportion to its entropy to the power 1 / `temperature`. For
    that, entropies of a sequence that holds negative ones (margins are) are counted from its lowest, and none counts
    as less than a millionth of a nat."""
    temperature: NotNegative = 0.25
    """Temperature of the noise added to the score; 0 masks exactly the tokens with the highest scores, as the paper's
    top 15 % does. Scores have a spread of 1 in each sequence if standardised, and under middle and both, so it is in
    units of that spread; under proportional it is the inverse of the exponent. Pretraining uses noise by default:
    greedy masks gather on the rarest tokens, and with noise every piece keeps a chance, which weights by inverse chance
    need. On made-up entropies (gamma of shape 2, 15 % masked) high at 0.25 keeps 0.96 of what the top gains over
    random, at 0.5 0.85, at 1 0.60."""
    standardise: Annotated[bool, OnlyFor("strategy", "high", "low")] = True
    """Whether high and low look at (entropy - mean) / standard deviation over the maskable pieces of the sequence, so
    that one temperature means the same in hard and in easy documents. A sequence's share of the masks never depends
    on it. Flat sequences give 0. The others look at ranks or proportions, which it cannot change."""
    skip_top: ShareBelowOne = 0.0
    """The top share of each sequence's pieces by entropy that the score leaves to the last, for they may be noise,
    typos or identifiers. 0 by default, as in the paper; 0.01 to 0.02 is meant. If nothing else is left they are taken,
    so the budget stays within reach. Tokens that `random_share` masks at random ignore it."""
    shuffle: Literal["no", "pack", "type"] = "no"
    """The control: the same entropies at wrong places, permuted over all maskable tokens of a pack, or among those
    with the same id, which keeps what the token alone says and takes away what the context says."""
    effective_sample_size: ShareInside | None = None
    """Moves the temperature, which starts at `temperature`, so that weights by inverse chance (`masking.correction` 1)
    would leave this share of the targets as the effective sample; 0.8 is meant. None: the temperature is fixed."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        if self.strategy == "proportional" and self.temperature == 0:
            rule, cure = "be above 0 under the strategy 'proportional'", "For the highest entropies use 'high'."
            return [must(f"{name}.temperature", rule, self.temperature, cure)]
        if self.effective_sample_size is not None and self.temperature == 0:
            rule = f"be above 0 with `{name}.effective_sample_size`, which moves it"
            return [must(f"{name}.temperature", rule, self.temperature)]
        return []


@dataclass(frozen=True)
class PartOfSpeechScoreConfig:
    """How the losses of tags become weights."""

    momentum: ShareBelowOne = 0.999
    """How much of a tag's running loss stays at each step in which it had targets. Losses begin at 0."""
    sharpness: Positive = 2.0
    """The weight of a tag is sigmoid(sharpness x (loss - mean over tags) / standard deviation over tags)."""
    temperature: Positive = 1.0
    """Temperature of the noise of the selection: pieces are drawn in proportion to weight to the power 1 / temperature,
    1 is the paper's; large ones come near random whole words."""


@dataclass(frozen=True)
class TokenTypeScoreConfig:
    """How the predictions of each token of the vocabulary become weights."""

    signal: Literal["accuracy", "loss"] = "accuracy"
    """What a type's weight follows: `accuracy`: the share of its targets that were not predicted (hard); `loss`: their
    mean loss (soft)."""
    every: Count = 200
    """Steps between updates of the weights, from the targets of all of them. Masks are random until the first."""
    momentum: ShareBelowOne = 0.2
    """How much of a type's value stays at each update in which it had targets."""
    floor: Positive = 0.005
    """The lowest value of a type, so that it is still drawn when it is always predicted: as 1 - accuracy, or nats."""
    temperature: Positive = 1.0
    """Temperature of the noise of the selection: tokens are drawn in proportion to weight to the power 1 / temperature;
    1 is the paper's."""


@dataclass(frozen=True)
class MaskingConfig:
    """How many tokens are masked, in which pieces, which first, and what stands in their place."""

    ratio: Schedule = field(default_factory=lambda: Schedule(start=0.3))
    """Share of a pack's rows that are targets."""
    unit: Unit = "token"
    """The pieces that are masked whole: tokens, words, or spans of words."""
    score: Literal["uniform", "entropy", "part_of_speech", "token_type"] = "uniform"
    """Which pieces come first: `uniform` is random masking; `entropy` uses how unsure a model is of each token, as
    `entropy.source` says it; `part_of_speech` by how hard words of each tag were (PTW), for text with tags;
    `token_type` by how hard each token of the vocabulary was (AMLM)."""
    corruption: Corruption = field(default_factory=Corruption)
    """What stands in the place of the targets."""
    entropy: Annotated[EntropyScoreConfig, OnlyFor("score", "entropy")] = field(default_factory=EntropyScoreConfig)
    """How entropy decides."""
    part_of_speech: Annotated[PartOfSpeechScoreConfig, OnlyFor("score", "part_of_speech")] = field(
        default_factory=PartOfSpeechScoreConfig
    )
    """How the losses of tags decide."""
    token_type: Annotated[TokenTypeScoreConfig, OnlyFor("score", "token_type")] = field(
        default_factory=TokenTypeScoreConfig
    )
    """How the predictions of token types decide."""
    random_share: Annotated[Schedule, OnlyFor("score", "entropy", "part_of_speech", "token_type")] = field(
        default_factory=lambda: Schedule("ramp", 1.0, 0.1, at=0.05, until=0.15)
    )
    """Share of the targets chosen at random, whatever the score. 1 is random masking, needed at first where a model's
    own entropy still says nothing (cold start); the rest keeps every token within reach, so that what is learnt at
    targets holds for all."""
    correction: Annotated[Share, OnlyFor("score", "entropy", "part_of_speech", "token_type")] = 0.0
    """Importance correction: the loss of a target has the weight (M / (T pi))^correction, where pi is the chance that
    it had to be chosen, and M of T maskable tokens are targets. 1: the expected loss is that of random targets; 0: no
    weights. The log has the effective sample size, the share of the targets that would be as many without weights."""
    max_weight: Annotated[FiniteFloat, Ge(1)] | None = None
    """The largest weight of a target under `correction`; larger ones are clipped and counted, which adds a bias. None:
    no limit. A `random_share` of r already limits weights to about 1 / r."""

    def targets(self, progress: float, rows: int) -> int:
        """Targets in a pack of ``rows`` at ``progress``: at least one."""
        return max(1, round(self.ratio(coarse(progress)) * rows))

    def most_targets(self, rows: int, steps: int | None = None) -> int:
        """The most targets that a pack of ``rows`` has in a run of ``steps``; None: of any length, or by the clock."""
        if steps is None or steps >= 2 * STEPS:  # then every value is reached
            return max(self.targets(stage / STEPS, rows) for stage in range(STEPS + 1))
        return max(self.targets(step / steps, rows) for step in range(steps))

    def problems(self, name: str) -> list[str]:
        """Sentences for schedules whose values are out of range."""
        problems = self.ratio.range_problems(f"{name}.ratio", 0, 1, touch=True)
        problems += self.random_share.range_problems(f"{name}.random_share", 0, 1, closed=True)
        return problems + self._correction_problems(name)

    def _correction_problems(self, name: str) -> list[str]:
        """Sentences for a correction by chances that are 0 or known only roughly."""
        if not self.correction:
            return removable(self, ["max_weight"], name, f"has no effect while `{name}.correction` is 0")
        if self.score == "uniform":
            return []  # without effect, as its field says
        problems = []
        if self.unit == "span":
            cure = "The chances of spans are known only roughly: in a test the weighted loss was off by up to 5 %."
            problems.append(must(f"{name}.unit", f"be 'token' or 'word' with `{name}.correction`", "span", cure))
        top_only = self.score == "entropy" and (self.entropy.temperature == 0 or self.entropy.skip_top > 0)
        if top_only and not self.random_share.lowest > 0:
            rule = f"stay above 0 with `{name}.correction`, because `{name}.entropy` gives some tokens no chance"
            cure = f"Raise its end, or set `{name}.entropy.temperature` above 0 and `{name}.entropy.skip_top` to 0."
            problems.append(must(f"{name}.random_share", rule, self.random_share.lowest, cure))
        return problems


def coarse(progress: float) -> float:
    """``progress`` in whole stages of `STEPS`."""
    return round(progress * STEPS) / STEPS
