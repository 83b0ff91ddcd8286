"""A small convolutional network that predicts the entropy at masked tokens and learns online from the losses.

It reads the model's own embedding of the unmasked text, detached, and how rare each token is::

    x = project(normalise(embedding)) + rarity                 D -> WIDTH
    x = gelu(x + convolve(x))                                  depthwise, 7 tokens, never across sequences
    entropy = head(gelu(mix(x))) + slope * rarity              WIDTH -> WIDTH -> 1

The loss yields the entropy at every masked token anyway. Those tokens were chosen, not drawn evenly, so each is
weighted by the inverse of its inclusion probability. The probe learns from each of the first ``EAGER`` steps, then from
one in ``EVERY``.

Cost per token: 2 (D W + 7 W + W^2) operations for a prediction and three times that in a step of learning: in total
0.2 million at D = 768, 0.03 % of a step of a base model. On one core beside a forward and backward pass of the small
preset (packs of 4,096 tokens, vocabulary of 16,384, bf16, 20 % targets; medians of interleaved runs): 1.017 of its
time. On a GPU its cost is that of small kernels: about 30 a pack and, in one step of four, 80 more a pack and 50 for
its own step.

How good it is, on a frozen model of 6 layers of width 384 (100 % [MASK], 9 million tokens of English seen), after 400
packs of 4,096 tokens with 20 % targets, against the exact `masked` signal of four passes on 16 held-out packs:

| | overlap of the top 20 % | captured gain | Spearman |
|---|---|---|---|
| -log unigram frequency | 0.43 | 0.63 | 0.62 |
| exact entropy of the clean text | 0.52 | 0.69 | 0.70 |
| this probe | 0.60 | 0.85 | 0.79 |
| the exact signal, drawn a second time | 0.64 | 0.79 | 0.75 |

It may exceed the second drawing, because it predicts a mean over drawings. With 32 channels the overlap was 0.589, with
128 0.607, at three times the learning rate 0.599, and with one step in four of learning from the start 0.57.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import Layout, Losses, MaskPlan, PackedBatch
from megamask.entropy.frequency import unigram_surprisal
from megamask.entropy.source import EntropySource, source_packs
from megamask.runtime import ranks

WIDTH, REACH = 64, 3
"""Channels, and the number of tokens to either side on which a prediction depends."""
RATE, BETA1, BETA2, EPS = 3e-3, 0.9, 0.98, 1e-8
"""Hyperparameters of Adam (Kingma and Ba 2015). The rate is constant, since the model that it follows changes."""
EAGER, EVERY = 200, 4
"""The probe learns from each of the first ``EAGER`` steps, then from one in ``EVERY``. It uses whole steps, so that
all ranks do the same."""
CLIP = 10.0
"""Largest weight of a token, as a multiple of the mean in its pack: a rare choice must not dominate all others."""
PAST = 0.99
"""Weight per step of the past in the running mean and scale of the entropies."""


class Probe(EntropySource):
    """A source of the `masked` signal at almost no cost; see the module.

    Everything it learns is one flat fp32 vector with Adam's two moments, so a step is one message and bit for bit the
    same on all ranks. Whether anything was observed is decided on the device: nobody waits for it.
    """

    def __init__(
        self,
        embed: Callable[[PackedBatch], Tensor],
        width: int,
        counts: Int64[Tensor, " V"],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rate: float = RATE,
        channels: int = WIDTH,
        every: int = EVERY,
    ):
        """``embed`` gives the detached rows (T, ``width``) of the embedding of the unmasked text, without dropout."""
        self.embed, self.rate, self.every = embed, rate, every
        rare = unigram_surprisal(counts).float()
        self._rarity = ((rare - rare.mean()) / rare.std().clamp_min(1e-6)).to(device)
        self._shapes = {
            "project": (channels, width), "rarity": (channels,), "project_bias": (channels,),
            "taps": (2 * REACH + 1, channels), "mix": (channels, channels), "mix_bias": (channels,),
            "head": (channels,), "slope": (1,), "bias": (1,),
        }  # fmt: skip
        draws = torch.Generator().manual_seed(seed)
        scale = {"project": width**-0.5, "taps": 0.3, "mix": channels**-0.5}
        first = [torch.randn(s, generator=draws) * scale.get(n, 0.0) for n, s in self._shapes.items()]
        self._weights = torch.cat([part.flatten() for part in first]).to(device)
        self._moments = torch.zeros(2, len(self._weights), device=device)
        # steps taken, and the running mean and scale of the entropies; scale 0: nothing was seen yet
        self._record = torch.zeros(3, device=device)
        self._turn = 0  # steps settled, the same on all ranks
        self._begin()

    def _begin(self) -> None:
        """Reset the gradient and the sums of weights, of weighted entropies and of their weighted squares."""
        self._gradient = torch.zeros_like(self._weights)
        self._sums = torch.zeros(3, device=self._weights.device)

    # ---- prediction

    @torch.no_grad()
    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """The predicted entropy of each token, in nats."""
        predicted: dict[int, Tensor] = {}
        _, mean, scale = self._record
        for batch in batches:
            if source_packs(batch) not in predicted:
                predicted[source_packs(batch)] = mean + scale * self._predict(self._weights, batch)
        return [predicted[source_packs(batch)] for batch in batches]

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
        return {n: p.view(s) for (n, s), p in zip(self._shapes.items(), flat.split(sizes), strict=True)}

    def _predict(self, flat: Float[Tensor, " W"], batch: PackedBatch) -> Float[Tensor, " T"]:
        """The entropy minus its mean, divided by its scale, with the weights ``flat``."""
        w, rarity = self._parts(flat), self._rarity[batch.tokens]
        rows = self.embed(batch).detach().float()
        rows = F.layer_norm(rows, rows.shape[-1:])
        with torch.autocast(rows.device.type, enabled=False):
            x = torch.addmm(w["project_bias"], rows, w["project"].t()) + rarity[:, None] * w["rarity"]
            x = F.gelu(x + convolve(x, w["taps"], batch.layout))
            x = F.gelu(torch.addmm(w["mix_bias"], x, w["mix"].t()))
            return x @ w["head"] + rarity * w["slope"] + w["bias"]

    # ---- learning

    def _learns(self) -> bool:
        return self._turn < EAGER or self._turn % self.every == 0

    def update(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """Add the gradient of the squared error at the targets, weighted by 1 / ``plan.probability``."""
        if not self._learns():
            return
        truth, weight = losses.entropy.detach().float(), weights(plan)
        _, mean, scale = self._record
        flat = self._weights.detach().requires_grad_()
        with torch.enable_grad():
            predicted = self._predict(flat, batch)[plan.targets]
            error = (weight * (predicted - (truth - mean) / scale.clamp_min(1e-6)).square()).sum() / 2
            self._gradient += torch.autograd.grad(error, flat)[0]
        self._sums += torch.stack([weight.sum(), weight @ truth, weight @ truth.square()])

    @torch.no_grad()
    def sync(self) -> None:
        """One step of Adam with the gradient of all ranks; none if no rank observed anything.

        The first step in which something is observed sets mean and scale alone.
        """
        learns = self._learns()
        self._turn += 1
        if not learns:
            return
        message = ranks.sum(torch.cat([self._gradient, self._sums]))
        gradient, (total, first, second) = message[:-3], message[-3:]
        seen = (total > 0) & message.isfinite().all()
        total = total.clamp_min(1e-6)
        steps, mean, scale = self._record
        ready = seen & (scale > 0)

        gradient = gradient / total
        next_steps = steps + 1
        m, v = self._moments
        m, v = torch.lerp(gradient, m, BETA1), torch.lerp(gradient.square(), v, BETA2)
        change = (m / (1 - BETA1**next_steps)) / ((v / (1 - BETA2**next_steps)).sqrt() + EPS)
        self._weights = torch.where(ready, self._weights - self.rate * change, self._weights)
        self._moments = torch.where(ready, torch.stack([m, v]), self._moments)

        average = first / total
        spread = (second / total - average.square()).clamp_min(1e-6).sqrt()
        past = torch.where(scale > 0, PAST, 0.0)
        after = torch.stack([steps + ready, torch.lerp(average, mean, past), torch.lerp(spread, scale, past)])
        self._record = torch.where(seen, after, self._record)
        self._begin()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, moments, Adam's steps with the running mean and scale, and steps settled."""
        return {
            "weights": self._weights, "moments": self._moments, "record": self._record,
            "turn": torch.tensor([self._turn]),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state."""
        device = self._weights.device
        self._weights, self._moments = state["weights"].to(device), state["moments"].to(device)
        self._record, self._turn = state["record"].to(device), int(state["turn"])
        self._begin()


def weights(plan: MaskPlan) -> Float[Tensor, " M"]:
    """What each target counts: one over the chance it had, the mean set to 1, at most ``CLIP``; 1 where unknown."""
    if plan.probability is None:
        return torch.ones(len(plan.targets), device=plan.targets.device)
    inverse = 1 / plan.probability.float().clamp_min(1e-6)
    return (inverse / inverse.mean()).clamp_max(CLIP)


def convolve(x: Float[Tensor, "T C"], taps: Float[Tensor, "K C"], layout: Layout) -> Float[Tensor, "T C"]:
    """A depthwise convolution along each sequence by itself: beyond both its ends stand zeros.

    Sequences are laid out with gaps of (K - 1) / 2 rows of zeros, so that one product of all windows serves the pack.
    """
    reach, rows = len(taps) // 2, layout.rows
    place = torch.arange(rows, device=x.device) + reach * (layout.sequence + 1)
    apart = x.new_zeros(rows + reach * (len(layout.lengths) + 1), x.shape[1]).index_copy(0, place, x)
    return (apart.unfold(0, len(taps), 1) * taps.t()).sum(-1).index_select(0, place - reach)
