"""Teachers and initial weights that are missing, damaged, or do not fit the run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from megamask.__main__ import main
from megamask.data.tokenizer_training import train_tokenizer as train_tokenizer
from tests.system.catalogue.row import CHECKPOINT, CONFIG, Command, Ground, Plant, Row, cut, missing, rows
from tests.system.commands import run

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def teacher(spoil: Callable[[Path], object]) -> Plant:
    """A model of transformers with the tokenizer of the text, spoilt."""

    def plant(ground: Ground) -> Command:
        spoil(folder := bert(ground))
        return ground.train("--teacher.path", folder, "--distill.weight.start", 0.5)

    return plant


def bert(ground: Ground, **more: int) -> Path:
    folder = Path(shutil.copytree(ground.data / "tokenizer", ground.folder / "teacher"))
    BertForMaskedLM(BertConfig(vocab_size=300, **BERT, **more)).save_pretrained(folder)
    return folder


def of_another_vocabulary(folder: Path) -> None:
    train_tokenizer("wordpiece", ["other words of another text"] * 20, size=60).save(folder)


def of_another_order(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    content["model"]["vocab"] = {word: n for n, word in enumerate(words[:100] + words[100:][::-1])}
    path.write_text(json.dumps(content))


def with_a_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.weight"][3, 5] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_few_positions(folder: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=300, **BERT, max_position_embeddings=32)).save_pretrained(folder)


def causal(folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=1)).save_pretrained(folder)


def another_teacher(ground: Ground) -> Command:
    """A teacher that is another when the run goes on."""
    folder = bert(ground)
    flags = ["--teacher.path", folder, "--distill.weight.start", 0.5]
    main, arguments = ground.train(*flags, steps=1)
    assert run(main, *arguments).code == 0
    BertForMaskedLM(BertConfig(vocab_size=300, **BERT)).save_pretrained(folder)  # other random weights
    return main, arguments


def first_weights(ground: Ground) -> Command:
    """First weights whose tokenizer is another."""
    of_another_order(bert(ground))
    start = ground.folder / "start"
    assert run(main, "import", "--model", ground.folder / "teacher", "--output", start).code == 0
    return ground.train("--init", start)


TEACHERS = [
    *rows(
        CONFIG, teacher,
        (
            "another vocabulary", of_another_vocabulary,
            ["`teacher.path` has a vocabulary of", "tokens, but data's tokenizer has 300", "megamask prepare"],
        ),
        (
            "the same words in another order", of_another_order,
            [*(f"at the id {n}, but data's tokenizer has" for n in range(100, 105)), "`teacher.path` has"],
        ),
        ("few positions", with_few_positions, ["`packs.length` must be at most 32, the number of positions"]),
    ),
    *rows(
        CHECKPOINT, teacher,
        ("a causal language model", causal, ["transformers cannot load", "GPT2Config"]),
        ("NaN in the weights", with_a_nan, ["teacher has NaN or Inf in the tensor", "layer.0.output.dense.weight"]),
        ("no weights", missing("model.safetensors"), ["teacher has no model.safetensors"]),
        ("weights cut short", cut("model.safetensors", -100), ["teacher/model.safetensors is not a valid safetensors"]),
        ("no teacher", shutil.rmtree, ["`teacher.path`"]),
    ),
    Row(
        "another teacher than before", another_teacher, CONFIG,
        ("step-1 was written with a teacher of hash", "`teacher.path` has"),
    ),
    Row(
        "initial weights of another tokenizer", first_weights, CONFIG,
        ("`init` has", "at the id 100, but data's tokenizer has", "prepare --input TEXT --tokenizer"),
    ),
]  # fmt: skip
