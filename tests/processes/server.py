"""A process that has imported PyTorch and whatever was asked of it before, and forks: what it is asked starts at once.

A fresh process spends seconds on imports, a fork none.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""What pretrain.py sets before it imports PyTorch, which here has been imported before."""
NAMESPACE = ("unshare", "--map-root-user", "--mount")

SCRIPT = """
import contextlib, importlib, json, os, subprocess, sys, traceback
asks, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)  # libraries print when they are imported
import torch  # once for all
from megamask.runtime import ranks

def tell(*words):
    print(json.dumps(words), file=answers, flush=True)

def be(target, given, env, folder, log, answer, disk):
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        if not disk:
            os.setsid()  # so that a kill takes its children too
        os.environ |= env
        os.chdir(folder)
        module, function = target.split(":")
        said = getattr(importlib.import_module(module), function)(**given)
        with open(answer, "w") as file:
            json.dump(said, file)
        code = 0
    except BaseException:
        traceback.print_exc()
    ranks.exit_process(code)

for line in asks:
    target, given, places = json.loads(line)
    with contextlib.suppress(Exception):  # it fails again where it is told
        importlib.import_module(target.split(":")[0])
    disks = [place["disk"] for place in places if place["disk"]]
    for disk in disks:
        subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
    born = []
    for place in places:
        pid = os.fork()
        if not pid:
            be(target, given, **place)
        born.append(pid)
    tell(*born)
    for _ in born:
        pid, status = os.wait()
        tell(born.index(pid), os.waitstatus_to_exitcode(status))
    for disk in disks:
        subprocess.run(["umount", "--lazy", disk], check=True)
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables by which `torchrun` tells a process who it is."""
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",  # what a killed rank had printed is kept
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # to ask for CUDA otherwise would deny it to all forks
    }


def namespaces() -> bool:
    """Whether this machine lets us mount a small disk of our own."""
    try:
        mounted = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return mounted.returncode == 0


@dataclass(frozen=True)
class Place:
    """Where one fork is to work."""

    env: dict[str, str]
    folder: str
    """Its working folder."""
    log: str
    """What it prints."""
    answer: str
    """What the function returns, as JSON."""
    disk: str = ""
    """A folder over which a disk in memory is mounted while it works. Such a fork stays in the server's session."""


class Server:
    """Forks on demand, one demand at a time."""

    def __init__(self) -> None:
        self.mounts = namespaces()
        self._process = subprocess.Popen(
            [*(NAMESPACE if self.mounts else ()), sys.executable, "-c", SCRIPT],
            env=environment(0, 1, 0) | QUIET, bufsize=0, start_new_session=True,  # what is read is a line, never more
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, target: str, given: dict[str, Any], places: Sequence[Place]) -> list[int]:
        """Let a fork in each of ``places`` call ``target`` ("module:function"); their process ids."""
        assert self._process.stdin
        request = json.dumps([target, given, [asdict(place) for place in places]])
        self._process.stdin.write(request.encode() + b"\n")
        return self._hear()

    def ended(self, timeout: float | None = None) -> tuple[int, int] | None:
        """Which of them has ended next, and its exit code (negative: the signal); None if none does in time."""
        if timeout is not None and not select.select([self._process.stdout], [], [], timeout)[0]:
            return None
        number, code = self._hear()
        return number, code

    def _hear(self) -> list[int]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the server of forks has ended"
        return json.loads(line)

    def close(self) -> None:
        """End it, and every fork that is left in its session."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
