"""The DeepSpeed file of a teacher, which has no optimizer: what it must and must not set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamask.engine.ds_file import parse_ds_config, stage_is_known, zero_stage
from megamask.engine.offloads import nvme_problems

PRECISION_KEYS = ("bf16", "torch_autocast", "data_types")
"""Keys that a teacher's DeepSpeed file must not set, because `teacher.precision` decides them."""


def teacher_ds_problems(name: str, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The content of the DeepSpeed file of the setting ``name``, and sentences for its problems as a teacher's file."""
    ds, problems = parse_ds_config(path)
    if ds is None:
        return {}, problems
    problems += [
        f"`{path}` must not set `{key}`: the teacher's `precision` decides it. Remove it."
        for key in PRECISION_KEYS
        if key in ds
    ]
    if stage_is_known(ds) and zero_stage(ds) != 3:
        problems.append(
            f"`{name}` needs ZeRO stage 3, the only one that DeepSpeed runs without an optimizer, but {path} says "
            f"{zero_stage(ds)}. Use teacher_shard, or remove `{name}` to hold the whole teacher on each device."
        )
    section = ds.get("zero_optimization", {})
    if "offload_optimizer" in section:
        problems.append(f"`{path}` has `offload_optimizer`, but a teacher has no optimizer. Remove it.")
    return ds, problems + nvme_problems({"offload_param": section.get("offload_param")}, 3)
