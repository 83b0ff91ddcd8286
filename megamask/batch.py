"""The records that packages exchange: packs, masks, teacher targets and losses.

A pack has ``T`` tokens and no padding dimension: its sequences follow one another, and a ``Layout`` has their
boundaries. All records are small and frozen; nothing here computes with weights.

Letters in shapes: ``T`` tokens of a pack, ``S`` sequences, ``M`` targets, ``N`` hidden tokens, ``R`` = ``T`` - ``N``
visible tokens, ``Q`` tokens with teacher targets, ``K`` sampled teacher tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped, UInt8
from torch import Tensor

from megamask.basic_types import Measure as Measure
from megamask.basic_types import TokenIds as TokenIds

Record = TypeVar("Record", bound="OnDevice")


class OnDevice:
    """A frozen record of tensors that can be moved to a device, with the records inside it."""

    def map_tensors(self: Record, function: Callable[[Tensor], Tensor]) -> Record:
        """The record with ``function`` applied to every tensor."""
        changed: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = function(value)
            elif isinstance(value, OnDevice):
                changed[f.name] = value.map_tensors(function)
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self: Record, device: torch.device | str) -> Record:
        """The record on ``device``."""
        return self.map_tensors(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class Layout(OnDevice):
    """The boundaries of the sequences of a pack, and the position of each token in its sequence.

    ``cu_seqlens`` may end in repeats of ``T``: empty sequences, so that all packs have the same shapes. For the same
    reason ``max_seqlen`` is a bound, not the length of the longest sequence.
    """

    cu_seqlens: Int32[Tensor, " S1"]
    max_seqlen: int
    positions: Int32[Tensor, " T"]
    bounds: Int64[np.ndarray, " S"] | None = None
    """What the host knows of a layout on another device: the length of each sequence, or the one before ``keep``."""

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Layout:
        """The layout with ``function`` applied to every tensor; off the host, with what the host knows of it."""
        moved = super().map_tensors(function)
        return replace(moved, bounds=None if moved.positions.is_cpu else self.host_lengths)

    @classmethod
    def of(cls, cu_seqlens: Int[Tensor, " S1"], rows: int, max_seqlen: int) -> Layout:
        """Sequences that begin at ``cu_seqlens`` and fill ``rows`` tokens; positions count from 0 in each."""
        sequence = torch.repeat_interleave(cu_seqlens.diff(), output_size=rows)
        positions = torch.arange(rows, device=cu_seqlens.device) - cu_seqlens[sequence]
        return cls(cu_seqlens.int(), max_seqlen, positions.int())

    @property
    def rows(self) -> int:
        """T, the number of tokens."""
        return self.positions.shape[0]

    @cached_property
    def lengths(self) -> Int64[Tensor, " S"]:
        """Tokens in each sequence."""
        return self.cu_seqlens.diff().long()

    @cached_property
    def host_lengths(self) -> Int64[np.ndarray, " S"]:
        """Tokens in each sequence, or ``bounds``. Waits for the device only if the layout was never on the host."""
        return np.diff(_on_host(self.cu_seqlens)).astype(np.int64) if self.bounds is None else self.bounds

    @cached_property
    def sequence(self) -> Int64[Tensor, " T"]:
        """The number of the sequence of each token."""
        numbers = torch.arange(len(self.lengths), device=self.cu_seqlens.device)
        return torch.repeat_interleave(numbers, self.lengths, output_size=self.rows)

    @cached_property
    def offset(self) -> Int64[Tensor, " T"]:
        """Tokens of the same sequence before each token. Differs from ``positions`` after ``keep``."""
        return torch.arange(self.rows, device=self.cu_seqlens.device) - self.cu_seqlens[self.sequence]

    def keep(self, rows: Int64[Tensor, " R"]) -> Layout:
        """The layout of the sorted ``rows`` alone; each token keeps its position."""
        starts = torch.searchsorted(rows.contiguous(), self.cu_seqlens.long()).int()
        return Layout(starts, self.max_seqlen, self.positions[rows], None if rows.is_cpu else self.host_lengths)


def _on_host(tensor: Tensor) -> np.ndarray:
    return (tensor if tensor.is_cpu else tensor.cpu()).numpy()


def sum_by_sequence(
    values: Shaped[Tensor, "*C n"], sequence: Int64[Tensor, " n"], count: int
) -> Shaped[Tensor, "*C S"]:
    """The sums of ``values`` over each of ``count`` sequences, to which ``sequence`` assigns them."""
    return values.new_zeros(*values.shape[:-1], count).index_add_(-1, sequence, values)


def true_rows(mask: Bool[Tensor, " n"], count: int) -> Int64[Tensor, " count"]:
    """Where ``mask`` is true, in order; it must be true ``count`` times, so that nothing waits for the device."""
    if mask.is_cpu:  # in a tenth of the time
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero_static(mask, size=count).squeeze(1)


@dataclass(frozen=True)
class HostPack:
    """What the host keeps of a pack, so that it knows all sizes and never has to ask the device for one."""

    tokens: Int64[np.ndarray, " T"]
    cu_seqlens: Int32[np.ndarray, " S1"]
    starts_word: Bool[np.ndarray, " T"]
    maskable: Bool[np.ndarray, " T"]

    @classmethod
    def of(cls, batch: PackedBatch) -> HostPack:
        """That of ``batch``: views of tensors on the host, otherwise copies, which wait for the device."""
        tensors = batch.tokens, batch.layout.cu_seqlens, batch.starts_word, batch.maskable
        return cls(*map(_on_host, tensors))

    @cached_property
    def maskable_tokens(self) -> int:
        """Tokens of the pack that can be masked."""
        return int(np.count_nonzero(self.maskable))

    @cached_property
    def sequence(self) -> Int64[np.ndarray, " T"]:
        """The number of the sequence of each token."""
        return np.repeat(np.arange(len(self.cu_seqlens) - 1), np.diff(self.cu_seqlens))

    @cached_property
    def maskable_by_sequence(self) -> Int64[np.ndarray, " S"]:
        """Tokens of each sequence that can be masked."""
        return np.diff(np.concatenate(([0], self.maskable.cumsum(dtype=np.int64)))[self.cu_seqlens])

    @cached_property
    def begins(self) -> Bool[np.ndarray, " T"]:
        """Whether each token is the first of its sequence."""
        first = np.zeros(len(self.maskable), dtype=bool)
        first[self.cu_seqlens[self.cu_seqlens < len(first)]] = True
        return first


@dataclass(frozen=True)
class PackedBatch(OnDevice):
    """A pack of ``T`` tokens, which is also the micro-batch.

    It depends only on (seed, pack number). Padding at the end of the pack is a sequence of its own with ``maskable``
    false, so no other token attends to it.
    """

    number: int
    tokens: Int64[Tensor, " T"]
    layout: Layout
    starts_word: Bool[Tensor, " T"]
    maskable: Bool[Tensor, " T"]
    tags: UInt8[Tensor, " T"] | None = None
    entropy: UInt8[Tensor, " T"] | None = None
    """The sidecar's byte for each token."""
    source_pack: int | None = None
    """Number of the text: packs that show one text under different masks have the same. None: not known."""
    kept: HostPack | None = None
    """What stayed on the host when the pack was moved from there to another device."""

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The pack with ``function`` applied to every tensor; off the host, with what the host keeps of it."""
        moved = super().map_tensors(function)
        return replace(moved, kept=None if moved.tokens.is_cpu else self.on_host)

    @cached_property
    def on_host(self) -> HostPack:
        """The parts of the pack that decide sizes. Waits for the device only if it was never on the host."""
        return self.kept or HostPack.of(self)


@dataclass(frozen=True)
class MaskPlan(OnDevice):
    """What a model sees of a pack and which tokens it must predict.

    ``inputs`` has [MASK] at the ``hidden`` tokens and other tokens at targets corrupted by replacement. All indices are
    sorted; ``hidden`` is a subset of ``targets``; ``visible`` is the rest of the pack. ``probability`` is that with
    which each target was chosen, where it is known: estimates from targets, weighted by its inverse, hold for all
    maskable tokens. ``weights`` are those of the targets in the loss that is differentiated; None: all are 1.
    """

    inputs: Int64[Tensor, " T"]
    targets: Int64[Tensor, " M"]
    labels: Int64[Tensor, " M"]
    hidden: Int64[Tensor, " N"]
    visible: Int64[Tensor, " R"]
    probability: Float[Tensor, " M"] | None = None
    weights: Float[Tensor, " M"] | None = None

    @classmethod
    def hide_nothing(cls, batch: PackedBatch) -> MaskPlan:
        """The plan in which every token is visible and predicted: the entropy of clean text."""
        rows = torch.arange(batch.layout.rows, device=batch.tokens.device)
        return cls(batch.tokens, rows, batch.tokens, rows[:0], rows)


@dataclass(frozen=True)
class SoftTargets(OnDevice):
    """The predictions of a teacher and their weight: the loss becomes

        (1 - share) * sum over targets of nll + share * scale * temperature^2 * sum over rows of KL(teacher, student)

    with both distributions softened by the temperature. ``rows`` are the tokens that the teacher predicts; None: the
    targets, whose terms then have the weights of the plan in both sums. Exactly one of two forms is present.
    ``hidden`` with ``weight`` and ``bias`` lets the student's loss form the teacher's logits chunk by chunk;
    ``tokens`` with ``counts`` is an unbiased stored sample of its distribution (counts over their sum), made at the
    same temperature.
    """

    share: float
    temperature: float = 1.0
    scale: float = 1.0
    rows: Int64[Tensor, " Q"] | None = None
    hidden: Float[Tensor, "Q D"] | None = None
    weight: Float[Tensor, "V D"] | None = None
    bias: Float[Tensor, " V"] | None = None
    tokens: Int64[Tensor, "Q K"] | None = None
    counts: Float[Tensor, "Q K"] | None = None


@dataclass(frozen=True)
class Losses(OnDevice):
    """``total`` is the sum over targets that is differentiated, weighted as the plan says; the rest is detached.

    Units are nats. ``entropy`` is the uncertainty of the model's prediction at each target, by the measure in use.
    ``distill`` is the sum of KL(teacher || student) over the tokens that the teacher predicts, at the temperature,
    without any factor or weight.
    """

    total: Float[Tensor, ""]
    nll: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]
    correct: Bool[Tensor, " M"]
    distill: Float[Tensor, ""] | None = None


@runtime_checkable
class Learner(Protocol):
    """What learns during training beside the weights: a score, a source of entropy, its audit, a moving average.

    Its state is saved in the checkpoint and is the same on every rank after ``sync``. The defaults learn nothing.
    """

    def update(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """Take in the losses at the targets of a micro-batch, on this rank."""
        return

    def sync(self) -> None:
        """Take in the step: sum over ranks what ``update`` collected. Once per optimizer step, after it. Collective."""
        return

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned, by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned. Collective."""
        assert not state, f"{type(self).__name__} has no state"
