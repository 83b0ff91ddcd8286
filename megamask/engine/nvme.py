"""The files of weights and moments that DeepSpeed keeps on NVMe: a folder for each process, and memory to lock.

DeepSpeed names its files by the rank alone. Without a folder of its own, a run would read the weights of a teacher, or
of another run on the same host.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
from pathlib import Path
from typing import Any

from megamask.engine.offloads import moment_buffers, offload_devices, weight_buffers
from megamask.errors import ConfigError, StorageError
from megamask.runtime import ranks
from megamask.storage.scratch_folder import ScratchFolder


def in_own_folders(ds: dict[str, Any]) -> tuple[dict[str, Any], list[ScratchFolder]]:
    """The DeepSpeed file with a new folder for each `nvme_path`, and these folders.

    Raises StorageError if one cannot be made.
    """
    section = ds.get("zero_optimization", {})
    own, folders = dict(section), []
    for key in (key for key, device in offload_devices(section).items() if device == "nvme"):
        path = section[key]["nvme_path"]
        try:
            folders.append(ScratchFolder(Path(path)))
        except OSError as error:
            raise StorageError(
                f"`zero_optimization.{key}.nvme_path` in the DeepSpeed file is {path}, where no folder can be made: "
                f"{error.strerror}. Name another one, on a local disk."
            ) from None
        own[key] = section[key] | {"nvme_path": str(folders[-1].path)}
    return (ds | {"zero_optimization": own} if folders else ds), folders


def check_buffers(ds: dict[str, Any], largest: int) -> None:
    """Raise ConfigError if a rank's part of the largest tensor, of ``largest`` numbers, does not fit into a buffer."""
    part = -(-largest // ranks.world())
    size = (ds.get("zero_optimization", {}).get("offload_param") or {}).get("buffer_size", 1e8)
    if weight_buffers(ds.get("zero_optimization", {})) and part > size:
        raise ConfigError(
            f"`zero_optimization.offload_param.buffer_size` in the DeepSpeed file must be at least {part:,}, a rank's "
            f"part of the largest tensor, but is {size:,.0f}. Raise it."
        )


def check_locked_memory(ds: dict[str, Any], num_weights: int, width: int) -> None:
    """Raise ConfigError if this process may lock less memory than DeepSpeed's buffers need: it would abort.

    The model has ``num_weights`` trained weights over all ranks, of ``width`` bytes in a forward pass.
    """
    needed, allowed = locked_bytes(ds, num_weights, width), _most_locked_bytes()
    if needed > allowed:
        raise ConfigError(
            f"Offloading to NVMe locks {needed / 1e6:,.0f} MB of memory for buffers, but this process may lock "
            f"{allowed / 1e6:,.0f} MB. Raise the limit (`ulimit -l`, or LimitMEMLOCK of the Slurm daemon), or, in "
            "`zero_optimization` of the DeepSpeed file, lower `offload_param.buffer_size` (for weights) or "
            "`sub_group_size` (for moments)."
        )


def locked_bytes(ds: dict[str, Any], num_weights: int, width: int) -> float:
    """Bytes of a rank's buffers between its files and its devices; arguments as of `check_locked_memory`."""
    section = ds.get("zero_optimization", {})
    largest = min(section.get("sub_group_size", 1e9), num_weights / ranks.world())
    return weight_buffers(section) * width + moment_buffers(section) * largest * 4


def _most_locked_bytes() -> float:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return float("inf") if limit == resource.RLIM_INFINITY or _can_lock(limit + mmap.PAGESIZE) else float(limit)


def _can_lock(size: int) -> bool:
    """Whether this process can lock ``size`` bytes, as root can above the limit, but not root of a user namespace."""
    memory = mmap.mmap(-1, size)
    library, address = ctypes.CDLL(None), (ctypes.c_char * size).from_buffer(memory)
    locked = library.mlock(address, ctypes.c_size_t(size)) == 0
    if locked:
        library.munlock(address, ctypes.c_size_t(size))
    del address
    memory.close()
    return locked
