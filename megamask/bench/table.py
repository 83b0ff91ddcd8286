"""The results as a Markdown table and as JSON, with the machine and the versions that they hold for."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megamask.bench.measure import Medians, Round
from megamask.runtime import private_api
from megamask.runtime.precision import cpu_support
from megamask.runtime.versions import installed_version

LIBRARIES = ("torch", "deepspeed", "transformers", "accelerate", "numpy")


def machine() -> dict[str, Any]:
    """Processor and its load, devices and versions."""
    cpu = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instructions": instructions(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in LIBRARIES},
    }


def instructions() -> str:
    """The widest instructions that PyTorch uses on this CPU, with bf16 where it multiplies in it: avx2, amx, ..."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if not cpu_support(os.environ).bf16:
        return capability
    return "amx" if private_api.cpu_has_amx() else f"{capability}_bf16"


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {key.strip(): value.strip() for key, value in reversed(pairs)}


def ratios(medians: Mapping[str, Medians], bases: Sequence[str], *, by_cpu: bool) -> dict[str, list[float]]:
    """The speed of each variant as a multiple of that of each of ``bases``."""
    speed = {name: of_variant.speed(by_cpu=by_cpu) for name, of_variant in medians.items()}
    return {name: [speed[name] / speed[base] for base in bases] for name in medians}


def speed_markdown(
    medians: Mapping[str, Medians], bases: Sequence[str], *, by_cpu: bool, peak: float | None = None
) -> list[str]:
    """The table; without ``peak`` (FLOP/s of the device) it has no MFU. Ratios are of the speed that ``by_cpu`` names.

    The corner names the device or the instructions of the CPU.
    """
    device = "cuda" if torch.cuda.is_available() else instructions()
    head = [f"variant ({device})", "tokens/s", "tokens per CPU second", "positions that are text", "masked"]
    head += [f"x {base}" for base in bases] + (["MFU"] if peak else [])
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    multiples = ratios(medians, bases, by_cpu=by_cpu)
    for name, one in medians.items():
        cells = [name, f"{one.per_second:,.0f}", f"{one.per_cpu_second:,.0f}", f"{one.fill:.1%}", f"{one.masked:.1%}"]
        cells += [f"{ratio:.2f}" for ratio in multiples[name]]
        if peak:
            cells.append("" if one.flops_per_second is None else f"{one.flops_per_second / peak:.1%}")
        rows.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in rows]


def speed_json(
    settings: Mapping[str, Any], rounds: Mapping[str, Sequence[Round]], bases: Sequence[str], *, by_cpu: bool
) -> dict[str, Any]:
    """All results, with each round."""
    medians = {name: Medians.of(of_variant) for name, of_variant in rounds.items()}
    multiples = ratios(medians, bases, by_cpu=by_cpu)
    return {
        "machine": machine(),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "ratios of": "tokens per CPU second" if by_cpu else "tokens/s",
        "variants": [
            {
                "name": name,
                "median": asdict(medians[name]),
                "ratios": dict(zip(bases, multiples[name], strict=True)),
                "rounds": [asdict(one) for one in of_variant],
            }
            for name, of_variant in rounds.items()
        ],
    }
