"""A module that is asked and never trained: whole on every device, or cut up by DeepSpeed's ZeRO stage 3.

Stage 3 is the only one that DeepSpeed runs without an optimizer. A file in `ds_configs/` says how: shared out among
the ranks (teacher_shard.json), or on the host and brought to the device a few layers at a time (teacher_offload.json).
Then each pass moves all weights once, and is collective: every rank must make the same number of passes, with the same
calls of modules inside.

Costs: whole, the weights on each device; shared out, a part of them, and an all-gather of each layer a pass; on the
host, the copy of each layer to the device a pass. Every rank reads the whole module into its host's memory first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megamask.engine import choose_accelerator
from megamask.runtime import private_api, ranks


class FrozenEngine:
    """``module`` in ``dtype``, without dropout and gradients; ``ds`` is DeepSpeed's file, None to hold it whole."""

    def __init__(self, module: nn.Module, ds: dict[str, Any] | None, dtype: torch.dtype):
        module = module.eval().requires_grad_(False).to(dtype)
        self._engine = None if ds is None else _cut_up(module, ds, dtype)
        self._module = module.to(ranks.device()) if self._engine is None else self._engine

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> Tensor:
        """What the module returns."""
        return self._module(*arguments)

    def close(self) -> None:
        """Let go of the memory that DeepSpeed holds."""
        if self._engine is not None:
            self._engine.destroy()


def _cut_up(module: nn.Module, ds: dict[str, Any], dtype: torch.dtype) -> Any:
    choose_accelerator()
    import deepspeed

    private_api.skip_shm_extension(deepspeed.ops)
    ranks.init_process_group()
    deepspeed.init_distributed(verbose=False)
    filled = {
        **ds,
        # DeepSpeed asks for both, and uses neither without an optimizer
        "train_batch_size": ranks.world(),
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=module, config=filled, dist_init_required=False)[0]
    engine.eval()
    return engine
