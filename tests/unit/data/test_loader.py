"""The loader gives the packs that were asked for, in order, and its thread's errors."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megamask.data.loader import QUEUE_SIZE, Loader
from megamask.data.packs import Packs
from megamask.data.shards import Shards


@pytest.fixture
def packs(make_shards):
    return Packs(Shards.open(make_shards([62] * 160)), tokens=256, length=64, seed=0)


def test_batches_are_the_requested_packs(packs):
    numbers = [5, 3, 3, 40, 0]
    loaded = list(Loader(packs).batches(numbers))
    assert [batch.number for batch in loaded] == numbers
    for batch in loaded:
        expected = packs.batch(batch.number)
        assert torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.layout.cu_seqlens, expected.layout.cu_seqlens)
        assert batch.tags is None
    assert torch.equal(Loader(packs).batch(7).tokens, packs.batch(7).tokens)


def test_an_error_surfaces_at_its_batch(packs, monkeypatch):
    read = packs.batch

    def batch(number):
        if number == 3:
            raise OSError("the disk is gone")
        return read(number)

    monkeypatch.setattr(packs, "batch", batch)
    batches = Loader(packs).batches(range(10))
    assert [next(batches).number for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_reading_ahead_is_bounded_and_ends_with_the_caller(packs, monkeypatch):
    requested = []
    read = packs.batch
    monkeypatch.setattr(packs, "batch", lambda number: requested.append(number) or read(number))
    before = threading.active_count()
    batches = Loader(packs).batches(iter(range(1_000_000)))
    next(batches)
    assert len(requested) <= QUEUE_SIZE + 3
    batches.close()
    assert threading.active_count() == before


def test_waiting_is_counted(packs, monkeypatch):
    read = packs.batch

    def slow(number):
        time.sleep(0.05)
        return read(number)

    loader = Loader(packs)
    monkeypatch.setattr(packs, "batch", slow)
    begun = time.perf_counter()
    list(loader.batches(range(4)))
    assert 0.05 < loader.waited <= time.perf_counter() - begun
