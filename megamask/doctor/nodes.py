"""What the nodes of a Slurm job answer: their clocks, their GPUs and drivers, and processes that use these GPUs.

Inside of a job, `srun` runs one shell on each node, for about a second; elsewhere this machine answers alone. Without
torch, so that this process itself uses no GPU when it asks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass

ANSWER_TIMEOUT = 120
"""Seconds that the nodes may take to answer."""
MAX_CLOCK_DIFFERENCE = 1.0
"""Seconds by which clocks may differ, beside the time that the answers take."""
QUESTION = """
node=${SLURMD_NODENAME:-this machine} only=
echo "$node|clock|$(date +%s.%N)"
command -v nvidia-smi >/dev/null || exit 0
case ${CUDA_VISIBLE_DEVICES:-} in [0-9]* | GPU-* | MIG-*) only="--id=$CUDA_VISIBLE_DEVICES" ;; esac
ask() {
    kind=$1
    answer=$(timeout 60 nvidia-smi $only "$2" --format=csv,noheader 2>&1) || kind=failure
    [ "$kind" != failure ] || answer=${answer:-no answer within 60 s}
    [ -z "$answer" ] || echo "$answer" | sort -u | while read -r line; do echo "$node|$kind|$line"; done
}
ask gpu --query-gpu=name,driver_version
ask process --query-compute-apps=pid,process_name,used_memory
"""
"""A shell script that prints lines NODE|KIND|VALUE. Where Slurm gives a step some of the GPUs, it looks at these."""


@dataclass(frozen=True)
class NodeAnswer:
    """The answer of one node. GPUs are "name, driver", processes "number, program, memory"."""

    name: str
    clock: float
    """Seconds since 1970."""
    gpus: tuple[str, ...] = ()
    processes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    """Lines of `nvidia-smi` where it failed."""


@dataclass(frozen=True)
class NodeAnswers:
    """The answers of all nodes that gave one, between two readings of the clock of this machine."""

    begun: float
    ended: float
    answers: tuple[NodeAnswer, ...]
    error: str = ""
    """The last line of what `srun` reports."""

    def clock_error(self, node: NodeAnswer) -> float:
        """Seconds by which the clock of ``node`` is at least ahead of this machine's; below 0: behind it."""
        return max(node.clock - self.ended, 0.0) + min(node.clock - self.begun, 0.0)


def ask_nodes() -> NodeAnswers:
    """Ask every node of the Slurm job of this process, or this machine where there is no job or no `srun`."""
    words = ["sh", "-c", QUESTION]
    if why_not_all() is None:
        nodes = os.environ["SLURM_JOB_NUM_NODES"]
        # as a step beside the others of the job, perhaps inside of one
        words = [
            *("srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--wait=0"),
            *("--kill-on-bad-exit=0", f"--nodelist={os.environ['SLURM_JOB_NODELIST']}", *words),
        ]
    begun = time.time()
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_TIMEOUT)
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out, err = late.stdout or b"", (late.stderr or b"") + f"no answer within {ANSWER_TIMEOUT} s".encode()
    lines = err.decode(errors="replace").strip().splitlines()
    return NodeAnswers(begun, time.time(), read_answers(out.decode(errors="replace")), lines[-1] if lines else "")


def why_not_all() -> str | None:
    """Why only this machine can answer, as a sentence; None inside of a Slurm job with `srun`."""
    if not {"SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"} <= os.environ.keys():
        return "This is not a Slurm job: the clocks, drivers and GPU processes of other nodes were not checked."
    if shutil.which("srun") is None:
        return "There is no `srun` here: the clocks, drivers and GPU processes of the job's nodes were not checked."
    return None


def read_answers(text: str) -> tuple[NodeAnswer, ...]:
    """The answers in lines of `QUESTION`, in the order of the nodes' names; other lines are left out."""
    answers: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        name, kind, value = (*line.split("|", 2), "", "")[:3]
        if kind in ("clock", "gpu", "process", "failure"):
            answers.setdefault(name, {}).setdefault(kind, []).append(value)
    return tuple(
        NodeAnswer(
            name,
            float(lines["clock"][0]),
            gpus=tuple(lines.get("gpu", ())),
            processes=tuple(lines.get("process", ())),
            failures=tuple(lines.get("failure", ())),
        )
        for name, lines in sorted(answers.items())
        if "clock" in lines
    )


def node_facts(nodes: NodeAnswers) -> list[str]:
    """What the nodes answered, or why they were not asked."""
    reason = why_not_all()
    lines = (
        [reason] if reason else [f"{len(nodes.answers)} of {os.environ['SLURM_JOB_NUM_NODES']} nodes answered `srun`"]
    )
    gpus: dict[str, list[str]] = {}
    for node in nodes.answers:
        for gpu in node.gpus or ("no nvidia-smi: GPUs and driver not known",):
            gpus.setdefault(gpu, []).append(node.name)
    lines += [f"{gpu}{'' if len(gpus) == 1 else ': ' + ', '.join(names)}" for gpu, names in gpus.items()]
    if reason:
        lines += [f"process on a GPU here: {process}" for node in nodes.answers for process in node.processes]
    return lines


def node_problems(nodes: NodeAnswers) -> list[str]:
    """Sentences for nodes of a job that do not answer, whose clock is wrong, or whose GPUs are not free."""
    problems = [
        f"`nvidia-smi` fails on {node.name}: {' '.join(node.failures)}. Repair its driver, or leave the node out."
        for node in nodes.answers
        if node.failures
    ]
    if why_not_all() is not None:
        return problems
    expected = os.environ["SLURM_JOB_NUM_NODES"]
    if str(len(nodes.answers)) != expected:
        names = ", ".join(node.name for node in nodes.answers) or "none"
        problems.append(
            f"{len(nodes.answers)} of {expected} nodes of the job answer `srun` ({names}): "
            f"{nodes.error or 'no reason is given'}. Leave the others out with `sbatch --exclude`."
        )
    for node in nodes.answers:
        if abs(wrong := nodes.clock_error(node)) > MAX_CLOCK_DIFFERENCE:
            problems.append(
                f"The clock of {node.name} is {abs(wrong):,.1f} s {'ahead of' if wrong > 0 else 'behind'} that of this "
                f"node, but clocks may differ by {MAX_CLOCK_DIFFERENCE:.0f} s, because heartbeats compare them. "
                "Synchronise the clocks (chrony, NTP), or leave the node out with `sbatch --exclude`."
            )
        if node.processes:
            problems.append(
                f"Processes use the GPUs of {node.name} (number, program, memory): {'; '.join(node.processes)}. End "
                "what an earlier job left, or leave the node out with `sbatch --exclude`."
            )
    return problems
