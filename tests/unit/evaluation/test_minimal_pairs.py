"""Pairs are decided by the scores, ties count half, and each paradigm has the same weight."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.errors import CheckpointError, DataError
from megamask.evaluation import minimal_pairs as pairs
from megamask.evaluation.settings import EvaluateConfig
from megamask.evaluation.tasks import TASKS, Examples, TaskData
from tests.unit.evaluation.masked_models import save_model, small_tokenizer

TEXTS = (
    ("The cats break all.", "The cats breaks all."),
    ("What could a fox find?", "What find could a fox?"),
    ("The dog jumps over the box.", "The dog jump over the box."),
    ("Some cats jump.", "Some cats jumps."),
    ("The lazy dog.", "The dog lazy."),
)
GROUPS = ("verb", "order", "verb", "verb", "order")


@pytest.fixture
def model(tmp_path):
    return save_model("bert", small_tokenizer(), tmp_path / "model")


def blimp(texts, groups):
    none = Examples((), np.zeros(0))
    return TaskData(TASKS["blimp"], none, Examples(tuple(texts), np.ones(len(texts)), (), tuple(groups)))


def change(model, edit):
    """``edit`` the tensors of the model in place."""
    path = model.folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_accuracy_is_the_mean_over_paradigms_and_a_tie_is_half():
    scores = np.array([[-1.0, -2.0], [-2.0, -1.0], [-3.0, -3.0], [-1.0, -5.0]])
    outcome = pairs.pair_outcome(scores, ("a", "a", "a", "b"))
    assert outcome.predictions.tolist() == [1, 0, 0.5, 1]
    assert outcome.scores == {"pair_accuracy": (0.5 + 1) / 2}
    assert outcome.metrics["paradigm/a"] == 0.5 and outcome.metrics["paradigm/b"] == 1 and outcome.metrics["ties"] == 1
    assert not outcome.collapsed


def test_swapped_sentences_swap_the_decision(model):
    there = pairs.score_pairs(model, blimp(TEXTS, GROUPS), EvaluateConfig())
    back = pairs.score_pairs(model, blimp([texts[::-1] for texts in TEXTS], GROUPS), EvaluateConfig())
    for variant in ("original", "within_word"):
        np.testing.assert_array_equal(back[variant].predictions, 1 - there[variant].predictions)


def test_decisions_do_not_depend_on_the_order_of_pairs(model):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    straight = pairs.score_pairs(model, blimp(TEXTS, GROUPS), EvaluateConfig())
    mixed = pairs.score_pairs(model, blimp([TEXTS[n] for n in order], [GROUPS[n] for n in order]), EvaluateConfig())
    for variant, outcome in mixed.items():
        np.testing.assert_array_equal(outcome.predictions, straight[variant].predictions[order])


def test_a_constant_scorer_gets_half_of_the_pairs(model):
    change(model, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    # as many tokens in both sentences, so that the sums of a constant are equal
    order = [n for n, group in enumerate(GROUPS) if group == "order"]
    outcome = pairs.score_pairs(model, blimp([TEXTS[n] for n in order], ["order"] * 2), EvaluateConfig())["original"]
    assert outcome.scores == {"pair_accuracy": 0.5} and outcome.metrics["ties"] == 2
    assert "ties" in outcome.collapsed


def test_a_scorer_that_counts_words_ties_on_other_orders_of_the_same_words(model):
    def only_frequencies(tensors):
        for name, tensor in tensors.items():
            if name == "cls.predictions.bias":
                tensor.copy_(torch.randn_like(tensor))
            else:
                tensor.zero_()

    change(model, only_frequencies)
    outcome = pairs.score_pairs(model, blimp(TEXTS, GROUPS), EvaluateConfig())["original"]
    assert outcome.metrics["paradigm/order"] == 0.5 and outcome.metrics["ties"] == 2 and not outcome.collapsed


def test_the_first_pairs_of_each_paradigm_are_taken(model):
    some = pairs.score_pairs(model, blimp(TEXTS, GROUPS), EvaluateConfig(max_pairs=1))
    same = pairs.score_pairs(model, blimp(TEXTS[:2], GROUPS[:2]), EvaluateConfig())
    for variant, outcome in some.items():
        np.testing.assert_array_equal(outcome.predictions, same[variant].predictions)
        assert outcome.metrics == same[variant].metrics


def test_inputs_of_both_sentences_are_shared(model):
    """Where one token differs, its [MASK] input is the same; a pair of equal sentences costs as much as one."""
    texts = [("The lazy dog.", "The lazy dog.")]
    outcome = pairs.score_pairs(model, blimp(texts, ["same"]), EvaluateConfig())["original"]
    assert outcome.metrics["ties"] == 1
    assert 2 * outcome.metrics["inputs"] >= outcome.metrics["tokens"] > outcome.metrics["inputs"]


def test_overflow_counts_as_a_tie_and_a_collapse(model):
    change(model, lambda tensors: tensors["cls.predictions.transform.dense.bias"].fill_(3e38))
    outcome = pairs.score_pairs(model, blimp(TEXTS, GROUPS), EvaluateConfig())["original"]
    assert "NaN or Inf" in outcome.collapsed and outcome.metrics["not_finite"] == len(TEXTS)
    assert outcome.scores == {"pair_accuracy": 0.5}


def test_sentences_that_are_too_long_are_refused(model):
    with pytest.raises(DataError, match=r"2 of 4 sentences have more tokens .* takes 64"):
        long = "The quick brown fox. " * 20
        pairs.score_pairs(model, blimp([TEXTS[0], (long, long)], ["a", "b"]), EvaluateConfig())


def test_a_tokenizer_without_a_mask_token_is_refused(model):
    path = model.folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": None}))
    with pytest.raises(CheckpointError, match="no mask token"):
        pairs.score_pairs(model, blimp(TEXTS, GROUPS), EvaluateConfig())
