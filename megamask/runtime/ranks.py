"""Rank, world size and collectives; the only module that imports torch.distributed.

Works the same under `deepspeed`, `torchrun`, `srun` (ranks from Slurm's environment) and plain `python`, where a single
process needs no port.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megamask.errors import REQUEUE, ConfigError, MegamaskError
from megamask.runtime import private_api
from megamask.runtime.entry_point import end_process
from megamask.runtime.launch_environment import is_main as is_main
from megamask.runtime.launch_environment import launch_variables as environment
from megamask.runtime.launch_environment import port_taken_problem
from megamask.runtime.launch_environment import rank as rank
from megamask.runtime.launch_environment import world as world

Result = TypeVar("Result")
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""How long rank 0 waits for the other ranks at the start."""


def init_process_group(timeout: timedelta = timedelta(hours=24)) -> None:
    """Connect to the other ranks, and set the environment variables that DeepSpeed reads. A second call does nothing.

    All ranks must arrive within 10 minutes. A collective that a rank never enters fails after ``timeout`` and does not
    name that rank. The watchdog does, so its timeouts should be shorter.
    """
    os.environ.update(environment())
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if world() == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" not in str(error) and "in use" not in str(error):
            raise
        raise ConfigError(port_taken_problem(os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))) from None


def set_collective_timeout(timeout: timedelta) -> None:
    """Let no collective fail before ``timeout``, also in groups that DeepSpeed has created with its own timeout."""
    if is_distributed():
        private_api.set_group_timeout(timeout)


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether ``error`` only means that another rank has ended, as the error of a collective does."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _PEER_FAILURES)


_PEER_FAILURES = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")


def destroy_process_group() -> None:
    """Disconnect from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Disconnect from the other ranks and end the process at once with ``code``.

    After an error, skip the disconnection: it could hang while it waits for other ranks.
    """
    if code in (0, REQUEUE):
        destroy_process_group()
    end_process(code)


def is_distributed() -> bool:
    """Whether there are several ranks; if so, `init_process_group` must have been called."""
    assert world() == 1 or dist.is_initialized(), "call ranks.init_process_group() before any collective"
    return world() > 1


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", int(environment()["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def sum(values: Tensor) -> Tensor:
    """The element-wise sum over all ranks, on every rank; ``values`` does not change."""
    return _reduce(values, dist.ReduceOp.SUM)


def maximum(values: Tensor) -> Tensor:
    """The element-wise maximum over all ranks, on every rank."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    total = values.clone()
    if is_distributed():
        dist.all_reduce(total, how)
    return total


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank."""
    return bool(maximum(torch.tensor(float(flag))).item())


def gather(value: Result) -> list[Result]:
    """The values of all ranks, in the order of the ranks, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Result] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def on_rank_zero(act: Callable[[], Result]) -> Result:
    """Call ``act`` on rank 0 and return its result on every rank. If it raises, every rank raises the same error.

    That includes KeyboardInterrupt and its subclasses, which stop a run.
    """
    result: list = [None, None]
    if is_main():
        try:
            result[0] = act()
        except (Exception, KeyboardInterrupt) as error:  # every rank must get it, or the others would wait forever
            result[1] = error
    if is_distributed():
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        _raise_everywhere(result[1])
    return result[0]


def all_ranks_or_none(act: Callable[[], Result]) -> Result:
    """The result of ``act`` on this rank. A MegamaskError or KeyboardInterrupt on any rank is raised on all ranks."""
    result: list = [None, None]
    try:
        result[0] = act()
    except (MegamaskError, KeyboardInterrupt) as error:
        result[1] = error
    if first := next((error for error in gather(result[1]) if error is not None), None):
        _raise_everywhere(first)
    return result[0]


def _raise_everywhere(error: BaseException) -> NoReturn:
    if isinstance(error, MegamaskError):
        error.everywhere = True
    raise error
