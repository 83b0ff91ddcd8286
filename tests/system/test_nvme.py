"""Weights and moments in files: the same run as in memory, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megamask.checkpoint.format import read_tensors
from megamask.engine import offloads
from tests.system.commands import ROOT, free_port, shell, training

WIDE = {"model__hidden_size": 128, "model__num_heads": 2, "model__intermediate_size": 2056}
"""DeepSpeed moves a tensor to a file if a rank has at least 1 MiB of it: here the matrices of feed-forward blocks."""

pytestmark = pytest.mark.skipif(not offloads.has_async_io(), reason="libaio or a C++ compiler is missing")


def file_of(folder: Path, weights: dict[str, object], moments: dict[str, object]) -> Path:
    section = {"stage": 3, "sub_group_size": 1, "offload_param": weights, "offload_optimizer": moments}
    path = folder / f"{weights['device']}-{moments['device']}.json"
    path.write_text(json.dumps({"zero_optimization": section}))
    return path


def on_two_ranks(data: Path, output: Path, ds: Path) -> Path:
    """Four steps with checkpoints after two and four, or what is left of them; returns the last checkpoint."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port())
    words = training(data, output, checkpoint__every=2, **WIDE)
    ended = shell(*torchrun, ROOT / "megamask" / "pretrain.py", *words, "--deepspeed", ds, timeout=1200)
    assert ended.code == 0, ended.err
    return output / "checkpoints" / "step-4"


def test_the_packaged_file_trains(data: Path, tmp_path: Path) -> None:
    words = (*training(data, tmp_path / "run", steps=3), "--deepspeed", "zero3_nvme")
    ended = shell(sys.executable, ROOT / "megamask" / "pretrain.py", *words, timeout=1200)
    assert ended.code == 0, ended.err


def test_state_in_files_is_the_state_in_memory_and_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    disk = {"device": "nvme", "nvme_path": str(tmp_path / "disk")}
    host = {"device": "cpu"}
    # small buffers, so that users who may lock only 8 MiB can run this test
    weights = disk | {"max_in_cpu": 0, "buffer_count": 2, "buffer_size": 270_000}
    expected = dict(read_tensors(on_two_ranks(data, tmp_path / "memory", file_of(tmp_path, host, host))))
    for ds in (file_of(tmp_path, host, disk), file_of(tmp_path, weights, disk)):
        output = tmp_path / ds.stem
        last = on_two_ranks(data, output, ds)
        for _ in range(2):
            found = dict(read_tensors(last))
            assert found.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
            shutil.rmtree(last)
            on_two_ranks(data, output, ds)  # takes the last two steps again
        assert list((tmp_path / "disk").iterdir()) == []
