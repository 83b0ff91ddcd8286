"""The figures as a Markdown table and as JSON, with the machine and the versions that they hold for."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megamask.bench.measure import Figures, Round
from megamask.runtime import private_api
from megamask.runtime.precision import cpu_support

LIBRARIES = ("torch", "deepspeed", "transformers", "accelerate", "numpy")


def machine() -> dict[str, Any]:
    """Processor, what else it does, devices and versions."""
    known = _cpu()
    return {
        "cpu": known.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": instructions(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def instructions() -> str:
    """The widest instructions that PyTorch uses on this CPU, with bf16 where it multiplies in it: avx2, amx, ..."""
    said = torch.backends.cpu.get_cpu_capability().lower()
    if not cpu_support(os.environ).bf16:
        return said
    return "amx" if private_api.cpu_has_amx() else f"{said}_bf16"


def _cpu() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {key.strip(): value.strip() for key, value in reversed(pairs)}


def version(library: str) -> str | None:
    """Its version, or None where it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def ratios(found: Mapping[str, Figures], bases: Sequence[str], *, by_cpu: bool) -> dict[str, list[float]]:
    """How many times as many tokens per second each variant makes as each of ``bases``."""
    speed = {name: f.per_cpu_second if by_cpu else f.per_second for name, f in found.items()}
    return {name: [speed[name] / speed[base] for base in bases] for name in found}


def speed_markdown(
    found: Mapping[str, Figures], bases: Sequence[str], *, by_cpu: bool, peak: float | None = None
) -> list[str]:
    """The table, with the instructions in its corner; without ``peak`` (FLOP/s of the device) there is no MFU."""
    head = [
        f"variant ({'cuda' if torch.cuda.is_available() else instructions()})",
        "tokens/s",
        "tokens per CPU second",
        "rows that are text",
        "masked",
    ]
    head += [f"x {base}" for base in bases] + (["MFU"] if peak else [])
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    times = ratios(found, bases, by_cpu=by_cpu)
    for name, figures in found.items():
        cells = [name, f"{figures.per_second:,.0f}", f"{figures.per_cpu_second:,.0f}"]
        cells += [f"{figures.fill:.1%}", f"{figures.masked:.1%}", *(f"{ratio:.2f}" for ratio in times[name])]
        if peak:
            cells.append("" if figures.flops_per_second is None else f"{figures.flops_per_second / peak:.1%}")
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def speed_json(
    settings: Mapping[str, Any], rounds: Mapping[str, Sequence[Round]], bases: Sequence[str], *, by_cpu: bool
) -> dict[str, Any]:
    """All that was found, each round of it."""
    found = {name: Figures.of(some) for name, some in rounds.items()}
    times = ratios(found, bases, by_cpu=by_cpu)
    return {
        "machine": machine(),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "ratios of": "tokens per CPU second" if by_cpu else "tokens/s",
        "variants": [
            {
                "name": name,
                "median": asdict(found[name]),
                "ratios": dict(zip(bases, times[name], strict=True)),
                "rounds": [asdict(one) for one in some],
            }
            for name, some in rounds.items()
        ],
    }
