"""Which offloads of a DeepSpeed file work at which stage."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from megamask.engine import offloads
from megamask.engine.ds_file import ds_problems
from megamask.engine.settings import OptimizerConfig

NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}


@pytest.mark.parametrize(("key", "stages"), [("offload_optimizer", {1, 2, 3}), ("offload_param", {3})])
def test_an_offload_that_deepspeed_would_ignore_is_refused(key: str, stages: set[int]) -> None:
    for stage in range(4):
        ds = {"zero_optimization": {"stage": stage, key: {"device": "cpu"}}}
        problems = ds_problems(OptimizerConfig(), ds)
        refused = [f"`zero_optimization.{key}` has an effect only at ZeRO stage" in each for each in problems]
        assert refused == ([] if stage in stages else [True])
        assert not ds_problems(OptimizerConfig(), {"zero_optimization": {"stage": stage, key: {"device": "none"}}})


@pytest.mark.parametrize("there", [True, False])
def test_nvme_needs_libaio_and_stage_3(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloads, "has_async_io", lambda: there)
    assert bool(ds_problems(OptimizerConfig(), NVME)) != there
    lower = {"zero_optimization": NVME["zero_optimization"] | {"stage": 2}}
    assert "stage 3" in ds_problems(OptimizerConfig(), lower)[0]


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_nvme_needs_a_path(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloads, "has_async_io", lambda: True)
    problems = offloads.nvme_problems({key: {"device": "nvme"}}, 3)
    assert len(problems) == 1 and f"`zero_optimization.{key}.device` 'nvme' needs `nvme_path`" in problems[0]


def test_libaio_is_looked_for_where_stderr_is_not_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed redirects its file descriptor, which the stderr of a notebook does not have."""

    class Builder:
        def is_compatible(self) -> bool:
            return sys.stderr.fileno() >= 0

    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: SimpleNamespace(create_op_builder=builder))
    builder = {"AsyncIOBuilder": Builder()}.get
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert offloads.has_async_io()


@pytest.mark.parametrize("flag", ["pipeline_read", "pipeline_write"])
def test_a_pipeline_of_moments_is_refused(flag: str) -> None:
    problems = offloads.offload_problems({"offload_optimizer": {"device": "cpu", flag: True}}, 3, "adamw", "optimizer")
    assert len(problems) == 1 and f"`zero_optimization.offload_optimizer.{flag}`" in problems[0]
