"""The door to torch.distributed: who am I, how many are we, and sums over all of us.

Works the same under `deepspeed`, `torchrun`, `srun` (ranks from Slurm's environment) and plain `python`,
where one process needs no port at all.
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
from megamask.runtime.launch_environment import rank as rank
from megamask.runtime.launch_environment import world as world

Answer = TypeVar("Answer")
MEETING = timedelta(minutes=10)
"""How long the first rank waits for the others at the start."""


def init_process_group(timeout: timedelta = timedelta(hours=24)) -> None:
    """Meet the other ranks; a second call does nothing. Sets the environment that DeepSpeed reads.

    They must come within 10 minutes. A collective that one of them never enters fails after ``timeout``, an error that
    does not say which; the watchdog does, so it should come first.
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
        store, rank, count = next(dist.rendezvous("env://", timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" not in str(error) and "in use" not in str(error):
            raise
        raise ConfigError(
            f"MASTER_PORT {os.environ.get('MASTER_PORT')} is taken on {os.environ.get('MASTER_ADDR')}. "
            "Another run uses it: choose another with `deepspeed --master_port N` or `torchrun --master-port N`."
        ) from None


def set_collective_timeout(timeout: timedelta) -> None:
    """Let no collective fail before ``timeout``, also in groups that DeepSpeed has created with its own timeout."""
    if is_distributed():
        private_api.set_collective_timeout(timeout)


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether ``error`` says no more than that another rank is gone, as a collective does."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")


def destroy_process_group() -> None:
    """Say goodbye to the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Say goodbye and end the process at once with ``code``.

    After an error there is no goodbye: to wait for ranks that may wait for something else would be to hang.
    """
    if code in (0, REQUEUE):
        destroy_process_group()
    end_process(code)


def is_distributed() -> bool:
    """Whether there is anybody to talk to; if so, `join` must have been called."""
    assert world() == 1 or dist.is_initialized(), "ranks.init_process_group() comes before anything collective"
    return world() > 1


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", int(environment()["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def sum(values: Tensor) -> Tensor:
    """The element-wise sum over all ranks, on every rank; ``values`` itself is left alone."""
    return _reduce(values, dist.ReduceOp.SUM)


def maximum(values: Tensor) -> Tensor:
    """The element-wise maximum over all ranks, on every rank."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    total = values.clone()
    if is_distributed():
        dist.all_reduce(total, how)
    return total


def any_rank(says: bool) -> bool:
    """Whether any rank says so."""
    return bool(maximum(torch.tensor(float(says))).item())


def gather(value: Answer) -> list[Answer]:
    """What each rank says, in the order of the ranks, on every rank."""
    if not is_distributed():
        return [value]
    said: list[Answer] = [value] * world()
    dist.all_gather_object(said, value)
    return said


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def on_rank_zero(act: Callable[[], Answer]) -> Answer:
    """What ``act`` returned on rank 0, on every rank; if it raised there, every rank raises the same error.

    So it is with KeyboardInterrupt and its kinds, a stop, too.
    """
    answer: list = [None, None]
    if is_main():
        try:
            answer[0] = act()
        except (Exception, KeyboardInterrupt) as error:  # every rank must hear of it, or the others would wait for ever
            answer[1] = error
    if is_distributed():
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        _raise_everywhere(answer[1])
    return answer[0]


def all_ranks_or_none(act: Callable[[], Answer]) -> Answer:
    """What ``act`` returned on this rank; a MegamaskError or KeyboardInterrupt on any rank is raised on all."""
    found: list = [None, None]
    try:
        found[0] = act()
    except (MegamaskError, KeyboardInterrupt) as error:
        found[1] = error
    if first := next((error for error in gather(found[1]) if error is not None), None):
        _raise_everywhere(first)
    return found[0]


def _raise_everywhere(error: BaseException) -> NoReturn:
    if isinstance(error, MegamaskError):
        error.everywhere = True
    raise error
