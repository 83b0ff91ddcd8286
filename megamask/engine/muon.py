"""Muon's momentum under ZeRO stages 1 and 2, which DeepSpeed keeps unlike any other state.

A rank holds the momentum of every tensor that touches its part, whole, one behind the other; a tensor that touches two
parts is held, and updated alike, by both.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from megamask.runtime import ranks

BUFFER = "momentum_buffer"
COMPILED = ("muon_update", "zeropower_via_gram_newtonschulz", "zeropower_via_newtonschulz5")
"""Functions that DeepSpeed passes through torch.compile, for every shape of a matrix."""


def without_compiling() -> None:
    """Run Muon's update as it is written: for a CPU, where compiling it does not pay.

    For the tiny preset (16 matrices, one thread, AVX-512) it takes 154 ms of CPU time as it is written and 143 ms
    compiled. Compiling takes 40 s of CPU time before the first step, as much as the gain of 3,600 steps.
    """
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    for module in (original_muon, muon_optimizer):
        for name in COMPILED:
            if hasattr(module, name):
                setattr(module, name, inspect.unwrap(getattr(module, name)))


def make_momentum(zero: Any) -> None:
    """Momentum of zero for every group under Muon of DeepSpeed's ZeRO optimizer ``zero``."""
    for index, group in enumerate(zero.optimizer.param_groups):
        if group["use_muon"]:
            held = zero.params_in_partition[index]
            size = sum(parameter.numel() for parameter in held)
            zero.optimizer.state[group["params"][0]][BUFFER] = torch.zeros(size, device=ranks.device())


def get_momentum(zero: Any, parameter: nn.Parameter) -> Tensor:
    """The momentum of ``parameter``, whole, in fp32. Collective."""
    slot, first = _slot(zero, parameter)
    said = torch.zeros(parameter.shape, device=ranks.device())
    if slot is not None and first:
        said += slot.view(parameter.shape)
    return ranks.sum(said)


def put_momentum(zero: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Set the momentum of ``parameter`` wherever it is held."""
    slot, _ = _slot(zero, parameter)
    if slot is not None:
        slot.copy_(value.flatten())


def _slot(zero: Any, parameter: nn.Parameter) -> tuple[Tensor | None, bool]:
    """Where this rank holds the momentum of ``parameter``, and whether the parameter begins in its part."""
    for index, group in enumerate(zero.optimizer.param_groups):
        begin = 0
        for place, held in enumerate(zero.params_in_partition[index]):
            if held is parameter:
                buffer = zero.optimizer.state[group["params"][0]][BUFFER]
                return buffer[begin : begin + held.numel()], place > 0 or zero.first_offset[index] == 0
            begin += held.numel()
    return None, False
