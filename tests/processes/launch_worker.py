"""Ranks that launch pretrain.py again and again, as many of them as each launch wants."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path

from megamask.runtime import ranks
from tests.system.commands import free_port
from tests.system.launches import launch

JOBS = itertools.count()
"""The numbers of jobs, the same on all ranks."""


def serve(jobs: list[dict]) -> list[dict | None]:
    """What `launch` said of each job on this rank; None of a job that wants fewer ranks.

    A job is what `launch` is given, and says how many ranks it wants as ``world``; ``copy`` names a folder and what is
    to be a copy of it first.
    """
    return [one(job) for job in jobs]


def one(job: dict) -> dict | None:
    world, number = job.pop("world"), next(JOBS)
    if world <= ranks.rank():
        return None
    port = meeting(number)
    source, copy = job.pop("copy", (None, None))
    if copy and ranks.is_main():
        shutil.copytree(source, Path(copy))
    before = dict(os.environ)
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    try:
        ranks.init_process_group()
        ranks.barrier()  # the copy is there
        return launch(**job)
    finally:
        disband()
        os.environ.clear()
        os.environ.update(before)


def meeting(number: int) -> int:
    """The port of a job: one that nobody listened on when rank 0 looked, a moment before it is used.

    It is told in the working folder, which all ranks share.
    """
    place = Path(f"port-{number}")
    if ranks.is_main():
        beside = place.with_suffix(".tmp")
        beside.write_text(str(free_port()))
        beside.rename(place)
    while not place.exists():
        time.sleep(0.01)
    return int(place.read_text())


def disband() -> None:
    """Leave the other ranks, so that another number of them can meet in these processes."""
    import deepspeed.comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    deepspeed.comm.destroy_process_group()
    # ZeRO 3 counts modules and parameters over the life of a process and wants the same numbers on every rank
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
