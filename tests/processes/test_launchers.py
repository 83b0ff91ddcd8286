"""The same run under every launcher: the losses of one process, and a signal to one rank stops all."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from megamask.checkpoint.run_folder import RunFolder
from megamask.errors import REQUEUE
from tests.system.commands import ROOT, Ended, clean, free_port, metrics, shell, text, training
from tests.tolerances import assert_close

STEPS = 4
PRETRAIN = "megamask/pretrain.py"
ZERO = ["--deepspeed", "fp32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "corpus.txt").write_text(text(documents=60))
    more = ["--tokenizer", "wordpiece", "--vocab-size", 300, "--valid-share", 0.2, "--workers", 1]
    files = ["--input", folder / "corpus.txt", "--output", folder / "data"]
    made = shell(sys.executable, "-m", "megamask", "prepare", *files, *more)
    assert made.code == 0, made.err
    return folder / "data"


def deepspeed(script: str, *arguments: str) -> Ended:
    return shell("deepspeed", "--num_accelerators", 2, "--master_port", free_port(), script, *arguments)


def torchrun(script: str, *arguments: str) -> Ended:
    """On two nodes."""
    common = [
        "torchrun",
        "--nnodes",
        2,
        "--nproc_per_node",
        1,
        "--master-addr",
        "127.0.0.1",
        "--rdzv-backend",
        "static",
    ]
    common += ["--master-port", free_port()]
    return together_on([[*common, "--node-rank", node, script, *arguments] for node in range(2)])


def hostfile(script: str, *arguments: str) -> Ended:
    """The deepspeed launcher, called on each of two nodes."""
    with tempfile.NamedTemporaryFile("w") as hosts:
        hosts.write("node1 slots=1\nnode2 slots=1\n")
        hosts.flush()
        common = ["deepspeed", "--hostfile", hosts.name, "--no_ssh", "--master_addr", "127.0.0.1"]
        common += ["--master_port", free_port()]
        return together_on([[*common, "--node_rank", node, script, *arguments] for node in range(2)])


def srun(script: str, *arguments: str) -> Ended:
    """What Slurm's srun tells each of two processes on one node."""
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    own = [slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    return together_on([[sys.executable, script, *arguments]] * 2, own)


def together_on(commands: Sequence[Sequence[object]], environments: Sequence[dict[str, str]] = ({}, {})) -> Ended:
    """Several commands at once; the worst exit code, and what the first two said."""
    started = [
        subprocess.Popen([str(word) for word in command], cwd=ROOT, env=clean() | own, text=True, stdout=-1, stderr=-2)
        for command, own in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return Ended(max(abs(process.returncode) for process in started), outputs[0], outputs[1])


LAUNCHERS: dict[str, Callable[..., Ended]] = {
    "deepspeed": deepspeed, "torchrun": torchrun, "hostfile": hostfile, "srun": srun,
}  # fmt: skip
INSTALLED = {"torchrun": ["-m", "megamask", "pretrain"], "hostfile": ["--module", "megamask", "pretrain"]}
"""How these launchers start the installed package; the others start the file."""


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], float]:
    """The figures of one process without any launcher."""
    output = tmp_path_factory.mktemp("alone") / "run"
    ended = shell(sys.executable, PRETRAIN, *training(data, output, steps=STEPS), *ZERO)
    assert ended.code == 0, ended.err
    return metrics(output)


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[int, str], float]]:
    """The figures of two ranks under each launcher."""
    runs = {}
    for name, launch in LAUNCHERS.items():
        output = tmp_path_factory.mktemp(name) / "run"
        ended = launch(*INSTALLED.get(name, [PRETRAIN]), *training(data, output, steps=STEPS), *ZERO)
        assert ended.code == 0, f"{name}: {ended.out}{ended.err}"
        assert len(list(RunFolder(output).checkpoint(STEPS).glob("*.safetensors"))) == 2
        runs[name] = metrics(output)
    return runs


def test_every_launcher_makes_the_same_run(together: dict[str, dict[tuple[int, str], float]]) -> None:
    assert all(run == together["srun"] for run in together.values())


def test_two_ranks_take_the_steps_of_one(
    alone: dict[tuple[int, str], float], together: dict[str, dict[tuple[int, str], float]]
) -> None:
    assert alone.keys() == together["torchrun"].keys()
    for name in alone:
        assert_close(torch.tensor(together["torchrun"][name]), torch.tensor(alone[name]))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(data: Path, tmp_path: Path) -> None:
    arguments = training(data, tmp_path / "run", steps=STEPS)
    ended = srun("tests/system/killed.py", "SIGUSR1", 1, *arguments, *ZERO)
    assert ended.code == REQUEUE, ended.out + ended.err
    assert "Stopped after step 2 of 4, as requested." in ended.out
    assert RunFolder(tmp_path / "run").steps() == [2]


def test_a_taken_port_is_a_sentence(data: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ended = shell(sys.executable, PRETRAIN, *training(data, tmp_path / "run"), env=rank)
    assert ended.code == 2
    assert f"MASTER_PORT {port} is taken" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()
