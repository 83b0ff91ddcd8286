"""Training metrics: sums on the device, and the metrics computed from them.

``Meters`` add up on the device and wait for it once per line of metrics, not once per step. This costs about fifteen
small kernels per pack, and ten more if entropies guide the masks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets, sum_by_sequence
from megamask.runtime import ranks

TIMING_METRICS = ("tokens_per_second", "masked_per_second", "mfu", "data_wait", "slowest_rank", "total/seconds")
"""Metrics that depend on a clock. All others are the same, bit for bit, when a step is repeated."""
FIRST = 6
"""How many numbers of the first step of a launch are kept: those of `Timed`."""
FLAT = 0.02
"""Entropies are flat if their spread within a sequence is below this share of their mean (or of one nat)."""


@dataclass(frozen=True)
class Timed:
    """The part of a window that rates are computed from: without the first step of a launch, which compiles."""

    steps: int
    seconds: float
    waited: float
    tokens: int
    targets: int
    pairs: int


@dataclass(frozen=True)
class Window:
    """Totals since the last line of metrics, over all ranks."""

    steps: int
    skipped: int
    grad_norm: float
    """Mean over the steps that were not skipped, before clipping."""
    seconds: float
    """Mean over the ranks."""
    waited: float
    """The part of ``seconds`` spent waiting for data."""
    ranks: int
    nll: float
    """Sum over targets, in nats."""
    correct: float
    targets: int
    tokens: int
    """Without padding."""
    pairs: int
    """Sum of squared sequence lengths."""
    distill: float = 0.0
    """Sum of the divergence between teacher and model over the teacher's tokens, in nats. With stored samples, the sum
    of the cross-entropy, which is larger by an unknown entropy."""
    num_teacher_tokens: int = 0
    """Tokens with a prediction of the teacher."""
    num_scored_tokens: int = 0
    """Tokens whose entropy guided the masks."""
    entropy: float = 0.0
    """Sum over these tokens, in nats (or the unit of the measure)."""
    spread: float = 0.0
    """Sum over these tokens of the squared distance from the mean of their sequence."""
    busy_seconds: tuple[float, ...] = ()
    """Seconds of each rank without waiting for other ranks: for its data, and in forward passes."""
    sampled: bool = False
    """Whether the teacher's predictions are stored samples."""
    without_first: Timed | None = None
    """The totals without the first step of the launch, if the window contains that step."""

    @property
    def timed(self) -> Timed:
        """The part that rates are computed from."""
        whole = Timed(self.steps, self.seconds, self.waited, self.tokens, self.targets, self.pairs)
        return self.without_first or whole

    @property
    def flat(self) -> bool:
        """Whether the entropies hardly differ within a sequence, so that they rank no token."""
        if not self.num_scored_tokens:
            return False
        mean = self.entropy / self.num_scored_tokens
        return math.sqrt(self.spread / self.num_scored_tokens) < FLAT * max(abs(mean), 1)

    def metrics(self, lr: float) -> dict[str, float]:
        """The metrics by name. Without a timed step there are no rates."""
        timed = self.timed
        metrics = {
            "train/loss": _share(self.nll, self.targets),
            "train/accuracy": _share(self.correct, self.targets),
            "lr": lr,
            "grad_norm": self.grad_norm,
            "mask_ratio": _share(self.targets, self.tokens),
        }
        if timed.steps:
            metrics["tokens_per_second"] = timed.tokens / timed.seconds
            metrics["masked_per_second"] = timed.targets / timed.seconds
        if self.num_teacher_tokens:
            name = "train/distill_sampled" if self.sampled else "train/distill"
            metrics[name] = self.distill / self.num_teacher_tokens
        if self.num_scored_tokens:
            metrics["entropy/mean"] = self.entropy / self.num_scored_tokens
            metrics["entropy/spread"] = math.sqrt(self.spread / self.num_scored_tokens)
        if len(self.busy_seconds) > 1:
            metrics["slowest_rank"] = _share(max(self.busy_seconds), median_low(self.busy_seconds))
        if timed.steps:
            metrics["data_wait"] = timed.waited / timed.seconds
        return metrics | {"skipped_steps": self.skipped}


@runtime_checkable
class WaitTimer(Protocol):
    """A loader that counts the seconds spent waiting for it."""

    waited: float


@runtime_checkable
class ForwardTimer(Protocol):
    """An engine that measures its forward passes since the last call; the call may wait for the device."""

    def forward_seconds(self) -> float: ...


class Meters:
    """Running sums of a rank. Only ``take``, and ``step`` once in a launch, wait for the device."""

    def __init__(self, loader: WaitTimer | None = None, engine: ForwardTimer | None = None):
        self._loader, self._engine = loader, engine
        self._sampled, self._started, self._first = False, False, [0.0] * FIRST
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(10, dtype=torch.float64, device=ranks.device())
        self._steps, self._skipped, self._norms = 0, 0, 0.0
        self._since, self._paused = time.perf_counter(), 0.0
        self._waited = self._loader.waited if self._loader else 0.0

    def add(
        self,
        batch: PackedBatch,
        plan: MaskPlan,
        losses: Losses,
        entropy: Float[Tensor, " T"] | None = None,
        soft: SoftTargets | None = None,
    ) -> None:
        """Count a pack, with the ``entropy`` that guided its masks, and the predictions of a teacher, if any."""
        lengths = _real_lengths(batch).double()
        sums: list[Tensor | float] = [
            losses.nll.double().sum(),
            losses.correct.double().sum(),
            float(len(plan.targets)),
        ]
        sums += [lengths.sum(), (lengths**2).sum()]
        if losses.distill is not None and soft is not None:
            rows = plan.targets if soft.rows is None else soft.rows
            sums += [losses.distill.double(), float(len(rows))]
            self._sampled = soft.tokens is not None
        else:
            sums += [0.0, 0.0]
        sums += _spread(batch, entropy) if entropy is not None else [0.0, 0.0, 0.0]
        # a number is filled in on the device, since a copy of it would wait
        self._sums += torch.stack([v if isinstance(v, Tensor) else lengths.new_full((), v) for v in sums])

    def step(self, grad_norm: float, skipped: bool = False) -> None:
        """Count an optimizer step. No pack may have been added for a ``skipped`` step."""
        self._steps += 1
        self._skipped += skipped
        self._norms += 0.0 if skipped else grad_norm
        if not self._started:
            self._started = True
            _, _, targets, tokens, pairs, *_ = self._sums.tolist()  # waits for the device, once in a launch
            self._first = [1.0, *self._clock(), tokens, targets, pairs]

    def _clock(self) -> tuple[float, float]:
        """Seconds of training, and of waiting for data, since the last line of metrics."""
        seconds = time.perf_counter() - self._since - self._paused
        return seconds, (self._loader.waited if self._loader else 0.0) - self._waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside, such as that of a validation or a save, does not count as training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def take(self) -> Window:
        """The totals since the last call, which restarts the sums. Needs at least one counted step. Collective."""
        local = self._sums.tolist()  # waits for the device, so that the clock is read after the work
        seconds, waited = self._clock()
        own = [0.0] * ranks.world()
        own[ranks.rank()] = waited + (self._engine.forward_seconds() if self._engine else 0.0)
        numbers = [*local, *self._first, seconds, waited, 1.0, *own]
        numbers_of_rank = torch.tensor(numbers, dtype=torch.float64, device=self._sums.device)
        totals = ranks.sum(numbers_of_rank).tolist()
        nll, correct, targets, tokens, pairs, distill, teacher_tokens, scored, entropy, spread = totals[: len(local)]
        seconds, waited, world, *own = totals[len(local) + FIRST :]
        _, first_seconds, first_waited, *first = totals[len(local) : len(local) + FIRST]
        without_first = None
        if self._first[0]:
            counts = (int(all_of_them - one) for all_of_them, one in zip((tokens, targets, pairs), first, strict=True))
            clocks = (seconds - first_seconds) / world, (waited - first_waited) / world
            without_first = Timed(self._steps - 1, *clocks, *counts)
        moved = self._steps - self._skipped
        window = Window(
            steps=self._steps,
            skipped=self._skipped,
            grad_norm=self._norms / moved if moved else math.nan,
            seconds=seconds / world,
            waited=waited / world,
            ranks=int(world),
            nll=nll,
            correct=correct,
            targets=int(targets),
            tokens=int(tokens),
            pairs=int(pairs),
            distill=distill,
            num_teacher_tokens=int(teacher_tokens),
            num_scored_tokens=int(scored),
            entropy=entropy,
            spread=spread,
            busy_seconds=tuple(own),
            sampled=self._sampled,
            without_first=without_first,
        )
        self._first = [0.0] * FIRST
        self._reset()
        return window


def _share(part: float, whole: float) -> float:
    """NaN if ``whole`` is 0, as when every step was skipped."""
    return part / whole if whole else math.nan


def _spread(batch: PackedBatch, entropy: Float[Tensor, " T"]) -> list[Tensor]:
    """Of the maskable tokens: number, sum of entropies, sum of squared distances from the mean of the sequence."""
    free, value = batch.maskable.double(), entropy.double() * batch.maskable
    sequence, sequences = batch.layout.sequence, len(batch.layout.lengths)
    count, total = (sum_by_sequence(x, sequence, sequences) for x in (free, value))
    apart = (value - (total / count.clamp(min=1))[sequence]) * free
    return [free.sum(), value.sum(), (apart**2).sum()]


def _real_lengths(batch: PackedBatch) -> Int64[Tensor, " S"]:
    """The length of each sequence; 0 for padding, which has no maskable token."""
    upto = torch.cat([batch.maskable.new_zeros(1, dtype=torch.int64), batch.maskable.cumsum(0)])
    return batch.layout.lengths * (upto[batch.layout.cu_seqlens.long()].diff() > 0)
