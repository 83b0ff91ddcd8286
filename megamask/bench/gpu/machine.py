"""The machine of a measurement and its versions, for every figure."""

from __future__ import annotations

from typing import Any

import torch

from megamask.bench.table import machine
from megamask.runtime.environment import describe_environment
from megamask.runtime.versions import installed_version


def this_machine() -> dict[str, Any]:
    """As `megamask bench` records it, with the memory of the GPU, more versions, and the commit."""
    facts = machine()
    on_gpu = torch.cuda.is_available()
    facts["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    facts["versions"] |= {"cuda": torch.version.cuda, "triton": installed_version("triton")}
    return facts | {"commit": describe_environment()["commit"]}
