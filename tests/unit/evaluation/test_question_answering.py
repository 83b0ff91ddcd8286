"""Windows cover a context and keep its answers; the span layer learns where an answer is, with and without tuning."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megamask.errors import DataError
from megamask.evaluation import question_answering as qa
from megamask.evaluation import span_features, span_windows
from megamask.evaluation.encoder import EncoderFolder, load_encoder
from megamask.evaluation.settings import EvaluateConfig, FineTuningConfig
from megamask.evaluation.tasks import TASKS, Answer, Examples, TaskData
from tests.unit.evaluation.models import save_model, sentences

FAMILIES = ("bert", "modernbert", "roberta")
RECIPE = FineTuningConfig(learning_rate=3e-3, batch_size=8, epochs=1, min_updates=60, dropout=0.0)


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request, tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp(request.param), request.param)
    return EncoderFolder(request.param, Path(folder), "", 48)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return EncoderFolder("bert", Path(save_model(tmp_path_factory.mktemp("bert"))), "", 48)


def questions(count, seed=0, longest=60):
    """The answer is the words "jugs five", which occur once in a context."""
    texts, answers = [], []
    for context in sentences(count, seed, longest):
        words = context.replace("jugs", "dog").replace("five", "fox").split()
        at = np.random.default_rng(len(texts)).integers(0, len(words) + 1)
        before = " ".join([*words[:at], ""])
        texts.append(("how many jugs", before + " ".join(["jugs five", *words[at:]])))
        answers.append((Answer("jugs five", len(before)),))
    return Examples(tuple(texts), np.ones(count), tuple(answers))


def windows_of(encoder, examples, length=48):
    return span_windows.make_windows(
        AutoTokenizer.from_pretrained(encoder.folder), examples, length, token_types=encoder.label == "bert"
    )


def task(train=24, test=8):
    return TaskData(TASKS["squad"], questions(train, 1), questions(test, 2))


# ---- windows


def test_windows_hold_every_token_of_a_context_and_overlap(encoder):
    examples = questions(6)
    windows = windows_of(encoder, examples)
    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    assert len(windows) > len(examples) and max(windows.texts.lengths) <= 48
    for number, (_, context) in enumerate(examples.texts):
        of_example = np.flatnonzero(windows.example == number)
        parts = [windows.offsets[window][windows.context[window]] for window in of_example]
        for left, right in pairwise(parts):
            np.testing.assert_array_equal(left[-windows.overlap :], right[: windows.overlap])
        whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        np.testing.assert_array_equal(
            np.concatenate([parts[0], *(part[windows.overlap :] for part in parts[1:])]), whole
        )


def test_the_tokens_of_an_answer_cover_its_text(encoder):
    examples = questions(12)
    windows = windows_of(encoder, examples)
    tokens = span_windows.answer_tokens(windows, [answers[0] for answers in examples.answers])
    seen = set()
    for window, (first, last) in enumerate(tokens):
        number = windows.example[window]
        offsets = windows.offsets[window]
        text = examples.texts[number][1][offsets[first, 0] : offsets[last, 1]]
        if last:
            assert text.strip() == "jugs five"
            seen.add(number)
        else:  # at most a part of the answer is in this window
            inside = examples.texts[number][1][slice(*offsets[windows.context[window]][[0, -1], [0, 1]])]
            assert "jugs five" not in inside
    assert seen == set(range(12))


def test_long_questions_are_cut_and_counted(bert):
    examples = questions(2)
    long = ("how many jugs " * 20, examples.texts[1][1])
    windows = windows_of(bert, replace(examples, texts=(examples.texts[0], long)))
    assert windows.truncated_questions == 1
    assert max(windows.texts.lengths) <= 48 and all(context.any() for context in windows.context)


def test_the_best_span_is_that_of_all_pairs_of_tokens():
    rng = np.random.default_rng(0)
    for length in (3, 20, 45):
        start, end, context = rng.normal(size=length), rng.normal(size=length), rng.random(length) < 0.8
        spans = {
            (first, last): start[first] + end[last]
            for first in range(length)
            for last in range(first, min(first + span_windows.LONGEST_ANSWER, length))
            if context[first] and context[last]
        }
        assert span_windows.best_span(start, end, context)[:2] == max(spans, key=spans.__getitem__)


def test_the_prediction_is_the_best_span_over_all_windows(bert):
    examples = questions(6)
    windows = windows_of(bert, examples)
    tokens = span_windows.answer_tokens(windows, [answers[0] for answers in examples.answers])
    logits = [np.zeros((length, 2)) for length in windows.texts.lengths]
    for window, (first, last) in enumerate(tokens):
        logits[window][0] = 9  # the first token is never an answer
        if last:
            logits[window][first, 0] = logits[window][last, 1] = 1
    assert span_windows.predicted_answers(windows, examples, logits) == ["jugs five"] * 6


# ---- fine-tuning


def test_fine_tuning_learns_where_the_answer_is(encoder):
    outcome = qa.fine_tune_spans(encoder, task(), EvaluateConfig(fine_tuning=RECIPE), seed=1)
    untrained = replace(RECIPE, min_updates=1, learning_rate=1e-9)
    before = qa.fine_tune_spans(encoder, task(8), EvaluateConfig(fine_tuning=untrained), seed=1)
    assert outcome.scores["span_f1"] > 0.8 > before.scores["span_f1"] and not outcome.collapsed
    assert outcome.scores["span_f1"] == outcome.predictions.mean()
    assert outcome.metrics["updates"] == 60 and outcome.metrics["train_answers_in_no_window"] == 0


def test_equal_seeds_give_equal_weights_and_others_do_not(bert):
    train = qa._Training.of(AutoTokenizer.from_pretrained(bert.folder), questions(8), 48, True)
    recipe = replace(RECIPE, min_updates=3, dropout=0.1)
    first, second, other = (qa._train(bert, train, recipe, seed)[0].weights() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_the_learning_rate_does_not_depend_on_the_test_examples(bert):
    recipe = replace(RECIPE, learning_rate=None, learning_rates=(1e-9, 3e-3), min_updates=25)
    data = task(20, 4)
    metrics = [
        qa.fine_tune_spans(bert, replace(data, test=test), EvaluateConfig(fine_tuning=recipe), seed=1).metrics
        for test in (data.test, questions(2, 5))
    ]
    assert metrics[0]["learning_rate"] == metrics[1]["learning_rate"] == 3e-3


def test_a_loss_that_is_not_finite_is_a_collapse(bert):
    outcome = qa.fine_tune_spans(
        bert, task(8, 2), EvaluateConfig(fine_tuning=replace(RECIPE, learning_rate=1e30)), seed=1
    )
    assert "NaN or Inf" in outcome.collapsed and outcome.scores == {"exact_match": 0.0, "span_f1": 0.0}


# ---- the frozen encoder


def test_the_gradient_of_the_frozen_layer_is_that_of_autograd():
    rng = np.random.default_rng(0)
    states, layer = rng.normal(size=(9, 5)).astype(np.float32), rng.normal(size=(5, 2))
    features = span_features.SpanFeatures(states, np.array([0, 4]), np.array([[1, 2], [4, 8]]))
    weights = torch.tensor(layer, requires_grad=True)
    logits = torch.tensor(states).double() @ weights
    expected = [
        torch.nn.functional.cross_entropy(part[None], torch.tensor(target)[None])
        for part, target in ((logits[:4], [1, 2]), (logits[4:], [0, 4]))
    ]
    losses, by_logit = features.losses(layer)
    np.testing.assert_allclose(losses, [loss.item() for loss in expected], rtol=1e-5)
    sum(expected).backward()
    np.testing.assert_allclose(states.T @ by_logit, weights.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_the_frozen_layer_learns_where_the_answer_is(encoder):
    outcome = qa.frozen_spans(encoder, task(), EvaluateConfig(frozen=True))
    again = qa.frozen_spans(encoder, task(), EvaluateConfig(frozen=True))
    assert outcome.scores["span_f1"] > 0.8 and not outcome.collapsed
    np.testing.assert_array_equal(outcome.predictions, again.predictions)


def test_states_do_not_depend_on_the_batch(encoder):
    windows, model = windows_of(encoder, questions(5)), load_encoder(encoder)
    together = dict(span_features.window_states(model, windows))
    for number, ids in enumerate(windows.texts.ids):
        types = {"token_type_ids": torch.tensor([windows.texts.types[number]])} if windows.texts.types else {}
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids]), **types).last_hidden_state[0]
        np.testing.assert_allclose(together[number], alone.numpy(), rtol=1e-4, atol=2e-5)


def test_features_that_are_not_finite_are_a_collapse(bert):
    data = task(6, 2)
    train = qa._Training.of(AutoTokenizer.from_pretrained(bert.folder), data.train, 48, True)
    features = span_features.SpanFeatures.of(load_encoder(bert), train.windows, train.tokens)
    features.states[0, 0] = np.inf
    layer, _ = span_features.fit_span_layer(features, np.arange(len(train.windows)) == 0)
    assert not np.isfinite(layer).any()


def test_one_context_is_too_little_to_choose_a_penalty_on(bert):
    with pytest.raises(DataError, match="tenth of the training contexts, but squad has 1"):
        qa.frozen_spans(bert, task(1, 2), EvaluateConfig(frozen=True))
