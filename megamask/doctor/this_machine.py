"""Limits and versions of this machine, which may be a login node, and the port where the ranks of a run meet."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megamask.doctor.report_text import in_gb
from megamask.runtime.launch_environment import is_main, launch_variables
from megamask.runtime.versions import installed_version

SHARED_MEMORY = Path("/dev/shm")
LAUNCHER_PORT = "29500"
"""The port of `deepspeed` and `torchrun` unless their flags name another one."""


def machine_facts() -> list[str]:
    """Versions, limits of files and memory, and cores."""
    names = ("torch", "deepspeed", "transformers", "numpy")
    versions = ", ".join(f"{name} {installed_version(name) or 'absent'}" for name in names)
    lines = [versions, f"CUDA of torch: {torch.version.cuda or 'none, this torch is for CPUs'}"]
    if torch.version.cuda:
        lines.append(f"NCCL of torch: {'.'.join(map(str, torch.cuda.nccl.version()))}")
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lines.append(f"open files (ulimit -n): {files:,}, at most {hard:,}" if hard >= 0 else f"open files: {files:,}")
    if SHARED_MEMORY.is_dir():
        lines.append(f"{SHARED_MEMORY}: {in_gb(shutil.disk_usage(SHARED_MEMORY).total)} GB")
    cores = len(os.sched_getaffinity(0))
    lines.append(f"{cores} core{'s' * (cores != 1)}, {in_gb(psutil.virtual_memory().total)} GB of memory")
    return lines


def master_address() -> tuple[str, str]:
    """Name and port of rank 0: those of the launch, else those that a launcher on this machine would take."""
    variables = launch_variables()
    return variables.get("MASTER_ADDR", "127.0.0.1"), variables.get("MASTER_PORT", LAUNCHER_PORT)


def port_state(address: str, port: str) -> str:
    """Whether rank 0 could open its port: "free", "taken", or why this machine cannot check that."""
    try:
        with socket.create_server((address, int(port))):
            return "free"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "taken"
        return f"not checked from here ({error.strerror})"


@dataclass(frozen=True)
class MasterPort:
    """The port where the ranks meet, and whether rank 0 could open it."""

    address: str
    port: str
    state: str
    """As `port_state` returns it."""


def check_port() -> MasterPort:
    """Try to open the port where the ranks meet, and close it again."""
    address, port = master_address()
    return MasterPort(address, port, port_state(address, port))


def port_facts(master: MasterPort) -> list[str]:
    """The port where the ranks meet, and whether it is free."""
    return [f"port {master.port} of {master.address}, where the ranks meet: {master.state}"]


def port_problems(master: MasterPort) -> list[str]:
    """A sentence if the port of this launch is taken by another one; that of a later launch may be free by then."""
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # `torchrun` itself has opened it
    if own or not is_main() or "MASTER_PORT" not in launch_variables() or master.state != "taken":
        return []
    return [
        f"MASTER_PORT {master.port} is taken on {master.address}. Choose another one with `deepspeed --master_port N`, "
        "`torchrun --master-port N` or the variable MASTER_PORT of a Slurm job."
    ]
