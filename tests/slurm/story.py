"""A run to which one deed after the other happens, and its twin to which none does.

The two are tasks of one array. The first is carried on by a chain of jobs: one link more than needed always waits.
Of each job the first node fails the first check; every other link has a spare one, the others must go elsewhere. The
ranks wait behind each new checkpoint for the next deed, so none comes too early or too late. Each costs a start of
four ranks, which is what all of this takes time for.
"""

from __future__ import annotations

from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import HERE, ROOT, Job, checkout
from tests.system.commands import training

EVERY = 3
"""Steps between two checkpoints, and between two deeds."""
LIMIT = ("--partition=spot", "--time=60", "--signal=B:USR1@3000")
UNFIT = '[[ $SLURM_NODEID != 0 ]] || ! mkdir "$OUT/unfit-$SLURM_JOB_ID"'
"""A check that the first node of each job fails once."""
DEEDS = ["limit", "signal", "preemption", "failure", "cancel", "crash"]


def spare_nodes(link: int) -> int:
    """How many nodes stand by for one that fails the check."""
    return 1 - link % 2


class Story:
    """``Story(slurm, data, folder, deeds).happens()``; each deed returns when the run starts again."""

    def __init__(self, slurm: Cluster, data: Path, folder: Path, deeds: list[str]):
        self.slurm, self.data, self.deeds = slurm, data, deeds
        self.root = checkout(folder / "megamask", HERE / "held.py")
        self.steps = (len(deeds) + 1) * EVERY
        self.held = [number * EVERY + 1 for number in range(1, len(deeds) + 1)]
        self.links: list[Job] = []
        self.told: list[str] = []
        """What the log of the jobs said during each deed."""
        array = self._submit("%a", "--array=1-2")
        self.job, self.twin = array.task(1), array.task(2)
        self.links[0] = self.job

    def happens(self) -> None:
        """All deeds, and the end."""
        for step, deed in zip(self.held, self.deeds, strict=True):
            self.job.held(step)
            if len(self.links) == 1:
                self._link()
            before = len(self.job.text())
            getattr(self, deed)()
            self.told.append(self.job.text()[before:])
        for run in (self.job.run, self.twin.run):
            self.slurm.until((run / "finished").exists, f"the end of {run.name}", self.job.everything)
        self.links[-1].ends()

    def _submit(self, task: str, *options: str) -> Job:
        spares = spare_nodes(len(self.links))
        more = {"packs__per_step": 4, "checkpoint__every": EVERY, "validation__every": 2 * EVERY}
        given = training(self.data, self.root / f"run-{task}", steps=self.steps, **more)
        options = (
            *LIMIT, "--job-name=story", f"--nodes={2 + spares}", f"--output={self.root}/job-{task}.out", *options,
        )  # fmt: skip
        environment = {"MEGAMASK_CHECK": UNFIT, "MEGAMASK_SPARES": str(spares), "HOLD": ",".join(map(str, self.held))}
        arguments = (*given, "--deepspeed", ROOT / "ds_configs" / "fp32.json")
        self.links.append(Job(self.slurm, self.root, *arguments, options=options, **environment))
        return self.links[-1]

    def _link(self) -> Job:
        """One more job that waits for the end of those before it."""
        return self._submit("1", "--dependency=singleton")

    # ---- what can happen

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
        size = f"--nodes={len(self.slurm.nodes)}"
        other = self.slurm.sbatch("--partition=urgent", size, "--exclusive", "--output=/dev/null", "--wrap=true")
        assert self.slurm.wait(other) == "COMPLETED"
        self.job.requeued()

    def failure(self) -> None:
        """A rank is killed, as by a lack of memory."""
        node = self._last()
        self.slurm.run("kill", "-KILL", self.job.processes(node)[-1], node=node, check=True)
        self.job.requeued()

    def crash(self) -> None:
        """The node with the batch script loses its power; it comes back later."""
        self._lose(self.job.nodes()[0])

    def outage(self) -> None:
        """The same with another node."""
        self._lose(self._last())

    def _last(self) -> str:
        """The last node with ranks; a spare one has none."""
        return [node for node in self.job.nodes() if self.job.processes(node)][-1]

    def _lose(self, node: str) -> None:
        self.slurm.crash_node(node)
        self.job.requeued()
        self.slurm.repair_node(node)

    def cancel(self) -> None:
        """Somebody cancels it, and the next link goes on."""
        assert self.slurm.state(self.links[-1].number) == "PENDING"
        self.slurm.run("scancel", self.job.number, check=True)
        self.job.ends("CANCELLED")
        self.job = self.links[-1]
        self._link()
        if not spare_nodes(self.links.index(self.job)):
            self.job.says(f"requeueing job {self.job.number} without")
            self.job.requeued()
