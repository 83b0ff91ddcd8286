"""Count the tokens of a run and its FLOPs by part, from its first step on, so that arms can be compared at equal cost.

Everything that a training step computes counts: the student, the passes that find entropies (a probe, exact passes,
audits), and the teacher. Validation, which is the same for every run, and work before the run (a sidecar, stored
targets, the training of a teacher) do not. A step that was dropped counts, since its work was done.

Sums are whole numbers on the device, so they are equal, bit for bit, for any number of ranks, and in a resumed run. A
pack costs about thirty small kernels; nothing waits for the device until the sums are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megamask.batch import PackedBatch
from megamask.entropy.source import source_packs
from megamask.masking.masker import Masker
from megamask.runtime import ranks
from megamask.runtime.private_api import full_shape
from megamask.teacher.frozen_lm import HiddenStatesFn
from megamask.training.flops import PARTS, ForwardFlops, PackFlops, forward_flops

UNIT = 2**16
"""FLOPs that one unit of the sums stands for: 64-bit sums then reach 6e23."""


class FlopCounter:
    """Tokens and FLOPs of this rank since they were last read, and those of all ranks before."""

    def __init__(self, flops: PackFlops, before: Mapping[str, Any] | None = None):
        """``before`` is what ``state`` returned where the run resumes."""
        self.flops = flops
        self._before = {name: int((before or {}).get(name, 0)) for name in ("tokens", *PARTS)}
        self._sums = torch.zeros(1 + len(PARTS), dtype=torch.int64, device=ranks.device())
        self.logged = -1
        """The step whose totals were logged last."""

    def count_step(
        self,
        step: int,
        batches: Sequence[PackedBatch],
        progress: float,
        masker: Masker,
        source: str,
        with_teacher: bool,
    ) -> None:
        """Count the packs of this rank in ``step`` (from 0).

        ``source`` is the entropy source in use, empty without one; ``with_teacher`` says whether a teacher is run.
        """
        scores = source if masker.needs_entropy(progress) else ""
        scored: set[int] = set()
        for batch in batches:
            tokens, pairs = _sizes(batch)
            targets = masker.budget(progress, batch.layout.rows, batch.number)
            scoring = self.flops.learning(step, tokens)
            if scores and source_packs(batch) not in scored:  # packs with the same text share a pass
                scored.add(source_packs(batch))
                scoring = scoring + self.flops.scoring(scores, tokens, pairs)
            teaching = self.flops.distillation(tokens, pairs, targets) if with_teacher else 0.0
            self._add(tokens, self.flops.student(tokens, pairs, targets, with_teacher=with_teacher), scoring, teaching)

    def count_audit(self, batch: PackedBatch, source: str) -> None:
        """Count an audit of ``batch``."""
        tokens, pairs = _sizes(batch)
        self._add(0.0, 0.0, self.flops.audit(source, tokens, pairs), 0.0)

    def state(self) -> dict[str, int]:
        """Tokens, and the units of FLOPs by part, of all ranks since the first step. Collective."""
        totals = ranks.sum(self._sums.clone()).tolist()
        self._sums.zero_()
        self._before = {name: self._before[name] + more for name, more in zip(self._before, totals, strict=True)}
        return dict(self._before)

    def metrics(self) -> dict[str, float]:
        """The totals as metrics. Collective."""
        totals = self.state()
        return {"total/tokens": totals["tokens"]} | {f"flops/{part}": float(totals[part] * UNIT) for part in PARTS}

    def _add(self, tokens: Any, *flops: Any) -> None:
        def on_device(value: Any) -> Tensor:
            # a number is filled in on the device, since a copy of it would wait
            given = isinstance(value, Tensor)
            return value.double() if given else self._sums.new_full((), value, dtype=torch.float64)

        values = [on_device(tokens), *(on_device(each) / UNIT for each in flops)]
        self._sums += torch.stack(values).round().long()


def teacher_flops(states: nn.Module, weight: Tensor) -> ForwardFlops:
    """FLOPs of a teacher: ``states`` up to its last hidden states, whose output matrix is ``weight``.

    Of a model that is not ours, the matrices count that are not tables of embeddings, and attention by the layers and
    the width of its configuration.
    """
    vocab, width = weight.shape
    if isinstance(states, HiddenStatesFn):
        return forward_flops(states.encoder.shape)
    tables = {id(module.weight) for module in states.modules() if isinstance(module, nn.Embedding)}
    shapes = [full_shape(p) for p in states.parameters() if id(p) not in tables]
    matrices = [shape.numel() for shape in shapes if len(shape) == 2]
    config = getattr(getattr(states, "model", None), "config", None)
    layers, hidden = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", width)
    return ForwardFlops(token=2 * sum(matrices), pair=4 * layers * hidden, target=2 * vocab * width)


def _sizes(batch: PackedBatch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Tokens without padding, and the sum of the squared lengths of the sequences that are not padding."""
    upto = torch.cat([batch.maskable.new_zeros(1, dtype=torch.int64), batch.maskable.cumsum(0)])
    lengths = batch.layout.lengths * (upto[batch.layout.cu_seqlens.long()].diff() > 0)
    return lengths.sum().double(), (lengths**2).sum().double()
