"""Several ranks make one checkpoint, and a kill at any moment costs at most the one that was being made."""

from __future__ import annotations

import pytest


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


def test_no_kill_costs_a_checkpoint(run_ranks, tmp_path) -> None:
    (found,) = run_ranks(1, "publish_worker:kill_loop", folder=str(tmp_path / "run"), variant="sound", kills=40, seed=0)
    assert found["broken"] == []
    assert found["acknowledged"] > 0
    assert found["inside"] >= 0.4 * 40  # else little was tried


@pytest.mark.parametrize("variant", ["in place", "prune first"])
def test_the_kills_find_a_publisher_that_is_broken(run_ranks, tmp_path, variant: str) -> None:
    (found,) = run_ranks(
        1, "publish_worker:kill_loop", folder=str(tmp_path / "run"), variant=variant, kills=200, seed=0
    )
    assert found["broken"]
