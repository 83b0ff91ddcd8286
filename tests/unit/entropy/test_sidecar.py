"""A byte per token: the error of rounding, what lies outside, and which sidecar a run may use."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.batch import Measure
from megamask.entropy.sidecar import SidecarFacts, StoredEntropy, from_bytes, sidecar_facts_of, to_bytes, top_of
from megamask.errors import DataError
from tests.unit.entropy.models import some_packs

FACTS = SidecarFacts("masked", "shannon", top_of("shannon", 97), "ab" * 32, 512)


@given(st.sampled_from(get_args(Measure)), st.floats(0, 1), st.integers(2, 10**6))
def test_rounding_moves_an_entropy_by_half_a_step_at_most(measure, share, vocab_size):
    top = top_of(measure, vocab_size)
    entropy = torch.tensor([share * top], dtype=torch.float32)
    back = from_bytes(to_bytes(entropy, top), top)
    step = abs(top) / 255
    # halfway between two codes, the rounding of 32-bit numbers as large as the top decides
    assert abs(float(back) - float(entropy)) <= step / 2 + 2 * torch.finfo(torch.float32).eps * abs(top)


@pytest.mark.parametrize("top", [10.8, -10.8])
def test_every_code_is_kept_and_values_outside_the_range_are_clipped(top):
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(codes, top), top), codes)
    outside = torch.tensor([-top, 0.0, top, 2 * top])
    assert to_bytes(outside, top).tolist() == [0, 0, 255, 255]


def test_order_is_kept():
    for measure in get_args(Measure):
        top = top_of(measure, 97)
        entropy = torch.linspace(min(0.0, top), max(0.0, top), 2000)
        assert (from_bytes(to_bytes(entropy, top), top).diff() >= 0).all()


def test_the_source_reads_the_bytes_of_the_pack():
    batch = some_packs()[0]
    codes = torch.randint(0, 256, batch.tokens.shape, dtype=torch.uint8)
    assert torch.equal(StoredEntropy(FACTS)([replace(batch, entropy=codes)])[0], from_bytes(codes, FACTS.top))
    with pytest.raises(DataError, match=r"pack 0 carries no entropies.*annotate entropy"):
        StoredEntropy(FACTS)([batch])


def test_facts_survive_json():
    assert sidecar_facts_of(json.loads(json.dumps(FACTS.record())), "here") == FACTS


def test_damaged_facts_are_sentences_all_at_once():
    with pytest.raises(DataError) as caught:
        sidecar_facts_of(
            {"signal": "cleen", "measure": "shannon", "top": float("nan"), "length": "long"}, "shards/manifest.json"
        )
    assert len(caught.value.problems) == 4
    assert all("shards/manifest.json" in problem for problem in caught.value.problems)
    with pytest.raises(DataError, match="does not say"):
        sidecar_facts_of(None, "shards/manifest.json")


def test_a_sidecar_of_another_kind_is_refused():
    assert FACTS.problems("masked", "shannon", 512, 97) == []
    assert ["entropy.signal" in p for p in FACTS.problems("clean", "shannon", 512, 97)] == [True]
    assert ["entropy.measure" in p for p in FACTS.problems("masked", "renyi", 512, 97)] == [True]
    assert ["packs.length" in p for p in FACTS.problems("masked", "shannon", 128, 97)] == [True]
    assert ["top" in p for p in FACTS.problems("masked", "shannon", 512, 98)] == [True]
    assert len(FACTS.problems("clean", "loss", 128, 97)) == 3
