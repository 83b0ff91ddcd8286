"""What an objective has beside encoder and head trains under every ZeRO stage as in plain PyTorch, and resumes."""

from __future__ import annotations

import pytest

from tests.processes.test_engine import BF16, BOUND, FP32, distance
from tests.processes.training_worker import plain

KINDS = [("modern", "three_ml"), ("bert", "mae_lm"), ("modern", "cross")]


@pytest.mark.parametrize("preset, learns", KINDS)
def test_every_stage_is_one_plain_process_and_resumes_bit_for_bit(run_ranks, preset, learns):
    cases = [{"ds": ds, "preset": preset, "learns": learns} for ds in FP32]
    expected = plain(preset, 1.0, "float64", learns)
    for answers in run_ranks(2, "training_worker:runs", cases=cases, timeout=300):
        for answer in answers:
            assert distance(answer["losses"], expected) < BOUND
            assert answer["halves"] == answer["losses"]
            assert answer["same"]


def test_16_bits_and_a_decoders_dropout_resume_bit_for_bit(run_ranks):
    cases = [
        {"ds": BF16[-1], "preset": "bert", "learns": "placed"},
        {"ds": FP32[3], "preset": "bert", "learns": "placed"},
    ]
    for answers in run_ranks(2, "training_worker:runs", cases=cases, timeout=300):
        for answer in answers:
            assert answer["halves"] == answer["losses"]
            assert answer["same"]
