"""An export computes what the original computes, or is not written."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, pipeline

from megamask.errors import CheckpointError, ConfigError
from megamask.hf import export_model as export
from megamask.hf import exporting
from megamask.hf.tensor_names import WEIGHTS
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.objectives.mlm import MLM
from tests.tolerances import assert_close
from tests.unit.hf.models import CARD, in_64_bits, packed_logits, padded_logits, weights_of

LOCAL = {"global_every": 3, "local_window": 8}
KINDS = [("bert", {}), ("modern", {}), ("modern", LOCAL), ("bert", {"num_layers": 1}), ("modern", {"num_layers": 1})]


@pytest.mark.parametrize("backend", ["padded", "reference"])
@pytest.mark.parametrize("preset, settings", KINDS)
@torch.no_grad()
def test_packed_logits_equal_padded_logits_of_the_export(make, tokenizer, tmp_path, preset, settings, backend):
    model = make(preset, attention=backend, **settings)
    export(weights_of(model), model.encoder.shape, tokenizer, tmp_path / "out", card=CARD)
    other = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    sequences = [torch.randint(model.encoder.shape.vocab_size, (length,)) for length in (5, 80, 1, 33, 12)]
    assert_close(packed_logits(model, sequences), padded_logits(other, sequences))
    assert_close(*in_64_bits(model, other, sequences))


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_the_encoder_loads_alone_and_the_pipeline_fills_masks(make, tokenizer, tmp_path, preset):
    model = make(preset)
    out = tmp_path / "out"
    assert export(weights_of(model), model.encoder.shape, tokenizer, out, card=CARD).difference < 1e-3
    body = AutoModel.from_pretrained(out)
    assert body.config.hidden_size == 32
    answers = pipeline("fill-mask", str(out))(
        "The quick [MASK] fox " + "jumps over " * 200, top_k=3, tokenizer_kwargs={"truncation": True}
    )
    assert len(answers) == 3 and all(0 < answer["score"] < 1 for answer in answers)
    card = (out / "README.md").read_text()
    assert all(text in card for text in (CARD.name, CARD.recipe, str(CARD.steps), CARD.data))


def test_an_export_with_other_logits_is_not_written(make, tokenizer, tmp_path, monkeypatch):
    model = make("bert")
    rename = exporting.to_hf_weights

    def swapped(weights, shape):
        tensors = rename(weights, shape)
        one, two = (f"bert.encoder.layer.2.attention.self.{part}.weight" for part in ("query", "value"))
        return tensors | {one: tensors[two], two: tensors[one]}

    monkeypatch.setattr(exporting, "to_hf_weights", swapped)
    with pytest.raises(CheckpointError, match="logits that differ from ours by"):
        export(weights_of(model), model.encoder.shape, tokenizer, tmp_path / "out", card=CARD)
    assert not list(tmp_path.iterdir())


def test_weights_with_nan_are_not_exported(make, tokenizer, tmp_path):
    model = make("modern")
    tensors = weights_of(model)
    tensors["encoder.layers.1.mlp_out.weight"] = tensors["encoder.layers.1.mlp_out.weight"] * torch.nan
    with pytest.raises(
        CheckpointError, match=r"the model to export has NaN or Inf in the tensor encoder\.layers\.1\.mlp"
    ):
        export(tensors, model.encoder.shape, tokenizer, tmp_path / "out", card=CARD)
    assert not list(tmp_path.iterdir())


def test_all_wrong_tensors_are_named_at_once(make, tokenizer, tmp_path):
    model = make("modern")
    tensors = weights_of(model)
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
        weights_of(model) | {"decoder.layers.0.qkv.weight": torch.zeros(2)},
        model.encoder.shape, tokenizer, tmp_path / "out", card=CARD,
    )  # fmt: skip
    assert not any(name.startswith("decoder.layers") for name in load_file(tmp_path / "out" / WEIGHTS))


def test_only_an_export_of_the_same_run_is_replaced(make, tokenizer, tmp_path):
    model = make("bert")
    out = tmp_path / "out"

    def again(**changes) -> str:
        replace = changes.pop("replace", False)
        card = dataclasses.replace(CARD, **changes)
        export(weights_of(model), model.encoder.shape, tokenizer, out, card=card, replace=replace)
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
        export(weights_of(model), model.encoder.shape, tokenizer, out, card=CARD)
    assert (out / "thesis.tex").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_larger_than_the_model_is_refused(make, tokenizer, tmp_path):
    shape = dataclasses.replace(make("bert").encoder.shape, vocab_size=20)
    tensors = weights_of(MLM(encoder := Encoder(shape), MaskedLMHead(encoder)))
    with pytest.raises(CheckpointError, match="do not belong together"):
        export(tensors, shape, tokenizer, tmp_path / "out", card=CARD)
