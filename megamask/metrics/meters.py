"""What a run says of itself: sums gathered on the device, and figures made of them.

``Meters`` add up on the device and wait for it once per line of figures, not once per step. Costs about fifteen small
kernels per pack, and ten more where entropies guide the masks.
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

from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.runtime import ranks

PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "V100": 125e12}
"""Dense 16-bit FLOP/s of one device by a part of its name, from the makers' data sheets (SXM form; fp16 for V100)."""
CLOCKS = ("tokens_per_second", "masked_per_second", "mfu", "data_wait", "slowest_rank")
"""The figures that a clock had a part in: all others are the same whenever a step is taken again."""
FIRST = 6
"""Numbers that are kept of the first step of a launch: those of `Timed`."""
FLAT = 0.02
"""Entropies are flat if, inside a sequence, they spread by less than this share of their mean (or of one nat)."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward pass: per token, per pair of tokens that attend, per target; a backward is two more.

    Matrix products alone are counted, as is usual for model FLOP utilisation (Chowdhery et al. 2022, appendix B),
    with full attention inside each document and the head at the targets alone.
    """

    token: int
    pair: int
    target: int
    local: int = 0
    """Per token and row of the window, of the layers that attend locally."""
    window: int = 0
    """Rows that those layers attend to."""
    mask: int = 0
    """Per row of [MASK], of layers that change no other."""
    mask_pair: int = 0
    """Per pair of such a row and one that it attends to."""
    early: Cost | None = None
    """Of the layers that [MASK] skips; they cost only what the visible rows do."""
    masks: float = 1.0
    """Share of the targets that are [MASK]."""

    @classmethod
    def of(
        cls, *, layers: int, width: int, inner: int, gated: bool, vocab: int, local_layers: int = 0, window: int = 0
    ) -> Cost:
        """Of layers and, unless ``vocab`` is 0, a BERT head (dense, then the vocabulary).

        ``inner`` is the width of the feed-forward blocks.
        """
        weights = layers * (4 * width**2 + (3 if gated else 2) * width * inner)
        attention = 4 * width
        return cls(
            token=2 * weights,
            pair=attention * (layers - local_layers),
            target=2 * width * (width + vocab) if vocab else 0,
            local=attention * local_layers,
            window=window,
        )

    def training(self, tokens: float, pairs: float, targets: float) -> float:
        """FLOPs of forward and backward. ``pairs`` is the sum of squared sequence lengths.

        With local layers an upper bound: how many rows a window holds is taken from the mean context. With [MASK]
        entering late a lower one, by next to nothing: that it hides the same share of every sequence.
        """
        seen, hidden = min(self.window * tokens, pairs), self.masks * targets
        layers = self.token * tokens + self.pair * pairs + self.local * seen
        layers += self.mask * hidden + self.mask_pair * pairs * hidden / tokens
        total = 3.0 * (layers + self.target * targets)
        if self.early is not None:
            left = 1 - hidden / tokens
            total += self.early.training(left * tokens, left**2 * pairs, 0)
        return total


def peak_flops(stated: float | None = None) -> float | None:
    """FLOP/s that one device could do at most: as stated, else of a known GPU, else unknown."""
    if stated is not None or not torch.cuda.is_available():
        return stated
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@dataclass(frozen=True)
class Timed:
    """What rates are of: a window without the first step of a launch, which compiles and warms up."""

    steps: int
    seconds: float
    waited: float
    tokens: int
    targets: int
    pairs: int


@dataclass(frozen=True)
class Window:
    """Totals since the last line of figures, over all ranks."""

    steps: int
    skipped: int
    grad_norm: float
    """Mean over the steps that were not skipped, before clipping."""
    seconds: float
    """Of one rank, on average."""
    waited: float
    """Those of them in which it waited for data."""
    ranks: int
    nll: float
    """Sum over targets, in nats."""
    correct: float
    targets: int
    tokens: int
    """Real ones: padding is not counted."""
    pairs: int
    """Sum of squared sequence lengths."""
    distill: float = 0.0
    """Sum over the teacher's rows of its divergence from the model, in nats; where its answers are stored samples, of
    the cross-entropy with them, which is larger by an entropy that is not known."""
    taught: int = 0
    """The teacher's rows."""
    guided: int = 0
    """Rows whose entropy was known before they could be masked."""
    entropy: float = 0.0
    """Sum over these rows, in nats (or what the measure gives)."""
    spread: float = 0.0
    """Sum over these rows of the squared distance from the mean of their sequence."""
    busy_seconds: tuple[float, ...] = ()
    """Seconds of each rank's own work, in which it waited for no other: for its data, and in forward passes."""
    sampled: bool = False
    """Whether the teacher's answers are stored samples."""
    without_first: Timed | None = None
    """The same without the first step of the launch, if that is in it."""

    @property
    def timed(self) -> Timed:
        """What rates are of."""
        whole = Timed(self.steps, self.seconds, self.waited, self.tokens, self.targets, self.pairs)
        return self.without_first or whole

    @property
    def flat(self) -> bool:
        """Whether the entropies say next to nothing: inside a sequence, they hardly differ."""
        return self.guided > 0 and math.sqrt(self.spread / self.guided) < FLAT * max(abs(self.entropy / self.guided), 1)

    def figures(self, lr: float, cost: Cost | None = None, peak: float | None = None) -> dict[str, float]:
        """The figures by the names under which they are written. Without a cost or peak there is no MFU.

        Without a step that was timed there are no rates.
        """
        timed = self.timed
        found = {
            "train/loss": _share(self.nll, self.targets),
            "train/accuracy": _share(self.correct, self.targets),
            "lr": lr,
            "grad_norm": self.grad_norm,
            "mask_ratio": _share(self.targets, self.tokens),
        }
        if timed.steps:
            found["tokens_per_second"] = timed.tokens / timed.seconds
            found["masked_per_second"] = timed.targets / timed.seconds
        if cost and peak and timed.steps and timed.tokens:
            done = cost.training(timed.tokens, timed.pairs, timed.targets)
            found["mfu"] = done / timed.seconds / (self.ranks * peak)
        if self.taught:
            found["train/distill_sampled" if self.sampled else "train/distill"] = self.distill / self.taught
        if self.guided:
            found["entropy/mean"] = self.entropy / self.guided
            found["entropy/spread"] = math.sqrt(self.spread / self.guided)
        if len(self.busy_seconds) > 1:
            found["slowest_rank"] = _share(max(self.busy_seconds), median_low(self.busy_seconds))
        if timed.steps:
            found["data_wait"] = timed.waited / timed.seconds
        return found | {"skipped_steps": self.skipped}


@runtime_checkable
class HasWait(Protocol):
    """What meters need of a loader: the seconds that were spent waiting for it so far."""

    waited: float


@runtime_checkable
class Works(Protocol):
    """What meters need of an engine: the seconds of its own work since the last call, which may wait for the device."""

    def forward_seconds(self) -> float: ...


class Meters:
    """Running sums of a rank; nothing here waits for the device but ``take``."""

    def __init__(self, loader: HasWait | None = None, engine: Works | None = None):
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
        """Count a pack, the ``entropy`` that guided its mask and what its teacher said, where there were any."""
        lengths = _real_lengths(batch).double()
        sums = [losses.nll.double().sum(), losses.correct.double().sum(), float(len(plan.targets))]
        sums += [lengths.sum(), (lengths**2).sum()]
        if losses.distill is not None and soft is not None:
            rows = plan.targets if soft.rows is None else soft.rows
            sums += [losses.distill.double(), float(len(rows))]
            self._sampled = soft.tokens is not None
        else:
            sums += [0.0, 0.0]
        sums += _spread(batch, entropy) if entropy is not None else [0.0, 0.0, 0.0]
        self._sums += torch.stack([torch.as_tensor(v, dtype=torch.float64, device=lengths.device) for v in sums])

    def step(self, grad_norm: float, skipped: bool = False) -> None:
        """Count an optimizer step; of one that was ``skipped``, no pack should have been added."""
        self._steps += 1
        self._skipped += skipped
        self._norms += 0.0 if skipped else grad_norm
        if not self._started:
            self._started = True
            _, _, targets, tokens, pairs, *_ = self._sums.tolist()  # waits for the device, once in a launch
            self._first = [1.0, *self._clock(), tokens, targets, pairs]

    def _clock(self) -> tuple[float, float]:
        """Seconds of training, and of waiting for data, since the last line of figures."""
        seconds = time.perf_counter() - self._since - self._paused
        return seconds, (self._loader.waited if self._loader else 0.0) - self._waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, such as a validation or a save, is not counted as training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def take(self) -> Window:
        """The totals since the last call, and start again. Collective; at least one step must have been counted."""
        mine = self._sums.tolist()  # waits for the device, so that the clock is read after the work
        seconds, waited = self._clock()
        own = [0.0] * ranks.world()
        own[ranks.rank()] = waited + (self._engine.forward_seconds() if self._engine else 0.0)
        numbers = [*mine, *self._first, seconds, waited, 1.0, *own]
        all_of_it = torch.tensor(numbers, dtype=torch.float64, device=self._sums.device)
        found = ranks.sum(all_of_it).tolist()
        nll, correct, targets, tokens, pairs, distill, taught, guided, entropy, spread = found[: len(mine)]
        seconds, waited, world, *own = found[len(mine) + FIRST :]
        _, first_seconds, first_waited, *first = found[len(mine) : len(mine) + FIRST]
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
            taught=int(taught),
            guided=int(guided),
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
    """Not a number where there is nothing, as when every step was skipped."""
    return part / whole if whole else math.nan


def _spread(batch: PackedBatch, entropy: Float[Tensor, " T"]) -> list[Tensor]:
    """Number, sum of entropies and of their squared distances from the mean of their sequence, of rows to mask."""
    free, value = batch.maskable.double(), entropy.double() * batch.maskable
    empty = torch.zeros(len(batch.layout.lengths), dtype=torch.float64, device=value.device)
    count = empty.index_add(0, batch.layout.sequence, free)
    mean = empty.index_add(0, batch.layout.sequence, value) / count.clamp(min=1)
    apart = (value - mean[batch.layout.sequence]) * free
    return [free.sum(), value.sum(), (apart**2).sum()]


def _real_lengths(batch: PackedBatch) -> Int64[Tensor, " S"]:
    """The length of each sequence, 0 for those of padding: they have no row that may be masked."""
    upto = torch.cat([batch.maskable.new_zeros(1, dtype=torch.int64), batch.maskable.cumsum(0)])
    return batch.layout.lengths * (upto[batch.layout.cu_seqlens.long()].diff() > 0)
