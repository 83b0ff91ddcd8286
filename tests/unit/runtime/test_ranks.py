"""Who am I: what each launcher tells a process, and what one process says without any."""

from __future__ import annotations

import os
import re

import pytest
import torch

from megamask.errors import LaunchError
from megamask.runtime import ranks

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_JOB_ID": "20007",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


@pytest.fixture
def read_environment(monkeypatch: pytest.MonkeyPatch):
    """What `ranks.environment` makes of exactly these variables."""
    for name in list(os.environ):
        if name in NAMES or name.startswith("SLURM"):
            monkeypatch.delenv(name)

    def read(**variables: str) -> dict[str, str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return ranks.environment()

    return read


def test_one_process_without_a_launcher(read_environment) -> None:
    assert read_environment() == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert ranks.is_main()
    assert (ranks.rank(), ranks.world()) == (0, 1)


def test_a_world_of_one_needs_no_rank(read_environment) -> None:
    assert read_environment(WORLD_SIZE="1") == read_environment()


def test_torchrun(read_environment) -> None:
    given = {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400",
    }  # fmt: skip
    assert read_environment(**given) == given
    assert not ranks.is_main()


def test_the_deepspeed_launcher_calls_it_local_size(read_environment) -> None:
    given = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert read_environment(**given, LOCAL_SIZE="2") == given | {"LOCAL_WORLD_SIZE": "2"}


def test_srun(read_environment) -> None:
    combined = read_environment(**SLURM)
    assert combined == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": str(12000 + 20007 % 20000),
    }  # fmt: skip
    assert read_environment(WORLD_SIZE="8") == combined
    del os.environ["WORLD_SIZE"]
    chosen = read_environment(MASTER_ADDR="node1", MASTER_PORT="4321")
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("node1", "4321")


def test_a_launcher_inside_a_slurm_job_takes_precedence(read_environment) -> None:
    combined = read_environment(**SLURM, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert (combined["RANK"], combined["WORLD_SIZE"]) == ("0", "2")


def test_python_in_a_slurm_batch_script_is_one_process(read_environment) -> None:
    """There the job has tasks, but this process is not a step of it."""
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert read_environment(**batch)["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "-1"}, ("RANK must .*'x'", "WORLD_SIZE must .*'-1'")),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, ("MASTER_PORT must .* 0 to 65535, .*'70000'",)),
        (
            {"RANK": "-1", "MASTER_PORT": "65536"},
            ("RANK must .*'-1'", "MASTER_PORT must .*'65536'", "RANK is '-1', but WORLD_SIZE, .* is not set"),
        ),
        ({"RANK": "0"}, ("RANK is '0', but WORLD_SIZE, .* is not set",)),
        ({"RANK": "3", "WORLD_SIZE": "2"}, (r"RANK must be below WORLD_SIZE \(2\), .*'3'",)),
        ({"RANK": "2", "WORLD_SIZE": "2"}, (r"RANK must be below WORLD_SIZE \(2\), .*'2'",)),
        (SLURM | {"SLURM_PROCID": "8"}, (r"RANK must be below WORLD_SIZE \(8\), .*'8'",)),
        ({"WORLD_SIZE": "2"}, ("WORLD_SIZE is '2', but RANK, .* is not set",)),
        ({"WORLD_SIZE": "two", "LOCAL_RANK": "0"}, ("WORLD_SIZE is 'two', but RANK, .* is not set",)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, ("SLURM_LOCALID, SLURM_NTASKS, .* not set",)),
        (SLURM | {"SLURM_JOB_ID": "a"}, ("MASTER_PORT must .*'a'",)),
        (SLURM | {"WORLD_SIZE": "2"}, ("WORLD_SIZE is '2', but `srun` started 8 tasks",)),
        (SLURM | {"SLURM_NTASKS": ""}, ("WORLD_SIZE must .*''",)),
    ],
)
def test_a_wrong_environment_is_an_error_for_each_variable(read_environment, variables, words) -> None:
    with pytest.raises(LaunchError) as caught:
        read_environment(**variables)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == len(words)
    assert all(re.search(part, problem) for part, problem in zip(words, caught.value.problems, strict=True))


@pytest.mark.parametrize("job", [0, 1, 19_999, 20_000, 4_294_967_295])
def test_the_port_of_a_job_is_below_the_ephemeral_ports(read_environment, job: int) -> None:
    assert 12_000 <= int(read_environment(**SLURM | {"SLURM_JOB_ID": str(job)})["MASTER_PORT"]) < 32_768


def test_collectives_of_one_process_return_its_value(read_environment) -> None:
    read_environment()
    values = torch.tensor([1.0, 2.0])
    for combined in (ranks.sum(values), ranks.maximum(values)):
        assert torch.equal(combined, values)
        assert combined is not values
    assert ranks.gather("word") == ["word"]
    assert ranks.on_rank_zero(lambda: 7) == 7
    with pytest.raises(ValueError, match="why"):
        ranks.on_rank_zero(lambda: (_ for _ in ()).throw(ValueError("why")))
    ranks.barrier()
