"""Rank and world size, from the environment variables of `deepspeed`, `torchrun` or Slurm.

Does not import torch, so that a command line can be parsed first. `ranks` communicates with the other processes.
"""

from __future__ import annotations

import os


def launch_variables() -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process.

    From the launcher if it sets them, else from Slurm, else those of a single process.
    """
    if "RANK" in os.environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        variables = {name: os.environ[name] for name in names if name in os.environ}
        # the deepspeed launcher calls it LOCAL_SIZE
        variables.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
        return {"LOCAL_RANK": "0", "WORLD_SIZE": "1"} | variables
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
        slurm = os.environ
        return {
            "RANK": slurm["SLURM_PROCID"],
            "LOCAL_RANK": slurm["SLURM_LOCALID"],
            "WORLD_SIZE": slurm["SLURM_NTASKS"],
            "LOCAL_WORLD_SIZE": slurm["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],
            "MASTER_ADDR": slurm.get("MASTER_ADDR", slurm.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")),
            # below the ephemeral ports, and different for jobs that share a node
            "MASTER_PORT": slurm.get("MASTER_PORT", str(12000 + int(slurm["SLURM_JOB_ID"]) % 20000)),
        }
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ or "SLURM_STEP_ID" in os.environ


def rank() -> int:
    """The rank of this process."""
    return int(launch_variables()["RANK"])


def world() -> int:
    """The number of processes."""
    return int(launch_variables()["WORLD_SIZE"])


def is_main() -> bool:
    """Whether this is rank 0, which prints and publishes."""
    return rank() == 0
