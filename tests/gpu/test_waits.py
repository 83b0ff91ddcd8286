"""On a real GPU: a micro-step under torch's own check that the host waits for nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamask.data.loader import Loader
from megamask.masking.rng import PackRng
from tests.unit.test_waits import OBJECTIVES, SCORES, MicroStep, masker, objective_of, text

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("unit", "name", "objective", "attention"),
    [
        *((unit, name, "mlm", "varlen") for unit in ("token", "word", "span") for name in SCORES),
        *(("word", "uniform", name, attention) for name in OBJECTIVES for attention in ("varlen", "padded")),
    ],
)
def test_a_micro_step_waits_for_nothing(unit, name, objective, attention):
    batch = text()
    entropy = torch.rand(batch.layout.rows)
    expected = masker(unit, name)(batch, progress=0.5, rng=PackRng(0, batch.number), entropy=entropy)
    step = MicroStep(masker(unit, name), objective_of(objective, attention).cuda())
    moved, entropy = batch.to("cuda"), entropy.cuda()
    plan = step(moved, entropy)  # learned state moves to the device, and kernels are chosen
    if name == "uniform":
        assert all(torch.equal(getattr(plan, part).cpu(), getattr(expected, part)) for part in ("inputs", "targets"))
    again = dataclasses.replace(moved, layout=dataclasses.replace(moved.layout))  # with nothing computed yet
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(again, entropy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_loader_waits_for_nothing():
    class Packs:
        def batch(self, number):
            return dataclasses.replace(text(), number=number)

    batches = Loader(Packs(), "cuda").batches(range(4))
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = [(batch, batch.on_host.maskable_tokens) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [(batch.number, count) for batch, count in moved] == [(n, int(text().maskable.sum())) for n in (1, 2, 3)]
