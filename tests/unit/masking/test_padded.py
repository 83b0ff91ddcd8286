"""The hook alone: padded batches of a custom loop, compared with that loop written by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from megamask.data import tokenizer as tokenizers
from megamask.data import tokenizer_training
from megamask.data.word_boundaries import word_starts
from megamask.errors import DataError
from megamask.hf import to_fast_tokenizer
from megamask.masking.corrupt import Corruption
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.padded import losses_at, pack_padded, pad_plan
from megamask.masking.rng import PackRng
from megamask.schedules import Schedule
from tests.batches import IDS
from tests.tolerances import assert_close

LENGTHS = [9, 3, 12, 7, 12, 1]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs and some water."]


def padded(side="right", width=12, seed=0):
    """Sequences of LENGTHS with special tokens at both ends, padded on one side."""
    draws = torch.Generator().manual_seed(seed)
    input_ids = torch.full((len(LENGTHS), width), IDS.pad)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        sequence = torch.randint(len(IDS.special), IDS.size, (length,), generator=draws)
        sequence[0], sequence[-1] = IDS.cls, IDS.sep
        place = slice(0, length) if side == "right" else slice(width - length, width)
        input_ids[row, place], mask[row, place] = sequence, 1
    return input_ids, mask


def uniform(ratio=0.3):
    return Masker(MaskingConfig(Schedule(start=ratio), corruption=Corruption(1.0, 0.0, 0.0)), IDS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_run_of_tokens_is_a_sequence_and_padding_is_never_masked(side):
    input_ids, mask = padded(side)
    batch = pack_padded(input_ids, mask, IDS, 0)
    assert torch.equal(batch.tokens.view(input_ids.shape), input_ids)
    for row, length in enumerate(LENGTHS):  # by hand
        places = torch.arange(row * 12, row * 12 + 12)
        here, there = places[mask[row] == 1], places[mask[row] == 0]
        assert len(batch.layout.sequence[here].unique()) == 1
        assert batch.layout.positions[here].tolist() == list(range(length))
        assert not set(batch.layout.sequence[here].tolist()) & set(batch.layout.sequence[there].tolist())
        assert batch.maskable[here].tolist() == [0 < n < length - 1 for n in range(length)]
        assert not batch.maskable[there].any()
    assert int(batch.layout.lengths.sum()) == input_ids.numel()
    assert int(batch.layout.lengths.max()) <= batch.layout.max_seqlen


def test_the_side_of_the_padding_does_not_change_the_mask():
    plans = [uniform()(pack_padded(*padded(side), IDS, 5), progress=0, rng=PackRng(0, 5)) for side in ("left", "right")]
    masked = []
    for side, plan in zip(("left", "right"), plans, strict=True):
        mask = padded(side)[1].bool()
        shown = pad_plan(plan, (6, 12))
        masked.append([shown[0][row][mask[row]].tolist() for row in range(6)])
    assert sorted(map(len, masked[0])) == sorted(LENGTHS)
    counts = [[sum(token == IDS.mask for token in row) for row in rows] for rows in masked]
    assert sum(counts[0]) == sum(counts[1]) == len(plans[0].targets)


def test_the_ratio_may_be_one_of_the_real_tokens():
    input_ids, mask = padded(width=40)
    batch, real = pack_padded(input_ids, mask, IDS, 0), int(mask.sum())
    plan = uniform(0.25)(batch, progress=0, rng=PackRng(0, 0), rows=real)
    assert len(plan.targets) == round(0.25 * real)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_bert_is_the_cross_entropy_at_the_targets(side):
    sizes = {"vocab_size": IDS.size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 12, "initializer_range": 0.5}
    model = BertForMaskedLM(BertConfig(**sizes, pad_token_id=IDS.pad)).eval()
    input_ids, mask = padded(side)
    masker = Masker(MaskingConfig(Schedule(start=0.3), "word", "entropy", random_share=Schedule(start=0.2)), IDS)
    batch = pack_padded(input_ids, mask, IDS, 3, torch.rand(6, 12) < 0.6)
    with torch.no_grad():
        clean = model(input_ids=input_ids, attention_mask=mask).logits.log_softmax(-1)
        entropy = -(clean.exp() * clean).sum(-1).flatten()
        plan = masker(batch, progress=0.5, rng=PackRng(0, 3), entropy=entropy, rows=int(mask.sum()))
        inputs, labels = pad_plan(plan, (6, 12))
        out = model(input_ids=inputs, attention_mask=mask, labels=labels)
    expected = cross_entropy(out.logits.view(-1, IDS.size)[plan.targets], batch.tokens[plan.targets])
    assert_close(out.loss, expected)
    losses = losses_at(out.logits, plan)
    assert_close(losses.total / len(plan.targets), out.loss)
    p = torch.distributions.Categorical(logits=out.logits.double().flatten(0, 1)[plan.targets])
    assert_close(losses.entropy, p.entropy())
    assert_close(losses.nll, -p.log_prob(plan.labels))
    assert torch.equal(losses.correct, p.logits.argmax(-1) == plan.labels)
    # and by the plainest loop: what differs from the text is a target, every target's label is the text
    for row in range(6):
        for place in range(12):
            if inputs[row, place] != input_ids[row, place]:
                assert labels[row, place] == input_ids[row, place]
            assert labels[row, place] in (-100, int(input_ids[row, place]))
            assert mask[row, place] or labels[row, place] == -100
    assert int((labels != -100).sum()) == len(plan.targets) == round(0.3 * int(mask.sum()))


def test_shapes_that_do_not_fit_are_named():
    input_ids, mask = padded()
    with pytest.raises(DataError, match=r"attention_mask.*\(6, 11\)"):
        pack_padded(input_ids, mask[:, 1:].clone(), IDS, 0)


def test_a_converted_tokenizer_of_transformers_equals_ours(tmp_path):
    ours = tokenizer_training.train_tokenizer("wordpiece", TEXTS * 5, size=90)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    converted = to_fast_tokenizer(theirs)
    assert tokenizers.token_ids(converted) == tokenizers.token_ids(ours)
    assert (word_starts(converted) == word_starts(ours)).all()
    # and the words are those that transformers finds itself
    encoded = theirs(TEXTS, padding=True, return_tensors="pt")
    starts = torch.from_numpy(word_starts(converted))[encoded["input_ids"]]
    for row, text in enumerate(TEXTS):
        words = encoded.word_ids(row)
        assert [bool(s) for s, word in zip(starts[row], words, strict=True) if word is not None] == [
            word != before for before, word in zip([None, *words], words, strict=False) if word is not None
        ], text
