"""DeepSpeed's file: what is not its to say is refused, with everything else that is wrong, and the rest is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.engine import ds_file
from megamask.engine.ds_file import OURS, filled, parse, problems, read_ds_config, zero_stage
from megamask.engine.optimizer import OptimizerConfig
from megamask.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent.parent
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}


@pytest.fixture
def written(tmp_path: Path):
    def write(said: dict | str) -> Path:
        (tmp_path / "ds.json").write_text(said if isinstance(said, str) else json.dumps(said))
        return tmp_path / "ds.json"

    return write


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_own_files_are_accepted_as_they_stand(path: Path) -> None:
    assert read_ds_config(path) == json.loads(path.read_text())


def test_all_that_is_wrong_is_said_at_once_and_the_rest_kept(written) -> None:
    wrong = {"optimizer": {}, "bf17": {}, "zero_optimization": {"stage": 7, "bucket": 1}, "bf16": {"enabled": False}}
    found, sentences = parse(written(wrong))
    assert len(sentences) == 4
    assert all(name in " ".join(sentences) for name in ("optimizer", "bf17", "stage", "zero_optimization.bucket"))
    assert found["bf16"] == {"enabled": False}
    assert zero_stage(found) == 0
    with pytest.raises(ConfigError) as caught:
        read_ds_config(written(wrong))
    assert list(caught.value.problems) == sentences


@pytest.mark.parametrize("section", [name for name in ds_file.SECTIONS])
def test_a_typo_in_any_section_is_found(section: str, written) -> None:
    _, sentences = parse(written({section: {"enabledd": True}}))
    assert len(sentences) == 1
    assert f"`{section}.enabledd`" in sentences[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lamb_and_muon_have_their_stages(stage: int) -> None:
    ds = {"zero_optimization": {"stage": stage}}
    assert zero_stage(ds) == stage
    assert bool(problems(OptimizerConfig("lamb"), ds)) == (stage > 0)
    assert bool(problems(OptimizerConfig("muon"), ds)) == (stage == 0)
    assert problems(OptimizerConfig("adamw"), ds) == []
    assert zero_stage({}) == 0


@pytest.mark.parametrize("there", [True, False])
def test_nvme_needs_libaio_and_stage_3(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_file, "_has_async_io", lambda: there)
    assert bool(problems(OptimizerConfig(), NVME)) != there
    lower = {"zero_optimization": NVME["zero_optimization"] | {"stage": 2}}
    assert "stage 3" in problems(OptimizerConfig(), lower)[0]


def test_what_the_run_decides_is_filled_in() -> None:
    ds = {"zero_optimization": {"stage": 2}}
    full = filled(ds, OptimizerConfig(clip=0.5), 3, 12)
    assert full["zero_optimization"] == {"stage": 2}
    assert full["gradient_clipping"] == 0.5
    assert (full["train_batch_size"], full["gradient_accumulation_steps"]) == (12, 3)
    assert ds == {"zero_optimization": {"stage": 2}}
    # whatever it fills in, a file may not say
    assert {"train_batch_size", "gradient_clipping", "gradient_accumulation_steps", "steps_per_print"} <= OURS.keys()
