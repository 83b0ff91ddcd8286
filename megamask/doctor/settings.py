"""The settings of `megamask doctor`: those of `megamask pretrain`, and the machines of the run; without torch."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from annotated_types import Ge

from megamask.config.cli import Command, parse_flags
from megamask.config.time_budget import parse_duration
from megamask.errors import must
from megamask.errors.setting_rules import Count, OnlyFor, Positive, ShareInside, settings_problems
from megamask.runtime import launch_environment

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MFU = 0.4


@dataclass(frozen=True)
class MachineConfig:
    """The machines of a planned run, which may be others than this one."""

    gpus: Count | None = None
    """GPUs of the run, over all nodes, with one process each. Without it, the run is planned for the CPU of this
    machine."""
    nodes: Annotated[Count, OnlyFor("gpus")] = 1
    """Nodes that the GPUs are in: the report adds up what the ranks of a node need on its host."""
    gpu_memory: Annotated[str | None, OnlyFor("gpus")] = None
    """Memory of a GPU, such as 80GB (10^9 bytes) or 40GiB. Without it, the report does not say what fits."""
    gpu_bf16: Annotated[bool, OnlyFor("gpus")] = True
    """Whether the GPUs multiply in bf16, as those from compute capability 8.0 do: decides `auto` in the DeepSpeed
    file."""
    tokens_per_second: Positive | None = None
    """Measured rate of the whole run, over all devices, such as that of a probe job."""
    peak_flops: Positive | None = None
    """Peak floating-point operations per second of one device, to estimate a rate that was not measured."""
    assumed_mfu: Annotated[ShareInside, OnlyFor("peak_flops")] = MFU
    """Share of `peak_flops` that the run is assumed to reach. An assumption: a probe job measures it."""
    probe: Annotated[int, Ge(4)] | None = None
    """Run this many steps, such as 20, on one device of this machine: measures their rate, the loader and the
    memory. `tokens_per_second`, if given, still decides the time."""
    job_time: str | None = None
    """Time limit of a job, such as 24h (s, m, h, d): the report says how many jobs the run needs."""

    def problems(self, name: str) -> list[str]:
        """Sentences for amounts that cannot be read, and settings that exclude each other."""
        problems = []
        if self.gpu_memory is not None and parse_memory(self.gpu_memory) is None:
            rule = f"be an amount of memory with one of the units {', '.join(UNITS)}, such as 80GB"
            problems.append(must("gpu_memory", rule, self.gpu_memory))
        if self.job_time is not None and not parse_duration(self.job_time):
            rule = "be a time above 0 with one of the units s, m, h, d, such as 24h"
            problems.append(must("job_time", rule, self.job_time))
        if self.gpus is not None and self.nodes >= 1 and self.gpus % self.nodes:
            problems.append(must("gpus", f"be a multiple of `nodes` ({self.nodes})", self.gpus))
        if self.tokens_per_second is not None and self.peak_flops is not None:
            problems.append("`peak_flops` has no effect with `tokens_per_second`. Remove one of them.")
        return problems


@dataclass(frozen=True)
class DoctorCommand(Command):
    """Predict what a run needs: memory by ZeRO stage, FLOPs, time and disk; and report everything that is wrong.

    Takes all flags of `megamask pretrain`. Needs no GPU, and writes nothing without `probe`. Inside a Slurm job, `srun`
    asks every node for its clock, its GPUs and what runs on them.
    """

    machine: Annotated[MachineConfig, tyro.conf.arg(name="")] = field(default_factory=MachineConfig)

    @property
    def num_ranks(self) -> int:
        """The number of processes of the planned run."""
        gpus = self.machine.gpus
        return launch_environment.world() if gpus is None else max(1, gpus)

    def problems(self) -> list[str]:
        """Sentences for what is wrong with flags outside of the configuration."""
        return [*super().problems(), *settings_problems(self.machine)]


def parse_doctor_command(arguments: list[str]) -> DoctorCommand:
    """The command `megamask doctor`; ConfigError with all problems of flags, recipe and file."""
    with launch_environment.planned_world(_planned_gpus(arguments)):
        return parse_flags(DoctorCommand, arguments)


def _planned_gpus(arguments: list[str]) -> int | None:
    """The value of `--gpus`, which decides how many packs a step of some recipes has; None if it is not a count."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--gpus", nargs="?")
    given = first.parse_known_args(arguments)[0].gpus or ""
    return int(given) if given.isdecimal() and int(given) > 0 else None


def parse_memory(amount: str) -> float | None:
    """``"80GB"`` -> 8e10, with one of `UNITS`; None if it is not such an amount or 0."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(" + "|".join(UNITS) + ")", amount, re.ASCII)
    return float(match[1]) * UNITS[match[2]] or None if match else None
