"""An import keeps the weights of a checkpoint of transformers, or names what is missing or not supported."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.__main__ import main
from megamask.data import tokenizer as tokenizers
from megamask.data.compare_tokenizers import MOST_PADDING
from megamask.errors import CheckpointError, ConfigError, MegamaskError
from megamask.hf import export_model as export
from megamask.hf import import_model, save_start
from megamask.hf.masked_lm import load_hf_masked_lm
from megamask.hf.tensor_names import WEIGHTS
from megamask.hf.weights import CONVERSION
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape
from megamask.objectives.mlm import MLM
from megamask.objectives.objective import load_objective_weights
from tests.tolerances import assert_close
from tests.unit.hf.models import CARD, in_64_bits, transformers_model

RECIPES = Path(__file__).parents[3] / "docs" / "recipes.md"


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("bert", {}),
        ("bert", {"type_vocab_size": 3, "layer_norm_eps": 1e-6}),
        ("modern", {}),
        ("modern", {"global_attn_every_n_layers": 2, "local_attention": 16}),
        ("modern", {"layer_types": ["full_attention"] * 4}),
    ],
)
def test_import_and_export_keep_the_weights_bit_for_bit(saved, tmp_path, preset, changes):
    source = saved(transformers_model(preset, **changes))
    model = import_model(source)
    export(model.weights, model.shape, source, tmp_path / "out", card=CARD)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    assert import_model(tmp_path / "out").shape == model.shape


@pytest.mark.parametrize("preset", ["bert", "modern"])
@torch.no_grad()
def test_an_imported_model_computes_the_logits_of_the_original(saved, preset):
    other = transformers_model(preset)
    imported = import_model(saved(other))
    encoder = Encoder(imported.shape)
    model = MLM(encoder, MaskedLMHead(encoder)).eval()
    assert not model.load_state_dict(imported.weights, strict=False).unexpected_keys
    sequences = [torch.randint(imported.shape.vocab_size, (length,)) for length in (5, 70, 33)]
    assert_close(*in_64_bits(model, other, sequences))


def test_old_tensor_names_and_unused_tensors_are_accepted(saved):
    folder = saved(transformers_model("bert"))
    expected = import_model(folder).weights
    tensors = load_file(folder / WEIGHTS)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    old["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    old["bert.embeddings.position_ids"] = torch.arange(80)[None]
    save_file(old, folder / WEIGHTS)
    imported = import_model(folder).weights
    assert imported.keys() == expected.keys() and all(torch.equal(imported[name], expected[name]) for name in expected)


def test_a_modernbert_configuration_of_transformers_4_is_read(saved):
    folder = saved(transformers_model("modern", global_attn_every_n_layers=2, local_attention=16))
    expected = import_model(folder).shape
    config = json.loads((folder / "config.json").read_text())
    thetas = {kind: rope["rope_theta"] for kind, rope in config.pop("rope_parameters").items()}
    del config["layer_types"]
    config |= {
        "global_attn_every_n_layers": 2,
        "global_rope_theta": thetas["full_attention"],
        "local_rope_theta": thetas["sliding_attention"],
        "reference_compile": False,
        "position_embedding_type": "absolute",
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert import_model(folder).shape == expected
    assert expected.rope_theta != expected.local_rope_theta and expected.global_every == 2


def test_16_bit_weights_keep_their_precision(saved):
    ours = import_model(saved(transformers_model("modern").bfloat16())).weights
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "preset, changes, named",
    [
        (
            "bert",
            {"hidden_act": "relu", "position_embedding_type": "relative_key"},
            ["hidden_act", "position_embedding_type"],
        ),
        ("bert", {"is_decoder": True, "add_cross_attention": True}, ["is_decoder", "add_cross_attention"]),
        ("modern", {"norm_bias": True, "decoder_bias": False}, ["norm_bias", "decoder_bias"]),
        (
            "modern",
            {"layer_types": ["sliding_attention", "full_attention"] * 2, "local_attention": 7},
            ["layer_types", "local_attention"],
        ),
    ],
)  # fmt: skip
def test_unsupported_configuration_keys_are_named(saved, preset, changes, named):
    folder = saved(transformers_model(preset))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        import_model(folder)
    assert len(error.value.problems) == len(named)
    assert all(f"config.json: {key}`" in problem for key, problem in zip(named, error.value.problems, strict=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 2**53), ("num_hidden_layers", 0), ("max_position_embeddings", 2**63),
        ("max_position_embeddings", -16), ("vocab_size", 10**400), ("num_attention_heads", -1),
        ("hidden_size", 2**31 - 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reads", [import_model, load_hf_masked_lm])
def test_impossible_sizes_are_a_sentence_before_a_model_is_built(saved, reads, key, value):
    folder = saved(transformers_model("bert"))
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MegamaskError):
        reads(folder)


def test_other_models_formats_and_damage_are_refused(saved, tmp_path):
    folder = saved(transformers_model("bert"))
    config, tensors = (folder / "config.json").read_text(), (folder / WEIGHTS).read_bytes()
    (folder / "config.json").write_text(json.dumps({"model_type": "mpnet", "auto_map": {"AutoConfig": "evil.py"}}))
    with pytest.raises(CheckpointError, match=r"`model_type` must be one of bert, .*, albert, but is 'mpnet'"):
        import_model(folder)
    (folder / "config.json").write_text(config)
    (folder / WEIGHTS).write_bytes(tensors[:-100])
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        import_model(folder)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        import_model(folder)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        import_model(tmp_path)
    with pytest.raises(CheckpointError, match="must be a folder or the name of a model"):
        import_model("no/such-model")


def test_a_pickle_is_refused_with_a_command_that_converts_it(saved, tmp_path):
    folder, new = saved(transformers_model("bert")), tmp_path / "new"
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as refused:
        import_model(folder)
    assert CONVERSION in str(refused.value)
    documented = re.findall(r"^python -c .*save_pretrained.*$", RECIPES.read_text(), re.MULTILINE)
    assert documented == [CONVERSION]
    command = shlex.split(CONVERSION.replace("MODEL", str(folder)).replace("NEW", str(new)))
    subprocess.run([sys.executable, *command[1:]], check=True)
    converted = load_file(new / WEIGHTS)
    assert all(torch.equal(converted[name], weight) for name, weight in weights.items())
    import_model(new)


def test_initial_weights_contain_all_that_pretraining_needs(saved, tmp_path):
    folder, out = saved(transformers_model("modern")), tmp_path / "start"
    assert main(["import", "--model", str(folder), "--output", str(out)]) == 0
    shape = EncoderShape.load(out)
    encoder = Encoder(shape)
    load_objective_weights(MLM(encoder, MaskedLMHead(encoder)), load_file(out / WEIGHTS))
    assert tokenizers.load_tokenizer(out / "tokenizer").hash() == tokenizers.load_tokenizer(folder).hash()
    with pytest.raises(ConfigError, match="must be a new or empty folder"):
        save_start(folder, out)


@pytest.mark.parametrize(("more", "noted"), [(0, False), (MOST_PADDING - 1, False), (MOST_PADDING, True)])
def test_a_vocabulary_far_larger_than_the_tokenizer_is_noted(saved, tokenizer, tmp_path, more: int, noted: bool):
    size = tokenizers.load_tokenizer(tokenizer).size
    folder = saved(transformers_model("bert", vocab_size=size + more))
    notes = save_start(folder, tmp_path / "start").notes
    assert any(f"weights for {size + more:,} tokens" in note and f"only {size:,}" in note for note in notes) == noted
