"""The words that every part speaks: how rows lie in a pack, what was hidden, what was lost.

A pack is ``T`` rows, one token each, with no padding dimension: sequences lie one behind the other and a
``Layout`` says where each begins. Everything here is a small frozen record; nothing here computes with weights.

Letters in shapes: ``T`` rows of a pack, ``S`` sequences, ``M`` targets, ``N`` hidden rows, ``R`` = ``T`` - ``N``
visible rows, ``Q`` rows that a teacher speaks of, ``K`` sampled teacher tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped, UInt8
from torch import Tensor

from megamask.basic_types import Measure as Measure
from megamask.basic_types import TokenIds as TokenIds

Record = TypeVar("Record", bound="OnDevice")


class OnDevice:
    """A frozen record of tensors that can be moved; records inside it go along."""

    def each(self: Record, act: Callable[[Tensor], Tensor]) -> Record:
        """The record with ``act`` done to every tensor."""
        changed: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = act(value)
            elif isinstance(value, OnDevice):
                changed[f.name] = value.each(act)
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self: Record, device: torch.device | str) -> Record:
        """The record on ``device``."""
        return self.each(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class Layout(OnDevice):
    """Where the sequences of a pack begin and end, and the position of each row in its sequence.

    ``cu_seqlens`` may end in repeats of ``T``: empty sequences that keep its length, and so every shape, the
    same from pack to pack. ``max_seqlen`` is a bound, not the longest length found, for the same reason.
    """

    cu_seqlens: Int32[Tensor, " S1"]
    max_seqlen: int
    positions: Int32[Tensor, " T"]

    @classmethod
    def of(cls, cu_seqlens: Int[Tensor, " S1"], rows: int, max_seqlen: int) -> Layout:
        """Sequences that begin at ``cu_seqlens`` and fill ``rows`` tokens; positions count from 0 in each."""
        sequence = torch.repeat_interleave(cu_seqlens.diff(), output_size=rows)
        positions = torch.arange(rows, device=cu_seqlens.device) - cu_seqlens[sequence]
        return cls(cu_seqlens.int(), max_seqlen, positions.int())

    @property
    def rows(self) -> int:
        """T, the number of rows."""
        return self.positions.shape[0]

    @cached_property
    def lengths(self) -> Int64[Tensor, " S"]:
        """Rows in each sequence."""
        return self.cu_seqlens.diff().long()

    @cached_property
    def sequence(self) -> Int64[Tensor, " T"]:
        """The number of the sequence that each row belongs to."""
        numbers = torch.arange(len(self.lengths), device=self.cu_seqlens.device)
        return torch.repeat_interleave(numbers, self.lengths, output_size=self.rows)

    @cached_property
    def offset(self) -> Int64[Tensor, " T"]:
        """How many rows of its sequence lie before each row. Not ``positions``, once rows were left out."""
        return torch.arange(self.rows, device=self.cu_seqlens.device) - self.cu_seqlens[self.sequence]

    def keep(self, rows: Int64[Tensor, " R"]) -> Layout:
        """The layout of the ascending ``rows`` alone; each keeps the position it had."""
        starts = torch.searchsorted(rows.contiguous(), self.cu_seqlens.long()).int()
        return Layout(starts, self.max_seqlen, self.positions[rows])


def sum_by_sequence(
    values: Shaped[Tensor, "*C n"], sequence: Int64[Tensor, " n"], count: int
) -> Shaped[Tensor, "*C S"]:
    """The sums of ``values`` over each of ``count`` sequences, to which ``sequence`` assigns them."""
    return values.new_zeros(*values.shape[:-1], count).index_add_(-1, sequence, values)


@dataclass(frozen=True)
class PackedBatch(OnDevice):
    """``T`` rows of text: one pack, the unit of a micro-step.

    A function of (seed, pack number) alone. Rows that fill up the pack are a sequence of padding of their own
    with ``maskable`` false, so no other row can see them.
    """

    number: int
    tokens: Int64[Tensor, " T"]
    layout: Layout
    starts_word: Bool[Tensor, " T"]
    maskable: Bool[Tensor, " T"]
    tags: UInt8[Tensor, " T"] | None = None
    entropy: UInt8[Tensor, " T"] | None = None
    """The sidecar's byte for each row."""
    source_pack: int | None = None
    """The number of the text: packs of one text, each under a mask of its own, have the same. None: not known."""


@dataclass(frozen=True)
class MaskPlan(OnDevice):
    """What a model may see of a pack and what it must say about it.

    ``inputs`` holds [MASK] at the ``hidden`` rows, other tokens at rows corrupted by replacement.
    All row lists are ascending; ``hidden`` is a subset of ``targets``; ``visible`` is the rest of the pack.
    ``probability`` is the chance that each target had of being chosen, where it is known: what is learnt from the
    targets alone speaks for all rows when it is weighted by its inverse.
    """

    inputs: Int64[Tensor, " T"]
    targets: Int64[Tensor, " M"]
    labels: Int64[Tensor, " M"]
    hidden: Int64[Tensor, " N"]
    visible: Int64[Tensor, " R"]
    probability: Float[Tensor, " M"] | None = None

    @classmethod
    def hide_nothing(cls, batch: PackedBatch) -> MaskPlan:
        """The plan under which every row is seen and asked for: what entropy on clean text means."""
        rows = torch.arange(batch.layout.rows, device=batch.tokens.device)
        return cls(batch.tokens, rows, batch.tokens, rows[:0], rows)


@dataclass(frozen=True)
class SoftTargets(OnDevice):
    """What a teacher says, and how much it counts: the loss becomes

        (1 - share) * sum over targets of nll + share * scale * temperature^2 * sum over rows of KL(teacher, student)

    with both distributions softened by the temperature. ``rows`` are the rows of the pack that the teacher speaks of,
    None for the targets. Exactly one of two forms is present. ``hidden`` with ``weight`` and ``bias`` lets the
    student's loss form the teacher's logits chunk by chunk; ``tokens`` with ``counts`` is an unbiased stored sample of
    its distribution (counts over their sum), made at the same temperature.
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
    """``total`` is the sum over targets that is differentiated; the rest is detached and for the record.

    Units are nats. ``entropy`` is how unsure the model's own prediction is at each target, by the measure in use.
    ``distill`` is the sum over the teacher's rows of KL(teacher || student) at the temperature, without any factor.
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
