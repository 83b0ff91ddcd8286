"""A small text, and a plan for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megamask.data.shard_writer import EncodedDocuments, write_shards
from megamask.data.tokenizer import load_tokenizer
from megamask.study.plan import PlannedArm, PlannedEvaluation, StudyPlan

LENGTHS = [40, 100, 300, 20, 150] * 8
"""Tokens of the documents."""
ENTROPY = PlannedArm("probe", "entropy-self-probe-tiny")


@pytest.fixture(scope="module")
def text(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its shards."""
    folder = tmp_path_factory.mktemp("text") / "shards"
    folder.mkdir()
    draws = np.random.default_rng(0)

    def documents(lengths):
        return [EncodedDocuments(draws.integers(10, 80, sum(lengths)), np.array(lengths, np.int64))]

    splits = {"train": documents(LENGTHS), "valid": documents([50, 60])}
    facts = {"inputs": [{"name": "wiki.txt", "bytes": 9, "sha256": "0f"}], "settings": {"valid_share": 0.01}}
    write_shards(folder, load_tokenizer(tokenizer), splits, facts=facts)
    return folder


@pytest.fixture
def plan() -> StudyPlan:
    """Two arms, two seeds and an evaluation."""
    return StudyPlan(
        name="p",
        question="q",
        seeds=(1, 2),
        budgets=("tokens=40960",),
        arm=(PlannedArm("random", "random-tiny", role="baseline"), ENTROPY),
        evaluation=({"name": "frozen", "frozen": True, "tasks": ["sst2"]},),
        deepspeed="",
    )


def evaluation(plan: StudyPlan) -> PlannedEvaluation:
    """The only one."""
    (only,) = plan.evaluations
    return only
