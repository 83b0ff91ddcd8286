"""Damage to the checkpoints of two ranks in every stage: each bit of the small files, thousands in the large ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.checkpoint.run_folder import RunFolder
from tests.system.commands import free_port, shell, training
from tests.system.test_damage import sweep


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_damage_is_seen_in_stage(data: Path, tmp_path: Path, stage: int) -> None:
    launcher = ["deepspeed", "--num_accelerators", 2, "--master_port", free_port()]
    more = ["--deepspeed", f"ds_configs/zero{stage}.json"]
    ended = shell(*launcher, "megamask/pretrain.py", *training(data, tmp_path / "run"), *more)
    assert ended.code == 0, ended.out + ended.err
    unnoticed = sweep(RunFolder(tmp_path / "run").checkpoint(4), 5000)
    print(f"\ndamages in stage {stage}: {unnoticed}")
    assert unnoticed["missed"] == []
    assert unnoticed["files"] == 4
