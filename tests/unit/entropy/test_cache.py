"""The cache: what the loss said comes back an epoch later, whoever was killed in between and however many ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megamask.batch import Layout, PackedBatch
from megamask.entropy.cache import FIRST, UNKNOWN, Cache
from megamask.entropy.frequency import surprise
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
        return PackedBatch(number, tokens, layout, maskable, maskable, text=self.text_of(number))


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
            cache.observe(*one)
            if record is not None:
                for place, value in zip(
                    cache.packs.places(one[0].number)[one[1].targets].tolist(), one[2].entropy, strict=True
                ):
                    record[place] = float(from_bytes(to_bytes(value, TOP, FIRST), TOP, FIRST))
        cache.settle(alone)
    cache.flush()
    return cache


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
    state = {name: value.clone() for name, value in before.state_dict().items()}
    run(before, at, at + lost)  # steps after the checkpoint: their writes are there, and are written again
    del before
    resumed = make(tmp_path / "killed", per_step, views)
    resumed.load_state_dict(state)
    run(resumed, at, 12)
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_two_ranks_are_one_and_the_first_alone_writes(tmp_path, monkeypatch):
    def be(rank: int) -> None:
        monkeypatch.setattr("megamask.ranks.is_main", lambda: rank == 0)

    one = make(tmp_path / "one", per_step=4)
    parts = [make(tmp_path / "two", per_step=4) for _ in range(2)]
    for step in range(6):
        numbers = range(4 * step, 4 * step + 4)
        said = {number: say(one, number) for number in numbers}
        for number in numbers:
            one.observe(*said[number])
            assert torch.equal(read(one, number), read(parts[number % 2], number))
            parts[number % 2].observe(*said[number])
        one.settle(alone)
        messages = [torch.zeros(4, 4, 2, dtype=torch.int64) for _ in parts]
        for part, message in zip(parts, messages, strict=True):
            for number, rows in part._rows:
                message[number % 4] = rows
        settle_together(parts, messages, be)
        monkeypatch.undo()
    assert parts[1]._writer is None
    one.flush()
    parts[0].flush()
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name, value in one.state_dict().items():
        assert all(torch.equal(value, part.state_dict()[name]) for part in parts)


def test_before_anything_was_seen_rare_tokens_come_first(tmp_path):
    cache = make(tmp_path / "cache")
    batch = cache.packs.batch(0)
    found = read(cache, 0)
    assert torch.equal(found.argsort(stable=True), surprise(counts())[batch.tokens].argsort(stable=True))
    assert (found >= 0).all() and (found <= TOP).all()


@pytest.mark.parametrize("measure", ["shannon", "margin", "loss"])
def test_the_rarest_token_is_the_least_sure_by_every_measure(tmp_path, measure):
    cache = Cache(Text(1), tmp_path / "cache", measure)
    batch = cache.packs.batch(0)
    order = surprise(counts())[batch.tokens].argsort()
    assert (read(cache, 0)[order].diff() >= 0).all()


def test_a_token_never_seen_has_the_mean_of_its_type(tmp_path):
    cache = make(tmp_path / "cache", per_step=1)
    batch = cache.packs.batch(0)
    type_, targets = int(batch.tokens[1]), torch.tensor([1])
    for step in range(50):
        plan = plan_of(cache.packs.batch(step), targets)
        plan = type(plan)(plan.inputs, targets, torch.tensor([type_]), targets, plan.visible)
        cache.observe(cache.packs.batch(step), plan, losses(plan, torch.tensor([0.5 * TOP])))
        cache.settle(alone)
    mean = (cache._sums + cache._guess) / (cache._counts + 1)
    found = float(from_bytes(mean[type_], TOP, FIRST))
    guess = float(from_bytes(cache._guess[type_], TOP, FIRST))
    # fifty observations against the one that rarity stands for; the oldest count 0.95
    assert abs(found - 0.5 * TOP) <= abs(guess - 0.5 * TOP) / 40 + TOP / 255
    others = torch.arange(IDS.size) != type_
    assert torch.equal(mean[others], cache._guess[others])


def test_old_files_go_when_no_checkpoint_needs_them(tmp_path):
    cache = run(make(tmp_path / "cache", per_step=5), 0, 6)
    state = {name: value.clone() for name, value in cache.state_dict().items()}
    assert len(files(tmp_path / "cache")) == 7
    cache.prune(oldest=6)
    assert list(files(tmp_path / "cache")) == ["epoch-00005.bytes", "epoch-00006.bytes"]
    make(tmp_path / "cache", per_step=5).load_state_dict(state)  # which is all a checkpoint of this step needs
    cache.prune(oldest=0)
    assert len(files(tmp_path / "cache")) == 2


def test_missing_and_damaged_files_are_named(tmp_path):
    cache = run(make(tmp_path / "cache"), 0, 4)
    state = cache.state_dict()
    path = tmp_path / "cache" / "epoch-00001.bytes"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"epoch-00001.bytes.*has 49"):
        make(tmp_path / "cache").load_state_dict(state)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"epoch-00001.bytes.*is missing"):
        make(tmp_path / "cache").load_state_dict(state)


def test_no_room_is_a_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match=r"need 50 bytes.*No space left"):
        run(make(tmp_path / "cache"), 0, 1)
    assert not list((tmp_path / "cache").iterdir())
