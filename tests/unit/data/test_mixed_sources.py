"""The packs of a mixture are those of its sources, in the order of a plain loop, on any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megamask.data.loader import Loader
from megamask.data.lost_text.coverage import Coverage
from megamask.data.mixed_sources import MixedPacks, MixedShards, joined_fingerprint, one_tokenizer_problems
from megamask.data.mixture import SourceOrder, block_quotas
from megamask.data.packs import Packs
from megamask.data.shard_writer import write_sidecar
from megamask.data.shards import Shards
from megamask.errors import DataError
from megamask.masking.masker import Masker
from megamask.masking.rng import PackRng
from megamask.masking.settings import EntropyScoreConfig, MaskingConfig
from megamask.schedules import RunPhases, Schedule

SIZES = {"tokens": 128, "length": 48}
SHARES = (0.5, 0.3, 0.2)


@pytest.fixture
def sources(make_shards) -> dict[str, Shards]:
    """Three sources of different sizes, of which the last is read many times."""
    lengths = {"wiki": [60] * 40, "books": [14] * 150, "code": [30] * 12}
    return {name: Shards.open(make_shards(some, name=name)) for name, some in lengths.items()}


def mixed(sources: dict[str, Shards], *, per_step: int = 4, masks_per_text: int = 1) -> MixedPacks:
    packs = {name: Packs(shards, seed=3 + place, **SIZES) for place, (name, shards) in enumerate(sources.items())}
    shards = MixedShards.join(sources, SHARES)
    phases = RunPhases.single(per_step, masks_per_text=masks_per_text)
    return MixedPacks(shards, packs, SourceOrder(block_quotas(SHARES)), phases)


def test_packs_are_those_of_a_loop_over_all_numbers(sources: dict[str, Shards]) -> None:
    packs = mixed(sources)
    alone = [Packs(shards, seed=3 + place, **SIZES) for place, shards in enumerate(sources.values())]
    before = [0, 0, 0]
    for number in range(120):
        source = packs.order[number][0]
        batch, expected = packs.batch(number), alone[source].batch(before[source])
        assert torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.layout.positions, expected.layout.positions)
        assert (batch.number, batch.source_pack) == (number, number)
        before[source] += 1
        read = {name: count / len(each) for name, count, each in zip(sources, before, alone, strict=True)}
        assert packs.source_epochs(number + 1) == read
    assert before[2] > 2 * len(alone[2])  # the last source has begun again, each time in another order
    orders = [[alone[2].batch(n).tokens for n in range(k * len(alone[2]), (k + 1) * len(alone[2]))] for k in (0, 1)]
    epochs = [sorted(tokens.tolist() for tokens in order) for order in orders]
    assert epochs[0] == epochs[1]


def test_the_source_of_a_pack_is_that_of_its_text(sources: dict[str, Shards]) -> None:
    packs = mixed(sources, per_step=6, masks_per_text=3)
    for number in range(60):
        assert packs.source_of(number) == packs.order[packs.text_of(number)][0]
    assert packs.shares == packs.shares_at(17) == dict(zip(sources, SHARES, strict=True))


def test_all_packs_have_the_same_shapes(sources: dict[str, Shards]) -> None:
    packs = mixed(sources)
    assert len({tuple(packs.batch(number).layout.cu_seqlens.shape) for number in range(20)}) == 1


def test_two_ranks_read_what_one_reads(sources: dict[str, Shards]) -> None:
    one = [batch.tokens for batch in Loader(mixed(sources)).batches(range(40))]
    two = [[batch.tokens for batch in Loader(mixed(sources)).batches(range(rank, 40, 2))] for rank in range(2)]
    together = [tokens for pair in zip(*two, strict=True) for tokens in pair]
    assert all(torch.equal(a, b) for a, b in zip(one, together, strict=True))


def test_a_step_shows_each_text_as_often_as_it_has_views(sources: dict[str, Shards]) -> None:
    plain, viewed = mixed(sources), mixed(sources, per_step=6, masks_per_text=3)
    for number in range(24):
        batch = viewed.batch(number)
        assert batch.source_pack == viewed.text_of(number)
        assert torch.equal(batch.tokens, plain.batch(viewed.text_of(number)).tokens)
    assert viewed.source_epochs(24) == plain.source_epochs(8)


def test_counts_of_the_text_are_sums_and_shares(sources: dict[str, Shards]) -> None:
    text = mixed(sources).shards
    assert text.tokens == sum(shards.tokens for shards in sources.values())
    assert text.documents == sum(shards.documents for shards in sources.values())
    frequencies = [shards.unigram / shards.unigram.sum() for shards in sources.values()]
    expected = text.tokens * np.average(frequencies, axis=0, weights=SHARES)
    assert np.abs(text.unigram - expected).max() <= 0.5
    assert [text.sources, next(iter(sources.values())).sources] == [(*sources.values(),), (sources["wiki"],)]


def test_what_the_tokenizer_lost_is_summed_where_every_source_counted_it(sources: dict[str, Shards]) -> None:
    for number, shards in enumerate(sources.values(), 1):
        counts = Coverage(tokens=100, characters=300, unknown_tokens=number)
        shards.manifest["coverage"] = {"train": counts.record()} | ({"valid": counts.record()} if number > 1 else {})
    coverage = mixed(sources).shards.manifest["coverage"]
    assert coverage == {"train": Coverage(tokens=300, characters=900, unknown_tokens=6).record()}


def test_the_fingerprint_depends_only_on_the_texts_and_their_order(sources: dict[str, Shards]) -> None:
    wiki, books, code = sources.values()
    assert joined_fingerprint([wiki]) == wiki.fingerprint
    assert MixedShards.join({"other": wiki, "name": books}, (0.1, 0.9)).fingerprint == joined_fingerprint([wiki, books])
    assert len({joined_fingerprint(some) for some in ([wiki, books], [books, wiki], [wiki, code])}) == 3


def test_a_source_with_another_tokenizer_is_named(sources: dict[str, Shards], make_shards) -> None:
    assert one_tokenizer_problems(list(sources.values())) == []
    strange = Shards.open(make_shards([30] * 12, name="strange", vocabulary=290))
    first, problem, cure = one_tokenizer_problems([*sources.values(), strange])
    assert "must have one tokenizer" in first and str(strange.folder) in problem and "`megamask prepare" in cure


def test_sidecars_are_used_if_all_sources_have_them_alike(sources: dict[str, Shards]) -> None:
    def text() -> MixedShards:
        opened = {name: Shards.open(shards.folder) for name, shards in sources.items()}
        return MixedShards.join(opened, SHARES)

    def write(name: str, tags: list[str]) -> None:
        parts = [(part % 3).astype(np.uint8) for part in sources[name].parts]
        write_sidecar(sources[name].folder, "tags", "train", parts, {"tags": tags})

    assert text().sidecar_facts("tags") is None and text().sidecar("tags") is None
    write("wiki", ["NOUN", "VERB"])
    with pytest.raises(DataError, match=r"books, .*code have none"):
        text().sidecar_facts("tags")
    write("books", ["NOUN", "VERB"])
    write("code", ["NOUN", "VERB"])
    assert text().sidecar_facts("tags") == {"tags": ["NOUN", "VERB"]}
    assert sum(map(len, text().sidecar("tags") or ())) == text().tokens
    write("code", ["NOUN", "ADJ"])
    with pytest.raises(DataError, match="made in different ways"):
        text().sidecar_facts("tags")
    assert text().sidecar("tags") is None


@pytest.mark.parametrize("standardise", [True, False])
def test_entropies_move_no_masks_between_sources_or_documents(sources: dict[str, Shards], standardise: bool) -> None:
    """A pack has one source and an exact budget, of which each document gets its part, however unsure a model is."""
    packs = mixed(sources)
    config = MaskingConfig(
        Schedule(start=0.2),
        score="entropy",
        entropy=EntropyScoreConfig(standardise=standardise, temperature=0.0),
        random_share=Schedule(start=0.0),
    )
    masker = Masker(config, packs.token_ids)
    targets: Counter[int] = Counter()
    for number in range(60):
        batch, source = packs.batch(number), packs.source_of(number)
        # the second source is always harder than the first, the third harder than both, as are later documents
        draws = torch.rand(batch.layout.rows, generator=torch.Generator().manual_seed(number))
        entropy = 3.0 * source + 0.2 * batch.layout.sequence + 0.1 * draws
        plan = masker(batch, progress=0.0, rng=PackRng(1, number), entropy=entropy)
        assert len(plan.targets) == masker.budget(0.0, batch.layout.rows)
        documents = len(batch.layout.lengths)
        of_document = torch.bincount(batch.layout.sequence[batch.maskable], minlength=documents)
        chosen = torch.bincount(batch.layout.sequence[plan.targets], minlength=documents)
        fair = len(plan.targets) * of_document / of_document.sum()
        assert ((chosen - fair).abs() < 1 + 1e-4).all()
        targets[source] += len(plan.targets)
    packs_read = packs.order.counts(60)
    assert len({targets[source] / packs_read[source] for source in range(3)}) == 1
