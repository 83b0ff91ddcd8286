"""The model FLOPs utilization (MFU): the FLOPs of training steps as a share of the peak of the devices."""

from __future__ import annotations

import torch

from megamask.config.pretrain_config import PretrainConfig
from megamask.metrics.meters import Window
from megamask.model.shape import EncoderShape
from megamask.training.flops import forward_flops

PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "V100": 125e12}
"""Dense 16-bit FLOP/s of one device by a part of its name, from the vendors' data sheets (SXM form; fp16 for V100)."""


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
