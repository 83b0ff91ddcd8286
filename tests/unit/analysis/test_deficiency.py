"""Subspaces planted in an encoder are found, and our code agrees with transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.analysis import deficiency, drawing
from megamask.analysis.deficiency import MATRICES, Cuts
from megamask.analysis.layers import AnalyzedEncoder, OwnStates, open_hf_encoder, open_run_encoder
from megamask.batch import Layout, MaskPlan
from megamask.data import tokenizer as tokenizers
from megamask.errors import CheckpointError, ConfigError
from megamask.hf import Card, export_model
from megamask.hf.tensor_names import WEIGHTS
from megamask.masking.masker import EVALUATION, Masker
from megamask.masking.rng import PackRng
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives.mlm import MLM
from tests.batches import pack
from tests.tolerances import TOLERANCES

SIZES = {"num_layers": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "max_positions": 64}
CUTS = Cuts(energy=0.9, threshold=1e-4)
RANK = 5


@pytest.fixture
def texts(ids):
    """Packs of several sequences with padding behind them, and uniform masks."""
    batches = [pack([30, 41, 9], padding=6, number=n, seed=n, ids=ids) for n in range(8)]
    masker = Masker(EVALUATION, ids)
    return [(batch, masker(batch, progress=0.0, rng=PackRng(0, batch.number))) for batch in batches]


@pytest.fixture
def model(ids):
    def make(preset="modern") -> MLM:
        config = ModelConfig(preset, init_std=0.2, **SIZES)
        encoder = Encoder(config.shape(ids), config)
        return MLM(encoder, MaskedLMHead(encoder, config)).eval()

    return make


def layered(encoder: Encoder) -> AnalyzedEncoder:
    shape = encoder.shape
    return AnalyzedEncoder(
        "ours", OwnStates(encoder), shape.num_layers, shape.hidden_size, 64, Path(), shape.vocab_size, ""
    )


def analysis(model: AnalyzedEncoder, texts, cuts=CUTS):
    return deficiency.analyze_layers(deficiency.gather_states(model, texts), cuts)


@torch.no_grad()
def plant(encoder: Encoder, mask: int) -> None:
    """Real tokens use the first RANK coordinates up to the last layer; only [MASK] uses one more.

    A norm subtracts the mean of a row, so a coordinate that equals the mean becomes 0.
    """
    table = encoder.embedding.tokens.weight
    table[:, RANK] = (table.sum(1) - table[:, RANK]) / (table.shape[1] - 1)
    table[mask, RANK] += 3.0
    encoder.embedding.norm.weight[RANK + 1 :] = 0
    for layer in encoder.layers:
        layer.attention_out.weight[RANK:] = 0
        layer.mlp_out.weight[RANK:] = 0
    encoder.final_norm.weight[RANK:] = 0


def test_the_planted_subspaces_are_found(model, texts, ids):
    encoder = model().encoder
    plant(encoder, ids.mask)
    result = analysis(layered(encoder), texts)
    for layer in result.plain[1:-1]:
        rank = {name: layer.ranks[name]["numerical"].all for name in MATRICES}
        assert rank == {"clean": RANK, "masked": RANK + 1, "real": RANK, "mask": RANK + 1, "under": RANK}
        assert layer.outside["mask"]["numerical"]["directions"].all == pytest.approx(1 / (RANK + 1), abs=1e-6)
        assert layer.outside["under"]["numerical"]["directions"].all == pytest.approx(0, abs=1e-6)
        assert layer.ranks["clean"]["effective"].all < RANK < layer.ranks["masked"]["numerical"].half
    # at the embedding all [MASK] are one row; the final norm takes its coordinate away
    assert result.plain[0].ranks["mask"]["effective"].all == pytest.approx(1, abs=1e-4)
    assert result.centred[0].ranks["mask"]["effective"].all == 0
    last = result.plain[-1]
    assert last.ranks["masked"]["numerical"].all == RANK
    assert last.outside["mask"]["numerical"]["norm"].all == pytest.approx(0, abs=1e-6)


def test_mae_lm_reads_masked_text_without_the_mask_tokens(model, texts):
    """Compare with each sequence alone, its [MASK] tokens removed by hand, at the remaining positions."""
    encoder = model().encoder
    result = analysis(replace(layered(encoder), without_masks=True), texts)
    whole, states = [], torch.no_grad()(OwnStates(encoder))
    for batch, plan in texts:
        left = torch.ones(batch.layout.rows, dtype=torch.bool).index_fill(0, plan.hidden, False)
        for number in range(3):
            rows = (left & (batch.layout.sequence == number)).nonzero().squeeze(1)
            alone = Layout(torch.tensor([0, len(rows)], dtype=torch.int32), 64, batch.layout.positions[rows])
            whole.append(states(plan.inputs[rows], alone)[-1][batch.maskable[rows]])
    values = torch.linalg.svdvals(torch.cat(whole).double())
    assert result.plain[-1].values["real"] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-5 * values[0].item())
    assert "mask" not in result.plain[-1].ranks and result.plain[-1].ranks["masked"] == result.plain[-1].ranks["real"]
    assert result.plain[-1].ranks["clean"] == analysis(layered(encoder), texts).plain[-1].ranks["clean"]


def test_figures_equal_those_of_the_stacked_states(model, texts):
    encoder = model().encoder
    result = analysis(layered(encoder), texts)
    with torch.no_grad():
        for layer in range(encoder.shape.num_layers + 1):
            rows = {name: [] for name in MATRICES}
            for batch, plan in texts:
                for name, tokens in (("clean", batch.tokens), ("masked", plan.inputs)):
                    x = encoder.embed(tokens, batch.layout)
                    if layer:
                        x = encoder.run(x, batch.layout, slice(layer))
                    hidden = torch.isin(torch.arange(len(x)), plan.hidden)
                    rows[name].append(x[batch.maskable])
                    if name == "masked":
                        rows["real"].append(x[batch.maskable & ~hidden])
                        rows["mask"].append(x[hidden])
                    else:
                        rows["under"].append(x[hidden])
            for name, some in rows.items():
                stacked = torch.cat(some).double()
                assert result.plain[layer].rows[name] == len(stacked)
                for centred, layers in ((False, result.plain), (True, result.centred)):
                    matrix = stacked - stacked.mean(0) if centred else stacked
                    values = torch.linalg.svdvals(matrix)
                    scale = torch.linalg.matrix_norm(stacked).item()
                    singular_values = torch.tensor(layers[layer].values[name], dtype=torch.float64)
                    rtol, _ = TOLERANCES[torch.float32]
                    assert (singular_values - values).abs().max() < rtol * scale


def test_the_error_is_zero_if_both_halves_are_equal(model, texts):
    cut = analysis(layered(model().encoder), texts)
    twice = analysis(layered(model().encoder), [one for text in texts for one in (text, text)])
    figures = [figure for layer in cut.plain for ways in layer.ranks.values() for figure in ways.values()]
    assert any(figure.error > 0 for figure in figures)
    # both halves have read the same
    for layer in twice.plain:
        for ways in layer.ranks.values():
            for figure in ways.values():
                assert figure.error == pytest.approx(0, abs=1e-6)
                assert figure.half == pytest.approx(figure.all, rel=1e-6)


def test_without_masks_both_inputs_give_the_same_ranks(model, texts):
    plain = [(batch, MaskPlan.hide_nothing(batch)) for batch, _ in texts]
    for layer in analysis(layered(model().encoder), plain).plain:
        assert set(layer.ranks) == {"clean", "masked", "real"} and not layer.outside
        assert layer.ranks["clean"] == layer.ranks["masked"] == layer.ranks["real"]


def test_padding_and_special_tokens_are_left_out(model, texts):
    rows = analysis(layered(model().encoder), texts).plain[0].rows
    assert rows["clean"] == rows["masked"] == sum(int(batch.maskable.sum()) for batch, _ in texts)
    assert rows["mask"] == rows["under"] == sum(len(plan.hidden) for _, plan in texts)
    assert rows["real"] == rows["masked"] - rows["mask"]


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A model of ours as initial weights and as an export; returns both folders."""

    def save(model: MLM) -> tuple[Path, Path]:
        first, export = tmp_path / "first", tmp_path / "export"
        tokenizers.load_tokenizer(tokenizer).save(first / "tokenizer")
        model.encoder.shape.save(first)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        save_file(weights, first / WEIGHTS)
        export_model(weights, model.encoder.shape, tokenizer, export, card=Card("test", "none", 0, "none"))
        return first, export

    return save


@pytest.mark.parametrize("preset", ["modern", "bert"])
def test_a_run_and_its_export_have_the_same_ranks(preset, model, texts, saved):
    first, export = saved(model(preset))
    ours, theirs = open_run_encoder(first), open_hf_encoder(str(export))
    assert (ours.layers, ours.width, ours.longest) == (theirs.layers, theirs.width, theirs.longest)
    assert not isinstance(theirs.states, OwnStates)
    one, two = analysis(ours, texts), analysis(theirs, texts)
    rtol, _ = TOLERANCES[torch.float32]
    for layer, its in zip(one.plain + one.centred, two.plain + two.centred, strict=True):
        for name in MATRICES:
            assert layer.ranks[name]["effective"].all == pytest.approx(its.ranks[name]["effective"].all, rel=rtol)
            assert layer.values[name] == pytest.approx(its.values[name], rel=rtol, abs=rtol * layer.values[name][0])


def test_tables_name_every_layer_and_matrix(model, texts):
    result = analysis(layered(model().encoder), texts)
    lines = drawing.tables("ours", result.plain, CUTS, centred=False)
    heads = [line for line in lines if line.startswith("| layer")]
    assert [all(name in head for name in MATRICES) for head in heads] == [True] * 3 + [False] * 2
    assert sum(line.startswith("|") for line in lines) == len(heads) * (2 + len(result.plain))


def test_several_encoders_are_drawn_in_one_picture(model, texts, tmp_path):
    result = analysis(layered(model().encoder), texts)
    drawing.picture({"one": result}, CUTS, tmp_path / "one.png")
    drawing.picture({"one": result, "two": analysis(layered(model().encoder), texts)}, CUTS, tmp_path / "two.png")
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one[:4] == two[:4] == b"\x89PNG" and one != two


class TestRefused:
    def test_no_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="is not a folder"):
            open_run_encoder(tmp_path / "nowhere")

    def test_a_folder_without_checkpoints(self, tmp_path):
        with pytest.raises(CheckpointError, match="contains no checkpoint"):
            open_run_encoder(tmp_path)

    def test_weights_of_another_width(self, model, saved):
        first, _ = saved(model())
        replace(model().encoder.shape, hidden_size=32).save(first)
        with pytest.raises(CheckpointError, match=r"must have the shape .*32"):
            open_run_encoder(first)

    def test_a_model_without_mask(self, model, saved):
        _, export = saved(model())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = export / name
            path.write_text(path.read_text().replace("[MASK]", "[NONE]"))
        tokenizer_config = json.loads((export / "tokenizer_config.json").read_text())
        tokenizer_config.pop("mask_token")
        (export / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        with pytest.raises(ConfigError, match="no mask token"):
            open_hf_encoder(str(export))

    def test_a_folder_without_config(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            open_hf_encoder(str(tmp_path))

    def test_a_missing_tensor(self, model, saved):
        _, export = saved(model())
        tensors = load_file(export / WEIGHTS)
        tensors.pop("model.layers.1.mlp.Wi.weight")
        save_file(tensors, export / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.Wi"):
            open_hf_encoder(str(export))

    def test_nan_in_the_weights(self, model, saved):
        _, export = saved(model())
        tensors = load_file(export / WEIGHTS)
        tensors["model.layers.1.mlp.Wi.weight"][0, 0] = torch.nan
        save_file(tensors, export / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="NaN or Inf in the tensor"):
            open_hf_encoder(str(export))
