"""Every reader under fire for a moment; `tests/soak/test_fuzz.py` goes on for minutes. Each has its own control.

A control takes one check out of a reader: the same fire must find that.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megamask.batch import TokenIds
from megamask.checkpoint import format
from megamask.config import overrides
from megamask.data import manifest, packs, shard_writer, tokenizer
from megamask.data.formats import compression, lines
from megamask.data.input_file import InputFile
from megamask.data.read_documents import ReadOptions, read_documents
from megamask.data.shards import Shards
from megamask.errors import MegamaskError
from megamask.errors.setting_rules import settings_problems
from megamask.hf import weights
from megamask.masking.corrupt import Corruption
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.schedules import LearningRate, Schedule
from megamask.storage import strict_json
from tests.hostile import targets
from tests.hostile.fuzzing import Target, fuzz
from tests.hostile.targets import TARGETS, odd_batches

COUNT = 25


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_under_fire(name: str, tmp_path: Path) -> None:
    findings = fuzz(TARGETS[name], tmp_path, count=COUNT)
    print(f"{name}: {findings}")
    assert not findings.wrong, "\n\n".join(findings.wrong)
    # a bad index of packs is made again, and a bad document is a value
    assert findings.tried == COUNT and (findings.refused or name in ("packs", "text"))


def nothing(*_, **__) -> Iterator[str]:
    yield from ()


CONTROLS = {
    "shard arrays": (manifest, "_array_problems", nothing),
    "shard manifest": (
        manifest.TypeAdapter,
        "validate_json",
        lambda self, raw, strict: manifest._Facts(**json.loads(raw)),
    ),
    "sidecars": (strict_json, "parse_json", json.loads),
    "packs": (packs, "_load", lambda folder, *_: packs.Index(*(np.load(folder / f"{n}.npy") for n in packs.KINDS))),
    "checkpoint": (format, "SafetensorError", KeyboardInterrupt),
    "run folder": (strict_json, "parse_json", json.loads),
    "settings": (overrides, "ValidationError", KeyboardInterrupt),
    "deepspeed file": (strict_json, "parse_json", json.loads),
    "text": (compression, "DAMAGED", KeyboardInterrupt),
    "model": (weights, "SafetensorError", KeyboardInterrupt),
    "first weights": (weights, "SafetensorError", KeyboardInterrupt),
    "tokenizer": (tokenizer, "_as_data_error", lambda what: nullcontext()),
    "stored samples": (strict_json, "parse_json", json.loads),
}
"""For each target a check, and what stands in its place."""


@pytest.mark.parametrize("name", ["shard arrays", "checkpoint", "tokenizer", "model"])
def test_a_reader_without_its_check_is_found_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*CONTROLS[name])
    findings = fuzz(TARGETS[name], tmp_path, count=20 * COUNT)
    print(f"{name}: {findings}")
    assert findings.wrong


def fails(how: str) -> Target:
    """A reader that does what no reader may do."""

    def begin(folder: Path) -> list[str]:
        (folder / "a.json").write_text("{}")
        return ["a.json"]

    def read(folder: Path) -> None:
        if (folder / "a.json").read_bytes() == b"{}":
            return
        if how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "leave":
            Path("/etc/hostname").exists() and open("/etc/passwd").close()
        if how == "start":
            os.system("true")
        if how == "swell":
            np.ones(2**27, np.uint8)
        if how == "raise":
            raise KeyError("a")
        if how == "spin":
            while True:
                pass

    return Target(begin, read)


@pytest.mark.parametrize("how", ["crash", "leave", "start", "swell", "raise", "spin"])
def test_what_no_reader_may_do_is_seen(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hostile.fuzzing.SECONDS", 0.2)
    assert fuzz(fails(how), tmp_path, count=3).wrong


# ---- readers of which more is known: what they must give


@pytest.mark.parametrize("seed", range(4))
def test_the_mapped_reader_gives_what_the_plainest_reader_gives(seed: int, tmp_path: Path) -> None:
    differential(tmp_path, seed, samples=2000)


def differential(folder: Path, seed: int, samples: int) -> int:
    """Random shards, read at random places by the reader and by a few lines of arithmetic; returns how many."""
    draw = np.random.default_rng(seed)
    lengths = [draw.integers(0, 60, draw.integers(1, 30)) for _ in range(draw.integers(1, 6))]
    lengths[0][0] += 1
    units = [
        shard_writer.EncodedDocuments(draw.integers(5, targets.WORDS, some.sum()), some.astype(np.int64))
        for some in lengths
    ]
    folder.mkdir(exist_ok=True)
    shard_writer.write_shards(
        folder, targets.small_tokenizer(), {"train": units}, facts={}, shard_tokens=int(draw.integers(1, 200))
    )
    opened = Shards.open(folder)
    stream, documents = reference(folder)
    assert [a.tolist() for a in documents] == [
        a.tolist() for unit in units for a in np.split(unit.tokens, unit.lengths.cumsum())[:-1]
    ]
    assert (opened.tokens, opened.documents) == (len(stream), len(documents))
    for _ in range(-(-samples // 500)):
        places = draw.integers(0, len(stream), 500)
        assert opened.read(opened.parts, places).tolist() == stream[places].tolist()
    assert [n for shard_offsets in opened.offsets() for n in np.diff(shard_offsets)] == [
        len(document) for document in documents
    ]
    return -(-samples // 500) * 500


def reference(folder: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """The stream of tokens of a split and its documents, from the bytes of the files alone."""

    def array(path: Path) -> np.ndarray:
        raw = path.read_bytes()
        assert raw[:8] == b"\x93NUMPY\x01\x00"
        head = 10 + int.from_bytes(raw[8:10], "little")
        kind = re.search(rb"'descr': '([^']+)'", raw[:head])
        assert kind
        return np.frombuffer(raw, np.dtype(kind[1].decode()), offset=head)

    streams, documents = [], []
    for shard in json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"]:
        tokens, offsets = (array(folder / f"{shard['name']}.{part}.npy") for part in ("tokens", "offsets"))
        streams.append(tokens)
        documents += [tokens[a:b] for a, b in pairwise(offsets)]
    return np.concatenate(streams), documents


class Dripping(io.RawIOBase):
    """A file that gives its bytes in two helpings, cut at ``at``."""

    def __init__(self, raw: bytes, at: int):
        self.parts = [raw[:at], raw[at:]]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while self.parts and not self.parts[0]:
            self.parts.pop(0)
        if not self.parts:
            return 0
        given, self.parts[0] = self.parts[0][: len(buffer)], self.parts[0][len(buffer) :]
        buffer[: len(given)] = given
        return len(given)


LINES = b'\xef\xbb\xbf{"text": "caf\xc3\xa9"}\r\n\r\n{"text": "a\\u0000b \xe2\x82\xac"}\n[1]\n{"text": "\xff"}\n'
LINES += b'{"text": "end"}'


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_where_a_read_ends_makes_no_difference(name: str, tmp_path: Path) -> None:
    """Split at every byte; and cut short at every byte it is still read, or named."""
    raw = gzip.compress(LINES, mtime=0) if name.endswith("gz") else LINES
    (tmp_path / name).write_bytes(raw)
    source = InputFile(name, tmp_path / name)
    whole = list(read_documents(source, ReadOptions(), io.BytesIO(raw)))
    if name.startswith("a.jsonl"):
        texts = [getattr(document, "problem", document) for document in whole]
        assert texts[:2] == ["café", "a\0b €"] and texts[4] == "end"
        assert f"line 4 (byte {LINES.index(b'[1]')})" in texts[2]
        assert f"line 5 is not UTF-8: byte {LINES.index(0xFF)} is 0xff" in texts[3]
    for at in range(len(raw)):
        dripping = io.BufferedReader(Dripping(raw, at), 16)
        assert list(read_documents(source, ReadOptions(), dripping)) == whole
        list(read_documents(source, ReadOptions(), io.BytesIO(raw[:at])))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.txt.gz"])
def test_a_line_without_end_is_named_and_not_held(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_DOCUMENT_BYTES", 1000)
    after = b'\n\n{"text": "good"}\n'
    raw = b"x" * 10_000 + after
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith("gz") else raw)
    source = InputFile(name, tmp_path / name)
    with source.open() as opened:
        bad, good = read_documents(source, ReadOptions(), opened)
    assert "is longer than" in bad.problem and "line 1 (byte 0)" in bad.problem
    assert "good" in good
    many = tmp_path / "many.txt"
    many.write_bytes(b"a line\n" * 1000 + b"\nnext")
    with many.open("rb") as opened:
        bad, good = read_documents(InputFile("many.txt", many), ReadOptions(), opened)
    assert "is longer than" in bad.problem and good == "next"


# ---- what is computed


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_the_masker_accepts_any_pack_or_names_the_reason(unit: str) -> None:
    strange_packs(unit, seed=0, count=150)


def strange_packs(unit: str, seed: int, count: int) -> tuple[int, int]:
    """Packs of odd lengths, of special tokens alone, at ratios from 0 to 1, of 6 tokens: plans and refusals."""
    ids = TokenIds(6, 2, 3, 0, 4, (0, 1, 2, 3, 4))
    planned = refused = 0
    for number in range(seed, seed + count):
        draw = random.Random(number)
        batch = odd_batches(draw)
        share = draw.choice((0.0, 0.01, 0.15, 0.5, 1.0))
        masker = Masker(MaskingConfig(Schedule(start=share), unit, "uniform", Corruption(0.8, 0.1, 0.1)), ids)
        budget = masker.budget(0.5, batch.layout.rows)
        try:
            plan = masker(batch, progress=draw.random(), rng=PackRng(number, batch.number, "mask"))
        except MegamaskError as error:
            assert int(batch.maskable.sum()) < budget, error
            refused += 1
            continue
        planned += 1
        assert len(plan.targets) == budget
        assert batch.maskable[plan.targets].all() and len(plan.targets.unique()) == budget
        assert set(plan.hidden.tolist()) <= set(plan.targets.tolist())
        assert torch.equal(plan.labels, batch.tokens[plan.targets])
        replaced = plan.targets[~torch.isin(plan.targets, plan.hidden)]
        assert not torch.isin(plan.inputs[replaced], torch.tensor(ids.special)).any()
        kept = torch.ones(batch.layout.rows, dtype=torch.bool).index_fill(0, plan.targets, False)
        assert torch.equal(plan.inputs[kept], batch.tokens[kept])
    return planned, refused


def test_a_schedule_stays_between_its_ends_or_is_refused() -> None:
    strange_schedules(seed=0, count=3000)


def strange_schedules(seed: int, count: int) -> tuple[int, int]:
    """Schedules and learning rates of any numbers: what is not refused stays within its ends."""
    taken = refused = 0
    numbers = (None, -1.0, 0.0, 1e-9, 0.05, 0.3, 0.5, 1.0, 1.5, 1e308, "warmup", "decay")
    kinds = ("constant", "linear", "cosine", "step", "ramp")
    for number in range(seed, seed + count):
        draw = random.Random(number)
        plain = [one for one in numbers if not isinstance(one, str)]
        rate = LearningRate(draw.choice(("linear", "cosine", "wsd")), *(draw.choice(plain) or 0.1 for _ in range(4)))
        schedule = Schedule(
            draw.choice(kinds), draw.choice(plain[1:]), draw.choice(plain), draw.choice(numbers), draw.choice(numbers)
        )
        if not settings_problems(rate, "rate"):
            assert all(0 <= rate(step / 50) <= rate.peak * (1 + 1e-12) for step in range(1, 51))
            schedule = schedule.resolved(rate)
        problems = schedule.range_problems("ratio", 0, 1, touch=True) + settings_problems(schedule, "ratio")
        if problems or any(isinstance(turn, str) for turn in (schedule.at, schedule.until)):
            refused += 1
            continue
        taken += 1
        ends = [end for end in (schedule.start, schedule.end) if end is not None]
        for step in range(65):
            assert min(ends) - 1e-12 <= schedule(step / 64) <= max(ends) + 1e-12
    assert taken and refused
    return taken, refused
