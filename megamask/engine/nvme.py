"""The files of weights that DeepSpeed keeps on NVMe: a folder for each process, and memory that must be locked.

DeepSpeed names its files by the rank alone. Without a folder of its own, a run would read the weights of a teacher, or
of another run on the same host.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from megamask.engine.offloads import offload_devices
from megamask.errors import ConfigError, StorageError
from megamask.storage.scratch_folder import ScratchFolder

CAP_IPC_LOCK = 14
"""The bit of the capability, as root has it, to lock any amount of memory (capabilities(7))."""


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


def check_locked_memory(ds: dict[str, Any], width: int) -> None:
    """Raise ConfigError if this process may lock less memory than DeepSpeed's buffers need: it would abort.

    ``width`` is the bytes of a weight.
    """
    needed, allowed = locked_bytes(ds, width), _most_locked_bytes()
    if needed > allowed:
        raise ConfigError(
            f"Offloading to NVMe locks {needed / 1e6:,.0f} MB of memory for buffers, but this process may lock "
            f"{allowed / 1e6:,.0f} MB. Raise the limit (`ulimit -l`, or LimitMEMLOCK of the Slurm daemon), or lower "
            f"`zero_optimization.offload_param.buffer_size` in the DeepSpeed file."
        )


def locked_bytes(ds: dict[str, Any], width: int) -> float:
    """The bytes of the buffers through which weights of ``width`` bytes go between their files and the device."""
    section = ds.get("zero_optimization", {})
    if offload_devices(section)["offload_param"] != "nvme":
        return 0.0
    weights = section["offload_param"]
    # the defaults are DeepSpeed's
    return float(weights.get("buffer_count", 5) * weights.get("buffer_size", 1e8) * width)


def _most_locked_bytes() -> float:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return float("inf") if limit == resource.RLIM_INFINITY or _may_lock_any() else float(limit)


def _may_lock_any() -> bool:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return False
    (effective,) = (line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> CAP_IPC_LOCK & 1)
