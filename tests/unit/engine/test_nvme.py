"""Files on NVMe: folders of a process, and the memory that must be locked."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from megamask.engine import nvme
from megamask.errors import ConfigError, StorageError


def ds_file(path: Path, **more: Any) -> dict[str, Any]:
    weights = {"device": "nvme", "nvme_path": str(path), **more}
    return {"zero_optimization": {"stage": 3, "offload_param": weights, "offload_optimizer": {"device": "cpu"}}}


def test_two_users_of_a_path_have_different_folders(tmp_path: Path) -> None:
    ds = ds_file(tmp_path)
    (one, first), (other, second) = nvme.in_own_folders(ds), nvme.in_own_folders(ds)
    paths = [Path(each["zero_optimization"]["offload_param"]["nvme_path"]) for each in (one, other)]
    assert paths[0] != paths[1] and {path.parent for path in paths} == {tmp_path}
    assert ds == ds_file(tmp_path)  # unchanged: it is part of the identity of a run
    assert one["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    for folder in (*first, *second):
        folder.close()
    assert not any(path.exists() for path in paths)


def test_no_folder_without_files() -> None:
    ds = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "nvme_path": "/nowhere"}}}
    assert nvme.in_own_folders(ds) == (ds, [])
    assert nvme.in_own_folders({}) == ({}, [])


def test_a_path_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"offload_param\.nvme_path.*file.*Name another"):
        nvme.in_own_folders(ds_file(tmp_path / "file"))


def test_buffers_above_the_limit_of_locked_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = ds_file(tmp_path, buffer_count=2, buffer_size=1000)
    monkeypatch.setattr(nvme, "_can_lock", lambda size: False)
    for limit, width, refused in (
        (8000, 4, False),
        (7999, 4, True),
        (4000, 2, False),
        (resource.RLIM_INFINITY, 4, False),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        if refused:
            with pytest.raises(ConfigError, match="ulimit -l"):
                nvme.check_locked_memory(ds, 0, width)
        else:
            nvme.check_locked_memory(ds, 0, width)
    assert nvme.locked_bytes({"zero_optimization": {"stage": 3}}, 1000, 4) == 0


def test_a_process_that_may_lock_any_amount_is_not_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 1))
    monkeypatch.setattr(nvme, "_can_lock", lambda size: True)
    nvme.check_locked_memory(ds_file(tmp_path), 0, 4)


def test_a_buffer_that_is_too_small_for_the_largest_tensor_is_refused(tmp_path: Path) -> None:
    nvme.check_buffers(ds_file(tmp_path, buffer_size=1000), 1000)
    with pytest.raises(ConfigError, match=r"buffer_size.*at least 1,001.*is 1,000"):
        nvme.check_buffers(ds_file(tmp_path, buffer_size=1000), 1001)
    nvme.check_buffers({"zero_optimization": {"stage": 3}}, 10**12)


def test_moments_need_buffers_of_the_largest_flat_partition() -> None:
    moments = {"device": "nvme", "nvme_path": "/tmp", "buffer_count": 4}
    ds = {"zero_optimization": {"stage": 3, "offload_optimizer": moments, "sub_group_size": 100}}
    assert nvme.locked_bytes(ds, 1000, 2) == 4 * 100 * 4
    assert nvme.locked_bytes(ds, 10, 2) == 4 * 10 * 4  # a smaller model


def test_a_little_memory_can_be_locked_and_more_than_there_is_cannot() -> None:
    assert nvme._can_lock(4096)
