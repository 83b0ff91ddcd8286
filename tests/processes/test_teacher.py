"""A teacher beside the engine, whole or cut up by an engine of its own: the same losses as one plain process."""

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
def foreign(tmp_path: Path) -> str:
    """A model of transformers that is asked as it stands, on padded batches."""
    torch.manual_seed(2)
    config = RobertaConfig(
        vocab_size=IDS.size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=IDS.pad,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    return str(tmp_path / "roberta")


@torch.no_grad()
def states_of(source: str) -> list[torch.Tensor]:
    """What the plain module says of each pack of the last step."""
    model = teacher_worker.model(source).states.eval()
    packs = (micro(TAKEN - 1, place)[:2] for place in range(PACKS))
    return [model(plan.inputs, batch.layout, plan.targets) for batch, plan in packs]


def check(answers: list[list[dict]], cases: list[dict]) -> None:
    """Losses of every case on every rank are the plain ones; states and entropies, those of the plain module."""
    for number, case in enumerate(cases):
        parameters = list(teacher_worker.model(case.get("source", "ours")).states.parameters())
        whole, world = sum(p.numel() for p in parameters), len(answers)
        source, settings = case.get("source", "ours"), {k: case[k] for k in ("reduction", "positions") if k in case}
        expected = plain(source, **settings)
        for rank, said in enumerate(answers):
            assert distance(said[number]["losses"], expected) < BOUND
            # a part may end in padding
            part = whole / world + len(parameters) if "deepspeed" in case else whole
            assert whole / world <= said[number]["held"] <= part
            if not settings:
                for found, states in zip(said[number]["states"], states_of(source)[rank :: len(answers)], strict=True):
                    assert_close(torch.tensor(found), states)


def test_every_stage_with_every_placement_is_one_plain_process(run_ranks, foreign):
    cases = [
        {"stage": 0},
        {"stage": 1, "deepspeed": SHARED, "reduction": "sequence", "positions": "all"},
        {"stage": 2, "deepspeed": OFFLOADED, "after": True},
        {"stage": 3, "deepspeed": SHARED, "packs_per_pass": 1},
        {"stage": 3, "deepspeed": OFFLOADED},
        {"stage": 3, "packs_per_pass": 1},
        {"stage": 2, "deepspeed": OFFLOADED, "source": foreign},
        {"stage": 0, "source": foreign},
    ]
    two = run_ranks(2, "teacher_worker:runs", cases=cases, timeout=300)
    check(two, cases)
    # entropies do not depend on where the weights lie, nor on the number of ranks
    alone = [0, 4, 7]
    one = run_ranks(1, "teacher_worker:runs", cases=[cases[n] for n in alone], timeout=300)
    check(one, [cases[n] for n in alone])
    for number, said in zip(alone, one[0], strict=True):
        for place in range(PACKS):
            others = two[place % 2][number]["entropies"][place // 2]
            assert_close(torch.tensor(others), torch.tensor(said["entropies"][place]))
    for number in (2, 3, 4, 5):
        for mine, its in zip(two[0][number]["entropies"], two[0][0]["entropies"], strict=True):
            assert_close(torch.tensor(mine), torch.tensor(its))


def test_the_weight_moves_within_the_steps_that_are_taken():
    said = teacher_worker.distill("token", "targets")
    assert {said.weight(step / STEPS) for step in range(TAKEN)} == {0.0, 0.7}
