"""Packs: every piece of every document once an epoch, whole and alone in its sequence, whatever the seed."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.data import index
from megamask.data.index import best_fit
from megamask.data.packs import Packs
from megamask.data.shard_writer import write_sidecar
from megamask.data.shards import Shards
from megamask.errors import ConfigError, DataError
from tests.batches import text_positions


def sequences(batch) -> list[list[int]]:
    """The ids of each sequence of a pack that is not empty."""
    bounds = batch.layout.cu_seqlens.tolist()
    return [batch.tokens[a:b].tolist() for a, b in pairwise(bounds) if a < b]


def texts(packs: Packs, numbers) -> list[list[int]]:
    """The pieces in the packs of these numbers, without special tokens and padding."""
    ids = packs.token_ids
    sequences_read = [sequence for number in numbers for sequence in sequences(packs.batch(number))]
    return [sequence[1:-1] for sequence in sequences_read if sequence[0] != ids.pad]


def pieces(documents: list[list[int]], length: int) -> Counter:
    """What the documents are cut into, by the plainest code."""
    body = length - 2
    return Counter(tuple(document[at : at + body]) for document in documents for at in range(0, len(document), body))


LENGTHS = [1, 5, 200, 31, 30, 29, 62, 63, *range(3, 90), *[7] * 200]


@pytest.mark.parametrize(("tokens", "length"), [(256, 32), (64, 64), (100, 33), (512, 512)])
@pytest.mark.parametrize("shard_tokens", [2**27, 1500])
def test_an_epoch_holds_every_piece_once(make_shards, documents_of, tokens, length, shard_tokens):
    shards = Shards.open(make_shards(LENGTHS, shard_tokens=shard_tokens))
    packs = Packs(shards, tokens=tokens, length=length, seed=3)
    expected = pieces(documents_of(shards), length)
    pieces_read = Counter(map(tuple, texts(packs, range(len(packs)))))
    assert not pieces_read - expected
    missing = expected - pieces_read
    assert sum(len(piece) * count for piece, count in missing.items()) == packs.left_out
    assert pieces_read.total() > 0.8 * expected.total()


@pytest.mark.parametrize("number", [0, 1, 7, 1000])
def test_the_tokens_of_a_pack_are_consistent(make_shards, number):
    packs = Packs(Shards.open(make_shards(LENGTHS)), tokens=128, length=48, seed=0)
    batch, ids = packs.batch(number), packs.token_ids
    assert batch.number == number
    for sequence in sequences(batch):
        assert len(sequence) <= 48 == batch.layout.max_seqlen
        if ids.pad in sequence:
            assert set(sequence) == {ids.pad}
        else:
            assert (sequence[0], sequence[-1]) == (ids.cls, ids.sep) and len(sequence) > 2
    # positions count from the start of each sequence
    assert torch.equal(batch.layout.positions.long(), batch.layout.offset)
    assert torch.equal(batch.maskable, ~torch.isin(batch.tokens, torch.tensor(ids.special)))
    # words: every token but "##", and the first of each piece
    continues = (batch.tokens % 3 == 0) & batch.maskable
    first = torch.zeros_like(continues)
    first[1:] = batch.tokens[:-1] == ids.cls
    assert torch.equal(batch.starts_word, ~continues | first)
    assert batch.tags is None and batch.entropy is None


@pytest.mark.parametrize("shard_tokens", [2**27, 1500])
@pytest.mark.parametrize("masks_per_text", [1, 2])
@pytest.mark.parametrize("number", [0, 3, 1000])
def test_packs_hold_the_tokens_at_their_positions_in_the_text(make_shards, shard_tokens, masks_per_text, number):
    shards = Shards.open(make_shards(LENGTHS, shard_tokens=shard_tokens))
    packs = Packs(shards, tokens=128, length=48, seed=0, per_step=4, masks_per_text=masks_per_text)
    batch, positions = packs.batch(number), text_positions(packs, number)
    stream = torch.from_numpy(np.concatenate(shards.parts).astype(np.int64))
    assert torch.equal(positions >= 0, batch.maskable)
    assert torch.equal(stream[positions[positions >= 0]], batch.tokens[batch.maskable])


def test_types_and_shapes_do_not_change_from_pack_to_pack(make_shards):
    packs = Packs(Shards.open(make_shards(LENGTHS)), tokens=128, length=48, seed=0)
    batches = [packs.batch(number) for number in range(len(packs))]
    assert len({batch.layout.cu_seqlens.shape for batch in batches}) == 1
    # no longer than needed
    assert any(batch.layout.cu_seqlens[-2] < 128 for batch in batches)
    batch = batches[0]
    assert (batch.tokens.dtype, batch.starts_word.dtype) == (torch.int64, torch.bool)
    assert (batch.layout.cu_seqlens.dtype, batch.layout.positions.dtype) == (torch.int32, torch.int32)


def test_a_pack_is_a_function_of_seed_and_number(make_shards):
    folder = make_shards(LENGTHS)
    first, again = (Packs(Shards.open(folder), tokens=128, length=48, seed=5) for _ in range(2))
    other = Packs(Shards.open(folder), tokens=128, length=48, seed=6)
    epochs = [[first.batch(n).tokens for n in range(e * len(first), (e + 1) * len(first))] for e in range(2)]
    # read backwards, by another object, from the cached index
    for number in reversed(range(2 * len(first))):
        epoch, place = divmod(number, len(first))
        assert torch.equal(again.batch(number).tokens, epochs[epoch][place])
    as_sets = [{tuple(tokens.tolist()) for tokens in epoch} for epoch in epochs]
    elsewhere = [tuple(other.batch(n).tokens.tolist()) for n in range(len(other))]
    assert as_sets[0] == as_sets[1] == set(elsewhere)
    assert [tuple(t.tolist()) for t in epochs[0]] != [tuple(t.tolist()) for t in epochs[1]]
    assert [tuple(t.tolist()) for t in epochs[0]] != elsewhere


def make_unknown(folder: Path, documents, share: float = 1.0) -> None:
    """Turn a ``share`` of the tokens of some documents of the first shard into [UNK]; the shard keeps its size."""
    tokens, offsets = (np.load(folder / f"train-00000.{name}.npy") for name in ("tokens", "offsets"))
    for document in documents:
        begin, end = offsets[document : document + 2]
        tokens[begin : begin + round(share * (end - begin))] = 1
    np.save(folder / "train-00000.tokens.npy", tokens)


def left_to_mask(packs: Packs, epoch: int = 0) -> list[int]:
    """The maskable rows of each pack of an epoch, counted in the packs themselves."""
    return [int(packs.batch(epoch * len(packs) + number).maskable.sum()) for number in range(len(packs))]


@pytest.mark.parametrize("shard_tokens", [2**27, 1500])
def test_the_index_counts_what_can_be_masked(make_shards, shard_tokens):
    folder = make_shards(LENGTHS, shard_tokens=shard_tokens)
    make_unknown(folder, range(0, 8, 2), 0.7)
    for length in (32, 128):
        packs = Packs(Shards.open(folder), tokens=128, length=length, seed=3)
        assert sorted(left_to_mask(packs)) == sorted(packs._index.maskable.tolist())


def test_packs_with_too_few_maskable_tokens_are_replaced(make_shards):
    folder = make_shards([62] * 400)
    make_unknown(folder, [*range(20, 28), 77])
    shards, sizes = Shards.open(folder), {"tokens": 256, "length": 64, "seed": 5}
    plain, packs = Packs(shards, **sizes), Packs(shards, **sizes, targets=200)
    free = [count for epoch in range(8) for count in left_to_mask(plain, epoch)]
    assert packs.short == sum(count < 200 for count in free[: len(plain)]) > 1
    stand_ins = []
    for number, count in enumerate(free):
        batch, other = packs.batch(number), plain.batch(number)
        assert batch.number == number and int(batch.maskable.sum()) >= 200
        if count >= 200:
            assert torch.equal(batch.tokens, other.tokens)
            assert torch.equal(text_positions(packs, number), text_positions(plain, number))
        else:
            stand_ins.append(tuple(batch.tokens.tolist()))
    assert len(set(stand_ins)) == len(stand_ins) == 8 * packs.short  # none is favoured
    short = {at for n in range(len(plain)) if free[n] < 200 for at in text_positions(plain, n).tolist() if at >= 0}
    assert packs.short_tokens == len(short)
    assert "have fewer than 200 tokens that can be masked" in packs.shortage
    assert "The pack with the fewest has 0" in packs.shortage and "document 21 of train-00000" in packs.shortage
    assert (plain.short, plain.short_tokens, plain.shortage) == (0, 0, "")


def test_views_of_a_text_have_the_same_replacement(make_shards):
    folder = make_shards([62] * 200)
    make_unknown(folder, range(20, 28))
    packs = Packs(Shards.open(folder), tokens=256, length=64, seed=5, per_step=4, masks_per_text=2, targets=200)
    for step in range(len(packs)):
        for place in range(2):
            one, two = (packs.batch(4 * step + place + 2 * view) for view in range(2))
            assert one.source_pack == two.source_pack and torch.equal(one.tokens, two.tokens)
            assert int(one.maskable.sum()) >= 200


@pytest.mark.parametrize(
    ("lengths", "unknown", "reason", "cure"),
    [
        (
            [3] * 3000,
            [],
            r"the fewest has 15\d: .* 0 are \[UNK\] .* 102 are \[CLS\] and",
            "^Join short documents",
        ),
        (
            [62] * 200,
            range(100),
            r"the fewest has 0: .* 248 are \[UNK\] .* 8 are \[CLS\] and",
            "^Prepare the text with",
        ),
    ],
)
def test_a_text_with_too_few_targets_is_refused_with_a_working_cure(make_shards, lengths, unknown, reason, cure):
    folder = make_shards(lengths)
    make_unknown(folder, unknown)
    sizes = {"tokens": 256, "length": 64, "seed": 0}
    with pytest.raises(DataError, match=reason) as caught:
        Packs(Shards.open(folder), **sizes, targets=200)
    sentence = str(caught.value)
    assert re.search(cure, sentence.rpartition("padding. ")[2])
    if ratio := re.search(r"`masking.ratio` at (0\.\d+) or below", sentence):
        packs = Packs(Shards.open(folder), **sizes, targets=round(float(ratio[1]) * 256))
        assert all(int(packs.batch(number).maskable.sum()) >= packs.targets for number in range(len(packs)))
    assert bool(ratio) == (not unknown)


def test_an_index_without_the_counts_is_completed(make_shards):
    folder = make_shards(LENGTHS)
    made = Packs(Shards.open(folder), tokens=128, length=48, seed=0)
    counts = next((folder / "packs").glob("*/maskable.npy"))
    hashes = json.loads((counts.parent / "hashes.json").read_text())
    del hashes["maskable"]
    (counts.parent / "hashes.json").write_text(json.dumps(hashes))
    counts.unlink()
    again = Packs(Shards.open(folder), tokens=128, length=48, seed=0, targets=30)
    assert counts.is_file()
    assert torch.equal(again.batch(3).tokens, made.batch(3).tokens)


def test_the_index_is_stored_and_a_damaged_one_replaced(make_shards, monkeypatch):
    folder = make_shards(LENGTHS)
    made = Packs(Shards.open(folder), tokens=128, length=48, seed=0)
    first = next((folder / "packs").glob("*/first.npy"))
    whole = first.read_bytes()
    flipped = bytearray(next((folder / "packs").glob("*/starts.npy")).read_bytes())
    flipped[-8] ^= 1
    for name, bad in (("first.npy", whole[:-8]), ("starts.npy", bytes(flipped)), ("hashes.json", b"[")):
        (first.parent / name).write_bytes(bad)
        again = Packs(Shards.open(folder), tokens=128, length=48, seed=0)
        assert torch.equal(again.batch(3).tokens, made.batch(3).tokens)
        assert first.read_bytes() == whole and (first.parent / name).read_bytes() != bad
    # a read-only folder is not an obstacle
    monkeypatch.setattr(index, "save_array", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    Packs(Shards.open(folder), tokens=256, length=48, seed=0).batch(0)
    assert not list((folder / "packs").glob("*-256-48-*"))


def test_only_rank_0_stores_the_index(make_shards, monkeypatch):
    folder = make_shards(LENGTHS)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    other = Packs(Shards.open(folder), tokens=128, length=48, seed=0)
    assert not (folder / "packs").exists()
    monkeypatch.setenv("RANK", "0")
    first = Packs(Shards.open(folder), tokens=128, length=48, seed=0)
    assert list((folder / "packs").iterdir())
    assert torch.equal(first.batch(3).tokens, other.batch(3).tokens)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 120))
def test_best_fit_is_best_fit(rows, capacity):
    """Against the definition, piece by piece: the same rooms are left."""
    rooms: list[int] = []
    for size in sorted(rows, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= size]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda number: rooms[number])] -= size
    pack = best_fit(np.array(rows), capacity)
    assert sorted(capacity - np.bincount(pack, weights=rows)) == sorted(rooms)


@pytest.mark.parametrize(("tokens", "length"), [(128, 128), (512, 512), (1024, 1024), (8192, 512)])
def test_packs_are_full(make_shards, tokens, length):
    rng = np.random.default_rng(1)
    lengths = rng.lognormal(np.log(300), 1.2, 2000).astype(int) + 1
    packs = Packs(Shards.open(make_shards(lengths)), tokens=tokens, length=length, seed=0)
    assert packs.fill >= 0.99
    rows = np.mean([(packs.batch(n).tokens != packs.token_ids.pad).float().mean() for n in range(len(packs))])
    assert packs.fill == pytest.approx(rows, rel=1e-5)


def test_sidecars_come_with_their_tokens(make_shards, documents_of):
    folder = make_shards(LENGTHS, shard_tokens=1500)
    shards = Shards.open(folder)
    plain = Packs(shards, tokens=128, length=48, seed=0)
    write_sidecar(folder, "entropy", "train", [(part % 251).astype(np.uint8) for part in shards.parts])
    beside = Packs(Shards.open(folder), tokens=128, length=48, seed=0)
    for number in range(len(plain)):
        batch = beside.batch(number)
        assert batch.tags is None
        assert torch.equal(batch.tokens, plain.batch(number).tokens)
        assert torch.equal(batch.entropy.long(), torch.where(batch.maskable, batch.tokens % 251, 0))


def test_an_id_outside_the_vocabulary_is_named(make_shards):
    folder = make_shards([126] * 10)
    Packs(Shards.open(folder), tokens=128, length=128, seed=0)  # leaves its index behind
    file = folder / "train-00000.tokens.npy"
    damaged = np.load(file)
    damaged[123] = 300
    np.save(file, damaged)
    packs = Packs(Shards.open(folder), tokens=128, length=128, seed=0)
    sentence = r"train-00000\.tokens\.npy contains the id 300 at token 123, .* has 300\."
    with pytest.raises(DataError, match=sentence):
        for number in range(len(packs)):
            packs.batch(number)
    with pytest.raises(DataError, match=sentence):  # without an index it is found at once
        Packs(Shards.open(folder), tokens=256, length=128, seed=0)


@pytest.mark.parametrize(
    ("lengths", "tokens", "length", "error", "sentence"),
    [
        ([20, 30], 64, 32, DataError, "has 50 tokens in the split 'train', fewer than one pack of 64"),
        ([70] * 1000, 128, 128, DataError, "70000 of 70000 tokens would be left out"),
        ([70] * 10, 64, 128, ConfigError, "`tokens` must lie between the length of a sequence"),
        ([70] * 10, 64, 2, ConfigError, "`length` must be at least 3"),
    ],
)
def test_a_text_that_cannot_be_packed_is_refused(make_shards, lengths, tokens, length, error, sentence):
    with pytest.raises(error, match=sentence):
        Packs(Shards.open(make_shards(lengths)), tokens=tokens, length=length, seed=0)


def test_too_little_text_for_validation_names_the_share(make_shards):
    folder = make_shards([50] * 100, valid=(20, 30))
    with pytest.raises(DataError, match=r"50 tokens in the split 'valid', fewer than one pack of 64\. .*valid-share"):
        Packs(Shards.open(folder, "valid"), tokens=64, length=32, seed=0)


def test_a_step_with_views_has_each_text_several_times(make_shards):
    shards = Shards.open(make_shards([62] * 160))
    sizes = {"tokens": 256, "length": 64, "seed": 0}
    plain, viewed = Packs(shards, **sizes), Packs(shards, **sizes, per_step=6, masks_per_text=3)
    for step in range(3):
        texts = [viewed.batch(6 * step + place).source_pack for place in range(6)]
        assert sorted(texts) == sorted(3 * [2 * step, 2 * step + 1])
        # ranks that take every second pack of the step meet the same texts again
        assert texts[0::2] == 3 * texts[:1]
        for place, text in enumerate(texts):
            batch = viewed.batch(6 * step + place)
            assert batch.number == 6 * step + place
            assert torch.equal(batch.tokens, plain.batch(text).tokens)


def test_a_shard_of_another_size_is_found_at_the_next_epoch(make_shards):
    folder = make_shards(LENGTHS)
    packs = Packs(Shards.open(folder), tokens=256, length=64, seed=0)
    packs.batch(0)
    file = folder / "train-00000.tokens.npy"
    size = file.stat().st_size
    with file.open("ab") as opened:
        opened.write(b"x")  # to cut it would kill a process that reads beyond its end
    packs.batch(len(packs) - 1)
    sentence = rf"was changed during the run: .*tokens\.npy has {size + 1:,} bytes, but {size:,} were written"
    with pytest.raises(DataError, match=sentence):
        packs.batch(len(packs))
