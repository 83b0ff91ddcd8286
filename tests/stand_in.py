"""A stand-in for a device on a machine without one: tensors have shapes but no values, so no work can wait for them.

torch's fake tensors raise at whatever needs a value on the host: `item`, `int`, `bool`, `nonzero`, indices of booleans.
Tensors on the device `meta` stand for those on a device, and the copies between it and the host are counted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")


class Constants(TorchFunctionMode):
    """Counts values of Python that become tensors on the device by a copy that the host waits for."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        if made and out.device.type != "cpu" and not any(isinstance(a, torch.Tensor) for a in args[-1:]):
            self.copies.count(func.__name__, waits=True)
        return out


class Copies(TorchDispatchMode):
    """Where the host waited for a copy, and how many copies it did not wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, source = str(func), next((a for a in args if isinstance(a, torch.Tensor)), None)
        if name.startswith("aten._to_copy") and source is not None and source.device != out.device:
            self.count(name, waits=not (kwargs or {}).get("non_blocking") or out.device.type == "cpu")
        if name.startswith("aten.copy_") and args[0].device != args[1].device:
            self.count(name, waits=not (len(args) > 2 and args[2]) or args[0].device.type == "cpu")
        return out

    def count(self, name: str, *, waits: bool) -> None:
        """Count a copy between the host and the device."""
        self.sent += not waits
        if waits:
            ours = [frame for frame in traceback.extract_stack() if "/megamask/" in frame.filename]
            self.waits.append(f"{name} in {ours[-1].filename}:{ours[-1].lineno}" if ours else name)


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    """Inside, work on `DEVICE` raises where it would wait for a value; copies are in the result."""
    # autocast does not know the stand-in
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies, Constants(copies):
        yield copies
