"""Ranks that launch pretrain.py again and again, as many of them as each launch wants."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megamask import ranks
from tests.system.launches import launch


def serve(jobs: list[dict]) -> list[dict | None]:
    """What `launch` said of each job on this rank; None of a job that wants fewer ranks.

    A job is what `launch` is given, and says how many ranks it wants as ``world`` and where they meet as ``port``;
    ``copy`` names a folder and what is to be a copy of it first.
    """
    return [one(job) for job in jobs]


def one(job: dict) -> dict | None:
    world, port = job.pop("world"), job.pop("port")
    if world <= ranks.rank():
        return None
    source, copy = job.pop("copy", (None, None))
    if copy and ranks.is_main():
        shutil.copytree(source, Path(copy))
    before = dict(os.environ)
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    try:
        ranks.join()
        ranks.barrier()  # the copy is there
        return launch(**job)
    finally:
        disband()
        os.environ.clear()
        os.environ.update(before)


def disband() -> None:
    """Leave the other ranks, so that another number of them can meet in these processes."""
    import deepspeed.comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    deepspeed.comm.destroy_process_group()
    # ZeRO 3 counts modules and parameters over the life of a process and wants the same numbers on every rank
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
