"""What a launch runs on, as it is recorded with it: versions, hardware, commit, command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from megamask.runtime import ranks


def describe_environment() -> dict:
    """What this process runs on: versions, hardware (without the host's name), git commit, command line."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": devices,
        "ranks": ranks.world(),
    }
    return {"versions": versions, "hardware": hardware, "commit": _commit(), "command": sys.argv}


def _commit() -> str | None:
    """The commit of the source tree that megamask runs from, if it is one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # installed into an environment inside someone else's repository, it has no commit of its own
        subprocess.run([*git, "ls-files", "--error-unmatch", "errors.py"], capture_output=True, timeout=10, check=True)
        ask = [*git, "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
