"""Teachers that do not fit the student, or are damaged, are refused with the reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.data.tokenizer_training import train_tokenizer
from megamask.errors import CheckpointError, ConfigError, DataError
from megamask.hf.tensor_names import WEIGHTS
from tests.batches import pack
from tests.unit.teacher.models import plan_of


def test_another_tokenizer_is_refused_with_its_first_difference(student, first_weights, load, ids):
    folder = first_weights(student())
    file = folder / "tokenizer" / "tokenizer.json"
    whole = json.loads(file.read_text())

    def refused(change, sentence):
        content = json.loads(json.dumps(whole))
        change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=sentence) as error:
            load(folder)
        assert f"`megamask prepare --input TEXT --tokenizer {folder / 'tokenizer'} " in error.value.problems[-1]

    def larger(content):
        content["model"]["vocab"]["xyz"] = ids.size

    def swapped(content):
        words = content["model"]["vocab"]
        words["##q"], words["##z"] = words["##z"], words["##q"]

    first = min(whole["model"]["vocab"][token] for token in ("##q", "##z"))
    refused(
        larger, f"`teacher.path` has a vocabulary of {ids.size + 1} tokens, but data's tokenizer has {ids.size}; both"
    )
    refused(swapped, rf"`teacher.path` has '##[qz]' at the id {first}, but data's tokenizer has '##[qz]'; both must")
    refused(
        lambda content: content["normalizer"]["normalizers"][1].update(lowercase=True),
        r"differ in `normalizer\.normalizers\[1\]\.lowercase`: true in one, false",
    )
    refused(lambda content: content.update(pre_tokenizer={"type": "WhitespaceSplit"}), "differ in `pre_tokenizer")
    refused(
        lambda content: content["model"].update(max_input_chars_per_word=7),
        r"differ in `model\.max_input_chars_per_word`: 7 in one, 100",
    )

    settings = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(whole))
    roles = json.loads(settings.read_text())
    settings.write_text(json.dumps(roles | {"mask_token": "[UNK]"}))
    with pytest.raises(ConfigError, match=r"has the id \d as its mask token, but data's tokenizer has"):
        load(folder)


def test_a_smaller_vocabulary_or_table_is_refused(theirs, load, ids):
    folder, _ = theirs("bert", vocab_size=ids.size - 1)
    with pytest.raises(ConfigError, match=f"has logits for {ids.size - 1} tokens, but its tokenizer has {ids.size}"):
        load(folder)
    train_tokenizer("wordpiece", ["other words of another text"] * 20, size=ids.size - 1).save(folder)
    with pytest.raises(ConfigError, match="has a vocabulary of") as error:
        load(folder)
    assert [problem for problem in error.value.problems if f"--tokenizer {folder} " in problem] == [
        error.value.problems[-1]
    ]


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(student, first_weights, load):
    folder = first_weights(student())
    file = str(folder / "tokenizer" / "tokenizer.json")
    backend = Backend.from_file(file)
    backend.enable_truncation(7)
    backend.enable_padding()
    backend.save(file)
    load(folder)


@pytest.mark.parametrize(("kind", "longest"), [("bert", 64), ("roberta", 63), ("distilbert", 64)])
def test_sequences_longer_than_its_positions_are_refused(theirs, load, packs, ids, kind, longest):
    assert ids.pad == 0  # RoBERTa counts from behind it
    folder, _ = theirs(kind)
    teacher = load(folder, length=longest)
    batch = pack([longest], ids=ids)
    teacher.targets([batch], [plan_of(batch, ids)], 0.0)
    with pytest.raises(ConfigError, match=f"`packs.length` must be at most {longest}, the number of positions"):
        load(folder, length=longest + 1)


@pytest.mark.parametrize("kind", ["ours", "bert", "roberta"])
def test_missing_or_corrupt_weights_and_nan_are_sentences(student, first_weights, theirs, load, kind):
    folder = first_weights(student()) if kind == "ours" else theirs(kind)[0]
    file = folder / WEIGHTS
    tensors, whole = load_file(file), file.read_bytes()
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    save_file(tensors | {name: tensors[name] * torch.nan}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{folder} has NaN or Inf in the tensor "):
        load(folder)
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=f"{file} is not a valid safetensors file"):
        load(folder)
    less = {n: t for n, t in tensors.items() if "norm" not in n.lower()}
    save_file(less, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors"):
        load(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load(folder)


def test_folders_that_are_not_models_are_refused(load, tmp_path, run: RunFolder, theirs):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a run of megamask"):
        load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"`teacher.path` must be a folder or the name of a model"):
        load("no/such-model")
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        load(run.path)
    folder, _ = theirs("roberta")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"contains no tokenizer\.json"):
        load(folder)
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "strange", "auto_map": {"AutoModelForMaskedLM": "evil.Evil"}}))
    with pytest.raises(CheckpointError, match=f"transformers cannot load {folder}: "):
        load(folder)


def test_a_corrupt_checkpoint_is_refused(student, first_weights, load, run):
    folder = first_weights(model := student())
    for name in ("shape.json", "tokenizer"):
        (folder / name).rename(run.path / name)
    save_checkpoint(run, 7, {f"weights/{n}": p.detach() for n, p in model.named_parameters()}, {}, keep=3)
    file = next(run.checkpoint(7).glob("*.safetensors"))
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        load(run.path)


def test_a_model_that_ends_in_more_than_a_matrix_is_refused(theirs, load, monkeypatch):
    folder, model = theirs("roberta")
    forward = type(model.lm_head).forward
    monkeypatch.setattr(type(model.lm_head), "forward", lambda self, x: 1.1 * forward(self, x))
    with pytest.raises(ConfigError, match=r"\(roberta\) computes logits that differ by"):
        load(folder)
    monkeypatch.setattr(type(model.lm_head), "forward", lambda self, x: forward(self, x) + self.bias)
    with pytest.raises(ConfigError, match=r"does more at its end than multiply by one matrix and add its bias"):
        load(folder)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(ConfigError, match="has no output embedding that is a single matrix"):
        load(folder)
