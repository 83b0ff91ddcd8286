"""The environment of a launch, for the record: versions, hardware, commit, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from megamask.runtime import ranks
from megamask.runtime.versions import installed_version


def describe_environment() -> dict:
    """Versions, hardware (without the host name), git commit and command line of this process."""
    libraries = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy")
    versions = {"python": platform.python_version()} | {name: installed_version(name) or "absent" for name in libraries}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": devices,
        "ranks": ranks.world(),
    }
    return {"versions": versions, "hardware": hardware, "commit": _commit(), "command": sys.argv}


def _processor() -> str:
    """The model of the processor, as Linux names it; empty if it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> str | None:
    """The commit of the checkout that megamask runs from; None if it is installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # if it is installed inside another repository, that commit is not its own
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, timeout=10, check=True
        )
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
