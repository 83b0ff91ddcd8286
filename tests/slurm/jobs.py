"""A job of slurm/run.sh in a checkout of its own, seen from outside."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

from megamask.metrics.meters import TIMING_METRICS
from tests.slurm.cluster import Cluster
from tests.system.commands import ROOT, clean

HERE = Path(__file__).parent
SIZE = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60"]


def checkout(folder: Path, trainer: Path, script: str = "") -> Path:
    """A checkout in ``folder`` with ``trainer`` as pretrain.py, and ``script``, if given, as run.sh."""
    (folder / "slurm").mkdir(parents=True)
    (folder / "megamask").mkdir()
    for name in ("run.sh", "job.sh", "prepare.sh", "glue.sh", "study.sh"):
        (folder / "slurm" / name).write_text((ROOT / "slurm" / name).read_text())
    if script:
        (folder / "slurm" / "run.sh").write_text(script)
    (folder / "megamask" / "pretrain.py").write_text(trainer.read_text())
    return folder


def given(options: tuple[str, ...], name: str, usual: str) -> str:
    """The value of an option of sbatch."""
    return next((option.split("=", 1)[1] for option in options if option.startswith(f"{name}=")), usual)


class Job:
    """``sbatch OPTIONS run.sh ARGUMENTS`` in ``root``, with a log ``job.out`` in it."""

    def __init__(
        self,
        slurm: Cluster,
        root: Path,
        *arguments: object,
        options: tuple[str, ...] = (),
        size: list[str] = SIZE,
        script: str = "run.sh",
        **env: str,
    ):
        self.slurm, self.root = slurm, root
        self.log = Path(given(options, "--output", str(root / "job.out")))
        user = clean() | {"TESTS": str(HERE), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | env
        submit = [*size, f"--output={self.log}", *options, f"slurm/{script}", *map(str, arguments)]
        self.number = slurm.sbatch(*submit, env=user, folder=root)
        self.run = root / "runs" / f"{given(options, '--job-name', 'megamask')}-{self.number}"
        if "--output" in arguments:
            self.run = root / str(arguments[arguments.index("--output") + 1])  # as it is, if absolute

    def task(self, number: int) -> Job:
        """One task of this array."""
        task = copy.copy(self)
        task.number = f"{self.number}_{number}"
        task.log, task.run = (Path(str(path).replace("%a", str(number))) for path in (self.log, self.run))
        return task

    def nodes(self) -> list[str]:
        """Where it runs, the node of the batch script first."""
        listed = self.slurm.job(self.number)["NodeList"]
        return self.slurm.run("scontrol", "show", "hostnames", listed, check=True).stdout.split()

    def processes(self, node: str) -> list[str]:
        """The numbers of the ranks on ``node``, there."""
        look = "grep -lsa '^python.megamask/pretrain.py' /proc/[0-9]*/cmdline"
        pids = self.slurm.run("sh", "-c", look, node=node).stdout.split()
        return sorted((path.split("/")[2] for path in pids), key=int)

    def text(self) -> str:
        """The job's log."""
        return self.log.read_text() if self.log.exists() else ""

    def ranks(self, restart: int = 0) -> dict[str, str]:
        """What each rank of a launch has said, by the name of its log."""
        logs = sorted(self.run.glob(f"logs/{self.number}.{restart}/*-rank*.log"))
        return {log.name.removesuffix(".log"): log.read_text() for log in logs}

    def everything(self) -> str:
        """For the message of a test that fails."""
        ranks = "\n".join(f"-- {log}\n{log.read_text()[-3000:]}" for log in sorted(self.run.glob("logs/*/*.log")))
        return f"{self.slurm.job(self.number)}\n{self.text()}\n{ranks}"

    def held(self, step: int, ranks: int = 4) -> None:
        """Return when all ranks wait before ``step``; AssertionError if the job ends instead."""

        def waits() -> bool:
            complete = len(list(self.run.glob(f"held-{step}-rank*"))) == ranks
            assert complete or self.slurm.state(self.number) in ("PENDING", "RUNNING", "COMPLETING"), self.everything()
            return complete

        self.slurm.until(waits, f"ranks held at step {step}", self.everything)

    def says(self, words: str) -> None:
        """Return when the log holds ``words``."""
        self.slurm.until(lambda: words in self.text(), words, self.everything)

    def signal(self) -> None:
        """What a time limit or a preemption sends: USR1 to the batch shell."""
        self.slurm.run("scancel", "--batch", "--signal=USR1", self.number, check=True)

    def requeued(self) -> None:
        """Return when the job was requeued and starts again; AssertionError if it ends instead."""
        restarts = self.slurm.job(self.number).get("Restarts", "0")

        def again() -> bool:
            job = self.slurm.job(self.number)
            assert job["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), self.everything()
            return job["JobState"] == "PENDING" or job["Restarts"] != restarts

        self.slurm.until(again, "a requeue", self.everything)
        self.slurm.restart(self.number)

    def ends(self, state: str = "COMPLETED") -> None:
        """Return when the job has ended in ``state``."""
        states = self.slurm.wait(self.number)
        assert states == state, self.everything()

    def finishes(self) -> None:
        """Return when the job has ended with its run finished."""
        self.ends()
        assert (self.run / "finished").exists(), self.everything()


def losses(run: Path) -> list[dict[str, float]]:
    """The loss curve, every figure that no clock decides."""
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING_METRICS} for line in lines]


def python_first(folder: Path) -> str:
    """A PATH on which programs in ``folder`` come first."""
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
