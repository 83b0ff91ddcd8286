"""Every ZeRO stage is plain PyTorch, on any number of ranks, and a restored run is the run."""

from __future__ import annotations

import pytest

from tests.processes.training_worker import GROWING, plain

FP32 = [{"zero_optimization": {"stage": stage}} for stage in range(4)]
BF16 = [config | {"bf16": {"enabled": True, "check_grad_overflow": False}} for config in FP32[1:]]
AUTOCAST = FP32[0] | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
CPU = {"device": "cpu"}
OFFLOAD = [
    {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}},
    {"zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}},
]
BOUND = 1e-5  # fp32 against float64, over 20 steps


def distance(actual: list[float], expected: list[float]) -> float:
    return max(abs(f - e) / e for f, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_is_one_plain_process_and_resumes_bit_for_bit(run_ranks, world):
    cases = [{"ds": ds} for ds in [*FP32, *OFFLOAD]] + [{"ds": FP32[2], "preset": "bert", "clip": 0.0}]
    expected = [plain("modern", 1.0, "float64")] * 6 + [plain("bert", 0.0, "float64")]
    for answers in run_ranks(world, "training_worker:runs", cases=cases if world == 2 else cases[::3], timeout=300):
        for answer, reference in zip(answers, expected if world == 2 else expected[::3], strict=True):
            assert distance(answer["losses"], reference) < BOUND
            assert answer["halves"] == answer["losses"]
            assert answer["same"]


def test_steps_of_other_sizes_are_those_of_one_plain_process(run_ranks):
    expected = plain("modern", 1.0, "float64", sizes=GROWING)
    cases = [{"ds": ds, "sizes": GROWING} for ds in [*FP32, *OFFLOAD]]
    for answers in run_ranks(2, "training_worker:runs", cases=cases, timeout=300):
        for answer in answers:
            assert distance(answer["losses"], expected) < BOUND
            assert answer["halves"] == answer["losses"]
            assert answer["same"]


def test_16_bits_dropout_and_other_optimizers_resume_bit_for_bit(run_ranks):
    cases = [{"ds": ds} for ds in [*BF16, AUTOCAST]]
    cases += [{"ds": FP32[1], "dropout": 0.1}, {"ds": FP32[0], "kind": "lamb"}]
    for answers in run_ranks(2, "training_worker:runs", cases=cases, timeout=300):
        for answer in answers:
            assert answer["losses"][-1] < answer["losses"][0]
            assert answer["halves"] == answer["losses"]
            assert answer["same"]


@pytest.mark.slow
def test_muon_resumes_bit_for_bit(run_ranks):
    cases = [{"ds": ds, "kind": "muon", "clip": 0.0} for ds in FP32[1:]]
    for answers in run_ranks(2, "training_worker:runs", cases=cases, timeout=500):
        for answer in answers:
            assert answer["moments"] == ["exp_avg", "exp_avg_sq", "momentum_buffer", "weights"]
            assert answer["halves"] == answer["losses"]
            assert answer["same"]


def test_a_run_resumes_in_other_stages_on_other_numbers_of_ranks(run_ranks, tmp_path):
    losses = []
    for end, (world, stage) in zip((5, 10, 15, 20), [(2, 1), (1, 3), (2, 0), (2, 2)], strict=True):
        arguments = {"folder": str(tmp_path / "run"), "ds": FP32[stage], "end": end}
        losses += run_ranks(world, "training_worker:elastic", **arguments)[0]
    assert distance(losses, plain("modern", 1.0, "float64")) < BOUND
