"""Annotation by several processes gives the bytes of one."""

from __future__ import annotations

import dataclasses

import pytest

from megamask.annotate import store_entropies, store_targets
from tests.unit.test_annotate import HOW, config, content, data, model, run, teacher

__all__ = ["config", "data", "model", "run", "teacher"]  # fixtures


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_bytes(config, run, data, tmp_path):
    store_entropies(config)
    whole = content(data)
    store_entropies(dataclasses.replace(config, signal="clean"))
    assert content(data) != whole
    store_entropies(dataclasses.replace(config, workers=2))
    assert content(data) == whole

    store_targets(run, data, HOW)
    other = dataclasses.replace(run, distill=dataclasses.replace(run.distill, stored=tmp_path / "other"))
    store_targets(other, data, dataclasses.replace(HOW, workers=2))
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("stored", "other")]
    assert contents[0] == contents[1]
