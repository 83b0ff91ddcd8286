"""One step: its seeds, and the report about NaN and Inf."""

from __future__ import annotations

import pytest
import torch

from megamask.batch import Losses, MaskPlan
from megamask.runtime import ranks
from megamask.training.step import MicroBatch, describe_nonfinite, dropout_seed
from tests.batches import pack


def test_every_pack_of_every_run_has_its_own_dropout_seed() -> None:
    seeds = [dropout_seed(seed, number) for seed in range(100) for number in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in (*seeds, dropout_seed(2**63 - 1, 10**12)))


def micro_batch(number: int, total: float = 1.0, nll: float = 1.0, distill: float | None = None) -> MicroBatch:
    """A pack with these losses at two targets."""
    target = torch.full((2,), nll)
    teacher = None if distill is None else torch.tensor(distill)
    batch = pack([9], number=number)
    losses = Losses(torch.tensor(total), target, target, target.bool(), teacher)
    return MicroBatch(batch, MaskPlan.hide_nothing(batch), losses=losses)


def test_the_pack_and_the_tensors_with_nan_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nan = float("nan")
    first = [micro_batch(4), micro_batch(6, total=nan, nll=nan)]
    second = [micro_batch(5, total=nan, distill=nan), micro_batch(7)]
    reports: list[object] = []
    monkeypatch.setattr(ranks, "gather", lambda report: reports.append(report) or list(reports))
    assert describe_nonfinite(first, []) == "the loss of pack 6 on rank 0 is NaN or Inf (packs 4 to 6)"
    assert describe_nonfinite(second, ["a", "b", "c", "d"]) == (
        "the loss of pack 6 on rank 0; the teacher's loss at pack 5 on rank 1; the gradient of a, b, c and of 1 more "
        "tensors is NaN or Inf (packs 4 to 7)"
    )
    reports.clear()
    assert describe_nonfinite([micro_batch(3)], []) == "their sum is NaN or Inf (packs 3 to 3)"
