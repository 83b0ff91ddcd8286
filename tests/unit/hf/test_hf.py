"""Import and export keep logits and weights, or name what is missing."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

from megamask.__main__ import main
from megamask.batch import Layout
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.data import tokenizer as tokenizers
from megamask.data import tokenizer_training
from megamask.errors import CheckpointError, ConfigError, MegamaskError
from megamask.hf import Card, exporting, import_model, save_start
from megamask.hf import export_model as export
from megamask.hf.masked_lm import load_hf_masked_lm
from megamask.hf.predictions import sentence_entropies
from megamask.hf.tensor_names import WEIGHTS
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape, ModelConfig
from megamask.objectives.mlm import MLM
from megamask.objectives.objective import load_objective_weights
from tests.tolerances import assert_close

CARD = Card("a test", recipe="random weights", steps=7, data="0123abcd", run="first")
SMALL = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "max_positions": 80}
LOCAL = {"global_every": 3, "local_window": 8}
KINDS = [("bert", {}), ("modern", {}), ("modern", LOCAL), ("bert", {"num_layers": 1}), ("modern", {"num_layers": 1})]
FAMILY_NAMES = ["bert", "modern", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert"]
"""Our presets, and every other `model_type` that is imported."""
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs and some water."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_training.train_tokenizer("wordpiece", TEXTS * 5, size=90).save(folder)
    return folder


@pytest.fixture
def make(tokenizer):
    """Makes an MLM for the tokenizer with random values in every tensor."""
    ids = tokenizers.token_ids(tokenizers.load_tokenizer(tokenizer))

    def make(preset, dtype=torch.float32, **settings):
        config = ModelConfig(preset=preset, init_std=0.2, **{**SMALL, **settings})
        encoder = Encoder(config.shape(ids), config)
        model = MLM(encoder, MaskedLMHead(encoder, config)).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model

    return make


def weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def theirs(preset, **changes):
    """A model of transformers with random weights; ``preset`` is one of ours or a `model_type` of theirs."""
    common = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0}
    common |= {"intermediate_size": 48, "max_position_embeddings": 80, "initializer_range": 0.2}
    special = dict.fromkeys(("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id"))
    more = {"distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48}, "electra": {"embedding_size": 16}}
    more["albert"] = {"embedding_size": 16}
    model_type = {"modern": "modernbert"}.get(preset, preset)
    common |= more.get(preset, special if preset == "modern" else {})
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **common | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Saves a model of theirs with the tokenizer; returns the folder."""

    def save(model, name="theirs"):
        folder = tmp_path / name
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        return folder

    return save


def packed_logits(model, sequences):
    lengths = [len(sequence) for sequence in sequences]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = Layout(ends, max(lengths), torch.cat([torch.arange(n) for n in lengths]).int())
    states = model.encoder.run(model.encoder.embed(torch.cat(sequences), layout), layout)
    return model.head.logits(states)


def in_64_bits(model, other, sequences):
    """The logits of both in fp64, and the precision of the worse: rotary embeddings of transformers are always fp32."""
    rotary = model.encoder.shape.preset == "modern"
    pair = packed_logits(model.double(), sequences), padded_logits(other.double(), sequences)
    return *pair, torch.float32 if rotary else torch.float64


def padded_logits(model, sequences):
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    present = torch.arange(padded.shape[1]) < torch.tensor([len(sequence) for sequence in sequences])[:, None]
    return model(input_ids=padded, attention_mask=present.long()).logits[present]


@pytest.mark.parametrize("backend", ["padded", "reference"])
@pytest.mark.parametrize("preset, settings", KINDS)
@torch.no_grad()
def test_packed_logits_equal_padded_logits_of_the_export(make, tokenizer, tmp_path, preset, settings, backend):
    model = make(preset, attention=backend, **settings)
    export(weights(model), model.encoder.shape, tokenizer, tmp_path / "out", card=CARD)
    other = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    sequences = [torch.randint(model.encoder.shape.vocab_size, (length,)) for length in (5, 80, 1, 33, 12)]
    assert_close(packed_logits(model, sequences), padded_logits(other, sequences))
    assert_close(*in_64_bits(model, other, sequences))


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_the_encoder_loads_alone_and_the_pipeline_fills_masks(make, tokenizer, tmp_path, preset):
    model = make(preset)
    out = tmp_path / "out"
    assert export(weights(model), model.encoder.shape, tokenizer, out, card=CARD).difference < 1e-3
    body = AutoModel.from_pretrained(out)
    assert body.config.hidden_size == 32
    answers = pipeline("fill-mask", str(out))(
        "The quick [MASK] fox " + "jumps over " * 200, top_k=3, tokenizer_kwargs={"truncation": True}
    )
    assert len(answers) == 3 and all(0 < answer["score"] < 1 for answer in answers)
    card = (out / "README.md").read_text()
    assert all(text in card for text in (CARD.name, CARD.recipe, str(CARD.steps), CARD.data))


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
    source = saved(theirs(preset, **changes))
    model = import_model(source)
    export(model.weights, model.shape, source, tmp_path / "out", card=CARD)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    assert import_model(tmp_path / "out").shape == model.shape


@pytest.mark.parametrize("preset", ["bert", "modern"])
@torch.no_grad()
def test_an_imported_model_computes_the_logits_of_the_original(saved, preset):
    other = theirs(preset)
    imported = import_model(saved(other))
    encoder = Encoder(imported.shape)
    model = MLM(encoder, MaskedLMHead(encoder)).eval()
    assert not model.load_state_dict(imported.weights, strict=False).unexpected_keys
    sequences = [torch.randint(imported.shape.vocab_size, (length,)) for length in (5, 70, 33)]
    assert_close(*in_64_bits(model, other, sequences))


def test_old_tensor_names_and_unused_tensors_are_accepted(saved):
    folder = saved(theirs("bert"))
    wanted = import_model(folder).weights
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
    assert imported.keys() == wanted.keys() and all(torch.equal(imported[name], wanted[name]) for name in wanted)


def test_a_modernbert_configuration_of_transformers_4_is_read(saved):
    folder = saved(theirs("modern", global_attn_every_n_layers=2, local_attention=16))
    wanted = import_model(folder).shape
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
    assert import_model(folder).shape == wanted
    assert wanted.rope_theta != wanted.local_rope_theta and wanted.global_every == 2


def test_16_bit_weights_keep_their_precision(saved):
    ours = import_model(saved(theirs("modern").bfloat16())).weights
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}


def test_an_export_with_other_logits_is_not_written(make, tokenizer, tmp_path, monkeypatch):
    model = make("bert")
    rename = exporting.to_theirs

    def swapped(weights, shape):
        tensors = rename(weights, shape)
        one, two = (f"bert.encoder.layer.2.attention.self.{part}.weight" for part in ("query", "value"))
        return tensors | {one: tensors[two], two: tensors[one]}

    monkeypatch.setattr(exporting, "to_theirs", swapped)
    with pytest.raises(CheckpointError, match="logits that differ from ours by"):
        export(weights(model), model.encoder.shape, tokenizer, tmp_path / "out", card=CARD)
    assert not list(tmp_path.iterdir())


def test_weights_with_nan_are_not_exported(make, tokenizer, tmp_path):
    model = make("modern")
    tensors = weights(model)
    tensors["encoder.layers.1.mlp_out.weight"] = tensors["encoder.layers.1.mlp_out.weight"] * torch.nan
    with pytest.raises(
        CheckpointError, match=r"the model to export has NaN or Inf in the tensor encoder\.layers\.1\.mlp"
    ):
        export(tensors, model.encoder.shape, tokenizer, tmp_path / "out", card=CARD)
    assert not list(tmp_path.iterdir())


def test_all_wrong_tensors_are_named_at_once(make, tokenizer, tmp_path):
    model = make("modern")
    tensors = weights(model)
    del tensors["head.norm.weight"]
    tensors["head.norm.strange"] = torch.zeros(3)
    tensors["encoder.layers.0.qkv.weight"] = torch.zeros(3, 4)
    with pytest.raises(CheckpointError) as error:
        export(tensors, model.encoder.shape, tokenizer, tmp_path / "out", card=CARD)
    assert error.value.problems == (
        "the model to export lacks the tensor head.norm.weight.",
        "the model to export has the tensor head.norm.strange, which this encoder does not have.",
        "`encoder.layers.0.qkv.weight` must have the shape (96, 32), but is (3, 4). It is in the model to export.",
    )


def test_modules_of_another_objective_are_left_out(make, tokenizer, tmp_path):
    model = make("modern")
    export(
        weights(model) | {"decoder.layers.0.qkv.weight": torch.zeros(2)},
        model.encoder.shape, tokenizer, tmp_path / "out", card=CARD,
    )  # fmt: skip
    assert not any(name.startswith("decoder.layers") for name in load_file(tmp_path / "out" / WEIGHTS))


def test_only_an_export_of_the_same_run_is_replaced(make, tokenizer, tmp_path):
    model = make("bert")
    out = tmp_path / "out"

    def again(**changes) -> str:
        replace = changes.pop("replace", False)
        card = dataclasses.replace(CARD, **changes)
        export(weights(model), model.encoder.shape, tokenizer, out, card=card, replace=replace)
        return (out / "README.md").read_text()

    again()
    assert "# again" in again(name="again")
    for run in ("second", ""):
        with pytest.raises(ConfigError, match=r"is not an export of this run or was changed since\..*--replace"):
            again(name="other", run=run)
    assert "# again" in (out / "README.md").read_text()
    assert "# other" in again(name="other", run="second", replace=True)
    tuned = load_file(out / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tuned.items()}, out / WEIGHTS)
    with pytest.raises(ConfigError, match="was changed since"):
        again(run="second")
    (out / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"is not an earlier export: it contains thesis\.tex"):
        export(weights(model), model.encoder.shape, tokenizer, out, card=CARD)
    assert (out / "thesis.tex").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_larger_than_the_model_is_refused(make, tokenizer, tmp_path):
    shape = dataclasses.replace(make("bert").encoder.shape, vocab_size=20)
    tensors = weights(MLM(encoder := Encoder(shape), MaskedLMHead(encoder)))
    with pytest.raises(CheckpointError, match="do not belong together"):
        export(tensors, shape, tokenizer, tmp_path / "out", card=CARD)


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
    folder = saved(theirs(preset))
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
    folder = saved(theirs("bert"))
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MegamaskError):
        reads(folder)


def test_impossible_sizes_are_a_sentence_for_sentence_entropies(saved):
    folder = saved(theirs("bert"))
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2**53}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{folder}/config.json does not describe .*: num_hidden_layers is"):
        sentence_entropies(folder, torch.tensor([1, 2]), 3, "clean")


@pytest.mark.parametrize(
    "reads", [load_hf_masked_lm, lambda folder: sentence_entropies(folder, torch.tensor([1, 2]), 3, "clean")]
)
def test_an_encoder_without_a_head_gives_no_predictions(saved, reads, capfd):
    folder = saved(theirs("bert").bert)
    capfd.readouterr()
    with pytest.raises(CheckpointError, match=r"does not hold a complete BertForMaskedLM: it lacks \d+ tensors"):
        reads(folder)
    assert not any(capfd.readouterr())


def test_other_models_formats_and_damage_are_refused(saved, tmp_path):
    folder = saved(theirs("bert"))
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


def test_initial_weights_contain_all_that_pretraining_needs(saved, tmp_path):
    folder, out = saved(theirs("modern")), tmp_path / "start"
    assert main(["import", "--model", str(folder), "--output", str(out)]) == 0
    shape = EncoderShape.load(out)
    encoder = Encoder(shape)
    load_objective_weights(MLM(encoder, MaskedLMHead(encoder)), load_file(out / WEIGHTS))
    assert tokenizers.load_tokenizer(out / "tokenizer").hash() == tokenizers.load_tokenizer(folder).hash()
    with pytest.raises(ConfigError, match="must be a new or empty folder"):
        save_start(folder, out)


@pytest.fixture
def trained(make, tokenizer, tmp_path):
    """``trained(name)``: a run folder after 12 steps with everything that an export reads."""

    def trained(name: str, **settings: object) -> Path:
        model = make("modern")
        run = RunFolder(tmp_path / name)
        run.logs.mkdir(parents=True)
        run.config.write_text(json.dumps({"recipe": "quick", "text": "feed5eed", "data": "/far/away/poems"} | settings))
        run.environment.write_text(json.dumps({"launches": [{"launch": f"{name}-1"}, {"launch": f"{name}-2"}]}))
        run.text.write_text(json.dumps({"splits": {"train": {"documents": 7, "tokens": 4321}}}))
        lines = [{"step": 6, "valid/loss": 5.5}, {"step": 12, "valid/loss": 4.25, "valid/unigram_loss": 6.5}]
        lines += [{"step": 12, "train/loss": 3.0}, {"step": 18, "valid/loss": 1.0}]
        (run.logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        model.encoder.shape.save(run.path)
        (run.path / "tokenizer").symlink_to(tokenizer)
        run.checkpoints.mkdir()
        save_checkpoint(run, 12, {f"weights/{name}": tensor for name, tensor in weights(model).items()}, {})
        return run.path

    return trained


def test_one_command_exports_a_checkpoint(trained, tmp_path, capsys):
    run, out = trained("run"), tmp_path / "out"
    assert main(["export", "--run", str(run), "--output", str(out)]) == 0
    assert "differ by at most" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for row in ("steps | 12", "text | poems: 7 documents, 4,321 tokens", f"exported | {date.today():%Y}"):
        assert f"| {row}" in card
    assert "| validation loss | 4.2500 nats per masked token at step 12 (a guess by frequency: 6.5000) |" in card
    assert main(["export", "--run", str(run), "--output", str(out), "--step", "13"]) == CheckpointError.exit_code
    assert "has no checkpoint of step 13" in capsys.readouterr().err


def test_an_export_of_another_run_is_replaced_only_with_replace(trained, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--run", str(trained("one")), "--output", str(out)]
    assert main(["export", *command]) == main(["export", *command]) == 0
    other = ["--run", str(trained("other")), "--output", str(out)]
    before = (out / WEIGHTS).read_bytes()
    capsys.readouterr()
    assert main(["export", *other]) == ConfigError.exit_code
    assert "contains a model that is not an export of this run" in capsys.readouterr().err
    assert (out / WEIGHTS).read_bytes() == before
    assert main(["export", *other, "--replace"]) == 0
    assert (out / WEIGHTS).read_bytes() != before


@pytest.mark.parametrize("settings", [{}, {"objective": {"kind": "mae_lm"}}, {"objective": {"mask_vector": "own"}}])
def test_the_example_of_the_model_card_runs(trained, tmp_path, settings):
    out = tmp_path / "out"
    assert main(["export", "--run", str(trained("run", **settings)), "--output", str(out)]) == 0
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert ("pipeline" in code and "[MASK]" in code) is not bool(settings)
    printed: list[object] = []
    exec(code.replace("path/to/this/model", str(out)), {"print": printed.append})
    assert bool(printed) is not bool(settings)


def test_an_export_has_the_permissions_of_the_umask(trained, tmp_path):
    run = str(trained("run"))
    before = os.umask(0o027)
    try:
        assert main(["export", "--run", run, "--output", str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_no_module_imports_transformers_at_the_top() -> None:
    """Importing transformers takes a second of every rank's start."""

    def at_once(path: Path) -> bool:
        return any(
            ast.unparse(line).startswith(("import transformers", "from transformers"))
            for line in ast.parse(path.read_text()).body
        )

    assert at_once(Path(__file__))
    assert not [path for path in Path(exporting.__file__).parent.glob("*.py") if at_once(path)]
