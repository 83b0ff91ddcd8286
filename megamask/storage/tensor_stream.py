"""The tensors of a checkpoint that this rank writes, without a copy of all of them in memory.

Whole tensors must be gathered from all ranks. They are gathered in windows: every rank keeps its own tensors of a
window and writes them, at the same time as the others, before all gather the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

Gathered = Sequence[tuple[str, Callable[[], Tensor]]]
"""Names of tensors, each with the collective function that gathers it."""


class TensorStream:
    """Named tensors that are gathered when they are read, once, in the order of ``meta``; then `finish` is called.

    ``meta`` has the type and shape of each tensor of this rank, on the device `meta`. ``windows`` are the tensors of
    all ranks, in the same order on each. ``present`` are further tensors of this rank, which need no gathering.
    """

    def __init__(self, meta: Mapping[str, Tensor], windows: Iterable[Gathered], present: Mapping[str, Tensor]):
        self.meta = {**meta, **{name: tensor.to("meta") for name, tensor in present.items()}}
        self._windows: Iterator[Gathered] = iter(windows)
        self._ready = dict(present)

    def read(self, name: str) -> Tensor:
        """The tensor, on the host. Collective."""
        while name not in self._ready:
            self._gather(next(self._windows))
        return self._ready.pop(name)

    def finish(self) -> None:
        """Gather what this rank did not read, after an error too, because the other ranks wait for it. Collective."""
        for window in self._windows:
            self._gather(window)
            self._ready.clear()

    def _gather(self, window: Gathered) -> None:
        try:
            for name, gather in window:
                tensor = gather()
                if name in self.meta:
                    self._ready[name] = tensor.cpu()
        except BaseException:  # the ranks are no longer at the same place
            self._windows = iter(())
            raise


def as_stream(tensors: Mapping[str, Tensor] | TensorStream) -> TensorStream:
    """``tensors`` as a stream; those that are in memory already need no gathering."""
    return tensors if isinstance(tensors, TensorStream) else TensorStream({}, (), tensors)
