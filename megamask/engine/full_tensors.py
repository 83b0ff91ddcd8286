"""Weights and moments as full fp32 tensors by name, read and written alike in every ZeRO stage.

Under Muon at stages 1 and 2 a rank keeps the momentum of every tensor that touches its partition, whole, one after the
other. A tensor that touches two partitions is kept, and updated alike, on both ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megamask.engine.optimizer import MOMENTS, moments_of
from megamask.runtime import private_api, ranks

MOMENTUM = "momentum_buffer"


class FullTensors:
    """The full tensors of ``parameters`` and of the moments of an optimizer of ``kind``. Every method is collective."""

    def __init__(self, zero: Any, stage: int, kind: str, parameters: Mapping[str, nn.Parameter]):
        """``zero`` is DeepSpeed's optimizer. Creates the moments as zeros; the optimizers would in their first step."""
        self._zero, self._stage, self._kind, self._parameters = zero, stage, kind, parameters
        self._loaded: int | None = None
        self._changed = False
        if stage == 3:  # what goes to files together is read together
            order = {name: private_api.sub_group_of(zero, parameter) for name, parameter in parameters.items()}
            self._parameters = {name: parameters[name] for name in sorted(parameters, key=order.__getitem__)}
        self._optimizer = private_api.inner_optimizer(zero, stage)
        self._create_moments()

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Every weight and moment as (name, function that gathers it), in the same order on all ranks."""
        for name, parameter in self._parameters.items():
            yield f"weights/{name}", partial(self._get, parameter, None)
            for moment in self._moments(parameter):
                yield f"{moment}/{name}", partial(self._get, parameter, moment)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of every weight and moment, in the order of iteration."""
        return {
            f"{kind}/{name}": tuple(private_api.full_shape(parameter))
            for name, parameter in self._parameters.items()
            for kind in ("weights", *self._moments(parameter))
        }

    def store(self) -> None:
        """Put back into files what was read from them: a step needs the memory."""
        if self._loaded is not None:
            private_api.store_sub_group(self._zero, self._loaded, changed=self._changed)
            self._loaded, self._changed = None, False

    @torch.no_grad()
    def nonfinite(self) -> list[str]:
        """The names of those that contain NaN or Inf in this rank's partition. No rank waits for another."""
        names = []
        for name, parameter in self._parameters.items():
            for kind in ("weights", *self._moments(parameter)):
                part = self._partition(parameter, None if kind == "weights" else kind)
                # the sum is finite unless an element is not, or, far beyond any weight, the sum overflows
                if part is not None and not part.sum().isfinite() and not part.isfinite().all():
                    names.append(f"{kind}/{name}")
        return names

    def restore(self, read: Callable[[str], Tensor | None], *, steps: int) -> None:
        """Set every weight and moment to what ``read`` returns for its name, unless None, after ``steps`` steps."""
        for name, parameter in self._parameters.items():
            weight = read(f"weights/{name}")
            if weight is not None:
                self._set_weight(parameter, weight)
            for moment in self._moments(parameter):
                value = read(f"{moment}/{name}")
                if value is not None:
                    self._set(parameter, value, moment)
        self.store()
        if self._stage in (1, 2):
            private_api.update_weights_from_masters(self._zero)
        # AdamW counts its steps with each tensor, LAMB with each group
        for record in (*self._optimizer.state.values(), *self._optimizer.param_groups):
            if "step" in record:
                record["step"] = torch.full_like(record["step"], steps) if torch.is_tensor(record["step"]) else steps

    def _moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return moments_of(self._kind, getattr(parameter, "use_muon", False))

    def _create_moments(self) -> None:
        groups = [moments_of(self._kind, group.get("use_muon", False)) for group in self._optimizer.param_groups]
        buffered = [index for index, moments in enumerate(groups) if moments == (MOMENTUM,) and self._stage < 3]
        for index, moments in enumerate(groups):
            if self._kind == "lamb":
                self._optimizer.param_groups[index]["step"] = 0
            if index in buffered:
                continue
            for tensor in private_api.state_tensors(self._zero, self._stage, index):
                state = self._optimizer.state[tensor]
                for moment in moments:
                    state.setdefault(moment, torch.zeros_like(tensor, dtype=torch.float32))
                if moments == MOMENTS["adamw"] and self._kind != "lamb":
                    state.setdefault("step", torch.zeros((), dtype=torch.float32))
        if self._stage in (1, 2):
            private_api.link_moments(self._zero)  # before there is a momentum, which it would take for a moment of Adam
        for index in buffered:
            size = sum(parameter.numel() for parameter in private_api.partition_parameters(self._zero, index))
            first = self._optimizer.param_groups[index]["params"][0]
            self._optimizer.state[first][MOMENTUM] = torch.zeros(size, device=ranks.device())

    def _get(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            return (parameter if moment is None else self._optimizer.state[parameter][moment]).detach().float()
        if self._stage == 3:
            part = self._own_part(parameter, moment).to(ranks.device())
            return private_api.gather_partitions(self._zero, parameter, part)
        if moment is None:
            return safe_get_full_fp32_param(parameter).detach()
        if moment == MOMENTUM:
            momentum = torch.zeros(parameter.shape, device=ranks.device())
            buffer, is_first = self._momentum(parameter)
            if buffer is not None and is_first:  # of two ranks that keep it, one adds it
                momentum += buffer.view(parameter.shape)
            return ranks.sum(momentum)
        return safe_get_full_optimizer_state(parameter, moment).detach().view(parameter.shape)

    def _partition(self, parameter: nn.Parameter, moment: str | None) -> Tensor | None:
        """What this rank keeps of a weight or moment in fp32; None if that is nothing."""
        if self._stage == 0:
            return (parameter if moment is None else self._optimizer.state[parameter][moment]).detach()
        if self._stage == 3:
            return self._own_part(parameter, moment)
        if moment == MOMENTUM:
            return self._momentum(parameter)[0]
        return private_api.fragment(parameter, moment)

    def _own_part(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """Stage 3: this rank's part, with padding, as a view. If it is in a file, it is in memory until `store`."""
        index = private_api.sub_group_of(self._zero, parameter)
        if index != self._loaded:
            self.store()
            private_api.load_sub_group(self._zero, index)
            self._loaded = index
        return private_api.partition(self._zero, parameter, moment)

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self._stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if ranks.is_main():
                    parameter.copy_(value)
        self._set(parameter, value, None)

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(device=ranks.device(), dtype=torch.float32)
        if self._stage == 0:
            with torch.no_grad():
                (parameter if moment is None else self._optimizer.state[parameter][moment]).copy_(value)
        elif self._stage == 3:
            part = self._own_part(parameter, moment)
            begin = ranks.rank() * part.numel()
            values = value.flatten()[begin : begin + part.numel()]
            part.zero_()[: values.numel()].copy_(values)  # the last rank's part ends in padding
            self._changed = True
        elif moment == MOMENTUM:
            buffer, _ = self._momentum(parameter)
            if buffer is not None:
                buffer.copy_(value.flatten())
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _momentum(self, parameter: nn.Parameter) -> tuple[Tensor | None, bool]:
        """This rank's momentum of ``parameter`` at stages 1 and 2, and whether its partition has the first part."""
        for index, group in enumerate(self._optimizer.param_groups):
            begin = 0
            for place, other in enumerate(private_api.partition_parameters(self._zero, index)):
                if other is parameter:
                    buffer = self._optimizer.state[group["params"][0]][MOMENTUM]
                    is_first = private_api.starts_in_partition(self._zero, index, place)
                    return buffer[begin : begin + other.numel()], is_first
                begin += other.numel()
        return None, False
