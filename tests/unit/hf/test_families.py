"""RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA and ALBERT compute here what transformers computes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from megamask.errors import CheckpointError, DataError
from megamask.hf import export_model, import_model, save_start
from megamask.hf.families import FAMILIES
from megamask.hf.predictions import sentence_entropies
from megamask.hf.tensor_names import WEIGHTS
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape, ModelConfig
from megamask.objectives.mlm import MLM
from megamask.objectives.objective import ObjectiveConfig, build_objective, load_objective_weights
from megamask.objectives.settings import DecoderConfig
from megamask.training.flops import forward_flops
from tests.batches import IDS, pack
from tests.tolerances import assert_close
from tests.unit.hf.models import CARD, FAMILY_NAMES, TEXTS, packed_logits, padded_logits, transformers_model
from tests.unit.model.models import plan

NEW = [name for name in FAMILY_NAMES if name not in ("bert", "modern")]
KINDS = [
    *((name, {}) for name in NEW),
    ("roberta", {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-2}),
    ("xlm-roberta", {"pad_token_id": 7}),
    ("electra", {"layer_norm_eps": 1e-2, "type_vocab_size": 3}),
    ("electra", {"embedding_size": 32}),
    ("electra", {"embedding_size": 48}),
    ("albert", {"num_hidden_groups": 2}),
    ("albert", {"num_hidden_groups": 4, "embedding_size": 32}),
    ("albert", {"hidden_act": "gelu", "layer_norm_eps": 1e-2}),
]
"""A model_type and settings that are not its defaults."""


def ours(imported, **settings) -> MLM:
    """The encoder and head of an imported model."""
    config = ModelConfig(**settings)
    encoder = Encoder(imported.shape, config)
    model = MLM(encoder, MaskedLMHead(encoder, config)).eval()
    load_objective_weights(model, imported.weights)
    return model


def texts(shape: EncoderShape) -> list[torch.Tensor]:
    """Sequences of several lengths, the longest among them, without the padding token."""
    ids = [torch.randint(shape.vocab_size, (length,)) for length in (5, shape.max_positions, 1, 33, 12)]
    return [torch.where(text == shape.pad_id, (text + 1) % shape.vocab_size, text) for text in ids]


@pytest.mark.parametrize("backend", ["padded", "reference"])
@pytest.mark.parametrize(("name", "changes"), KINDS)
@torch.no_grad()
def test_packed_logits_equal_the_padded_logits_of_transformers(saved, name, changes, backend) -> None:
    other = transformers_model(name, **changes)
    model = ours(imported := import_model(saved(other)), attention=backend)
    sequences = texts(imported.shape)
    assert_close(packed_logits(model, sequences), padded_logits(other, sequences))
    assert_close(packed_logits(model.double(), sequences), padded_logits(other.double(), sequences))


@pytest.mark.parametrize(("name", "changes"), KINDS)
def test_import_and_export_keep_weights_and_settings(saved, tmp_path, name, changes) -> None:
    source = saved(transformers_model(name, **changes | {"pad_token_id": 0}))  # the tokenizer's
    model = import_model(source)
    export_model(model.weights, model.shape, source, tmp_path / "out", card=CARD)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)
    assert import_model(tmp_path / "out").shape == model.shape
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")]
    family = FAMILIES[name]
    for key in ("model_type", "architectures", "pad_token_id", family.activation, *family.keys.values()):
        assert configs[0][key] == configs[1][key], key
    assert f"`{family.architecture}`" in (tmp_path / "out" / "README.md").read_text()
    model.shape.save(tmp_path)
    assert EncoderShape.load(tmp_path) == model.shape


@pytest.mark.parametrize(("pad", "rows"), [(0, 79), (1, 78), (7, 72)])
@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "camembert"])
@torch.no_grad()
def test_positions_count_from_the_padding_token(saved, name, pad, rows) -> None:
    imported = import_model(saved(transformers_model(name, pad_token_id=pad)))
    assert (imported.shape.max_positions, imported.shape.position_offset) == (rows, pad + 1)
    model, (text, *_) = ours(imported), texts(imported.shape)
    table = model.encoder.embedding.positions.weight
    before = packed_logits(model, [text])
    table[: pad + 1] += 1
    assert torch.equal(packed_logits(model, [text]), before)
    table[pad + 1] += 1
    assert not torch.equal(packed_logits(model, [text]), before)


@torch.no_grad()
def test_only_token_type_0_is_used_and_distilbert_has_none(saved) -> None:
    model = ours(import_model(saved(transformers_model("roberta", type_vocab_size=3))))
    (text, *_) = texts(model.encoder.shape)
    before = packed_logits(model, [text])
    model.encoder.embedding.token_types.weight[1:] += 1
    assert torch.equal(packed_logits(model, [text]), before)
    shape = import_model(saved(transformers_model("distilbert"), "distil")).shape
    assert shape.token_types == 0 and not shape.problems()
    assert replace(shape, family="roberta").problems()


@pytest.mark.parametrize(("name", "changes"), KINDS)
def test_one_parameter_is_the_table_and_the_output_matrix(saved, name, changes) -> None:
    model = ours(import_model(saved(transformers_model(name, **changes))))
    assert model.head.decoder.weight is model.encoder.embedding.tokens.weight
    transformed = model.head.transform(torch.zeros(2, model.encoder.shape.hidden_size))
    assert transformed.shape == (2, model.encoder.shape.table_width)


OBJECTIVES = [
    ObjectiveConfig(),
    ObjectiveConfig("three_ml", depth=2),
    ObjectiveConfig("three_ml", depth=2, mask_vector="own"),
    ObjectiveConfig("mae_lm", decoder=DecoderConfig(1)),
    ObjectiveConfig("mae_lm", decoder=DecoderConfig(1, attention="cross"), mask_vector="own"),
    ObjectiveConfig("mae_lm", decoder=DecoderConfig(1, positions="all")),
    ObjectiveConfig("mae_lm", decoder=DecoderConfig(1, positions="all"), mask_vector="own"),
]


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda config: f"{config.kind}-{config.mask_vector}")
@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra", "albert"])
def test_every_objective_moves_every_weight_of_every_family(saved, name, config) -> None:
    imported = import_model(saved(transformers_model(name, vocab_size=IDS.size)))
    encoder = Encoder(imported.shape)
    model = build_objective(config, encoder, MaskedLMHead(encoder))
    load_objective_weights(model, imported.weights)
    batch = pack([12, 20, 5])
    model(batch, plan(batch)).total.backward()
    unmoved = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert not unmoved
    assert forward_flops(imported.shape, config).training(37, 1000, 9) > 0


@torch.no_grad()
def test_three_ml_from_the_first_layer_is_mlm(saved) -> None:
    imported = import_model(saved(transformers_model("electra", vocab_size=IDS.size)))
    encoder = Encoder(imported.shape)
    head = MaskedLMHead(encoder)
    batch = pack([12, 20, 5])
    mlm, late = (
        build_objective(config, encoder, head)(batch, plan(batch)).total
        for config in (ObjectiveConfig(), ObjectiveConfig("three_ml", depth=0))
    )
    assert_close(late, mlm)


def byte_level(folder) -> None:
    """A byte-level BPE with the special tokens of RoBERTa, in its order."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(
        TEXTS * 5, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{role}_token": token for role, token in names.items()}
    ).save_pretrained(folder)


def test_the_tokenizer_of_roberta_crosses_both_ways(tmp_path) -> None:
    source = tmp_path / "roberta"
    size = 5 + 256 + 60
    other = transformers_model("roberta", vocab_size=size, pad_token_id=1, type_vocab_size=1)
    other.save_pretrained(source)
    byte_level(source)
    assert not save_start(source, tmp_path / "start").notes
    model = import_model(source)
    exported = export_model(model.weights, model.shape, tmp_path / "start" / "tokenizer", tmp_path / "out", card=CARD)
    assert not exported.notes
    config = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    pair = ("The quick <mask> fox.", "It jumps.")
    assert before(*pair)["input_ids"] == after(*pair)["input_ids"]
    assert after.model_max_length == model.shape.max_positions
    longest = torch.randint(5, size, (model.shape.max_positions + 1,))
    assert len(sentence_entropies(tmp_path / "out", longest[:-1], 4, "clean")) == model.shape.max_positions
    with pytest.raises(DataError, match=f"takes at most {model.shape.max_positions}"):
        sentence_entropies(tmp_path / "out", longest, 4, "clean")


def test_a_padding_token_that_is_not_the_tokenizers_is_refused(saved, tmp_path) -> None:
    folder = saved(transformers_model("roberta", pad_token_id=1))
    with pytest.raises(CheckpointError, match=r"from which positions count, has the id 1, but its tokenizer says 0"):
        save_start(folder, tmp_path / "start")
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("roberta", {"hidden_act": "relu"}, "hidden_act"),
        ("distilbert", {"activation": "relu"}, "activation"),
        ("electra", {"is_decoder": True}, "is_decoder"),
        ("camembert", {"pad_token_id": None}, "pad_token_id"),
        ("albert", {"inner_group_num": 2}, "inner_group_num"),
        ("albert", {"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_unsupported_settings_are_named(saved, name, changes, named) -> None:
    folder = saved(transformers_model(name))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json: {named}`"):
        import_model(folder)


SCRATCH = {
    "roberta": ModelConfig("roberta", num_layers=2, hidden_size=32, num_heads=2),
    "electra": ModelConfig("bert", num_layers=2, hidden_size=32, num_heads=2, embedding_size=16),
    "albert": ModelConfig("bert", num_layers=4, hidden_size=32, num_heads=2, embedding_size=16, layer_groups=2),
}


@pytest.mark.parametrize("name", SCRATCH)
@torch.no_grad()
def test_a_model_from_random_weights_is_exported_as_its_family(tokenizer, tmp_path, name) -> None:
    size = AutoTokenizer.from_pretrained(tokenizer)
    config = replace(SCRATCH[name], max_positions=64)
    shape = config.shape(replace(IDS, size=len(size), pad=size.pad_token_id))
    encoder = Encoder(shape, config)
    model = MLM(encoder, MaskedLMHead(encoder, config)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    weights = dict(model.named_parameters())
    export_model(weights, shape, tokenizer, tmp_path / "out", card=CARD)
    other = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert type(other).__name__ == FAMILIES[name].architecture
    assert sum(parameter.numel() for parameter in other.parameters()) == sum(part.numel() for part in weights.values())
    sequences = texts(shape)
    assert_close(packed_logits(model, sequences), padded_logits(other, sequences))


def test_shared_layers_compute_what_equal_layers_do_and_sum_their_gradients() -> None:
    config = replace(SCRATCH["albert"], layer_groups=1)
    shape = config.shape(IDS)
    shared = Encoder(shape, config).double()
    apart = Encoder(replace(shape, layer_groups=None), config).double()
    source = shared.state_dict()
    apart.load_state_dict({name: source[re.sub(r"layers\.\d", "layers.0", name)] for name in apart.state_dict()})
    batch = pack([12, 20, 5])
    states = [encoder.run(encoder.embed(batch.tokens, batch.layout), batch.layout) for encoder in (shared, apart)]
    assert torch.equal(*states)
    for one in states:
        one.square().sum().backward()
    for name, parameter in shared.layers[0].named_parameters():
        summed = sum(layer.get_parameter(name).grad for layer in apart.layers)
        assert_close(parameter.grad, summed)
