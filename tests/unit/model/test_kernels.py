"""The Triton kernel in Triton's interpreter against 64 bits; `tests/gpu` runs it on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.model.statistics import token_stats
from megamask.model.token_stats import TokenStats
from tests.tolerances import NATS
from tests.unit.model.vocabularies import problem

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("triton_worker.py")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# rows, tokens, width, shares of the vocabulary; a tile has 16 rows, 32 tokens and a width of 16
SHAPES = [
    (1, 1, 1, 1),
    (13, 101, 24, 3),
    (16, 32, 16, 1),
    (17, 33, 17, 2),
    (40, 333, 70, 4),
    (5, 65, 8, 99),
    (0, 9, 8, 2),
]
CASES = {
    f"{shape} {shift:+} {dtype}": (*shape, shift, dtype)
    for shape in SHAPES
    for shift in (-20.0, 0.0, 20.0)
    for dtype in (torch.float32, torch.float16)
}


def work(*arguments: object, **environment: str) -> str:
    """What the worker prints."""
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths} | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(rows, tokens, width, shares, shift, dtype):
    made = [t.detach() for t in problem(rows, tokens, shift, torch.float32, width)]
    made[0] *= 3 / width**0.5
    return [made[0].to(dtype), made[1].to(dtype), made[2], made[3], torch.tensor(shares)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Inputs and statistics of each case, from one process."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("interpreted")
    inputs = {name: built(*case) for name, case in CASES.items()}
    equal = built(6, 70, 8, 3, 0.0, torch.float32)
    inputs["equal logits"] = [equal[0], torch.zeros_like(equal[1]), torch.zeros_like(equal[2]), *equal[3:]]
    names = ("rows", "weight", "bias", "labels", "shares")
    tensors = {f"{case}/{n}": t.contiguous() for case, kept in inputs.items() for n, t in zip(names, kept, strict=True)}
    save_file(tensors, folder / "inputs")
    work("interpret", folder / "inputs", folder / "outputs", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    outputs = load_file(folder / "outputs")
    return {
        case: (kept, TokenStats(*(outputs[f"{case}/{n}"] for n in TokenStats._fields))) for case, kept in inputs.items()
    }


@pytest.mark.parametrize("case", [*CASES, "equal logits"])
def test_the_kernel_equals_64_bits(interpreted, case):
    (rows, weight, bias, labels, _), outputs = interpreted[case]
    expected = token_stats(rows.double(), weight.double(), bias.double(), labels)
    for name, value, want in zip(TokenStats._fields, outputs, expected, strict=True):
        assert value.dtype == torch.float32 and value.shape == want.shape, name
        torch.testing.assert_close(
            value.double(), want, rtol=0, atol=NATS, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    lines = work("build", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0").splitlines()
    elf = b"\x7fELF"
    assert lines == [f"{itemsize} {capability} {elf}" for itemsize in (2, 4) for capability in (80, 90)]
