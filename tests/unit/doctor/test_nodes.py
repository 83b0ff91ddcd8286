"""What the nodes of a job answer, with stand-ins for `srun` and `nvidia-smi`; tests/slurm has a real `srun`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megamask.doctor.nodes import NodeAnswer, NodeAnswers, ask_nodes, node_facts, node_problems, why_not_all

SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
for node in node1 node2 node3; do
    [ "$node" = "$SILENT" ] || SLURMD_NODENAME=$node "$@"
done
[ -z "$SILENT" ] || echo "srun: $SILENT is down" >&2
"""
NVIDIA_SMI = """#!/bin/sh
[ "$SLURMD_NODENAME" != "$BROKEN" ] || { echo "driver not loaded"; exit 9; }
case "$*" in
*--query-gpu*) printf 'H100, 550.1\\nH100, 550.1\\n' ;;
*) [ "$SLURMD_NODENAME" != "$BUSY" ] || echo "77, python, 900 MiB" ;;
esac
"""
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[1-3]"}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH, outside of any Slurm job."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def job(programs: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Slurm job of three nodes with two GPUs each; variables say what is wrong."""
    install(programs, "srun", SRUN)
    install(programs, "nvidia-smi", NVIDIA_SMI)
    for name, value in (JOB | dict.fromkeys(("SILENT", "BROKEN", "BUSY"), "")).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def install(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


def test_all_nodes_of_a_job_answer(job: pytest.MonkeyPatch) -> None:
    nodes = ask_nodes()
    assert [node.name for node in nodes.answers] == ["node1", "node2", "node3"]
    assert all(nodes.begun <= node.clock <= nodes.ended for node in nodes.answers)
    assert node_problems(nodes) == []
    assert node_facts(nodes) == ["3 of 3 nodes answered `srun`", "H100, 550.1"]


def test_every_node_that_cannot_run_is_named(job: pytest.MonkeyPatch) -> None:
    for name, node in (("SILENT", "node1"), ("BROKEN", "node2"), ("BUSY", "node3")):
        job.setenv(name, node)
    problems = node_problems(ask_nodes())
    for words in ("2 of 3 nodes .*node1 is down", "fails on node2: driver not loaded", "GPUs of node3 .*77, python"):
        assert sum(re.search(words, problem) is not None for problem in problems) == 1
    assert len(problems) == 3


@pytest.mark.parametrize(("clock", "words"), [(95.0, "5.0 s behind"), (107.0, "4.0 s ahead of")])
def test_a_clock_outside_of_the_time_of_the_answers_is_wrong(job, clock: float, words: str) -> None:
    right = tuple(NodeAnswer(f"node{number}", 100.5 + number) for number in (1, 2))
    nodes = NodeAnswers(100.0, 103.0, (*right, NodeAnswer("node3", clock)))
    (problem,) = node_problems(nodes)
    assert f"The clock of node3 is {words}" in problem


def test_an_srun_that_fails_is_a_problem(job: pytest.MonkeyPatch, programs: Path) -> None:
    install(programs, "srun", "#!/bin/sh\necho 'error: no step' >&2\nexit 1\n")
    (problem,) = node_problems(ask_nodes())
    assert problem.startswith("0 of 3 nodes") and "error: no step" in problem


def test_an_srun_that_never_ends_is_a_problem(job: pytest.MonkeyPatch, programs: Path) -> None:
    job.setattr("megamask.doctor.nodes.ANSWER_TIMEOUT", 1)
    install(programs, "srun", "#!/bin/sh\nexec sleep 60\n")
    (problem,) = node_problems(ask_nodes())
    assert "no answer within 1 s" in problem


def test_without_a_job_this_machine_answers_alone(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "node2")
    install(programs, "nvidia-smi", NVIDIA_SMI)  # without a name, this machine is the busy one
    (node,) = (nodes := ask_nodes()).answers
    assert (node.name, node.gpus, node.processes) == ("this machine", ("H100, 550.1",), ("77, python, 900 MiB",))
    # a process may be gone when the run starts
    assert node_problems(nodes) == []
    reason, *facts = node_facts(nodes)
    assert "not a Slurm job" in reason
    assert facts == ["H100, 550.1", "process on a GPU here: 77, python, 900 MiB"]


def test_a_job_in_a_container_without_srun_says_so(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megamask.doctor.nodes.shutil.which", lambda name: None)
    assert "no `srun`" in str(why_not_all())
    assert len(ask_nodes().answers) == 1
