"""FLOPs of a training step, and the model FLOPs utilization (MFU)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megamask.config.pretrain_config import PretrainConfig
from megamask.metrics.meters import Window
from megamask.model.shape import EncoderShape
from megamask.objectives.settings import ObjectiveConfig

PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "V100": 125e12}
"""Dense 16-bit FLOP/s of one device by a part of its name, from the vendors' data sheets (SXM form; fp16 for V100)."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass: per token, per pair of tokens that attend to each other, and per target.

    Only matrix products count, as usual for model FLOPs utilization (Chowdhery et al. 2022, appendix B), with full
    attention inside each document and the head only at the targets.
    """

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
        cls, *, layers: int, width: int, inner: int, gated: bool, vocab: int, local_layers: int = 0, window: int = 0
    ) -> ForwardFlops:
        """FLOPs of layers and, unless ``vocab`` is 0, of a BERT head (dense layer, then the vocabulary).

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
        """FLOPs of a forward and a backward pass. ``pairs`` is the sum of the squared sequence lengths.

        With local layers this is an upper bound: the size of a window follows from the mean context. If [MASK] enters
        late it is slightly too low: it assumes the same share of masked tokens in every sequence.
        """
        seen, hidden = min(self.window * tokens, pairs), self.masks * targets
        layers = self.token * tokens + self.pair * pairs + self.local * seen
        layers += self.mask * hidden + self.mask_pair * pairs * hidden / tokens
        total = 3.0 * (layers + self.target * targets)
        if self.early is not None:
            left = 1 - hidden / tokens
            total += self.early.training(left * tokens, left**2 * pairs, 0)
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
    )


def peak_flops(stated: float | None = None) -> float | None:
    """The peak FLOP/s of one device: as ``stated``, else of a known GPU, else None."""
    if stated is not None or not torch.cuda.is_available():
        return stated
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def mfu(config: PretrainConfig, shape: EncoderShape, window: Window) -> dict[str, float]:
    """The metric `mfu` of ``window``; none if the peak of the device is unknown or no step was timed."""
    peak, timed = peak_flops(config.log.peak_flops), window.timed
    if not (peak and timed.steps and timed.tokens):
        return {}
    flops = forward_flops(shape, config.objective, config.masking.corruption.mask)
    step_flops = flops.training(timed.tokens, timed.pairs, timed.targets)
    return {"mfu": step_flops / timed.seconds / (window.ranks * peak)}
