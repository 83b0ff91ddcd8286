"""Runs, checkpoints, exports and models of transformers open as encoders; what is none is refused with its reasons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, BertModel, GPT2Config, GPT2Model, T5Config, T5Model

from megamask.errors import CheckpointError
from megamask.evaluation.encoder import load_encoder, open_encoder, with_random_weights
from megamask.storage import file_list
from tests.unit.evaluation.models import FAMILIES, save_model

WEIGHTS = "model.safetensors"
OLD_RUN = Path(__file__).parents[2] / "data" / "old_run" / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_encoder(str(folder), folder.parent / "cache")
    return str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers_open(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path / "model", family)
    encoder = open_encoder(str(folder), tmp_path / "cache")
    assert (encoder.label, encoder.folder) == ("model", folder)
    assert encoder.weights == file_list.sha256(folder / WEIGHTS)
    assert not (tmp_path / "cache").exists()
    tokens = torch.full((1, encoder.max_length), 5)
    assert load_encoder(encoder)(input_ids=tokens).last_hidden_state.isfinite().all()


def test_positions_of_roberta_begin_after_the_padding_token(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "roberta")
    encoder = open_encoder(str(folder), tmp_path)
    assert encoder.max_length == 65  # 66 positions, the first for padding
    with pytest.raises((IndexError, RuntimeError)):
        load_encoder(encoder)(input_ids=torch.full((1, 66), 5))


def test_the_limit_of_the_tokenizer_counts_if_it_is_lower(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 40}))
    assert open_encoder(str(folder), folder).max_length == 40


def test_a_run_and_its_checkpoints_are_exported_once(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(OLD_RUN, run)
    encoder = open_encoder(str(run), tmp_path / "cache")
    assert encoder.label == "tiny"
    written = (encoder.folder / WEIGHTS).stat().st_mtime_ns
    step = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    again = open_encoder(str(step), tmp_path / "cache")
    assert again.label == f"tiny/{step.name}"
    assert (again.folder, again.weights) == (encoder.folder, encoder.weights)
    assert (again.folder / WEIGHTS).stat().st_mtime_ns == written
    model = AutoModelForMaskedLM.from_pretrained(encoder.folder)
    body = load_encoder(encoder)
    tokens = torch.arange(5, 15)[None]
    assert torch.equal(body(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)
    export = tmp_path / "tiny" / "export"
    shutil.copytree(encoder.folder, export)
    assert open_encoder(str(export), tmp_path / "cache").label == "tiny"


def test_random_weights_depend_only_on_the_seed(folder: Path, tmp_path: Path) -> None:
    encoder = open_encoder(str(folder), tmp_path)
    first, other = (with_random_weights(encoder, tmp_path / "one", seed) for seed in (1, 2))
    torch.manual_seed(7)
    again = with_random_weights(encoder, tmp_path / "two", 1)
    assert first.weights == again.weights and len({encoder.weights, first.weights, other.weights}) == 3
    opened = open_encoder(str(first.folder), tmp_path)
    assert (opened.weights, opened.max_length) == (first.weights, encoder.max_length)
    assert AutoModelForMaskedLM.from_pretrained(first.folder, output_loading_info=True)[1]["missing_keys"] == set()


def test_a_name_in_the_hub_cache_needs_no_network(folder: Path, tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "hub" / "models--someone--encoder" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    encoder = open_encoder("someone/encoder", tmp_path / "cache")
    assert (encoder.label, encoder.folder) == ("someone/encoder", snapshot)


@pytest.mark.parametrize("name", ["", "/nowhere/at/all", "nobody/nothing"])
def test_a_name_that_is_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="`model` must be a folder or the name of a model"):
        open_encoder(name, tmp_path)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_is_refused_as_a_file(folder: Path, absolute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match="It is a file: name the folder of the model"):
        open_encoder(str(folder / WEIGHTS if absolute else WEIGHTS), folder)


def test_a_missing_path_is_not_taken_for_a_name_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no such folder") as caught:
        open_encoder("runs/tiny/checkpoints/step-5", tmp_path)
    assert "Repo id" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "neither a run or checkpoint of megamask nor a model" in refusal(tmp_path)
    (checkpoints := tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert f"Name the run, {tmp_path / 'run'}, or one of its checkpoints." in refusal(checkpoints)
    assert "Name the run" not in refusal(tmp_path)


def test_all_problems_are_named_at_once(folder: Path) -> None:
    for path in folder.glob("tokenizer*.json"):
        path.unlink()
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("query.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    message = refusal(folder)
    assert "has no tokenizer" in message and "NaN or Inf" in message


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    assert "tokens, but the model only 40 embeddings" in refusal(save_model(tmp_path / "model", vocab_size=40))


def test_a_tokenizer_without_a_first_special_token_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    assert "puts no special token before a text" in refusal(folder)


def test_decoders_are_refused(folder: Path, tmp_path: Path) -> None:
    size = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **size)).save_pretrained(folder)
    assert "(gpt2) is not an encoder" in refusal(folder)
    config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0, **size)
    T5Model(config).save_pretrained(folder)
    assert "(t5) is an encoder with a decoder" in refusal(folder)


def test_weights_that_are_missing_are_refused_and_a_missing_pooler_is_not(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    assert not any("pooler" in name for name in tensors)
    encoder = open_encoder(str(folder), folder)
    tokens = torch.arange(5, 15)[None]
    expected = BertModel.from_pretrained(folder)(tokens).last_hidden_state
    assert torch.equal(load_encoder(encoder)(tokens).last_hidden_state, expected)
    save_file({name: t for name, t in tensors.items() if "layer.1.output.dense" not in name}, folder / WEIGHTS)
    assert "lacks" in refusal(folder)
