"""A stream of tensors is the tensors, of which it holds one window at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from megamask.checkpoint.format import serialise
from megamask.storage.tensor_stream import TensorStream

SIZES = {"a": 3, "b": 5, "c": 2, "d": 7, "e": 4}


class Gathering:
    """Tensors of all ranks, in windows of two, of which this rank has some."""

    def __init__(self, *own: str, broken: str = ""):
        self.whole = {name: torch.arange(float(size)) + size for name, size in SIZES.items()}
        self.calls: list[str] = []
        self.broken = broken
        self.living: weakref.WeakSet[Tensor] = weakref.WeakSet()
        names = list(SIZES)
        windows = [[(name, self.gather(name)) for name in names[begin : begin + 2]] for begin in (0, 2, 4)]
        meta = {name: torch.empty(SIZES[name], device="meta") for name in own}
        self.stream = TensorStream(meta, windows, {"learned": torch.arange(3)})

    def gather(self, name: str):
        def act() -> Tensor:
            self.calls.append(name)
            if name == self.broken:
                raise ConnectionError
            tensor = self.whole[name].clone()
            self.living.add(tensor)
            return tensor

        return act


@pytest.mark.parametrize("own", ["", "a", "e", "bd", "abcde"])
def test_a_file_of_a_stream_is_that_of_its_tensors(own: str) -> None:
    gathering = Gathering(*own)
    plain = {name: gathering.whole[name] for name in own} | {"learned": torch.arange(3)}
    assert b"".join(serialise(gathering.stream)) == b"".join(serialise(plain))
    gathering.stream.finish()
    assert gathering.calls == list(SIZES)


def test_only_a_window_is_in_memory() -> None:
    gathering = Gathering(*SIZES)
    for name in SIZES:
        gathering.stream.read(name)
        assert len(gathering.living) <= 2
    assert not gathering.living


def test_a_rank_that_fails_gathers_what_is_left() -> None:
    gathering = Gathering("a", "d")
    gathering.stream.read("a")
    gathering.stream.finish()
    assert gathering.calls == list(SIZES)
    assert not gathering.living


def test_after_a_failed_gathering_no_other_is_tried() -> None:
    gathering = Gathering("a", "d", broken="c")
    gathering.stream.read("a")
    with pytest.raises(ConnectionError):
        gathering.stream.read("d")
    gathering.stream.finish()
    assert gathering.calls == ["a", "b", "c"]
