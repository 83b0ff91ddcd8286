"""Training and transformers encode text alike after export and import, or the tokenizer is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer, PreTrainedTokenizerFast

from megamask.data import tokenizer as tokenizers
from megamask.data.tokenizer_training import train_tokenizer
from megamask.errors import CheckpointError, ConfigError, MegamaskError
from megamask.hf import Card, export_model, save_start
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape, ModelConfig
from megamask.objectives.mlm import MLM

ROLES = {role: f"[{role.upper()}]" for role in ("unk", "cls", "sep", "pad", "mask")}
TEXT = "The old river <e1>heparin</e1> flows by a lamp [SECTION] and the man sleeps."
ADDED = ["<e1>", "</e1>", "[SECTION]"]


def bare(folder: Path, added: list[str] = ADDED) -> Path:
    """A BPE tokenizer cut at blanks, saved by transformers, which puts nothing around a text."""
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=list(ROLES.values()), show_progress=False)
    backend.train_from_iterator([TEXT] * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{role}_token": name for role, name in ROLES.items()})
    fast.add_special_tokens({"additional_special_tokens": added})
    fast.save_pretrained(folder)
    return folder


def as_trained(folder: Path, output: Path) -> Path:
    """The tokenizer in ``folder`` as preparation leaves it beside shards and in a run."""
    tokenizers.load_tokenizer(folder).save(output)
    return output


def export(tokenizer: Path, output: Path, sentences: list[str] | None = None):
    ids = tokenizers.token_ids(tokenizers.load_tokenizer(tokenizer))
    config = ModelConfig(preset="modern", num_layers=1, hidden_size=16, num_heads=2, max_positions=64)
    encoder = Encoder(config.shape(ids), config)
    weights = {name: p.detach() for name, p in MLM(encoder, MaskedLMHead(encoder, config)).named_parameters()}
    card = Card("a test", recipe="none", steps=1, data="0", run="one")
    return export_model(weights, encoder.shape, tokenizer, output, card=card, sentences=sentences or [])


def seen(folder: Path, text: str) -> list[int]:
    """The ids of a sequence in training."""
    tokenizer = tokenizers.load_tokenizer(folder)
    ids = tokenizers.token_ids(tokenizer)
    return [ids.cls, *tokenizer.encode([text])[0].tolist(), ids.sep]


def test_an_export_adds_cls_and_sep_as_training_does(tmp_path):
    trained = as_trained(bare(tmp_path / "tokenizer"), tmp_path / "trained")
    assert AutoTokenizer.from_pretrained(trained)("The old man")["input_ids"] != seen(trained, "The old man")
    exported = export(trained, tmp_path / "out")
    assert exported.notes == ("The tokenizer added no special tokens: [CLS] and [SEP] now surround a text.",)
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (TEXT, "The old man", ""):
        assert hf_tokenizer(text)["input_ids"] == seen(trained, text)
    pair = hf_tokenizer("The old", "man")["input_ids"]
    assert pair == [*seen(trained, "The old"), *seen(trained, "man")[1:]]
    again = tmp_path / "again"
    hf_tokenizer.save_pretrained(again)
    assert export(again, tmp_path / "second").notes == ()


@pytest.mark.parametrize("kind, size", [("wordpiece", 1100), ("bpe", 400), ("sentencepiece", 700)])
def test_a_tokenizer_of_megamask_is_exported_unchanged(tmp_path, kind, size):
    letters = [chr(code) for code in range(33, 500) if chr(code).isprintable()]
    train_tokenizer(kind, [TEXT, " ".join(letters)] * 5, size=size).save(tmp_path / "tokenizer")
    assert export(tmp_path / "tokenizer", tmp_path / "out", [TEXT]).notes == ()


def test_added_tokens_are_one_token_and_special_tokens_are_text(tmp_path):
    folder = bare(tmp_path / "tokenizer")
    hf_tokenizer, ours = AutoTokenizer.from_pretrained(folder), tokenizers.load_tokenizer(folder)
    wanted = hf_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert [
        hf_tokenizer.convert_ids_to_tokens(number)
        for number in wanted
        if number in hf_tokenizer.convert_tokens_to_ids(ADDED)
    ]
    for ids in (ours.encode([TEXT])[0], ours.encode_with_offsets([TEXT])[0][0]):
        assert ids.tolist() == wanted
    written = ours.encode(["a [MASK] b [CLS]"])[0].tolist()
    assert not {hf_tokenizer.mask_token_id, hf_tokenizer.cls_token_id} & set(written)


def test_a_text_that_is_encoded_differently_is_shown_with_both_lists(tmp_path):
    trained = as_trained(bare(tmp_path / "tokenizer"), tmp_path / "trained")
    # of a class that builds its own rules from the vocabulary and reads no normalizer
    settings = json.loads((trained / "tokenizer_config.json").read_text())
    (trained / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(
        CheckpointError, match=r"training encodes \".+\" as \[.*\] \(\d+ ids\), transformers as \["
    ) as e:
        export(trained, tmp_path / "out", [TEXT])
    assert len(str(e.value)) < 500
    assert not (tmp_path / "out").exists()


# ---- import


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(rows, tokenizer)``: the folder of a BERT with a table of so many rows, without a tokenizer."""

    def make(rows: int) -> Path:
        config = BertConfig(
            vocab_size=rows, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32,
        )  # fmt: skip
        BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
        return tmp_path / "bert"

    return make


VOCABULARY = [*ROLES.values(), *"abcdefghijklmnopqrstuvwxyz.", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), "the"]


def agrees(start: Path, folder: Path, texts: list[str]) -> bool:
    """Whether training with the tokenizer in ``start`` sees what transformers does with ``folder``."""
    hf_tokenizer = AutoTokenizer.from_pretrained(folder)
    return all(seen(start / "tokenizer", text) == hf_tokenizer(text)["input_ids"] for text in texts)


@pytest.mark.parametrize("lower", [True, False])
def test_vocab_txt_becomes_a_tokenizer_json(checkpoint, tmp_path, lower):
    folder = checkpoint(len(VOCABULARY))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": lower})
    )
    notes = save_start(folder, tmp_path / "start").notes
    assert ("it lowercases text" in notes[0]) is lower
    assert agrees(tmp_path / "start", folder, ["The River.", "the river"])
    assert (
        EncoderShape.load(tmp_path / "start").vocab_size
        == tokenizers.load_tokenizer(tmp_path / "start" / "tokenizer").size
    )


def test_an_import_respects_tokenizer_config_json(checkpoint, tmp_path):
    folder = checkpoint(len(VOCABULARY))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    save_start(folder, tmp_path / "start")
    assert agrees(tmp_path / "start", folder, ["The River.", "the river"])


def test_an_import_adds_cls_and_sep(checkpoint, tmp_path):
    folder = bare(checkpoint(tokenizers.load_tokenizer(bare(tmp_path / "any")).size))
    assert any("now surround a text" in note for note in save_start(folder, tmp_path / "start").notes)
    text = "The old man"
    assert AutoTokenizer.from_pretrained(tmp_path / "start" / "tokenizer")(text)["input_ids"] == seen(folder, text)


def no_tokenizer(folder: Path) -> None:
    pass


def no_mask(folder: Path) -> None:
    words = [word for word in VOCABULARY if word != "[MASK]"]
    backend = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    names = {f"{role}_token": name for role, name in ROLES.items() if role != "mask"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def too_many(folder: Path) -> None:
    backend = Tokenizer(models.WordPiece({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.add_tokens([AddedToken("one more"), AddedToken("and another")])
    names = {f"{role}_token": name for role, name in ROLES.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


@pytest.mark.parametrize(
    "give, error, sentence",
    [
        (no_tokenizer, CheckpointError, "has no tokenizer"),
        (no_mask, ConfigError, "bert: The tokenizer has no mask token"),
        (
            too_many,
            CheckpointError,
            rf"has {len(VOCABULARY) + 2} tokens, but the weights only {len(VOCABULARY)}.*resize",
        ),
    ],
)
def test_unusable_tokenizers_are_refused_at_import(checkpoint, tmp_path, give, error, sentence):
    folder = checkpoint(len(VOCABULARY))
    give(folder)
    before = set(tmp_path.iterdir())
    with pytest.raises(MegamaskError, match=sentence) as raised:
        save_start(folder, tmp_path / "start")
    assert type(raised.value) is error
    assert set(tmp_path.iterdir()) == before


def test_a_tokenizer_with_only_normalizers_is_imported_unchanged(checkpoint, tmp_path):
    backend = Tokenizer(models.WordPiece({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    folder = checkpoint(len(VOCABULARY) + 3)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{role}_token": name for role, name in ROLES.items()}
    ).save_pretrained(folder)
    save_start(folder, tmp_path / "start")
    trained = tokenizers.load_tokenizer(tmp_path / "start" / "tokenizer")
    assert torch.equal(
        torch.from_numpy(trained.encode(["The River."])[0]),
        torch.from_numpy(tokenizers.load_tokenizer(folder).encode(["The River."])[0]),
    )
