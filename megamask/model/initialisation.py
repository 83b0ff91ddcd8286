"""The first values of weights: matrices and tables from a truncated normal distribution, biases 0, norms 1.

A module that is built on a device with memory has its values at once, from torch's generator. A run builds its model on
the device ``meta``, which has no memory, and draws each tensor when it is needed (`initial_value`), so no rank ever
holds more of the whole model than one tensor.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


@torch.no_grad()
def initialise(module: nn.Module, std: float) -> None:
    """Tables and matrices from a normal distribution truncated at two ``std``, as in BERT's code; biases 0, norms 1."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            setattr(part.weight, "initial_std", std)  # noqa: B010  for `initial_value`
            _draw(part.weight, std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


@torch.no_grad()
def scale_initial(weight: nn.Parameter, factor: float) -> None:
    """Multiply the first value of a matrix by ``factor``."""
    weight.mul_(factor)
    setattr(weight, "initial_std", weight.initial_std * factor)  # type: ignore[attr-defined]  # noqa: B010


def initial_value(name: str, weight: nn.Parameter, seed: int) -> Tensor:
    """The first value of ``weight``, in fp32 on the host: a function of ``seed`` and ``name``.

    It does not depend on other weights, on the number of ranks or on what else draws random numbers.
    """
    value = torch.empty(weight.shape, device="cpu")
    std = getattr(weight, "initial_std", None)
    if std is None:
        return value.fill_(0.0 if name.endswith("bias") else 1.0)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return _draw(value, std, torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True)))


def _draw(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std, generator=generator)
