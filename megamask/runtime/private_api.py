"""Every use of torch and DeepSpeed beyond their documented interfaces. Written for torch 2.13.0 and DeepSpeed 0.19.8.

Each function says why the documented interface is not enough. Read this file again before you change either version:
tests/unit/runtime/test_private_api.py names each attribute that is gone or has another signature, and
tests/unit/test_architecture.py refuses such uses elsewhere. DeepSpeed's objects are passed in, because only ``engine``
imports DeepSpeed. In signatures, ``zero`` is DeepSpeed's ZeRO optimizer, and ``stage`` is its stage.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.distributed import distributed_c10d

# ---- torch


def set_group_timeout(timeout: timedelta) -> None:
    """Set the timeout of every process group; torch takes one only at the creation, and DeepSpeed creates groups."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def norms(tensors: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
    """The L2 norm of each tensor in fp32, by a few kernels for all; the documented functions launch one for each."""
    return list(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)) if tensors else []


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, by a few kernels for all."""
    torch._foreach_copy_(list(targets), list(sources))


def onednn_supports_bf16() -> bool:
    """Whether oneDNN multiplies in bf16 on this CPU; no documented function reports it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_has_avx512_bf16() -> bool:
    """Whether this x86 CPU has AVX512_BF16; the documented capability level does not contain it."""
    return torch.cpu._is_avx512_bf16_supported()


def cpu_has_amx() -> bool:
    """Whether this x86 CPU has AMX; the documented capability level does not contain it."""
    return torch.cpu._is_amx_tile_supported()


def allow_recompiles(limit: int) -> None:
    """Let torch.compile make up to ``limit`` graphs of a function; torch 2.11 has no documented setting for it.

    Beyond its limits (8 and, of graphs that are no longer used too, 256) it does not compile, and prints a warning.
    """
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, name, max(getattr(torch._dynamo.config, name), limit))


# ---- DeepSpeed: messages and compilation


def skip_shm_extension(ops: ModuleType) -> None:
    """Do not compile a C++ extension that only tensor-parallel inference uses; ``ops`` is ``deepspeed.ops``.

    ``init_distributed`` compiles it on every CPU and has no setting for it.
    """
    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def hide_step_messages() -> None:
    """Hide two messages that DeepSpeed causes at every step and that no setting turns off."""
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    # its hooks need not see our dataclasses: only the modules inside have parameters, and those return tensors
    logging.getLogger("DeepSpeed").addFilter(lambda record: "unknown inputs or outputs" not in record.getMessage())


COMPILED_BY_MUON = ("muon_update", "zeropower_via_gram_newtonschulz", "zeropower_via_newtonschulz5")
"""Functions of DeepSpeed's Muon that are wrapped in torch.compile, once for every shape of a matrix."""


def run_muon_uncompiled(modules: Iterable[ModuleType]) -> None:
    """Replace the compiled functions in the ``modules`` of DeepSpeed's Muon by the functions they wrap.

    On a CPU compilation costs more than it saves: for the tiny preset (16 matrices, one thread, AVX-512) an update
    takes 154 ms of CPU time as it is written and 143 ms compiled. Compiling takes 40 s, as much as 3,600 steps save.
    """
    for module in modules:
        for name in COMPILED_BY_MUON:
            if hasattr(module, name):
                setattr(module, name, inspect.unwrap(getattr(module, name)))


# ---- DeepSpeed: a step


def gradient_norms(
    zero: Any, stage: int, parameters: Mapping[str, nn.Parameter], device: torch.device
) -> list[tuple[str, Float[Tensor, ""]]]:
    """The norm of each part of a gradient that this rank has after the last micro-step, by the name of its weight.

    DeepSpeed computes a norm only inside of ``step``, where it already changes weights or Muon's momentum.
    """
    if stage == 0:
        gradients = [(name, p.grad) for name, p in parameters.items() if p.grad is not None]
    elif zero.offload_optimizer if stage == 3 else zero.cpu_offload:
        by_name = {name: zero.norm_for_param_grads.get(zero.get_param_id(p)) for name, p in parameters.items()}
        known = {name: torch.as_tensor(norm).float() for name, norm in by_name.items() if norm is not None}
        # a copy for each device that they are on, not for each weight
        places = {norm.device for norm in known.values()}
        moved = {
            place: iter(torch.stack([n for n in known.values() if n.device == place]).to(device)) for place in places
        }
        return [(name, next(moved[norm.device])) for name, norm in known.items()]
    else:
        names = {id(p): name for name, p in parameters.items()}
        gradients = []
        for index, group in enumerate(zero.fp16_groups if stage == 3 else zero.params_in_partition):
            parts = (part for part in zero.averaged_gradients[index] if not getattr(part, "_zero_padding", False))
            gradients += [(names[id(p)], part) for p, part in zip(group, parts, strict=False)]
    return list(zip([name for name, _ in gradients], norms([part for _, part in gradients]), strict=True))


def discard_step(engine: Any, stage: int) -> None:
    """Discard the gradients of the micro-steps; weights and moments stay what they are. ``engine`` is DeepSpeed's.

    DeepSpeed only discards a step that overflowed, so at stages 1 to 3 its check is replaced, for one call, by one that
    finds an overflow: then DeepSpeed itself clears all that it must clear.
    """
    zero = engine.optimizer
    if stage == 0:
        engine.zero_grad()
        engine.micro_steps += 1
        return
    check = "_overflow_check_and_loss_scale_update" if stage == 3 else "check_overflow"
    enabled, zero.check_grad_overflow = getattr(zero, "check_grad_overflow", False), True
    setattr(zero, check, lambda **_: setattr(zero, "overflow", True))
    try:
        engine.step()
    finally:
        delattr(zero, check)
        zero.check_grad_overflow = enabled
    if stage == 3 and zero.swap_optimizer:
        zero.optimizer_swapper.flush_gradients()  # else these and the next ones are written to the same files at once


def restart_micro_steps(engine: Any) -> None:
    """Let DeepSpeed count micro-steps from 0 again, between two steps, when their number per step has changed.

    It takes a step when its count since the start is a multiple of that number, and ``set_train_batch_size`` leaves it.
    """
    engine.micro_steps = 0


def num_skipped_steps(engine: Any) -> int:
    """How many steps DeepSpeed has skipped by its own check; ``step`` does not report it."""
    return engine.skipped_steps


# ---- DeepSpeed: weights and moments


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; at stage 3 the parameter itself is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def inner_optimizer(zero: Any, stage: int) -> torch.optim.Optimizer:
    """The optimizer inside of ZeRO's, or of the one that DeepSpeed wraps around it at stage 0."""
    return zero.optimizer if stage else getattr(zero, "optimizer", zero)


def state_tensors(zero: Any, stage: int, group: int) -> Iterator[Tensor]:
    """The tensors that are the keys of the inner optimizer's state of parameter group number ``group``.

    At stage 3 these are flat partitions; before its first step DeepSpeed does not put them into the groups. One that is
    in a file is in memory, and may get a state, until the next is taken.
    """
    if stage != 3:
        yield from inner_optimizer(zero, stage).param_groups[group]["params"]
        return
    for index, tensor in enumerate(zero.fp32_partitioned_groups_flat):
        if zero.sub_group_to_group_id[index] == group:
            load_sub_group(zero, index)
            yield tensor
            store_sub_group(zero, index, changed=True)


def sub_group_of(zero: Any, parameter: nn.Parameter) -> int:
    """At stage 3: which of the flat partitions, which go to files as a whole, has this rank's part of a parameter."""
    return zero.grad_position[zero.get_param_id(parameter)][0]


def load_sub_group(zero: Any, index: int) -> None:
    """At stage 3: bring the masters and moments of a flat partition into memory, if they are in files."""
    if zero._swappable_optimizer_subgroup(index):
        zero._optimizer_states_and_gradient_swap_in(index)


def store_sub_group(zero: Any, index: int, *, changed: bool) -> None:
    """Free the memory of what `load_sub_group` read; write it to its files first if it was ``changed``."""
    if zero._swappable_optimizer_subgroup(index):
        (zero._optimizer_states_and_gradient_swap_out if changed else zero._release_swap_buffers)(index)


def partition(zero: Any, parameter: nn.Parameter, moment: str | None) -> Tensor:
    """At stage 3: this rank's part, with padding, of an fp32 weight or moment that is in memory, as a view.

    The documented getters read a whole flat partition from its files for each parameter, and write it back.
    """
    index, begin, size = zero.grad_position[zero.get_param_id(parameter)]
    master = zero.fp32_partitioned_groups_flat[index]
    tensor = master if moment is None else zero.optimizer.state[master][moment]
    return tensor.detach().narrow(0, begin, size)


def gather_partitions(zero: Any, parameter: nn.Parameter, part: Tensor) -> Tensor:
    """At stage 3: the whole tensor of which every rank has a `partition`. Collective."""
    return zero._fp32_state_allgather(parameter, part)


def share_memory(zero: Any, stage: int) -> None:
    """Let masters be the weights, and gradients be kept once, where DeepSpeed copies what has the same type and place.

    In fp32 DeepSpeed keeps masters beside equal weights at stages 1 and 2, and with offloads at stage 3 (without, it
    shares them). At stage 3 with an optimizer on the host it keeps the sum of the micro-steps and a copy of it for the
    optimizer. What the optimizer writes is then written in place, and DeepSpeed's copies copy nothing.
    """
    if stage in (1, 2):
        for group, master in enumerate(zero.single_partition_of_fp32_groups):
            partitions = zero.parallel_partitioned_bit16_groups[group]
            _share(master, partitions[distributed.get_rank(zero.real_dp_process_group[group])])
        zero._link_all_hp_params()  # the fragments by which DeepSpeed reads and writes masters
    if stage != 3:
        return
    for weights, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
        if weights is not None:  # else it is on NVMe
            _share(master, weights)
    if zero.offload_optimizer and not zero.swap_optimizer:
        begin = 0
        for master, size in zip(
            zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat_numel, strict=True
        ):
            _share(master.grad, zero.grad_partitions_flat_buffer.narrow(0, begin, size))
            begin += size


def free_memory(zero: Any, stage: int, parameters: Iterable[nn.Parameter]) -> None:
    """Free weights, gradients and moments of a destroyed optimizer at stage 3, where DeepSpeed's objects outlive it.

    A global list of modules and references between objects in C++ keep them until the process ends.
    """
    if stage != 3:
        return
    masters = zero.fp32_partitioned_groups_flat
    tensors = [zero.grad_partitions_flat_buffer, *masters, *(master.grad for master in masters)]
    tensors += [parameter.ds_tensor for parameter in parameters]  # type: ignore[attr-defined]
    tensors += [value for state in zero.optimizer.state.values() for value in state.values()]
    for tensor in tensors:
        if torch.is_tensor(tensor) and tensor.untyped_storage().resizable():
            tensor.untyped_storage().resize_(0)


def _share(tensor: Tensor, other: Tensor) -> None:
    """Let ``tensor`` have the memory of ``other``, if they have the same type, size and device."""
    if (tensor.dtype, tensor.shape, tensor.device) == (other.dtype, other.shape, other.device):
        tensor.data = other.data


def link_moments(zero: Any) -> None:
    """At stages 1 and 2: let DeepSpeed's getters and setters find the moments before its first step."""
    zero._lazy_init_hp_params_optimizer_state()


def update_weights_from_masters(zero: Any) -> None:
    """At stages 1 and 2: copy the fp32 masters into the weights of the forward pass, as only ``step`` does."""
    zero.update_lp_params()


def partition_parameters(zero: Any, group: int) -> list[nn.Parameter]:
    """At stages 1 and 2: the parameters of a group of which this rank has a part, in order.

    DeepSpeed's Muon keeps their momentum in one buffer, each parameter whole, and its getters do not know that buffer.
    """
    return zero.params_in_partition[group]


def fragment(parameter: nn.Parameter, moment: str | None) -> Tensor | None:
    """At stages 1 and 2: the part of an fp32 weight or moment that this rank keeps; the getters gather all parts."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return None if mapping is None else mapping.get_hp_fragment(moment).detach()


def starts_in_partition(zero: Any, group: int, index: int) -> bool:
    """Whether number ``index`` of ``partition_parameters`` begins in this rank's partition, not in the one before."""
    return index > 0 or zero.first_offset[group] == 0
