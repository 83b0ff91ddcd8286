"""FLOPs of a step and of its parts: the student, the passes that find entropies, and the teacher. Without torch.

Only matrix products count, as usual for model FLOPs utilization (Chowdhery et al. 2022, appendix B), with full
attention inside each document and the head only at the tokens that are predicted. Numbers of tokens may be tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megamask.config.pretrain_config import PretrainConfig
from megamask.entropy.settings import Kind
from megamask.model.shape import EncoderShape
from megamask.objectives.settings import ObjectiveConfig

PARTS = ("student", "scoring", "teacher")
"""What a step spends FLOPs on: `scoring` are the passes that find entropies, audits included."""
PROBE = (64, 7)
"""Channels and taps of the network in `entropy/probe.py`."""
PROBE_LEARNS = (200, 4)
"""The probe learns from each of its first 200 steps, then from one in 4."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass: per token, per pair of tokens that attend to each other, and per target."""

    token: int
    pair: int
    target: int
    local: int = 0
    """Per token and position of the window, of the layers with local attention."""
    window: int = 0
    """Positions that those layers attend to."""
    mask: int = 0
    """Per [MASK] position, of layers that update only these positions."""
    mask_pair: int = 0
    """Per pair of such a position and one that it attends to."""
    early: ForwardFlops | None = None
    """Of the layers that compute only the visible positions."""
    masks: float = 1.0
    """Share of the targets that are [MASK]."""

    @classmethod
    def of(
        cls,
        *,
        layers: int,
        width: int,
        inner: int,
        gated: bool,
        vocab: int,
        local_layers: int = 0,
        window: int = 0,
        table_width: int = 0,
    ) -> ForwardFlops:
        """FLOPs of layers and, unless ``vocab`` is 0, of a BERT head (dense layer, then the vocabulary).

        ``inner`` is the width of the feed-forward blocks, ``table_width`` that of the token table, if it is not
        ``width``.
        """
        table_width = table_width or width
        weights = layers * (4 * width**2 + (3 if gated else 2) * width * inner)
        attention = 4 * width
        return cls(
            token=2 * weights,
            pair=attention * (layers - local_layers),
            target=2 * table_width * (width + vocab) if vocab else 0,
            local=attention * local_layers,
            window=window,
        )

    def training(self, tokens: Any, pairs: Any, targets: Any) -> Any:
        """FLOPs of a forward and a backward pass. ``pairs`` is the sum of the squared sequence lengths.

        With local layers this is an upper bound: the size of a window follows from the mean context. If [MASK] enters
        late it is slightly too low: it assumes the same share of masked tokens in every sequence.
        """
        return 3.0 * self.forward(tokens, pairs, targets, self.masks * targets)

    def forward(self, tokens: Any, pairs: Any, predicted: Any, hidden: Any) -> Any:
        """FLOPs of a forward pass with the head at ``predicted`` tokens, while ``hidden`` tokens are [MASK]."""
        seen = _smaller(self.window * tokens, pairs)
        total = self.token * tokens + self.pair * pairs + self.local * seen + self.target * predicted
        total = total + self.mask * hidden + self.mask_pair * pairs * hidden / tokens
        if self.early is not None:
            left = 1 - hidden / tokens
            total = total + self.early.forward(left * tokens, left**2 * pairs, 0, 0)
        return total


def forward_flops(shape: EncoderShape, objective: ObjectiveConfig | None = None, masks: float = 1.0) -> ForwardFlops:
    """FLOPs of an ``objective`` (MLM if not given) with an encoder of ``shape``.

    ``masks`` is the share of the targets that are [MASK].
    """
    objective = objective or ObjectiveConfig()
    split = {"mlm": 0, "three_ml": objective.depth or 0, "mae_lm": shape.num_layers}[objective.kind]
    if objective.kind == "mae_lm":
        decoder = objective.decoder
        late = _layer_flops(shape, split, split + decoder.layers, shape.vocab_size)
        if decoder.attention == "cross":
            late = _layer_flops(replace(shape, global_every=1), 0, decoder.layers, shape.vocab_size)
            # keys and values of all positions; the rest of a layer only at [MASK]
            kept = 2 * decoder.layers * 2 * shape.hidden_size**2
            late = replace(late, token=kept, mask=late.token - kept, pair=0, mask_pair=late.pair)
    else:
        late = _layer_flops(shape, split, shape.num_layers, shape.vocab_size)
    return replace(late, early=_layer_flops(shape, 0, split, 0) if split else None, masks=masks)


def _layer_flops(shape: EncoderShape, first: int, end: int, vocab: int) -> ForwardFlops:
    """FLOPs of the layers ``first`` to ``end`` - 1, and of a head if ``vocab`` is not 0."""
    local = sum(shape.window(layer) is not None for layer in range(first, end))
    return ForwardFlops.of(
        layers=end - first,
        width=shape.hidden_size,
        inner=shape.intermediate_size,
        gated=shape.preset == "modern",
        vocab=vocab,
        local_layers=local,
        window=shape.local_window if local else 0,
        table_width=shape.table_width,
    )


def _smaller(first: Any, second: Any) -> Any:
    """The smaller of two numbers, without a branch, which would wait for the device."""
    return (first + second - abs(first - second)) / 2


@dataclass(frozen=True)
class PackFlops:
    """FLOPs of the parts of a step, for one pack: what its settings decide.

    A pack has ``tokens`` real tokens, ``pairs`` as in `ForwardFlops.training`, and ``targets`` masked ones.
    """

    config: PretrainConfig
    shape: EncoderShape
    model: ForwardFlops
    teacher: ForwardFlops | None = None
    """None without a teacher."""

    @classmethod
    def of(cls, config: PretrainConfig, shape: EncoderShape, teacher: ForwardFlops | None = None) -> PackFlops:
        """For a run with an encoder of ``shape``."""
        model = forward_flops(shape, config.objective, config.masking.corruption.mask)
        return cls(config, shape, model, teacher)

    def student(self, tokens: Any, pairs: Any, targets: Any, *, with_teacher: bool) -> Any:
        """A forward and a backward pass. ``with_teacher``: a teacher gives soft targets, perhaps at every token."""
        everywhere = with_teacher and self.config.distill.positions == "all"
        return 3.0 * self.model.forward(tokens, pairs, tokens if everywhere else targets, self.model.masks * targets)

    def logits(self, targets: Any) -> Any:
        """The part of `student` in the head: its dense layer and the logits."""
        return 3.0 * self.model.target * targets

    def distillation(self, tokens: Any, pairs: Any, targets: Any) -> Any:
        """The pass of the teacher over the masked text, and its logits."""
        if self.teacher is None:
            return 0.0
        return self.teacher.forward(tokens, pairs, tokens if self.config.distill.positions == "all" else targets, 0)

    def scoring(self, source: str, tokens: Any, pairs: Any) -> Any:
        """The entropies of the text of a pack by ``source``."""
        entropy = self.config.entropy
        if source == "exact":
            candidates = entropy.candidates and entropy.candidates * _largest(self.config) * self.config.packs.tokens
            proposal = self._probe() * tokens if candidates else 0.0
            return proposal + self._entropy_pass(self.model, tokens, pairs, candidates or tokens)
        if source == "teacher" and self.teacher is not None:
            return self._entropy_pass(self.teacher, tokens, pairs, tokens)
        return self._probe() * tokens if source == "probe" else 0.0

    def learning(self, step: int, tokens: Any) -> Any:
        """What the probe spends on learning from a pack of ``step`` (from 0); 0 without a probe."""
        eager, every = PROBE_LEARNS
        learns = self._has_probe() and (step < eager or step % every == 0)
        return 3.0 * self._probe() * tokens if learns else 0.0

    def audit(self, source: str, tokens: Any, pairs: Any) -> Any:
        """An audit of one pack: its entropies by ``source``, and one or two exact measurements."""
        times = 1 if self.config.entropy.signal == "clean" else 2
        exact = self._entropy_pass(self.model, tokens, pairs, tokens)
        return self.scoring(source, tokens, pairs) + times * exact

    def _entropy_pass(self, model: ForwardFlops, tokens: Any, pairs: Any, predicted: Any) -> Any:
        """`entropy.exact.measure_entropy`: every token is predicted once, in one pass or in several."""
        if self.config.entropy.signal == "clean":
            return model.forward(tokens, pairs, predicted, 0)
        passes = self.config.entropy.num_passes
        return passes * model.forward(tokens, pairs, predicted / passes, predicted / passes)

    def _has_probe(self) -> bool:
        kinds: tuple[Kind, ...] = self.config.entropy.kinds
        return "probe" in kinds or ("exact" in kinds and self.config.entropy.candidates is not None)

    def _probe(self) -> int:
        """FLOPs of the probe per token, a forward pass."""
        channels, taps = PROBE
        return 2 * (self.shape.hidden_size * channels + taps * channels + channels**2)


def _largest(config: PretrainConfig) -> float:
    ratio = config.masking.ratio
    return max(ratio.start, ratio.end or 0, *(phase.mask_ratio or 0 for phase in config.phases))
