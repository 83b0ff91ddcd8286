"""show-masks marks exactly the masked tokens and prints the entropies of the model."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertForMaskedLM

from megamask.__main__ import main
from megamask.analysis import show_masks as show
from megamask.data import shard_writer, tokenizer_training
from megamask.data.word_boundaries import encode_with_word_starts
from megamask.errors import DataError
from megamask.hf.predictions import sentence_entropies
from megamask.masking.entropy import EntropyScoreConfig
from tests.tolerances import assert_close

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs and some water."]


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request):
    return tokenizer_training.train_tokenizer(request.param, TEXTS * 5, size=300 if request.param == "bpe" else 90)


@pytest.fixture
def model(tokenizer, tmp_path) -> Path:
    """A folder of a random BERT with the tokenizer."""
    sizes = {"vocab_size": tokenizer.size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 40, "initializer_range": 0.5}
    BertForMaskedLM(BertConfig(**sizes, pad_token_id=0)).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def blocks(lines):
    """For each variant: its header, and the (tokens, marks, entropies) below it, line by line."""
    heads = [n for n, line in enumerate(lines) if line.endswith("tokens masked")]
    by_title = {}
    for head, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        below = lines[head + 1 : end - 1]  # an empty line follows
        by_title[lines[head]] = [below[n : n + 3] for n in range(0, len(below), 3)]
    return by_title


@pytest.mark.parametrize("width", [30, 200])
@pytest.mark.parametrize("text", TEXTS)
def test_every_variant_masks_exactly_the_budget(tokenizer, text, width):
    sentence = show.Sentence.of(text, tokenizer)
    rows = int(sentence.batch.maskable.sum())
    lines = show.render_masks(
        sentence, torch.rand(rows + 2), ratio=0.4, score=EntropyScoreConfig(temperature=0.0), seed=0, width=width
    )
    variants = blocks([line.plain for line in lines])
    assert len(variants) == 18
    for head, below in variants.items():
        assert head.endswith(f": {round(0.4 * rows)} of {rows} tokens masked")
        words = [word for tokens, _, _ in below for word in tokens.split()]
        marks = [mark for _, marks, _ in below for mark in marks.split()]
        assert words == sentence.words
        assert len(marks) == round(0.4 * rows)
        assert all(set(mark) == {"^"} for mark in marks)
        assert sum(len(doubts.split()) for _, _, doubts in below) == rows
        assert all(len(tokens) <= width for tokens, _, _ in below)


def test_strategy_high_marks_the_highest_entropies(tokenizer):
    sentence = show.Sentence.of(TEXTS[0], tokenizer)
    entropy = torch.rand(len(sentence.words)) * 9
    lines = show.render_masks(
        sentence, entropy, ratio=0.3, score=EntropyScoreConfig(temperature=0.0), seed=0, width=10_000
    )
    variants = blocks([line.plain for line in lines])
    ((_, marks, numbers),) = next(
        below for head, below in variants.items() if head.startswith("strategy high, unit token")
    )
    shown = {place: float(numbers[place:].split()[0]) for place in range(len(numbers)) if starts(numbers, place)}
    marked = [number for place, number in shown.items() if marks[place : place + 1] == "^"]
    others = [number for place, number in shown.items() if marks[place : place + 1] != "^"]
    assert min(marked) >= max(others)


def starts(line, place):
    return line[place] != " " and (place == 0 or line[place - 1] == " ")


def test_colors_agree_with_the_marks(tokenizer):
    sentence = show.Sentence.of(TEXTS[0], tokenizer)
    lines = list(
        show.render_masks(
            sentence, torch.rand(len(sentence.words)), ratio=0.3, score=EntropyScoreConfig(), seed=0, width=10_000
        )
    )
    for tokens, marks in zip(lines[1::5], lines[2::5], strict=True):
        coloured = [tokens.plain[span.start : span.end] for span in tokens.spans if span.style == show.MASKED]
        assert [len(word) for word in coloured] == [len(mark) for mark in marks.plain.split()]
    stream = io.StringIO()
    Console(file=stream, width=200, force_terminal=False).print(lines[1])
    assert "\x1b" not in stream.getvalue()


def test_entropies_equal_those_computed_by_hand(model, tokenizer):
    sentence = show.Sentence.of(TEXTS[0], tokenizer)
    tokens, bert = sentence.batch.tokens, BertForMaskedLM.from_pretrained(model).eval()
    for signal in ("clean", "masked"):
        entropies = sentence_entropies(model, tokens, sentence.ids.mask, signal)
        for place in range(len(tokens)):
            seen = tokens.clone()
            if signal == "masked":
                seen[place] = sentence.ids.mask
            with torch.no_grad():
                p = bert(input_ids=seen[None]).logits[0, place].double().softmax(0)
            assert_close(entropies[place], -(p * p.log()).sum().float())
    with pytest.raises(DataError, match="at most 40"):
        sentence_entropies(model, tokens.repeat(4), 4, "clean")
    with pytest.raises(DataError, match="do not belong together"):
        sentence_entropies(model, tokens + tokenizer.size, 4, "clean")


def test_the_output_matrix_is_applied_only_at_the_masked_position(model, tokenizer, monkeypatch):
    rows = []
    linear = torch.nn.functional.linear

    def counted(states, weight, *bias):
        if len(weight) == tokenizer.size:
            rows.append(states.shape[:-1].numel())
        return linear(states, weight, *bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    tokens = show.Sentence.of(TEXTS[0], tokenizer).batch.tokens
    sentence_entropies(model, tokens, 4, "masked")
    assert sum(rows) == len(tokens)


def test_the_command_shows_sentences_from_data_and_from_a_model(model, tokenizer, tmp_path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    encoded = encode_with_word_starts(tokenizer, TEXTS)

    def units():
        for ids, starts in encoded:
            yield shard_writer.EncodedDocuments(ids, np.array([len(ids)]), starts)

    shard_writer.write_shards(folder, tokenizer, {"train": units(), "valid": units()}, facts={})
    for source in (["--data", str(folder)], ["--model", str(model)], ["--model", str(model), "--signal", "clean"]):
        assert main(["show-masks", *source, "--sentence", *TEXTS, "--ratio", "0.2"]) == 0
        output = capsys.readouterr().out
        assert "\x1b" not in output
        for text, (ids, _) in zip(TEXTS, encoded, strict=True):
            assert output.count(f": {round(0.2 * len(ids))} of {len(ids)} tokens masked") >= 18, text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "`data`"),
        (["--data", "nowhere", "--ratio", "1.5"], "`ratio`"),
        (["--data", "nowhere", "--signal", "clean"], "`signal`"),
        (["--data", "nowhere", "--score.strategy", "low"], "`score.strategy`"),
        (["--data", "nowhere", "--model", "nowhere"], "`data`"),
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--model", "nowhere"], "`model` must be a folder, but is 'nowhere'"),
    ],
)
def test_wrong_arguments_are_sentences(arguments, words, capsys):
    assert main(["show-masks", *arguments]) in (2, 3)
    assert words in capsys.readouterr().err
