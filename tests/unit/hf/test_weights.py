"""The files and tensors that are read as the model are those that transformers loads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForMaskedLM, BertForSequenceClassification, ModernBertForSequenceClassification

from megamask.__main__ import main
from megamask.errors import CheckpointError, StorageError
from megamask.hf import import_model, save_start, weights
from megamask.hf.families import family_of
from megamask.hf.tensor_names import WEIGHTS, to_hf_weights
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.objectives.mlm import MLM
from megamask.objectives.objective import load_objective_weights
from megamask.teacher import frozen_lm
from tests.unit.hf.models import FAMILY_NAMES, transformers_model


def same(folder: Path, other) -> bool:
    """Whether what is imported from ``folder`` are the weights of ``other``, a model of transformers."""
    imported = import_model(folder)
    expected = other.state_dict()
    return all(
        torch.equal(tensor, expected[name]) for name, tensor in to_hf_weights(imported.weights, imported.shape).items()
    )


def rewrite(folder: Path, name) -> None:
    """Let the tensors in ``folder`` be called ``name(old)``; None leaves one out."""
    tensors = load_file(folder / WEIGHTS)
    renamed = {name(old): tensor.clone() for old, tensor in tensors.items()}
    save_file({new: tensor for new, tensor in renamed.items() if new}, folder / WEIGHTS, metadata={"format": "pt"})


def test_files_that_are_not_the_model_are_ignored(saved):
    other = transformers_model("bert")
    folder = saved(other)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    for stray in ("model_ema.safetensors", "model-00001-of-00002.safetensors", "optimizer.safetensors"):
        save_file(zeros, folder / stray)
    assert same(folder, AutoModelForMaskedLM.from_pretrained(folder)) and same(folder, other)
    teacher = frozen_lm.read_masked_lm(folder, "teacher.path")
    assert torch.equal(teacher.weight, other.get_input_embeddings().weight)


def test_all_files_of_an_index_are_read(tmp_path):
    other = transformers_model("bert")
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    parts = sorted(tmp_path.glob("model-*"))
    assert len(parts) > 2 and same(tmp_path, other)
    save_file({"x": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"has model\.safetensors and an index of other files"):
        import_model(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    lost = load_file(parts[0])
    name = sorted(lost)[0]
    save_file({other: tensor for other, tensor in lost.items() if other != name}, parts[0])
    with pytest.raises(CheckpointError, match=f"lists the tensor {name}, but"):
        import_model(tmp_path)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"names the file {parts[1].name}, but"):
        import_model(tmp_path)


@pytest.mark.parametrize("preset", FAMILY_NAMES)
def test_a_tied_tensor_is_found_under_either_name(saved, preset):
    other = transformers_model(preset)
    folder = saved(other)
    save_model(other, str(folder / WEIGHTS))
    kept = load_file(folder / WEIGHTS).keys()
    matrix = next(iter(family_of(import_model(folder).shape).tied.items()))
    assert len(set(matrix) & kept) == 1
    assert same(folder, other)


def test_bert_with_only_the_second_names_of_tied_tensors(saved):
    other = transformers_model("bert")
    folder = saved(other)
    copies = {
        "bert.embeddings.word_embeddings.weight": "cls.predictions.decoder.weight",
        "cls.predictions.bias": "cls.predictions.decoder.bias",
    }
    rewrite(folder, lambda name: copies.get(name, name))
    assert same(folder, other)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "_orig_mod.", "model.module."])
@pytest.mark.parametrize("preset", FAMILY_NAMES)
def test_a_prefix_is_removed_with_a_note(saved, preset, prefix):
    other = transformers_model(preset)
    folder = saved(other)
    rewrite(folder, lambda name: prefix + name)
    assert same(folder, other)
    (note,) = import_model(folder).notes
    assert f"under the prefix '{prefix}" in note


def test_two_encoders_in_one_file_are_a_sentence(saved):
    folder = saved(transformers_model("bert"))
    tensors = load_file(folder / WEIGHTS)
    save_file({f"{who}.{n}": t.clone() for n, t in tensors.items() for who in ("one", "two")}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"has 2 encoders, under the prefixes 'one\.bert\.', 'two\.bert\.'"):
        import_model(folder)


@pytest.mark.parametrize("preset", FAMILY_NAMES)
def test_an_encoder_without_a_head_gets_a_new_one(saved, tmp_path, preset, capsys):
    other = transformers_model(preset)
    folder = saved(other.base_model)
    assert main(["import", "--model", str(folder), "--output", str(tmp_path / "start")]) == 0
    output = capsys.readouterr().out
    assert output.count("has no masked-language head: training starts with a new one") == 1
    assert all(len(line) < 400 for line in output.splitlines())
    imported = import_model(folder)
    assert not [name for name in imported.weights if name.startswith("head.")]
    encoder = Encoder(imported.shape)
    model = MLM(encoder, MaskedLMHead(encoder))
    drawn = model.head.dense.weight.clone()
    load_objective_weights(model, imported.weights)
    assert torch.equal(model.head.dense.weight, drawn)
    assert torch.equal(model.encoder.embedding.tokens.weight, other.get_input_embeddings().weight)
    for path in (folder, tmp_path / "start"):
        why = "has no masked-language head, so it predicts no token|does not hold a complete"
        with pytest.raises(CheckpointError, match=why) as error:
            frozen_lm.read_masked_lm(path, "teacher.path")
        assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    "preset, kind", [("bert", BertForSequenceClassification), ("modern", ModernBertForSequenceClassification)]
)
def test_the_head_of_another_task_is_left_out_with_a_note(saved, preset, kind):
    imported = import_model(saved(kind(transformers_model(preset).config)))
    assert "no masked-language head" in imported.notes[0] and "Left out" in imported.notes[1]
    assert "classifier.weight" in imported.notes[1]
    assert not [name for name in imported.weights if name.startswith("head.")]


@pytest.mark.parametrize("preset", FAMILY_NAMES)
def test_an_untied_output_matrix_is_refused_with_the_cure(saved, tmp_path, preset, capsys):
    folder = saved(transformers_model(preset, tie_word_embeddings=False))
    command = ["--model", str(folder), "--output", str(tmp_path / "start")]
    capsys.readouterr()
    assert main(["import", *command]) == CheckpointError.exit_code
    message = capsys.readouterr().err.strip()
    assert str(folder) in message and "--new-head" in message and "\n" not in message
    assert main(["import", *command, "--new-head"]) == 0
    assert not [name for name in load_file(tmp_path / "start" / WEIGHTS) if name.startswith("head.")]


def test_an_untied_output_matrix_that_equals_the_table_is_accepted(saved):
    folder = saved(transformers_model("bert", tie_word_embeddings=False))
    tensors = load_file(folder / WEIGHTS)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    save_file(tensors, folder / WEIGHTS)
    assert import_model(folder).weights
    del tensors["cls.predictions.decoder.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is false.*--new-head"):
        import_model(folder)


def test_lists_of_tensors_are_short(saved):
    folder = saved(transformers_model("bert"))
    rewrite(folder, lambda name: name if ".layer.2." not in name else name.replace(".layer.2.", ".layer.7."))
    with pytest.raises(CheckpointError) as error:
        import_model(folder)
    lacks, strange = error.value.problems
    assert "lacks 16 tensors: " in lacks and "and 11 more" in lacks and lacks.count("bert.") == 5
    assert "has 16 tensors: " in strange and "and 11 more" in strange
    rewrite(folder, lambda name: f"x{name}" if "LayerNorm" in name else None)
    with pytest.raises(CheckpointError, match="has no encoder") as error:
        import_model(folder)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_permissions_of_the_umask(saved, tmp_path, umask, mode):
    folder = saved(transformers_model("bert"))
    before = os.umask(umask)
    try:
        save_start(folder, tmp_path / "start")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "start").iterdir() if path.is_file()} == {mode}


def test_initial_weights_are_complete_or_absent(saved, tmp_path, monkeypatch):
    folder = saved(transformers_model("bert"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(StorageError, match="start cannot be written: No space left on device"):
        save_start(folder, tmp_path / "start")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(saved, kind):
    folder = saved(transformers_model("bert"))
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("query.weight"))
    save_file(tensors | {name: tensors[name].to(kind)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} of the type {str(kind).removeprefix('torch.')}.*quantized"):
        import_model(folder)


def test_a_configuration_of_quantized_weights_is_refused(saved):
    folder = saved(transformers_model("bert"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "other"}}))
    with pytest.raises(CheckpointError, match=r"config\.json has a `quantization_config`"):
        import_model(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["bert", "modern"])
def test_nan_and_inf_in_weights_are_refused(saved, tmp_path, kind, value):
    folder = saved(transformers_model(kind))
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("decoder.bias") or name.endswith("predictions.bias"))
    tensors[name][-1] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"NaN or Inf in .*bias"):
        save_start(folder, tmp_path / "start")
    assert not (tmp_path / "start").exists()
