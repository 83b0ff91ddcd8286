"""Replace the parameters of a model, such as those on the device ``meta``, one tensor at a time.

At ZeRO stage 3, DeepSpeed partitions each tensor before the next one is made. So a rank holds its share of the model
and one whole tensor, and not the whole model as when DeepSpeed receives one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megamask.engine.ds_file import zero_stage

FirstValue = Callable[[str], Tensor | None]
"""The value of a weight by its name, of any type and device; None for zeros."""


def materialise(
    model: nn.Module, first_value: FirstValue, ds: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Replace the parameters of ``model`` by parameters on ``device`` in ``dtype``.

    ``ds`` is the complete configuration of DeepSpeed; at stage 3 this is collective.
    """
    parts = _Parameters(model, first_value, dtype, device)
    if zero_stage(ds) == 3:
        import deepspeed

        deepspeed.zero.Init(module=parts, config_dict_or_path=ds, dtype=dtype)
    else:
        for _ in parts.parameters():
            pass


class _Parameters(nn.Module):
    """What ``zero.Init`` takes: a module, of which it reads the parameters one after the other."""

    def __init__(self, model: nn.Module, first_value: FirstValue, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self._model = [model]  # in a list, or it would be a submodule
        self._first_value, self._dtype, self._device = first_value, dtype, device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        (model,) = self._model
        names = {parameter: name for name, parameter in model.named_parameters()}
        users: dict[str, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                users.setdefault(names[parameter], []).append((module, key))
        del names, parameter  # so that each value is freed when its successor is made
        for name, places in users.items():
            before = places[0][0].get_parameter(places[0][1])
            made = nn.Parameter(torch.zeros_like(before, dtype=self._dtype, device=self._device), before.requires_grad)
            del before
            if (value := self._first_value(name)) is not None:
                made.data.copy_(value)
            for module, key in places:  # the token table is the decoder's weight, too
                setattr(module, key, made)
            del value
            yield made
