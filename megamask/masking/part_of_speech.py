"""The score by part of speech (PTW): words of the tags that the model finds hard come first.

A running loss is kept for each tag. The weight of a tag depends on its loss relative to those of all tags. Pieces are
drawn without replacement, each with a probability in proportion to its weight.

Source: "Learning Better Masking for Better Language Model Pre-training" (Yang, Zhang, Zhao 2023; the released code,
repository mutonix/better_masking). Differs:

- There, words in random order are accepted with their weight as the probability, in one pass, until the budget is full,
  so an example may get fewer targets. Here the budget is exact, and probabilities are relative to the pieces left.
- Losses are means over the targets of a step on all ranks, there of one rank's packs; and the state is in checkpoints.
- Words are those of the unit, so pieces as `masking.unit` says; the paper masks whole words. All tokens of a word
  count by the tag of its first, as there; a span by the mean of the logarithms of its rows' weights.
- Tokens without a tag, which there do not exist, weigh 1/2, as a tag of mean loss does.

Costs a few lookups a pack and one message of 2 x tags numbers a step; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import Losses, MaskPlan, PackedBatch
from megamask.errors import CheckpointError, DataError
from megamask.masking.piece_order import PieceTable
from megamask.masking.rng import PackRng
from megamask.masking.score import GRAIN, Score
from megamask.masking.settings import PartOfSpeechScoreConfig as PartOfSpeechScoreConfig
from megamask.masking.units import pieces_of_unit
from megamask.runtime import ranks


class PartOfSpeechScore(Score):
    """Score by the running losses of tags; K tags, numbered from 1 in the data, 0 for none."""

    def __init__(self, config: PartOfSpeechScoreConfig, names: Sequence[str]):
        """``names`` of the tags, by number from 1."""
        assert len(names) > 1, "a deviation needs two"
        self.config, self.names, self.temperature = config, tuple(names), config.temperature
        self._losses = torch.zeros(len(names), dtype=torch.float64)
        self._steps = 0
        # loss and number of targets, by tag: of this step on this rank, of all since the last metrics
        self._own = torch.zeros(2, len(names) + 1, dtype=torch.float64)
        self._all = torch.zeros_like(self._own)

    def _follow(self, device: torch.device) -> None:
        if self._losses.device != device:
            self._losses, self._own, self._all = (t.to(device) for t in (self._losses, self._own, self._all))

    def __call__(
        self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None, pieces: PieceTable, rng: PackRng
    ) -> Float[Tensor, " P"] | None:
        """The mean of the logarithms of the weights of each piece's words; None until something was learned.

        Raises DataError if ``batch`` has no tags.
        """
        tags = _tags(batch)
        if not self._steps:
            return None
        self._follow(tags.device)
        # 32 bits: a mean of some equal ones is then exact in 64, so equal weights are equal scores
        table = torch.cat([self._losses.new_full((1,), 0.5).log(), self.log_weights]).float()
        return pieces.mean_of_tokens(table[tags[_first_rows(pieces_of_unit("word", batch, rng).piece)]])

    @property
    def log_weights(self) -> Float[Tensor, " K"]:
        """The logarithm of the weight of each tag."""
        spread = self._losses.std()
        apart = (self._losses - self._losses.mean()) / torch.where(spread == 0, 1e-4, spread)
        return F.logsigmoid(self.config.sharpness * apart)

    def update(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """Add the losses of the targets, in nats, to those of their tags."""
        tags = _tags(batch)[plan.targets]
        self._follow(tags.device)
        nll = torch.round(losses.nll.detach().double() / GRAIN) * GRAIN
        self._own.index_add_(1, tags, torch.stack([nll, torch.ones_like(nll)]))

    def sync(self) -> None:
        """Once per step: move the running loss of each tag that had targets, on whatever rank. Collective."""
        sums = ranks.sum(self._own)
        self._own = torch.zeros_like(self._own)
        self._all = self._all + sums
        total, count = sums[:, 1:]
        kept = self.config.momentum
        moved = kept * self._losses + (1 - kept) * total / count.clamp(min=1)
        # a NaN loss came from a step that was skipped or ends the run
        self._losses = torch.where((count > 0) & total.isfinite(), moved, self._losses)
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Since the last call, over all ranks: of each tag the mean loss, the share of the targets, and the weight.

        Waits for the device.
        """
        total, count = self._all[:, 1:].tolist()
        weights = self.log_weights.exp().tolist()
        targets = max(1.0, float(self._all[1].sum()))
        self._all = torch.zeros_like(self._all)
        metrics: dict[str, float] = {}
        for name, loss, number, weight in zip(self.names, total, count, weights, strict=True):
            metrics |= {f"tags/{name}/share": number / targets, f"tags/{name}/weight": weight}
            metrics |= {f"tags/{name}/loss": loss / number} if number else {}
        return metrics

    def state_dict(self) -> dict[str, Tensor]:
        """The running loss of each tag, and the number of steps that it was learned from."""
        return {"losses": self._losses, "steps": torch.tensor([self._steps])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state; CheckpointError if it has no losses of as many tags."""
        if "losses" not in state or state["losses"].shape != self._losses.shape:
            raise CheckpointError(
                f"The checkpoint holds no losses of {len(self.names)} parts of speech. It was made with another "
                "`masking.score` or other tags: start a new run."
            )
        self._losses, self._steps = state["losses"].to(self._losses), int(state["steps"])


def _tags(batch: PackedBatch) -> Int64[Tensor, " T"]:
    if batch.tags is None:
        raise DataError(
            f"`masking.score` is 'part_of_speech', but pack {batch.number} has no tags. Prepare the text with "
            "`megamask prepare --tags`."
        )
    return batch.tags.long()


def _first_rows(word: Int64[Tensor, " T"]) -> Int64[Tensor, " T"]:
    """The first row of each row's word; without a look at how many words there are, which would wait."""
    rows = torch.arange(len(word), device=word.device)
    return torch.full_like(rows, len(rows)).scatter_reduce_(0, word, rows, "amin")[word]
