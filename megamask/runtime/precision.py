"""Choose bf16 or fp32 for this machine.

One rule for training, teachers and all commands: bf16 if the device multiplies matrices in bf16, else fp32. GPUs do
from CUDA compute capability 8.0 on, CPUs if they have the instructions (AVX512_BF16 or AMX on x86). Without them
PyTorch computes in bf16 too, but slowly: a product of (2048, 256) by (256, 1024) took 70 times as long as in fp32 on a
CPU limited to AVX2, and twice as long on a CPU limited to AVX-512 without bf16.

The choice follows what PyTorch and oneDNN report, including limits that a user sets (ONEDNN_MAX_CPU_ISA). Nothing is
measured, so the choice is the same at every start.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch

from megamask.runtime import private_api, ranks
from megamask.runtime.precision_choice import Precision as Precision
from megamask.runtime.precision_choice import PrecisionChoice as PrecisionChoice
from megamask.runtime.precision_choice import PrecisionSupport as PrecisionSupport
from megamask.runtime.precision_choice import Setting as Setting

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that limit the instructions of oneDNN; the first one that is set counts."""
WITHOUT_BF16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of these variables for which matrix products in bf16 are slower than in fp32."""


def device_support(device: torch.device) -> PrecisionSupport:
    """Whether ``device`` multiplies matrices in bf16."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        has = "multiplies in bf16" if major >= 8 else "does not multiply in bf16, which needs 8.0"
        return PrecisionSupport(major >= 8, f"{name} (compute capability {major}.{minor}) {has}")
    return cpu_support(os.environ)


def cpu_support(environment: Mapping[str, str]) -> PrecisionSupport:
    """Whether this CPU multiplies matrices in bf16, under the limits in ``environment``."""
    level = torch.backends.cpu.get_cpu_capability()
    limit = next((f"{name}={environment[name]}" for name in LIMITS if environment.get(name)), "")
    limited = limit.partition("=")[2].upper() in WITHOUT_BF16
    has = torch.backends.mkldnn.is_available() and private_api.onednn_supports_bf16()
    if platform.machine() in ("x86_64", "AMD64"):
        # oneDNN counts AVX-512 without bf16, which it emulates; AMX comes with AVX512_BF16
        has = has and private_api.cpu_has_avx512_bf16()
    if limited:
        return PrecisionSupport(False, f"{limit} limits the CPU to instructions that do not multiply in bf16")
    return PrecisionSupport(has, f"the CPU ({level}) {'multiplies' if has else 'does not multiply'} in bf16")


def common_support() -> PrecisionSupport:
    """The support that all ranks have, so that all use the same precision. Collective."""
    by_rank = ranks.gather(device_support(ranks.device()))
    lacking = [number for number, one in enumerate(by_rank) if not one.bf16]
    if not lacking or len(by_rank) == 1:
        return by_rank[0]
    first = lacking[0]
    return PrecisionSupport(False, f"on rank {first} {by_rank[first].reason} ({len(lacking)} of {len(by_rank)} ranks)")


def precision_here(requested: Setting, setting: str) -> PrecisionChoice:
    """The precision of a single process, such as a command; ``setting`` is the name of the setting."""
    return PrecisionChoice(setting, requested, device_support(ranks.device()))


def precision_lines(model: PrecisionChoice, teacher: PrecisionChoice | None = None) -> list[str]:
    """The line about the precision of a run, and a warning if a setting makes it slow."""
    lines = [f"precision: {model}" + (f"; teacher: {teacher}" if teacher else "")]
    slow = [choice.setting for choice in (model, teacher) if choice and choice.slow]
    if slow:
        lines.append(
            f"bf16 is slow here: {model.support.reason}. Set {' and '.join(slow)} to 'auto', which takes fp32."
        )
    return lines
