"""The validation loss, the same for every run: 15 % of the held-out tokens, drawn uniformly, all replaced by [MASK].

The masks do not depend on the recipe, the seed, the number of ranks or the step, so losses of different recipes can be
compared. The baseline is a guess by the token frequencies of the training text.

**Nats per byte** are the loss per token x tokens / bytes, of the text of the validation split: tokens without special
ones, bytes of the text in UTF-8 before the tokenizer. The length of tokens then no longer counts, so languages and
tokenizers can be compared. An unknown token counts as a token with the mean loss, although it is never a target. Text
without a token costs nothing but has bytes, so a tokenizer that loses text has a figure that is too low. The figure
does not measure compression, because 85 % of the tokens are given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import TokenIds
from megamask.data.packs import Packs
from megamask.engine.engine import Engine
from megamask.masking.masker import EVALUATION, Masker
from megamask.masking.rng import PackRng
from megamask.runtime import ranks

SEED = 0
"""The seed of the evaluation masks and of the order of the held-out packs."""


@dataclass(frozen=True)
class Validation:
    """Means over the masked tokens of the held-out packs; losses in nats."""

    loss: float
    accuracy: float
    unigram_loss: float
    unigram_accuracy: float
    targets: int
    bytes: float | None = None
    """What the targets stand for: as many bytes a token as the split has. None: the shards do not record bytes."""

    @property
    def nats_per_byte(self) -> float | None:
        """loss x tokens / bytes (see the module); None if bytes are not known."""
        return None if self.bytes is None else self.loss * self.targets / self.bytes

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def validate_sources(
    engine: Engine, sources: Mapping[str, Packs], count: int, ids: TokenIds, unigram: Float[Tensor, " V"]
) -> tuple[Validation, dict[str, Validation]]:
    """The means over the targets of all sources together, and of each source. Collective.

    Evaluates the first ``count`` held-out packs of each source, or all if there are fewer, a share on each rank. The
    sources have equal weights if each has ``count`` packs, whatever their shares in training. ``unigram`` is the
    cross-entropy of a guess by frequency for each token, in nats. Every rank runs the same number of forward passes;
    the results of surplus ones are dropped.
    """
    sums = {name: _sums(engine, packs, count, ids, unigram) for name, packs in sources.items()}
    by_source = {name: _means(each, _bytes(sources[name], each)) for name, each in sums.items()}
    sizes = [each.bytes for each in by_source.values() if each.bytes is not None]
    return _means(torch.stack([*sums.values()]).sum(0), sum(sizes) if len(sizes) == len(sums) else None), by_source


def _bytes(packs: Packs, sums: Float[Tensor, " 5"]) -> float | None:
    per_token = packs.bytes_per_token
    return None if per_token is None else float(sums[-1]) * per_token


def _means(sums: Float[Tensor, " 5"], size: float | None) -> Validation:
    loss, correct, guess, hits, targets = sums.tolist()
    return Validation(loss / targets, correct / targets, guess / targets, hits / targets, int(targets), size)


def _sums(engine: Engine, packs: Packs, count: int, ids: TokenIds, unigram: Float[Tensor, " V"]) -> Float[Tensor, " 5"]:
    """Loss, correct predictions, loss of the guess, its correct ones, and targets, summed over all ranks."""
    count = min(count, len(packs))
    masker = Masker(EVALUATION, ids)
    device = ranks.device()
    unigram = unigram.to(device)
    best = unigram.argmin()
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for first in range(0, count, ranks.world()):
        number = first + ranks.rank()
        batch = packs.batch(min(number, count - 1)).to(device)
        plan = masker(batch, progress=0.0, rng=PackRng(SEED, batch.number, "validate"))
        losses = engine.evaluate(batch, plan)
        if number < count:
            sums += torch.stack([
                losses.nll.double().sum(),
                losses.correct.double().sum(),
                unigram[plan.labels].sum(),
                (plan.labels == best).double().sum(),
                torch.tensor(len(plan.labels), dtype=torch.float64, device=device),
            ])  # fmt: skip
    return ranks.sum(sums)


def source_metrics(by_source: Mapping[str, Validation]) -> dict[str, float]:
    """The metrics of each source, such as ``valid/wiki/loss``."""
    metrics: dict[str, float] = {}
    for name, result in by_source.items():
        values = {"loss": result.loss, "perplexity": result.perplexity, "accuracy": result.accuracy}
        if result.nats_per_byte is not None:
            values["nats_per_byte"] = result.nats_per_byte
        metrics |= {f"valid/{name}/{kind}": value for kind, value in values.items()}
    return metrics
