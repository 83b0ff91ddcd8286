"""A module for inference only: whole on every device, or partitioned by DeepSpeed's ZeRO stage 3.

Stage 3 is the only one that DeepSpeed runs without an optimizer. A file in `ds_configs/` selects how: partitioned among
the ranks (teacher_shard.json), or offloaded to the host and copied to the device a few layers at a time
(teacher_offload.json). Then each pass moves all weights once, and is collective: every rank must make the same number
of passes, with the same calls of inner modules.

Costs: whole, all weights on each device; partitioned, a part of them, and an all-gather of each layer per pass;
offloaded, a copy of each layer to the device per pass. Parameters are converted and partitioned one by one, so a rank
holds its share and one tensor if those of the given module are mapped from files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megamask.engine.meta_weights import materialise
from megamask.engine.nvme import check_buffers, check_locked_memory, in_own_folders
from megamask.runtime import private_api, ranks
from megamask.runtime.accelerator import choose_accelerator
from megamask.storage.scratch_folder import ScratchFolder


class FrozenEngine:
    """``module`` in ``dtype``, without dropout and gradients; whole if ``ds``, the DeepSpeed file, is None."""

    def __init__(self, module: nn.Module, ds: dict[str, Any] | None, dtype: torch.dtype):
        module = module.eval().requires_grad_(False)
        self._folders: list[ScratchFolder] = []
        if ds is not None:
            check_buffers(ds, max(parameter.numel() for parameter in module.parameters()))
            check_locked_memory(ds, 0, dtype.itemsize)
            ds, self._folders = in_own_folders(ds)
        self._engine = None if ds is None else _partition(module, ds, dtype)
        self._module = module.to(ranks.device(), dtype) if self._engine is None else self._engine

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> Tensor:
        """Run the module."""
        return self._module(*arguments)

    def close(self) -> None:
        """Release the memory of DeepSpeed."""
        if self._engine is not None:
            self._engine.destroy()
        for folder in self._folders:
            folder.close()


def _partition(module: nn.Module, ds: dict[str, Any], dtype: torch.dtype) -> Any:
    choose_accelerator()
    import deepspeed

    private_api.skip_shm_extension(deepspeed.ops)
    ranks.init_process_group()
    deepspeed.init_distributed(verbose=False)
    filled = {
        **ds,
        # DeepSpeed requires both, and without an optimizer uses neither
        "train_batch_size": ranks.world(),
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }
    read = dict(module.named_parameters())
    materialise(module, read.pop, filled, dtype, ranks.device())
    module.to(ranks.device(), dtype)  # what is not a parameter
    engine = deepspeed.initialize(model=module, config=filled, dist_init_required=False)[0]
    engine.eval()
    return engine
