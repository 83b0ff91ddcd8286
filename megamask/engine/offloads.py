"""What a DeepSpeed file moves from a device to its host or into files, and whether that can work."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr
from typing import Any

from megamask.runtime.accelerator import choose_accelerator

OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""Keys of `zero_optimization`, with the stages at which DeepSpeed reads them."""


def offload_devices(section: dict[str, Any]) -> dict[str, str]:
    """Where the `zero_optimization` of a DeepSpeed file keeps the moments and the weights: none, cpu or nvme."""
    return {key: str((section.get(key) or {}).get("device") or "none") for key in OFFLOADS}


def offload_problems(section: dict[str, Any], stage: int, optimizer: str, name: str) -> list[str]:
    """Sentences for offloads that have no effect or do not work at ``stage``, or with the kind of ``optimizer``.

    ``name`` is that of the section of the optimizer.
    """
    devices, problems = offload_devices(section), []
    if optimizer == "muon" and set(devices.values()) != {"none"}:
        problems.append(f"`{name}.kind` 'muon' does not support offloading. Use another DeepSpeed file, or 'adamw'.")
    for flag in ("pipeline_read", "pipeline_write"):
        if (section.get("offload_optimizer") or {}).get(flag):
            problems.append(
                f"`zero_optimization.offload_optimizer.{flag}` is not supported: DeepSpeed ran out of its buffers with "
                "it. Remove the key."
            )
    for key, stages in OFFLOADS.items():
        if devices[key] == "cpu" and stage not in stages:
            problems.append(
                f"`zero_optimization.{key}` has an effect only at ZeRO stage {', '.join(map(str, stages))}, but the "
                f"DeepSpeed file says {stage}. Remove the key, or set stage 3."
            )
    return problems + nvme_problems(section, stage)


def nvme_problems(section: dict[str, Any], stage: int) -> list[str]:
    """Sentences for what is missing if the `zero_optimization` of a DeepSpeed file keeps something on NVMe."""
    devices = offload_devices(section)
    if "nvme" not in devices.values():
        return []
    problems = [
        f"`zero_optimization.{key}.device` 'nvme' needs `nvme_path`, a folder on a local disk. Set it."
        for key, device in devices.items()
        if device == "nvme" and not section[key].get("nvme_path")
    ]
    if stage != 3:
        problems.append(f"Offloading to NVMe needs ZeRO stage 3, but the DeepSpeed file says {stage}. Set stage 3.")
    if not has_async_io():
        problems.append("Offloading to NVMe needs libaio (Debian: libaio-dev) and a C++ compiler, which are missing.")
    return problems


def moment_buffers(section: dict[str, Any]) -> int:
    """DeepSpeed's buffers between moments and their files, each of the largest flat partition in fp32; 0: no files."""
    in_files = offload_devices(section)["offload_optimizer"] == "nvme"
    return int(section["offload_optimizer"].get("buffer_count", 4)) if in_files else 0


def weight_buffers(section: dict[str, Any]) -> float:
    """Elements of DeepSpeed's buffers between weights and their files; 0: no files."""
    weights = section.get("offload_param") or {}
    in_files = offload_devices(section)["offload_param"] == "nvme"
    return float(weights.get("buffer_count", 5) * weights.get("buffer_size", 1e8)) if in_files else 0.0


def has_async_io() -> bool:
    """Whether DeepSpeed can build what reads and writes files for it."""
    choose_accelerator()
    from deepspeed.accelerator import get_accelerator

    with redirect_stderr(sys.__stderr__):  # DeepSpeed needs its file descriptor; that of a notebook has none
        return get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible()
