"""The nodes of a real job answer the doctor, from a batch script and from a step on one of them."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.system.commands import ROOT, clean

ASK = """
from megamask.doctor.nodes import ask_nodes, node_facts, node_problems
nodes = ask_nodes()
print([node.name for node in nodes.answers], node_facts(nodes)[0], node_problems(nodes))
"""
JOB = """#!/bin/bash
"$1" -c "$2"
srun --nodes=1 --ntasks=1 "$1" -c "$2"
SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=$SLURMD_NODENAME "$1" -c "$2"
SLURM_JOB_NODELIST=nowhere "$1" -c "$2"
"""


def test_every_node_of_a_job_answers(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(JOB)
    size = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
    number = slurm.sbatch(
        *size, f"--output={tmp_path / 'out'}", str(tmp_path / "job.sh"), sys.executable, ASK,
        env=clean() | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert slurm.wait(number) == "COMPLETED"
    batch, step, subset, wrong = (tmp_path / "out").read_text().splitlines()
    assert batch == step
    assert batch.count("'node") == 2 and "2 of 2 nodes answered `srun` []" in batch
    assert subset.count("'node") == 1 and "1 of 1 nodes answered `srun` []" in subset
    assert "0 of 2 nodes of the job answer `srun` (none): " in wrong
