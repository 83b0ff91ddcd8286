"""Pseudo-log-likelihoods equal those that transformers gives one sentence and one [MASK] at a time."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from megamask.evaluation import pseudo_log_likelihood as pll
from megamask.teacher.frozen_lm import read_masked_lm
from tests.tolerances import NATS
from tests.unit.evaluation.masked_models import FAMILIES, SENTENCES, save_model, small_tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    return save_model(request.param, small_tokenizer(), tmp_path_factory.mktemp(request.param)).folder


def scores(folder, sentences, variant):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenized = pll.tokenize_sentences(tokenizer, sentences)
    wanted = [pll.masked_tokens(sentence, variant, tokenizer.mask_token_id) for sentence in tokenized]
    distinct = {token for tokens in wanted for token in tokens}
    return pll.sentence_scores(wanted, pll.log_probabilities(read_masked_lm(folder, "model"), distinct))


@torch.no_grad()
def one_by_one(folder, sentence, variant):
    """The definition, in 64 bits: one forward pass of transformers for each token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).double().eval()
    encoded = tokenizer(sentence)
    ids, words, total = encoded["input_ids"], encoded.word_ids(), 0.0
    for position, word in enumerate(words):
        if word is None:
            continue
        masked = list(ids)
        for later in range(position, len(ids)):
            if later == position or (variant == "within_word" and words[later] == word):
                masked[later] = tokenizer.mask_token_id
        total += model(input_ids=torch.tensor([masked])).logits[0, position].log_softmax(-1)[ids[position]].item()
    return total


@pytest.mark.parametrize("variant", pll.VARIANTS)
def test_scores_are_sums_of_one_forward_pass_for_each_token(folder, variant):
    expected = [one_by_one(folder, sentence, variant) for sentence in SENTENCES]
    assert scores(folder, SENTENCES, variant) == pytest.approx(expected, abs=NATS)


def test_scores_do_not_depend_on_the_order_of_sentences(folder):
    shuffled = random.sample(SENTENCES, len(SENTENCES))
    by_sentence = dict(zip(shuffled, scores(folder, shuffled, "original"), strict=True))
    assert scores(folder, SENTENCES, "original") == [by_sentence[sentence] for sentence in SENTENCES]


def test_a_word_of_one_token_has_one_input_in_both_variants():
    sentence = pll.TokenizedSentence((2, 7, 8, 9, 3), (True, False, False, False, True), (None, 0, 1, 1, None))
    original, within = (pll.masked_tokens(sentence, variant, 4) for variant in pll.VARIANTS)
    assert [token.inputs for token in original] == [(2, 4, 8, 9, 3), (2, 7, 4, 9, 3), (2, 7, 8, 4, 3)]
    assert [token.inputs for token in within] == [(2, 4, 8, 9, 3), (2, 7, 4, 4, 3), (2, 7, 8, 4, 3)]
    assert [(token.position, token.target) for token in within] == [(1, 7), (2, 8), (3, 9)]


@pytest.mark.parametrize(("variant", "theirs"), [("original", "original"), ("within_word", "within_word_l2r")])
def test_scores_equal_those_of_minicons(folder, variant, theirs, monkeypatch):
    minicons = pytest.importorskip("minicons.scorer")
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    # minicons 0.3.39 calls a method that transformers 5 removed
    monkeypatch.setattr(type(tokenizer), "batch_encode_plus", type(tokenizer).__call__, raising=False)
    scorer = minicons.MaskedLMScorer(model, "cpu", tokenizer=tokenizer)
    expected = scorer.sequence_score(SENTENCES, reduction=lambda log_p: log_p.sum().item(), PLL_metric=theirs)
    assert scores(folder, SENTENCES, variant) == pytest.approx(expected, rel=0, abs=1e-4)
