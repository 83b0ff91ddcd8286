"""What ``private_api`` needs of torch and DeepSpeed exists. A test that fails here names what a new version moved."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from megamask.runtime import private_api

STAGE_0 = "deepspeed.runtime.bf16_optimizer"
STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2"
STAGE_3 = "deepspeed.runtime.zero.stage3"
ENGINE = "deepspeed.runtime.engine"
SWAPPER = "deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper"
PARTITION = "deepspeed.runtime.zero.partition_parameters"

ATTRIBUTES = {
    "engine.micro_steps": [ENGINE],
    "engine.optimizer": [ENGINE],
    "engine.skipped_steps": [ENGINE],
    "parameter.ds_shape": [PARTITION],
    "parameter.ds_tensor": [PARTITION],
    "part._zero_padding": [STAGE_1_2],
    "zero.averaged_gradients": [STAGE_1_2, STAGE_3],
    "zero.check_grad_overflow": [STAGE_1_2],
    "zero.cpu_offload": [STAGE_1_2],
    "zero.first_offset": [STAGE_1_2],
    "zero.fp16_groups": [STAGE_3],
    "zero.fp16_partitioned_groups_flat": [STAGE_3],
    "zero.fp16_partitioned_groups_flat_numel": [STAGE_3],
    "zero.fp32_partitioned_groups_flat": [STAGE_3],
    "zero.grad_partitions_flat_buffer": [STAGE_3],
    "zero.grad_position": [STAGE_1_2, STAGE_3],
    "zero.norm_for_param_grads": [STAGE_1_2, STAGE_3],
    "zero.offload_optimizer": [STAGE_3],
    "zero.optimizer_swapper": [STAGE_3],
    "zero.optimizer": [STAGE_0, STAGE_1_2, STAGE_3],
    "zero.overflow": [STAGE_1_2, STAGE_3],
    "zero.parallel_partitioned_bit16_groups": [STAGE_1_2],
    "zero.params_in_partition": [STAGE_1_2],
    "zero.real_dp_process_group": [STAGE_1_2],
    "zero.single_partition_of_fp32_groups": [STAGE_1_2],
    "zero.sub_group_to_group_id": [STAGE_3],
    "zero.swap_optimizer": [STAGE_3],
}
"""Attributes of DeepSpeed's objects, as ``private_api`` writes them, and the modules that set them."""
METHODS = {
    "engine.step": {ENGINE: "self, lr_kwargs=None"},
    "engine.zero_grad": {ENGINE: "self"},
    "optimizer_swapper.flush_gradients": {SWAPPER: "self"},
    "zero._fp32_state_allgather": {STAGE_3: "self, param, fp32_state_partition"},
    "zero._lazy_init_hp_params_optimizer_state": {STAGE_1_2: "self"},
    "zero._link_all_hp_params": {STAGE_1_2: "self", STAGE_3: "self"},
    "zero._optimizer_states_and_gradient_swap_in": {STAGE_3: "self, sub_group_id, timer_names=None"},
    "zero._optimizer_states_and_gradient_swap_out": {STAGE_3: "self, sub_group_id, timer_names=None"},
    "zero._overflow_check_and_loss_scale_update": {STAGE_3: "self, update_scale=True"},
    "zero._release_swap_buffers": {STAGE_3: "self, sub_group_id"},
    "zero._swappable_optimizer_subgroup": {STAGE_3: "self, sub_group_id"},
    "zero.check_overflow": {STAGE_1_2: "self, partition_gradients=True"},
    "zero.get_param_id": {STAGE_1_2: "self, param", STAGE_3: "self, param"},
    "zero.update_lp_params": {STAGE_1_2: "self"},
}
"""Methods of DeepSpeed's objects, and their parameters."""
TORCH = {
    "torch._dynamo.config.recompile_limit": "int",
    "torch._dynamo.config.accumulated_recompile_limit": "int",
    "torch._foreach_copy_": "builtin_function_or_method",
    "torch._foreach_norm": "builtin_function_or_method",
    "torch.cpu._is_amx_tile_supported": "()",
    "torch.cpu._is_avx512_bf16_supported": "()",
    "torch.distributed.distributed_c10d._set_pg_timeout": "(timeout, group=None)",
    "torch.distributed.distributed_c10d._world.pg_map": "dict",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "OpOverloadPacket",
}
"""Private names of torch, and their parameters or types."""


@functools.cache
def nodes(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))))


def signature(value: object) -> str:
    """The parameters of a Python function, without annotations; the type of anything else."""
    if not inspect.isfunction(value):
        return type(value).__name__
    parameters = inspect.signature(value).parameters.values()
    return f"({', '.join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)})"


@pytest.mark.parametrize(("name", "module"), [(name, one) for name, modules in ATTRIBUTES.items() for one in modules])
def test_deepspeed_sets_the_attribute(name: str, module: str) -> None:
    assert name.split(".")[1] in {
        node.attr for node in nodes(module) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


@pytest.mark.parametrize(("name", "module"), [(name, one) for name, modules in METHODS.items() for one in modules])
def test_deepspeed_has_the_method(name: str, module: str) -> None:
    definitions = [node for node in nodes(module) if isinstance(node, ast.FunctionDef)]
    parameters = [ast.unparse(node.args) for node in definitions if node.name == name.split(".")[1]]
    assert METHODS[name][module] in parameters


@pytest.mark.parametrize("name", TORCH)
def test_torch_has_the_private_name(name: str) -> None:
    value = torch
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    assert signature(value) == TORCH[name]


def test_deepspeed_has_a_table_of_extensions() -> None:
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


@pytest.mark.parametrize("name", private_api.COMPILED_BY_MUON)
def test_muon_compiles_the_function(name: str) -> None:
    from deepspeed.runtime.zero.muon import original_muon

    function = getattr(original_muon, name)
    assert inspect.unwrap(function) is not function


def test_the_tables_contain_all_that_private_api_uses() -> None:
    used = set()
    for node in ast.walk(ast.parse(Path(private_api.__file__).read_text())):
        if isinstance(node, ast.Attribute):
            owner, *path = ast.unparse(node).split(".")
            if owner in ("zero", "engine"):
                used.add(f"{owner}.{path[0]}")
            elif owner in ("torch", "distributed_c10d") and path[-1].startswith("_"):
                used.add(".".join([owner, *path]).replace("distributed_c10d", "torch.distributed.distributed_c10d"))
    known = {*ATTRIBUTES, *METHODS, *TORCH}
    assert not [name for name in used if not any(f"{one}.".startswith(f"{name}.") for one in known)]


def test_norms_equal_the_documented_function() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16()]
    torch.testing.assert_close(private_api.norms(tensors), [torch.linalg.vector_norm(x.float()) for x in tensors])
    assert private_api.norms([]) == []


def test_copies_keep_the_dtype_of_the_target() -> None:
    targets = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3)]
    private_api.copy_all(targets, [torch.ones(2), torch.full((3,), 2.0)])
    assert [target.tolist() for target in targets] == [[1.0, 1.0], [2.0, 2.0, 2.0]]
    assert targets[0].dtype == torch.bfloat16
