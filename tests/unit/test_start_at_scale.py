"""The file operations of a start: for a rank they do not grow with the number of ranks, and each fact is read once.

One rank of many is simulated: what a collective returns is what rank 0 found, or what this rank gives, from all ranks.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamask.checkpoint import format as checkpoints
from megamask.checkpoint.format import Manifest, render_manifest, serialise
from megamask.checkpoint.resume import open_run
from megamask.checkpoint.run_folder import RunFolder
from megamask.config.pretrain_config import PacksConfig, PretrainConfig
from megamask.data.shard_writer import EncodedDocuments, write_shards
from megamask.data.tokenizer import load_tokenizer
from megamask.engine.writers import MAX_WRITERS, writing_ranks
from megamask.health.heartbeats import Heartbeats
from megamask.runtime import ranks
from megamask.storage import atomic_write
from megamask.training.run_text import open_run_text
from megamask.training.state import read_train_state

WORLDS = (16, 64, 256, 1024)
EVENTS = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""What Python reports of its file operations; those that read the facts about a file are not among them."""
_counting: list[Counter[tuple[str, str]]] = []
sys.addaudithook(lambda event, given: _count(event, given[0]) if event in EVENTS else None)


def _count(operation: str, path: object) -> None:
    if _counting and isinstance(path, str | os.PathLike):
        _counting[-1][operation, os.fspath(path)] += 1


@contextmanager
def file_operations(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> Iterator[Counter[tuple[str, str]]]:
    """How often each operation was applied to each path in ``folders``."""

    def counted(name: str, act: Callable) -> Callable:
        def acts(path, *given, **named):
            _count(name, path)
            return act(path, *given, **named)

        return acts

    counts: Counter[tuple[str, str]] = Counter()
    with monkeypatch.context() as patches:
        for name in ("stat", "lstat"):
            patches.setattr(os, name, counted(name, getattr(os, name)))
        patches.setattr(checkpoints, "safe_open", counted("open", checkpoints.safe_open))
        _counting.append(counts)
        try:
            yield counts
        finally:
            _counting.pop()
    for operation, path in [*counts]:
        if not any(Path(path).is_relative_to(folder) for folder in folders):
            del counts[operation, path]


def be(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, answers: list[Any]) -> None:
    """Let this process be ``rank`` of ``world``. Rank 0 adds its ``answers``, which the others get."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    given = iter(answers)

    def by_main(act: Callable[[], Any]) -> Any:
        if rank:
            return next(given)
        answers.append(act())
        return answers[-1]

    monkeypatch.setattr(ranks, "on_rank_zero", by_main)
    monkeypatch.setattr(ranks, "gather", lambda value: [value] * world)


def start(config: PretrainConfig, launches: list[str]) -> None:
    """What a launch reads before its engine exists, and the state that it restores."""
    text = open_run_text(config)
    opened = open_run(config.output, {"text": text.train.fingerprint}, text=text.train)
    if opened.checkpoint:
        read_train_state(opened.checkpoint)
        assert len(dict(checkpoints.read_tensors(opened.checkpoint))) == 100
    Heartbeats(opened.run.logs, opened.run.launch).close()
    opened.close()
    launches.append(opened.run.launch)


def save(run: RunFolder, world: int) -> None:
    """A checkpoint as ``world`` ranks write it."""
    folder = run.checkpoint(3)
    folder.mkdir()
    files = {"state.json": atomic_write.write_file(folder / "state.json", [b'{"optimizer_steps": 3}'])}
    writers = writing_ranks(world)
    for place, rank in enumerate(writers):
        tensors = {f"weights/{n}": torch.zeros(1) for n in range(place, 100, len(writers))}
        name = f"rank-{rank:05d}.safetensors"
        files[name] = atomic_write.write_file(folder / name, serialise(tensors))
    (folder / "MANIFEST.json").write_bytes(render_manifest(Manifest(3, run.launch, files)))


def operations(
    monkeypatch: pytest.MonkeyPatch, config: PretrainConfig, rank: int, world: int, *, resumes: bool
) -> Counter[tuple[str, str]]:
    """Those of a start of ``rank``, by path."""
    output = config.output.with_name(f"{config.output.name}-{rank}-{world}-{resumes}")
    config = PretrainConfig(data=config.data, output=output, packs=config.packs)
    launches: list[str] = []
    answers: list[Any] = []
    assert isinstance(config.data, Path)
    with monkeypatch.context() as patches:
        if resumes:
            be(patches, 0, 1, [])
            start(config, launches)
            save(RunFolder(output, launches[0]), world)
        for each in dict.fromkeys((0, rank)):
            be(patches, each, world, answers)
            with file_operations(patches, config.data, output) as counts:
                start(config, launches)
    return counts


@pytest.fixture
def config(tokenizer: Path, tmp_path: Path) -> PretrainConfig:
    """A run whose text has several shards and an index of packs."""
    data, draws = tmp_path / "shards", np.random.default_rng(0)
    data.mkdir()

    def documents(count: int) -> list[EncodedDocuments]:
        return [EncodedDocuments(draws.integers(10, 80, 200), np.array([200])) for _ in range(count)]

    splits = {"train": documents(30), "valid": documents(6)}
    write_shards(data, load_tokenizer(tokenizer), splits, facts={}, shard_tokens=1500)
    config = PretrainConfig(data=data, output=tmp_path / "run", packs=PacksConfig(tokens=256, length=64))
    assert len(open_run_text(config).train.names) > 2
    return config


@pytest.mark.parametrize("rank", [0, 7])
def test_a_new_run_needs_as_many_operations_on_any_number_of_ranks(monkeypatch, config, rank) -> None:
    first, *others = (operations(monkeypatch, config, rank, world, resumes=False).total() for world in WORLDS)
    assert others == [first] * len(others)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_resume_needs_as_many_operations_on_any_number_of_ranks(monkeypatch, config, rank) -> None:
    """Of more ranks than write a checkpoint, each verifies one file of it or none, and opens all."""
    few, most, *others = (operations(monkeypatch, config, rank, world, resumes=True).total() for world in WORLDS)
    assert few < most and others[0] <= most
    assert others == [others[0]] * len(others)


def test_a_rank_asks_once_for_the_facts_about_each_shard(monkeypatch, config) -> None:
    counts = operations(monkeypatch, config, 7, 16, resumes=False)
    of_tokens = {key: number for key, number in counts.items() if key[1].endswith(".tokens.npy")}
    assert {operation for operation, _ in of_tokens} == {"stat", "open"}
    assert set(of_tokens.values()) == {1}


def test_writers_are_spread_evenly() -> None:
    for world in (1, 2, 63, 64, 65, 100, 1000, 1024):
        writers = writing_ranks(world)
        assert writers[0] == 0 and len(set(writers)) == len(writers) == min(world, MAX_WRITERS)
        distances = {b - a for a, b in zip(writers, [*writers[1:], world], strict=True)}
        assert max(distances) - min(distances) <= 1
