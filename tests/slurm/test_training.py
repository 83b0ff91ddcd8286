"""slurm/run.sh with the trainer itself on two nodes: whatever happens to a run, its losses are bit for bit the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import HERE, ROOT, Job, checkout, losses
from tests.system.commands import training

pytestmark = pytest.mark.slurm
EVERY = 4
"""Steps between two checkpoints, and between two deeds."""
LIMIT = ("--partition=spot", "--time=60", "--signal=B:USR1@3000")


class Deeds:
    """What can happen to a job whose ranks wait in the middle of training. Each returns when it starts again."""

    def __init__(self, slurm: Cluster, job: Job):
        self.slurm, self.job = slurm, job

    def limit(self) -> None:
        """Its time is up: the signal is due 3000 s before, so Slurm sends it at the next tick of its clock."""
        requeues = self.job.text().count("requeueing")
        self.slurm.expire(self.job.number, 2000)
        self.slurm.until(lambda: self.job.text().count("requeueing") > requeues, "a requeue", self.job.everything)
        self.slurm.run("scontrol", "update", f"JobId={self.job.number}", "TimeLimit=60", check=True)
        self.job.requeued()

    def signal(self) -> None:
        """Somebody, or Slurm, sends it USR1."""
        self.job.signal()
        self.job.requeued()

    def preemption(self) -> None:
        """Another job needs all nodes."""
        other = ("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
        assert self.slurm.wait(self.slurm.sbatch(*other)) == "COMPLETED"
        self.job.requeued()

    def failure(self) -> None:
        """A rank is killed, as by a lack of memory."""
        node = self.job.nodes()[-1]
        self.slurm.run("kill", "-KILL", self.job.processes(node)[-1], node=node, check=True)
        self.job.requeued()

    def crash(self) -> None:
        """A node loses its power, with the batch script; it comes back later."""
        node = self.job.nodes()[0]
        self.slurm.crash_node(node)
        self.job.requeued()
        self.slurm.start_node(node)


def arguments(data: Path, output: Path, steps: int) -> list[object]:
    """Four ranks take a pack each."""
    more = {"packs__per_step": 4, "checkpoint__every": EVERY, "validation__every": 2 * EVERY}
    return [*training(data, output, steps=steps, **more), "--deepspeed", ROOT / "ds_configs" / "cpu.json"]


def alone(slurm: Cluster, data: Path, folder: Path, steps: int) -> Job:
    """A job of the checkout as it is, to which nothing happens."""
    log = folder / "job.out"
    job = Job(slurm, ROOT, *arguments(data, folder / "run", steps), options=(f"--output={log}",))
    job.log = log
    job.finishes()
    return job


def disturbed(slurm: Cluster, data: Path, folder: Path, deeds: list[str]) -> Job:
    """A job to which all of ``deeds`` happen in turn, each behind a new checkpoint; nobody does anything about it."""
    root = checkout(folder / "megamask", HERE / "held.py")
    held = [number * EVERY + 1 for number in range(1, len(deeds) + 1)]
    given = arguments(data, folder / "run", steps_for(deeds))
    job = Job(slurm, root, *given, options=LIMIT, HOLD=",".join(map(str, held)))
    for step, deed in zip(held, deeds, strict=True):
        job.held(step)
        getattr(Deeds(slurm, job), deed)()
    slurm.until((job.run / "finished").exists, "the end", job.everything)
    return job


def steps_for(deeds: list[str]) -> int:
    return (len(deeds) + 1) * EVERY


DEEDS = ["limit", "failure", "crash"]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return alone(cluster, data, tmp_path_factory.mktemp("undisturbed"), steps_for(DEEDS))


def test_two_nodes_and_four_ranks_train_to_the_end(undisturbed: Job) -> None:
    assert set(undisturbed.ranks()) == {"node1-rank0", "node1-rank1", "node2-rank2", "node2-rank3"}
    assert "on 4 x cpu" in undisturbed.ranks()["node1-rank0"]
    assert len(list(undisturbed.run.glob(f"checkpoints/step-{steps_for(DEEDS)}/rank-*"))) == 4
    assert losses(undisturbed.run)[-1]["step"] == steps_for(DEEDS)


def test_a_time_limit_a_lost_rank_and_a_crashed_node(
    slurm: Cluster, data: Path, tmp_path: Path, undisturbed: Job
) -> None:
    job = disturbed(slurm, data, tmp_path, DEEDS)
    assert "asking the ranks to save" in job.text()
    assert "Killed" in job.text()
    assert set(job.ranks(3)) == {"node2-rank0", "node2-rank1", "node3-rank2", "node3-rank3"}
    assert losses(job.run) == losses(undisturbed.run)
