"""The cache: what the loss said comes back an epoch later, whoever was killed in between and however many ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megamask.batch import Layout, PackedBatch
from megamask.entropy.cache import FIRST, UNKNOWN, Cache
from megamask.entropy.frequency import unigram_surprisal
from megamask.entropy.sidecar import from_bytes, to_bytes, top_of
from megamask.errors import CheckpointError, StorageError
from tests.batches import IDS
from tests.unit.entropy.models import counts, losses, plan_of, settle_together

ROWS, LENGTH = 12, 5
"""Rows of a pack, of which ten are text; packs of an epoch."""
TOP = top_of("shannon", IDS.size)


class Text:
    """A text of LENGTH packs of ten tokens, each epoch in another order; the tokens stand in a stream."""

    def __init__(self, per_step: int, views: int = 1):
        self.per_step, self.views, self.shards = per_step, views, self
        self.tokens, self.unigram = LENGTH * 10, counts().numpy()
        draws = torch.Generator().manual_seed(0)
        self.stream = torch.randint(len(IDS.special), IDS.size, (LENGTH * 10,), generator=draws)

    def __len__(self) -> int:
        return LENGTH

    def text_of(self, number: int) -> int:
        step, place = divmod(number, self.per_step)
        texts = self.per_step // self.views
        return step * texts + place % texts

    def places(self, number: int) -> torch.Tensor:
        epoch, place = divmod(self.text_of(number), LENGTH)
        pack = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(epoch))[place]
        return torch.cat([torch.tensor([-1]), torch.arange(10) + 10 * pack, torch.tensor([-1])])

    def batch(self, number: int) -> PackedBatch:
        places = self.places(number)
        tokens = torch.where(places >= 0, self.stream[places], IDS.cls)
        layout = Layout(torch.tensor([0, ROWS]).int(), ROWS, torch.arange(ROWS).int())
        maskable = places >= 0
        return PackedBatch(number, tokens, layout, maskable, maskable, source_pack=self.text_of(number))


def make(folder: Path, per_step: int = 2, views: int = 1) -> Cache:
    return Cache(Text(per_step, views), folder, "shannon")


def say(cache: Cache, number: int):
    """A pack, its plan and what the loss said: functions of the number and of what the cache says of the pack."""
    batch = cache.packs.batch(number)
    known = cache([batch])[0]
    draws = torch.Generator().manual_seed(number)
    # some of the choice hangs on the cache: what is read wrongly after a resume changes what is written
    score = torch.rand(ROWS, generator=draws) + 0.1 * known
    targets = score.masked_fill(~batch.maskable, -1).topk(4).indices.sort().values
    entropy = (torch.rand(4, generator=draws) + 0.1 * known[targets]).clamp(0, TOP)
    plan = plan_of(batch, targets)
    return batch, plan, losses(plan, entropy)


def alone(message):
    return message.clone()


def run(cache: Cache, first: int, last: int, record: dict | None = None) -> Cache:
    per_step = cache.packs.per_step
    for step in range(first, last):
        said = [say(cache, number) for number in range(step * per_step, (step + 1) * per_step)]
        for one in said:
            cache.update(*one)
            if record is not None:
                for place, value in zip(
                    cache.packs.places(one[0].number)[one[1].targets].tolist(), one[2].entropy, strict=True
                ):
                    record[place] = float(from_bytes(to_bytes(value, TOP, FIRST), TOP, FIRST))
        cache.sync(alone)
    return cache


def held(cache: Cache) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold."""
    return {name: value.clone() for name, value in cache.state_dict().items()}


def read(cache: Cache, number: int) -> torch.Tensor:
    return cache([cache.packs.batch(number)])[0]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_the_loss_said_comes_back_in_the_next_epoch(tmp_path):
    record: dict[int, float] = {}
    cache = run(make(tmp_path / "cache", per_step=5), 0, 1, record)
    for number in range(5, 10):
        places, found = cache.packs.places(number), read(cache, number)
        for place, value in zip(places.tolist(), found.tolist(), strict=True):
            if place in record:
                assert value == pytest.approx(record[place])
    assert len(record) == 20


def test_nothing_of_the_epoch_itself_is_read(tmp_path):
    cache = run(make(tmp_path / "cache", per_step=1), 0, 1)
    fresh = make(tmp_path / "other", per_step=1)
    fresh._sums, fresh._counts = cache._sums, cache._counts
    assert torch.equal(read(cache, 0), read(fresh, 0))


def test_what_was_seen_longer_ago_is_not_forgotten(tmp_path):
    record: dict[int, float] = {}
    cache = run(make(tmp_path / "cache", per_step=5), 0, 4, record)
    known = np.frombuffer((tmp_path / "cache" / "epoch-00003.bytes").read_bytes(), np.uint8)
    assert {place for place in range(50) if known[place] != UNKNOWN} == set(record)
    assert len(record) > 20  # more than one epoch shows
    pairs = (zip(cache.packs.places(n).tolist(), read(cache, n).tolist(), strict=True) for n in range(20, 25))
    found = {place: value for pair in pairs for place, value in pair}
    assert {p: found[p] for p in record} == pytest.approx(record)


@pytest.mark.parametrize(("per_step", "views"), [(1, 1), (2, 1), (3, 1), (5, 1), (12, 1), (4, 2)])
@pytest.mark.parametrize(("at", "lost"), [(1, 4), (2, 1), (3, 4), (5, 2), (6, 0)])
def test_kill_and_resume_are_bit_for_bit(tmp_path, per_step, views, at, lost):
    whole = run(make(tmp_path / "whole", per_step, views), 0, 12)
    before = run(make(tmp_path / "killed", per_step, views), 0, at)
    state = held(before)
    run(before, at, at + lost)  # steps after the checkpoint: what they wrote is there, and is not gone on from
    del before
    resumed = make(tmp_path / "killed", per_step, views)
    resumed.load_state_dict(state)
    run(resumed, at, 12)
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_two_ranks_are_one_and_the_first_alone_writes(tmp_path, monkeypatch):
    answers = []

    def be(rank: int) -> None:
        def by_main(act):
            if rank == 0:
                answers.append(act())
                return answers[-1]
            return answers.pop(0)

        monkeypatch.setattr("megamask.runtime.ranks.is_main", lambda: rank == 0)
        monkeypatch.setattr("megamask.runtime.ranks.on_rank_zero", by_main)

    one = make(tmp_path / "one", per_step=4)
    parts = [make(tmp_path / "two", per_step=4) for _ in range(2)]
    for step in range(6):
        numbers = range(4 * step, 4 * step + 4)
        said = {number: say(one, number) for number in numbers}
        for number in numbers:
            one.update(*said[number])
            assert torch.equal(read(one, number), read(parts[number % 2], number))
            parts[number % 2].update(*said[number])
        one.sync(alone)
        messages = [torch.zeros(4, 4, 2, dtype=torch.int64) for _ in parts]
        for part, message in zip(parts, messages, strict=True):
            for number, rows in part._rows:
                message[number % 4] = rows
        settle_together(parts, messages, be)
        monkeypatch.undo()
    assert files(tmp_path / "one") == files(tmp_path / "two")
    first, second = (part.state_dict() for part in parts)
    assert torch.equal(one.state_dict()["seen"], first["seen"]) and "seen" not in second
    for name, value in second.items():
        assert torch.equal(value, first[name]) and torch.equal(value, one.state_dict()[name])


def test_before_anything_was_seen_rare_tokens_come_first(tmp_path):
    cache = make(tmp_path / "cache")
    batch = cache.packs.batch(0)
    found = read(cache, 0)
    assert torch.equal(found.argsort(stable=True), unigram_surprisal(counts())[batch.tokens].argsort(stable=True))
    assert (found >= 0).all() and (found <= TOP).all()


@pytest.mark.parametrize("measure", ["shannon", "margin", "loss"])
def test_the_rarest_token_is_the_least_sure_by_every_measure(tmp_path, measure):
    cache = Cache(Text(1), tmp_path / "cache", measure)
    batch = cache.packs.batch(0)
    order = unigram_surprisal(counts())[batch.tokens].argsort()
    assert (read(cache, 0)[order].diff() >= 0).all()


def test_a_token_never_seen_has_the_mean_of_its_type(tmp_path):
    cache = make(tmp_path / "cache", per_step=1)
    batch = cache.packs.batch(0)
    type_, targets = int(batch.tokens[1]), torch.tensor([1])
    for step in range(50):
        plan = plan_of(cache.packs.batch(step), targets)
        plan = type(plan)(plan.inputs, targets, torch.tensor([type_]), targets, plan.visible)
        cache.update(cache.packs.batch(step), plan, losses(plan, torch.tensor([0.5 * TOP])))
        cache.sync(alone)
    mean = (cache._sums + cache._guess) / (cache._counts + 1)
    found = float(from_bytes(mean[type_], TOP, FIRST))
    guess = float(from_bytes(cache._guess[type_], TOP, FIRST))
    # fifty observations against the one that rarity stands for; the oldest count 0.95
    assert abs(found - 0.5 * TOP) <= abs(guess - 0.5 * TOP) / 40 + TOP / 255
    others = torch.arange(IDS.size) != type_
    assert torch.equal(mean[others], cache._guess[others])


def test_old_files_go_when_no_checkpoint_needs_them(tmp_path):
    cache = run(make(tmp_path / "cache", per_step=5), 0, 6)
    state = held(cache)
    assert len(files(tmp_path / "cache")) == 7
    cache.prune(oldest=6)
    assert list(files(tmp_path / "cache")) == ["epoch-00005.bytes", "now.bytes"]
    resumed = make(tmp_path / "cache", per_step=5)
    resumed.load_state_dict(state)  # which is all a checkpoint of this step needs
    assert resumed.lost == ""
    cache.prune(oldest=0)
    assert len(files(tmp_path / "cache")) == 2


DAMAGES = {
    "gone": lambda whole: None,
    "shorter": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"\0",
    "zeros": lambda whole: bytes(len(whole)),
    **{f"bit {place}": lambda whole, place=place: _flipped(whole, place) for place in (0, 7, 199, 399)},
}


def _flipped(whole: bytes, place: int) -> bytes:
    changed = bytearray(whole)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_the_checkpoint_holds_is_read_in_the_place_of_a_damaged_file(tmp_path, damage):
    cache = run(make(tmp_path / "cache"), 0, 4)
    state = held(cache)
    path = tmp_path / "cache" / "epoch-00000.bytes"
    whole = path.read_bytes()
    changed = DAMAGES[damage](whole)
    path.unlink() if changed is None else path.write_bytes(changed)
    again = make(tmp_path / "cache")
    again.load_state_dict(state)
    assert f"{path} is" in again.lost and "no longer the same to the bit" in again.lost
    assert path.read_bytes() == bytes(state["seen"].tolist()) != whole
    # it is told once: what the next checkpoint holds is the hash of what is read now
    after = held(run(again, 4, 5))
    third = make(tmp_path / "cache")
    third.load_state_dict(after)
    assert third.lost == ""


def test_a_file_of_which_the_length_alone_is_looked_at_would_be_read(tmp_path, monkeypatch):
    state = held(run(make(tmp_path / "cache"), 0, 4))
    path = tmp_path / "cache" / "epoch-00000.bytes"
    monkeypatch.setattr("megamask.storage.durable.sha256", lambda path: bytes(state["hash"].tolist()).hex())
    path.write_bytes(_flipped(path.read_bytes(), 77))
    again = make(tmp_path / "cache")
    again.load_state_dict(state)
    assert again.lost == ""


def test_what_no_launch_has_finished_is_in_nobodys_way(tmp_path):
    whole = run(make(tmp_path / "whole"), 0, 6)
    state = held(run(make(tmp_path / "cache"), 0, 2))
    for name in (".epoch-00000.bytes", ".epoch-00001.bytes", "now.bytes"):
        (tmp_path / "cache" / name).write_bytes(b"half")
    resumed = make(tmp_path / "cache")
    resumed.load_state_dict(state)
    run(resumed, 2, 6)
    assert files(tmp_path / "whole") == files(tmp_path / "cache")
    assert torch.equal(whole.state_dict()["seen"], resumed.state_dict()["seen"])


def test_entropies_of_another_text_are_refused(tmp_path):
    state = held(run(make(tmp_path / "cache"), 0, 4))
    state["seen"] = state["seen"][:-1]
    with pytest.raises(CheckpointError, match="entropies of 49 tokens, but the text has 50"):
        make(tmp_path / "cache").load_state_dict(state)


def test_no_room_is_a_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match=r"need 50 bytes.*No space left"):
        run(make(tmp_path / "cache"), 0, 1)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    cache = run(make(tmp_path / "cache"), 0, 1)
    state, before = held(cache), files(tmp_path / "cache")
    monkeypatch.setattr("megamask.storage.durable.write_file", full)
    with pytest.raises(StorageError, match=r"need 50 bytes.*No space left"):
        run(cache, 1, 4)  # the second epoch begins
    assert files(tmp_path / "cache").keys() == before.keys()
    with pytest.raises(StorageError, match=r"need 50 bytes.*No space left"):
        make(tmp_path / "cache").load_state_dict(state)
