"""The score by token type: tokens of the vocabulary that the model finds hard come first, learned from the targets.

It needs no pass of a model, so it is the control for scores that do: masks that know which tokens are hard in general,
but nothing of the context. A value is kept for each type: 1 - accuracy (hard), or the mean loss (soft). A token is
drawn without replacement, the next one with a chance in proportion to the value of its type.

Source: AMLM (Edman and Fraser 2025, arXiv 2510.20475), from notes on the released code: every 200 steps
the weight of a type becomes 0.2 of the old and 0.8 of rate x (1 - accuracy), or of a number in proportion to the mean
loss; at least 0.005; renormalised so that the mean is the rate, then again in each sequence. Differs:

- There each token is masked independently with the weight of its type as the chance. Here the budget is exact, and the
  weight is a chance among the tokens that are left.
- Renormalisation is left out: it multiplies all weights by one number, which changes no choice here. So `floor` has the
  unit of the value, not of a chance: 0.005 there is 0.005 / rate here, 0.0125 at 40 %.
- A type without targets since the last update keeps its value, so rare types keep what was learned.
- A type that was never a target counts as never predicted (1), or as guessed uniformly (log V nats). It is among the
  hardest until it was drawn. Until the first update all types are equal, and masks are random.
- Predictions are those of training, summed over all ranks.

Costs a look-up a pack and one message of 2 V numbers a step (for V = 30,000 half a megabyte; no message on one rank);
nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import Losses, MaskPlan, PackedBatch
from megamask.errors import CheckpointError
from megamask.masking.piece_order import PieceTable
from megamask.masking.rng import PackRng
from megamask.masking.score import GRAIN, Score
from megamask.masking.settings import TokenTypeScoreConfig as TokenTypeScoreConfig
from megamask.runtime import ranks


class TokenTypeScore(Score):
    """Score by the running accuracy or loss of each of V token types."""

    def __init__(self, config: TokenTypeScoreConfig, vocabulary: int):
        """``vocabulary`` is V, the number of token ids."""
        self.config, self.temperature = config, config.temperature
        start = 1.0 if config.signal == "accuracy" else math.log(vocabulary)
        self._values = torch.full((vocabulary,), start, dtype=torch.float64)
        self._seen = torch.zeros(vocabulary, dtype=torch.bool)
        self._steps = 0
        # errors (or losses) and targets by type: of this step on this rank, of all since the last update
        self._own = torch.zeros(2, vocabulary, dtype=torch.float64)
        self._all = torch.zeros_like(self._own)

    def _follow(self, device: torch.device) -> None:
        if self._values.device != device:
            state = self._values, self._seen, self._own, self._all
            self._values, self._seen, self._own, self._all = (tensor.to(device) for tensor in state)

    def __call__(
        self, batch: PackedBatch, entropy: Float[Tensor, " T"] | None, pieces: PieceTable, rng: PackRng
    ) -> Float[Tensor, " P"] | None:
        """The mean of the logarithms of the values of each piece's types; None before the first update."""
        if self._steps < self.config.every:
            return None
        self._follow(batch.tokens.device)
        return pieces.mean_of_tokens(self._values.log().float()[batch.tokens])

    def update(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """Add the errors or the losses at the targets to those of their types."""
        self._follow(plan.labels.device)
        if self.config.signal == "accuracy":
            missed = (~losses.correct).double()
        else:
            # whole multiples of the grain: their sums are exact, so the same in any order on any ranks
            missed = torch.round(losses.nll.detach().double() / GRAIN) * GRAIN
        self._own.index_add_(1, plan.labels, torch.stack([missed, torch.ones_like(missed)]))

    def sync(self) -> None:
        """Once per step: sum over ranks; after every `every` steps move the values. Collective."""
        self._all = self._all + ranks.sum(self._own)
        self._own = torch.zeros_like(self._own)
        self._steps += 1
        if self._steps % self.config.every:
            return
        total, count = self._all
        kept = self.config.momentum
        moved = kept * self._values + (1 - kept) * total / count.clamp(min=1)
        # a NaN loss came from a step that was skipped or ends the run
        learned = (count > 0) & total.isfinite()
        self._values = torch.where(learned, moved.clamp(min=self.config.floor), self._values)
        self._seen = self._seen | learned
        self._all = torch.zeros_like(self._all)

    def metrics(self) -> dict[str, float]:
        """Of the types that were targets: their share of all types, their mean value, and the share at `floor`.

        Waits for the device.
        """
        seen = self._seen.double()
        at_floor = seen @ (self._values <= self.config.floor).double()
        number, total, lowest = torch.stack([seen.sum(), seen @ self._values, at_floor]).tolist()
        if not number:
            return {}
        name = "error" if self.config.signal == "accuracy" else "loss"
        return {
            "token_types/seen": number / len(seen),
            f"token_types/{name}": total / number,
            "token_types/at_floor": lowest / number,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The value of each type, whether it was ever a target, the sums since the last update, and the steps."""
        return {
            "values": self._values,
            "seen": self._seen,
            "sums": self._all,
            "steps": torch.tensor([self._steps]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state; CheckpointError if it has no values of as many token types."""
        if "values" not in state or state["values"].shape != self._values.shape:
            raise CheckpointError(
                f"The checkpoint holds no values of {len(self._values):,} token types. It was made with another "
                "`masking.score` or tokenizer: start a new run."
            )
        self._values, self._all = state["values"].to(self._values), state["sums"].to(self._all)
        self._seen, self._steps = state["seen"].to(self._seen), int(state["steps"])
