"""Rank and world size, from the environment variables of `deepspeed`, `torchrun` or Slurm.

Does not import torch, so that a command line can be parsed first. `ranks` communicates with the other processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from megamask.errors import LaunchError, raise_all

CURE = "Start the ranks with `deepspeed`, `torchrun` or `srun`, which set it, or a single process without it."
BOTH = "Start the ranks with `deepspeed`, `torchrun` or `srun`, which set both, or one process without either."
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID")
"""What a rank reads of the environment that `srun` gives it."""
RANGES = {
    "RANK": (0, math.inf),
    "LOCAL_RANK": (0, math.inf),
    "WORLD_SIZE": (1, math.inf),
    "LOCAL_WORLD_SIZE": (1, math.inf),
    "MASTER_PORT": (0, 65535),
}
"""The least and the largest value of each variable that is an integer."""
_planned: ContextVar[int | None] = ContextVar("planned", default=None)


def launch_variables() -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process.

    From the launcher if it sets them, else from Slurm, else those of a single process. LaunchError names each
    variable that is missing or is not an integer in its range, and a rank that is not below the number of processes.
    """
    variables = _given_variables()
    wrong = [
        name
        for name, (least, most) in RANGES.items()
        if name in variables and not (variables[name].isdecimal() and least <= int(variables[name]) <= most)
    ]
    problems = [
        f"The environment variable {name} must be an integer {_bounds(*RANGES[name])}, but is {variables[name]!r}. "
        f"{CURE}"
        for name in wrong
    ]
    if "WORLD_SIZE" not in variables:
        problems.append(
            f"The environment variable RANK is {variables['RANK']!r}, but WORLD_SIZE, the number of processes, is not "
            f"set. {BOTH}"
        )
    elif not {"RANK", "WORLD_SIZE"} & set(wrong) and int(variables["RANK"]) >= int(variables["WORLD_SIZE"]):
        problems.append(
            f"The environment variable RANK must be below WORLD_SIZE ({variables['WORLD_SIZE']}), because ranks are "
            f"counted from 0, but is {variables['RANK']!r}. {CURE}"
        )
    raise_all(LaunchError, problems)
    return variables


def _bounds(least: float, most: float) -> str:
    return f"of at least {least}" if most == math.inf else f"from {least} to {most}"


def _given_variables() -> dict[str, str]:
    if "RANK" in os.environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        variables = {name: os.environ[name] for name in names if name in os.environ}
        # the deepspeed launcher calls it LOCAL_SIZE
        variables.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
        return {"LOCAL_RANK": "0"} | variables
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
        slurm = os.environ
        if absent := [name for name in SLURM_VARIABLES if name not in slurm]:
            raise LaunchError(
                f"`srun` gives a task the environment variables {', '.join(absent)}, but they are not set. {CURE}"
            )
        if (size := slurm.get("WORLD_SIZE", slurm["SLURM_NTASKS"])) != slurm["SLURM_NTASKS"]:
            raise LaunchError(
                f"The environment variable WORLD_SIZE is {size!r}, but `srun` started {slurm['SLURM_NTASKS']} tasks "
                "(SLURM_NTASKS), which are the ranks. Unset it, or start as many tasks with `srun --ntasks`."
            )
        job = slurm["SLURM_JOB_ID"]
        return {
            "RANK": slurm["SLURM_PROCID"],
            "LOCAL_RANK": slurm["SLURM_LOCALID"],
            "WORLD_SIZE": slurm["SLURM_NTASKS"],
            "LOCAL_WORLD_SIZE": slurm["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],
            "MASTER_ADDR": slurm.get("MASTER_ADDR", slurm.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")),
            # below the ephemeral ports, and different for jobs that share a node
            "MASTER_PORT": slurm.get("MASTER_PORT", str(12000 + int(job) % 20000) if job.isdecimal() else job),
        }
    if (world_size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise LaunchError(
            f"The environment variable WORLD_SIZE is {world_size!r}, but RANK, the number of this process, is not set. "
            f"{BOTH}"
        )
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def port_taken_problem(address: str | None, port: str | None) -> str:
    """The sentence for a port of rank 0 that another process has opened."""
    return (
        f"MASTER_PORT {port} is taken on {address}. Choose another one with `deepspeed --master_port N`, `torchrun "
        "--master-port N` or the variable MASTER_PORT of a Slurm job."
    )


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ or "SLURM_STEP_ID" in os.environ


def rank() -> int:
    """The rank of this process."""
    return int(launch_variables()["RANK"])


def world() -> int:
    """The number of processes; inside `planned_world`, that of the planned run."""
    planned = _planned.get()
    return int(launch_variables()["WORLD_SIZE"]) if planned is None else planned


@contextmanager
def planned_world(count: int | None) -> Iterator[None]:
    """Read the settings of a run of ``count`` processes that this process plans and does not belong to.

    Recipes take a number of packs for each process, so they must know the processes of the run. None changes nothing.
    """
    token = _planned.set(count)
    try:
        yield
    finally:
        _planned.reset(token)


def is_main() -> bool:
    """Whether this is rank 0, which prints and publishes."""
    return rank() == 0
