"""The parts that are commands of their own: the tests that need a GPU, and a run of some minutes."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from megamask.bench.gpu.figures import NEEDS_CUDA, Figure
from megamask.bench.gpu.settings import GpuBenchConfig
from megamask.bench.gpu.sizes import open_text, sizes
from megamask.metrics.metrics_file import read_metrics
from megamask.runtime.child_process import ROOT, child_environment, end_with_parent

TESTS = Path("tests", "gpu")


def _run(command: list[str], **where: Any) -> int:
    """Run ``command`` to its end, or to that of this process, and return its exit code."""
    begin = partial(end_with_parent, signal.SIGTERM)
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False, preexec_fn=begin, **where).returncode


# ---- tests


def gpu_tests(config: GpuBenchConfig) -> Iterator[Figure]:
    """How many of the tests in `tests/gpu` passed, and the first line of each failure."""
    if not (ROOT / TESTS).is_dir():
        yield Figure("passed", error=f"{ROOT} has no {TESTS}: run this from a checkout")
        return
    checks = {} if find_spec("beartype") else {"MEGAMASK_CHECK_SHAPES": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch, "results.xml")
        options = ["-p", "no:cacheprovider", "-o", "minversion=7", f"--junitxml={results}", "-rs"]
        command = [sys.executable, "-m", "pytest", str(TESTS), *options]
        _run(command, cwd=ROOT, env=child_environment() | checks)
        if not results.exists():
            yield Figure("passed", error="pytest wrote no results: see log.txt")
            return
        yield from read_test_results(results.read_text(), on_gpu=torch.cuda.is_available())


def read_test_results(xml: str, *, on_gpu: bool) -> Iterator[Figure]:
    """The counts of a JUnit file of pytest, and its failures by the name of their test."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        problem = next((each for each in case if each.tag in ("failure", "error")), None)
        state = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[state] += 1
        if problem is not None:
            name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name')}"
            yield Figure(name, error=(problem.get("message") or "failed").splitlines()[0][:300])
    for state, count in counts.items():
        if state == "passed" and not on_gpu:
            yield Figure(state, error=NEEDS_CUDA)
        else:
            yield Figure(state, count, "tests")


# ---- a run


def base_run(config: GpuBenchConfig) -> Iterator[Figure]:
    """`megamask pretrain` with the recipe `bert` for `run_time`, without dropout: from the command to the export."""
    data = open_text(config).folder
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "run")
        command = [sys.executable, "-m", "megamask", "pretrain", *run_flags(config), "--data", str(data)]
        begin = time.perf_counter()
        code = _run([*command, "--output", str(output)], env=child_environment())
        seconds = time.perf_counter() - begin
        setting = {"flags": " ".join(run_flags(config)), "exit code": code}
        error = f"`megamask pretrain` ended with exit code {code}: see log.txt" if code else ""
        yield Figure("whole command", None if error else seconds, "s", setting, error)
        metrics = output / "logs" / "metrics.jsonl"
        if metrics.exists():
            yield from run_figures(read_metrics(metrics), on_gpu=torch.cuda.is_available())
        exported = float((output / "export" / "config.json").exists())
        yield Figure("exported, and compared with transformers", exported, "yes or no")


def run_flags(config: GpuBenchConfig) -> list[str]:
    """Flags of `megamask pretrain`, except the text and the output."""
    flags = {"recipe": "bert", "deepspeed": "zero1", "resume": "never", "model.dropout": 0}
    if config.size == "full":
        flags |= {"time-budget": config.run_time, "validation.every": 100}
    else:
        flags |= {
            "deepspeed": "fp32", "model.size": "tiny", "steps": 4, "packs.tokens": sizes(config).run_pack,
            "packs.length": 64, "packs.per-step": 2, "validation.packs": 2, "log.every": 1,
        }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run_figures(lines: Sequence[Mapping[str, float]], *, on_gpu: bool) -> Iterator[Figure]:
    """Speed and losses from the lines of `metrics.jsonl`."""
    yield Figure("steps", max((line["step"] for line in lines), default=0), "steps")
    for name, unit in (("tokens_per_second", "tokens/s"), ("mfu", "share"), ("data_wait", "share")):
        values = [line[name] for line in lines if name in line]
        if values:
            yield Figure(f"{name}, median of the log", statistics.median(values), unit)
        elif name == "mfu":
            yield Figure(
                f"{name}, median of the log", error="the peak of the device is not known" if on_gpu else NEEDS_CUDA
            )
    valid = [line for line in lines if "valid/loss" in line]
    for place, line in (("first", valid[0]), ("last", valid[-1])) if valid else ():
        yield Figure(f"validation loss, {place}", line["valid/loss"], "nats", {"step": line["step"]})
    if valid:
        yield Figure("unigram loss", valid[-1]["valid/unigram_loss"], "nats")
