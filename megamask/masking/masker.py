"""The masker: from a batch and the progress of the run to a mask plan, by budget, unit, score and corruption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import MaskPlan, PackedBatch, TokenIds
from megamask.errors import ConfigError, DataError, NonFiniteError
from megamask.masking.choose_within_budget import choose_pieces
from megamask.masking.corrupt import SourceTokens, corrupt_targets
from megamask.masking.entropy import EntropyScore
from megamask.masking.loss_weights import loss_weights
from megamask.masking.part_of_speech import PartOfSpeechScore
from megamask.masking.rng import PackRng
from megamask.masking.score import Score, UniformScore
from megamask.masking.settings import STEPS as STEPS
from megamask.masking.settings import Corruption, MaskingConfig
from megamask.masking.settings import coarse as coarse
from megamask.masking.token_type import TokenTypeScore
from megamask.masking.units import pieces_of_unit
from megamask.schedules import RunPhases, Schedule


class Masker:
    """Makes plans, which depend on (seed, pack number, progress), the entropy and the state of the score."""

    def __init__(
        self,
        config: MaskingConfig,
        ids: TokenIds,
        score: Score | None = None,
        *,
        tags: Sequence[str] = (),
        phases: RunPhases | None = None,
        source_tokens: SourceTokens | None = None,
    ):
        """``score`` is by default the one that ``config`` names; ``tags`` are the names of the text's tags from 1. A
        ratio of the ``phases`` of a run overrides that of ``config``. ``source_tokens`` are random tokens by source.

        Raises ConfigError if the score needs tags and there are none, or random tokens need sources.
        """
        self.config, self.ids, self._phases, self._source_tokens = config, ids, phases, source_tokens
        if config.corruption.random_from == "source" and source_tokens is None:
            raise ConfigError("`masking.corruption.random_from` 'source' needs a run on a mixture. Use 'vocabulary'.")
        self.score: Score = score or _score(config, tags, ids.size)

    def budget(self, progress: float, rows: int, number: int | None = None) -> int:
        """Targets in pack ``number`` of ``rows`` tokens: the same for every pack of a step, on every rank."""
        if self._phases is None:
            return self.config.targets(progress, rows)
        assert number is not None, "the phase follows from the number of the pack"
        return self.config.targets(progress, rows, self._phases.at_pack(number).mask_ratio)

    def random_share(self, progress: float) -> float:
        """Share of the targets that are chosen at random instead of by score."""
        return 1.0 if self.config.score == "uniform" else self.config.random_share(coarse(progress))

    def needs_entropy(self, progress: float) -> bool:
        """Whether plans at ``progress`` depend on entropy; otherwise it need not be computed."""
        return isinstance(self.score, EntropyScore) and self.config.random_share(coarse(progress)) < 1

    def __call__(
        self,
        batch: PackedBatch,
        *,
        progress: float,
        rng: PackRng,
        entropy: Float[Tensor, " T"] | None = None,
        rows: int | None = None,
    ) -> MaskPlan:
        """The plan for ``batch`` at ``progress`` in [0, 1].

        ``entropy`` is in nats, with any finite value where a token is not maskable. Whether it is finite is checked
        only on the CPU: on another device this would wait for it, so the caller must check it once per step. The ratio
        is a share of ``rows`` tokens, by default all of the pack.

        Raises ConfigError if entropy is needed but missing, DataError if it is of another length or the pack has too
        few tokens that can be masked, NonFiniteError.
        """
        if self.needs_entropy(progress):
            _check(entropy, batch)
        pieces = pieces_of_unit(self.config.unit, batch, rng)
        budget = self.budget(progress, batch.layout.rows if rows is None else rows, batch.number)
        random_share = self.config.random_share(coarse(progress))
        score = None if random_share == 1 else self.score(batch, entropy, pieces, rng)
        targets, probability = choose_pieces(
            score, pieces, budget, batch, rng, temperature=self.score.temperature, random_share=random_share
        )
        weights = None if score is None else loss_weights(self.config, probability, batch.on_host.maskable_tokens)
        return corrupt_targets(
            batch, targets, self.config.corruption, self.ids, rng, probability, weights, self._source_tokens
        )


def _score(config: MaskingConfig, tags: Sequence[str], vocabulary: int) -> Score:
    """The score that ``config`` names."""
    if config.score == "token_type":
        return TokenTypeScore(config.token_type, vocabulary)
    if config.score == "entropy":
        return EntropyScore(config.entropy)
    if config.score == "part_of_speech":
        if not tags:
            raise ConfigError(
                "`masking.score` is 'part_of_speech', which needs a text with tags. Prepare it with "
                "`megamask prepare --tags`, or choose another score."
            )
        return PartOfSpeechScore(config.part_of_speech, tags)
    return UniformScore()


def _check(entropy: Tensor | None, batch: PackedBatch) -> None:
    """Refuse an entropy that does not fit ``batch``."""
    if entropy is None:
        raise ConfigError(
            "`masking.score` is 'entropy', which needs the entropy at each token, but none was given. Name a source of "
            "entropy, or keep `masking.random_share` at 1."
        )
    if entropy.shape != batch.tokens.shape:
        raise DataError(
            f"Pack {batch.number} has {batch.layout.rows} tokens, but the entropy given for it has the shape "
            f"{tuple(entropy.shape)}. It must have one number for each token."
        )
    # NaN is lowest and highest wherever it is, so two numbers say whether all are finite
    if entropy.device.type == "cpu" and not torch.stack(entropy.aminmax()).isfinite().all():
        raise NonFiniteError(
            f"The entropy given for pack {batch.number} is not finite at {int((~entropy.isfinite()).sum())} of "
            f"{batch.layout.rows} tokens. Its source is at fault: check the model that computed it."
        )


EVALUATION = MaskingConfig(Schedule(start=0.15), "token", "uniform", Corruption(1.0, 0.0, 0.0))
"""The mask under which every recipe is validated: uniform, 15 %, all [MASK]."""
