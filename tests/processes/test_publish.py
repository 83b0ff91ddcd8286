"""Several ranks make one checkpoint, and no kill, no full disk and no other launch costs one that was acknowledged."""

from __future__ import annotations

import pytest

from tests.processes.server import namespaces

namespace = pytest.mark.skipif(not namespaces(), reason="no namespace for a small disk of its own")


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_on_every_checkpoint_and_every_error(run_ranks, tmp_path, world: int) -> None:
    first, *others = run_ranks(world, "publish_worker:life", folder=str(tmp_path / "run"))
    assert others == [first] * (world - 1)
    assert first["fresh"] == 0 and first["launch"]
    assert first["full"].startswith(f"StorageError: Rank {world - 1} could not save checkpoint 10: No space left")
    assert "bytes are free" in first["full"] and "bytes are needed" in first["full"]
    assert first["after"] == ["step-9"]
    assert first["tensors"] == 3 * world and first["exact"]
    assert "`depth` is 3 here, but 2 there" in first["other"]
    assert first["never"].startswith("CheckpointError")
    assert first["resumed"] == 10
    assert f"step-11/rank-{world - 1:05d}.safetensors has" in first["notes"][0]


@pytest.mark.parametrize("variant", ["sound", "background"])
def test_no_kill_costs_a_checkpoint(apart, tmp_path, variant: str, kills: int = 200) -> None:
    report = apart("storage_worker:kill_loop", tmp_path, variant=variant, kills=kills, seed=0)
    print(f"\nkills of the publisher: {report}")
    assert report["lost"] == []
    assert report["saves"] > 0
    assert report["inside a save"] >= 0.4 * kills  # else little was tried


@pytest.mark.parametrize("variant", ["in place", "prune first", "latest first"])
def test_the_kills_find_a_publisher_that_is_broken(apart, tmp_path, variant: str) -> None:
    assert apart("storage_worker:kill_loop", tmp_path, variant=variant, kills=200, seed=0)["lost"]


@pytest.mark.parametrize("background", [False, True])
def test_a_kill_at_any_point_of_a_save_costs_nothing(apart, tmp_path, background: bool) -> None:
    report = apart("storage_worker:crash_points", tmp_path, background=background)
    print(f"\npoints of a save: {len(report['points'])}")
    assert report["lost"] == []
    for rank, name in ((0, "rename-.tmp-step-3"), (0, "middle-MANIFEST.json"), (1, "middle-rank-00001"), (1, "sync")):
        assert any(point.startswith(f"{rank}: {name}") for point in report["points"])


def test_a_launch_that_lost_its_lock_publishes_nothing(apart, tmp_path, rounds: int = 30) -> None:
    report = apart("storage_worker:take_overs", tmp_path, variant="sound", rounds=rounds)
    print(f"\nlaunches that woke after another took over: {report}")
    assert report["published"] == []
    assert report["refused"] == rounds


def test_without_the_fence_it_would(apart, tmp_path) -> None:
    assert apart("storage_worker:take_overs", tmp_path, variant="no fence", rounds=5)["published"]


@namespace
def test_a_full_disk_costs_no_checkpoint(apart, tmp_path, levels: int = 8) -> None:
    report = apart("storage_worker:full_disks", tmp_path, variant="sound", levels=levels)
    print(f"\nfull disks: {report}")
    assert report["wrong"] == []
    assert report["failed"] >= levels and report["saved"] > 0


@namespace
def test_a_rank_that_takes_no_notice_of_a_full_disk_is_found(apart, tmp_path) -> None:
    assert apart("storage_worker:full_disks", tmp_path, variant="careless", levels=3)["wrong"]


@pytest.mark.parametrize(("variant", "sound"), [("sound", True), ("own clocks", False)])
def test_ranks_with_other_clocks_and_folders_agree(apart, tmp_path, variant: str, sound: bool) -> None:
    report = apart("storage_worker:agreements", tmp_path, variant=variant, launches=200)
    assert (report["codes"] == [0, 0, 0] and report["agreed"] == 200) == sound


def test_one_ranks_view_of_a_checkpoint_sets_none_aside(apart, tmp_path) -> None:
    messages = apart("storage_worker:views", tmp_path)
    assert messages["late"] == ["2 0"]
    for kind in ("never", "another byte"):
        (sentence,) = messages[kind]
        assert "Rank 0 reads" in sentence and "step-2 without damage, but other ranks do not" in sentence
    assert messages["damaged"] == ["1 2"]  # all see it, so it is renamed


@pytest.mark.parametrize(("variant", "sound"), [("sound", True), ("no wait", False)])
def test_a_file_system_that_lags_costs_no_save(apart, tmp_path, variant: str, sound: bool, saves: int = 50) -> None:
    report = apart("storage_worker:lags", tmp_path, variant=variant, saves=saves, seed=0)
    print(f"\nsaves where storage lags: {report}")
    assert report["codes"] == [0, 0, 0]
    assert (report["done"] == saves) == sound
