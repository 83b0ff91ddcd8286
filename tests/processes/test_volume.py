"""What DeepSpeed sends in a step is what `bench/scale.py` computes."""

from __future__ import annotations

from collections import Counter

import pytest

from megamask.bench.scale import ScaledRun, Stage, StepSeconds
from tests.processes.conftest import RunRanks

KEPT = {"stage3_param_persistence_threshold": 0}
RELEASED = KEPT | {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""Stage 3 with every weight in partitions between two passes, as in models too large for a device."""
CASES: list[tuple[Stage, dict[str, int]]] = [(0, {}), (1, {}), (2, {}), (3, RELEASED), (3, KEPT)]


def test_the_formula_counts_what_is_sent(run_ranks: RunRanks) -> None:
    zeros = [{"zero_optimization": {"stage": stage} | limits} for stage, limits in CASES]
    answers = run_ranks(2, "volume_worker:sent_in_a_step", zeros=zeros)[0]
    for (stage, limits), answer in zip(CASES, answers, strict=True):
        run = ScaledRun(
            StepSeconds(1, 1, 1), answer["weights"], bytes=4, accumulate=answer["accumulate"],
            releases=limits is RELEASED, shared=answer["table"],
        )  # fmt: skip
        gradients, weights = run.gradients_sent(stage), run.weights_sent(stage)
        # partitions end in padding
        assert answer["sent"].pop("allgather", 0) == pytest.approx(weights, rel=1e-3)
        assert sum(answer["sent"].values()) == pytest.approx(gradients, rel=1e-3)


def test_gradients_that_are_reduced_to_their_owner_are_half_of_the_volume(run_ranks: RunRanks) -> None:
    zeros = [
        {"zero_optimization": {"stage": stage, "use_multi_rank_bucket_allreduce": everywhere}}
        for stage in (1, 2)
        for everywhere in (True, False)
    ]
    sent = [Counter(answer["sent"]) for answer in run_ranks(2, "volume_worker:sent_in_a_step", zeros=zeros)[0]]
    for everywhere, to_owner in zip(sent[::2], sent[1::2], strict=True):
        assert to_owner.pop("allgather") == everywhere.pop("allgather")
        assert to_owner.total() == pytest.approx(everywhere.total() / 2, rel=1e-3)
