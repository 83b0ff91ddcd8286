"""Excerpts of the held-out text, and masked words in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megamask.data.excerpts import excerpts, fill_mask_examples
from megamask.data.prepare import prepare
from megamask.data.settings import PrepareConfig
from megamask.data.shard_writer import EncodedDocuments, write_shards
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer
from megamask.data.tokenizer_training import train_tokenizer
from megamask.hf import model_folder, predictions

ENGLISH = "The river froze early. Nobody crossed the {} before noon, and the ferry stayed where it was."
RUSSIAN = "Старик чинил сети. Никто не видел {} раньше полудня, и паром стоял на месте весь день."
CHINESE = "老人在海边修补渔网。没有人在中午以前看见第{}条船，渡船整天都停在原处。"  # noqa: RUF001
NUMBERS = ("first", "second", "third", "bridge", "harbour", "market", "garden", "window")


@pytest.fixture(scope="module", params=[ENGLISH, RUSSIAN, CHINESE], ids=["English", "Russian", "Chinese"])
def text(request, tmp_path_factory) -> Shards:
    """The held-out split of 80 documents in a language."""
    folder = tmp_path_factory.mktemp("text")
    documents = [request.param.format(f"{word}{number}") for number in range(10) for word in NUMBERS]
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (folder / "text.jsonl").write_text(lines)
    config = PrepareConfig((str(folder / "text.jsonl"),), folder / "shards", valid_share=0.3, workers=1, vocab_size=400)
    return Shards.open(prepare(config), "valid")


def test_excerpts_are_held_out_text_without_special_tokens(text):
    tokenizer = load_tokenizer(text.folder / TOKENIZER)
    passages = excerpts(text, tokenizer, 5)
    assert len(passages) == 5
    stream = tokenizer.decode(text.parts[0])
    for excerpt in passages:
        assert excerpt in stream and "[" not in excerpt


def test_excerpts_have_no_gaps_at_unknown_words(tmp_path):
    tokenizer = train_tokenizer("wordpiece", ["the river froze early over night"] * 20, size=90)
    sentence = "the river Ж froze early over night"
    units = [EncodedDocuments(ids, np.array([len(ids)])) for ids in tokenizer.encode([sentence])]
    write_shards(tmp_path, tokenizer, {"train": units, "valid": units}, facts={})
    (excerpt,) = excerpts(Shards.open(tmp_path, "valid"), tokenizer, 1)
    assert excerpt == "froze early over night"


def test_the_masked_word_is_one_of_the_text(text):
    tokenizer = load_tokenizer(text.folder / TOKENIZER)
    held_out = excerpts(text, tokenizer, 8)
    examples = fill_mask_examples(held_out, tokenizer, 3)
    assert len(examples) == 3
    for example in examples:
        assert example.sentence.count("[MASK]") == 1
        assert example.answer.isalpha()
        whole = example.sentence.replace("[MASK]", example.answer)
        assert any(whole in excerpt for excerpt in held_out)


def test_sentences_with_special_tokens_or_without_words_give_no_example(text):
    tokenizer = load_tokenizer(text.folder / TOKENIZER)
    assert not fill_mask_examples(["a b c [MASK] d e f g.", "1 2 3 4 5 6 7 8 9.", "...", ""], tokenizer)


def test_blank_tokens_are_printed_as_the_vocabulary_spells_them(tmp_path: Path):
    trained: Tokenizer = train_tokenizer("bpe", ["some words\n\nand\ta few more of them"] * 20, size=300)
    trained.save(tmp_path)
    tokenizer = model_folder.load_hf_tokenizer(tmp_path)
    known = trained.backend.get_vocab(with_added_tokens=True)
    shown = {name: predictions._as_text(tokenizer, known[name]) for name in ("Ġ", "Ċ", "ĉ", "Ã", "s")}
    assert shown == {"Ġ": "'Ġ'", "Ċ": "'Ċ'", "ĉ": "'ĉ'", "Ã": "'Ã'", "s": "s"}
