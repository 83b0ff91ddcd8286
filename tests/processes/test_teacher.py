"""Distillation with a whole or partitioned teacher gives the losses of one plain process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from tests.batches import IDS
from tests.processes import teacher_worker
from tests.processes.teacher_worker import PACKS, STEPS, TAKEN, micro, plain
from tests.processes.test_engine import BOUND, distance
from tests.tolerances import assert_close

FILES = Path(__file__).parents[2] / "ds_configs"
SHARED, OFFLOADED = str(FILES / "teacher_shard.json"), str(FILES / "teacher_offload.json")


@pytest.fixture
def hf_model(tmp_path: Path) -> str:
    """A model of transformers that runs in transformers, on padded batches."""
    torch.manual_seed(2)
    config = RobertaConfig(
        vocab_size=IDS.size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=IDS.pad,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    return str(tmp_path / "roberta")


@torch.no_grad()
def states_of(source: str) -> list[torch.Tensor]:
    """The states of the plain module for each pack of the last step."""
    model = teacher_worker.model(source).states.eval()
    packs = (micro(TAKEN - 1, place)[:2] for place in range(PACKS))
    return [model(plan.inputs, batch.layout, plan.targets) for batch, plan in packs]


def check(answers: list[list[dict]], cases: list[dict]) -> None:
    """Losses of every case on every rank equal the plain ones, and states those of the plain module."""
    for number, case in enumerate(cases):
        parameters = list(teacher_worker.model(case.get("source", "ours")).states.parameters())
        whole, world = sum(p.numel() for p in parameters), len(answers)
        source, settings = case.get("source", "ours"), {k: case[k] for k in ("reduction", "positions") if k in case}
        expected = plain(source, **settings)
        for rank, answer in enumerate(answers):
            assert distance(answer[number]["losses"], expected) < BOUND
            # a part may end in padding
            part = whole / world + len(parameters) if "deepspeed" in case else whole
            assert whole / world <= answer[number]["num_parameters"] <= part
            if not settings:
                for result, states in zip(
                    answer[number]["states"], states_of(source)[rank :: len(answers)], strict=True
                ):
                    assert_close(torch.tensor(result), states)


def test_every_stage_and_placement_equals_one_plain_process(run_ranks, hf_model):
    cases = [
        {"stage": 0},
        {"stage": 1, "deepspeed": SHARED, "reduction": "sequence", "positions": "all"},
        {"stage": 2, "deepspeed": OFFLOADED, "after": True},
        {"stage": 3, "deepspeed": SHARED, "packs_per_pass": 1},
        {"stage": 3, "deepspeed": OFFLOADED},
        {"stage": 3, "packs_per_pass": 1},
        {"stage": 2, "deepspeed": OFFLOADED, "source": hf_model},
        {"stage": 0, "source": hf_model},
    ]
    two = run_ranks(2, "teacher_worker:runs", cases=cases, timeout=300)
    check(two, cases)
    # entropies do not depend on where the weights lie, nor on the number of ranks
    alone = [0, 4, 7]
    one = run_ranks(1, "teacher_worker:runs", cases=[cases[n] for n in alone], timeout=300)
    check(one, [cases[n] for n in alone])
    for number, answer in zip(alone, one[0], strict=True):
        for place in range(PACKS):
            others = two[place % 2][number]["entropies"][place // 2]
            assert_close(torch.tensor(others), torch.tensor(answer["entropies"][place]))
    for number in (2, 3, 4, 5):
        for one_case, other_case in zip(two[0][number]["entropies"], two[0][0]["entropies"], strict=True):
            assert_close(torch.tensor(one_case), torch.tensor(other_case))


def test_the_weight_of_the_teacher_changes_within_the_steps():
    config = teacher_worker.distill("token", "targets")
    assert {config.weight(step / STEPS) for step in range(TAKEN)} == {0.0, 0.7}
