"""The README's story, from text to an exported model and on from there, by the command lines that it names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

from megamask.__main__ import main
from megamask.batch import Layout
from megamask.checkpoint.format import read_state, read_tensors, read_weights
from megamask.checkpoint.run_folder import RunFolder
from megamask.errors import REQUEUE
from megamask.hf.tensor_names import to_hf_weights
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import EncoderShape, ModelConfig
from megamask.objectives.mlm import MLM
from megamask.objectives.objective import load_objective_weights
from megamask.runtime import precision
from tests.system.commands import free_port, metrics, run, shell, train, training
from tests.system.conftest import STEPS
from tests.tolerances import assert_close

SENTENCE = "qo [MASK] w."


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(read_tensors(RunFolder(folder).checkpoint(step)))


def assert_same_run(actual: Path, expected: Path, step: int) -> None:
    """Every weight, moment and metric is the same, bit for bit."""
    ours, theirs = tensors(actual, step), tensors(expected, step)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(actual) == metrics(expected)


def our_model(folder: Path, step: int | None = None) -> MLM:
    config = ModelConfig()
    encoder = Encoder(EncoderShape.load(folder), config)
    model = MLM(encoder, MaskedLMHead(encoder, config))
    load_objective_weights(model, read_weights(folder, step))
    return model.eval()


@torch.no_grad()
def our_states(model: MLM, ids: torch.Tensor) -> torch.Tensor:
    layout = Layout.of(torch.tensor([0, len(ids)]), len(ids), len(ids))
    return model.encoder.run(model.encoder.embed(ids, layout), layout)


@pytest.fixture(scope="module")
def disturbed(folder: Path, data: Path) -> Path:
    """The finished run once more: stopped, then killed, and gone on with each time by the same command."""
    output = folder / "disturbed"
    command = training(data, output, steps=STEPS, checkpoint__every=4, validation__every=4)
    stopped = shell(sys.executable, "tests/system/killed.py", "SIGTERM", 2, *command)
    assert stopped.code == REQUEUE, stopped.err
    assert f"Stopped after step 3 of {STEPS}, as requested. The same command resumes the run." in stopped.out
    assert RunFolder(output).steps() == [3]
    killed = shell(sys.executable, "tests/system/killed.py", "SIGKILL", 9, *command)
    assert killed.code == -9
    assert "resuming after step 3 of" in killed.out
    assert RunFolder(output).steps() == [8, 4, 3]
    ended = shell(sys.executable, "megamask/pretrain.py", *command)
    assert ended.code == 0, ended.err
    assert "resuming after step 8 of" in ended.out
    return output


def test_a_run_that_was_stopped_and_killed_is_the_run_that_was_not(disturbed: Path, finished: Path) -> None:
    assert_same_run(disturbed, finished, STEPS)


def test_a_finished_run_started_again_changes_nothing(copy: Path, data: Path, finished: Path) -> None:
    again = train(data, copy, steps=STEPS, checkpoint__every=4, validation__every=4)
    assert again.code == 0, again.err
    assert_same_run(copy, finished, STEPS)


@pytest.fixture(scope="module")
def exported(disturbed: Path, folder: Path) -> Path:
    output = folder / "exported"
    made = shell(sys.executable, "-m", "megamask", "export", "--run", disturbed, "--output", output)
    assert made.code == 0, made.err
    assert "logits of transformers and ours differ by at most" in made.out
    return output


def test_transformers_computes_what_we_compute(exported: Path, disturbed: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    at = (ids[0] == tokenizer.mask_token_id).nonzero().item()
    model = our_model(disturbed)
    states = our_states(model, ids[0])
    with torch.no_grad():
        logits = model.head.logits(states)
        assert_close(AutoModelForMaskedLM.from_pretrained(exported)(ids).logits[0], logits)
        assert_close(AutoModel.from_pretrained(exported)(ids).last_hidden_state[0], states)
    answers = pipeline("fill-mask", str(exported), top_k=5)(SENTENCE)
    chances, best = logits[at].softmax(0).topk(5)
    assert [answer["token"] for answer in answers] == best.tolist()
    assert_close(torch.tensor([answer["score"] for answer in answers]), chances)
    card = (exported / "README.md").read_text()
    assert "tiny" in card
    assert str(STEPS) in card


def test_an_older_checkpoint_is_exported_as_it_was(disturbed: Path, exported: Path, tmp_path: Path) -> None:
    made = run(main, "export", "--run", disturbed, "--step", 8, "--output", tmp_path / "older")
    assert made.code == 0, made.err
    older = load_file(tmp_path / "older" / "model.safetensors")
    newer = load_file(exported / "model.safetensors")
    shape = EncoderShape.load(disturbed)
    for folder, step in ((older, 8), (newer, STEPS)):
        expected = to_hf_weights(read_weights(disturbed, step), shape)
        assert all(torch.equal(folder[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(older[name], newer[name]) for name in newer)


def test_training_continues_from_an_export(exported: Path, disturbed: Path, data: Path, tmp_path: Path) -> None:
    start, output = tmp_path / "start", tmp_path / "run"
    made = run(main, "import", "--model", exported, "--output", start)
    assert made.code == 0, made.err
    ended = train(data, output, init=start, steps=2)
    assert ended.code == 0, ended.err
    losses, expected = metrics(output, "valid/loss"), metrics(disturbed, "valid/loss")
    assert_close(torch.tensor(losses[0, "valid/loss"]), torch.tensor(expected[STEPS, "valid/loss"]))
    made = run(main, "import", "--model", exported, "--output", tmp_path / "body", "--new-head")
    assert made.code == 0, made.err
    ended = train(data, tmp_path / "again", init=tmp_path / "body", steps=1)
    assert ended.code == 0, ended.err
    assert ended.out.count("has no masked-language head: a new one is drawn from `seed`") == 1
    assert metrics(tmp_path / "again", "valid/loss")[0, "valid/loss"] > losses[0, "valid/loss"]


def test_a_run_of_two_ranks_in_stage_3_is_exported_by_one_process(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    launcher = ["deepspeed", "--num_accelerators", 2, "--master_port", free_port()]
    more = ["--deepspeed", "ds_configs/zero3.json"]
    ended = shell(*launcher, "megamask/pretrain.py", *training(data, output), *more)
    assert ended.code == 0, ended.out + ended.err
    assert len(list(RunFolder(output).checkpoint(4).glob("*.safetensors"))) == 2
    made = run(main, "export", "--run", output, "--output", tmp_path / "exported")
    assert made.code == 0, made.err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    model = our_model(output)
    with torch.no_grad():
        theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "exported")(ids).logits[0]
        assert_close(theirs, model.head.logits(our_states(model, ids[0])))


def test_a_run_resumes_in_another_precision_and_logs_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines of which one multiplies in bf16."""
    output, ends = tmp_path / "run", []
    for steps, bf16 in ((2, True), (3, False)):
        support = precision.PrecisionSupport(bf16, f"bf16 is {bf16} there")
        monkeypatch.setattr(precision, "device_support", lambda device, support=support: support)
        more = {"deepspeed": "ds_configs/zero2.json", "steps": steps}
        ends.append(train(data, output, "--change", "steps", **more))
        assert ends[-1].code == 0, ends[-1].err
    first, second = (ended.out.splitlines() for ended in ends)
    lines = [line for line in first + second if line.startswith("precision: ")]
    assert lines == ["precision: bf16, because bf16 is True there", "precision: fp32, because bf16 is False there"]
    assert [line for line in second if "ZeRO 2, fp32; the checkpoint was written by 1 rank, ZeRO 2, bf16" in line]
    assert not [line for line in first + second if "slow" in line]
    launches = json.loads((output / "environment.json").read_text())["launches"]
    assert [f"precision: {launch['precision']}" for launch in launches] == lines
    assert read_state(RunFolder(output).checkpoint(3))["precision"] == "fp32"


def test_an_order_for_bf16_where_it_is_slow_is_one_line(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        precision, "device_support", lambda device: precision.PrecisionSupport(False, "this is a slow machine")
    )
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 1}}')
    ended = train(data, tmp_path / "run", deepspeed=tmp_path / "ds.json", steps=1)
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if "slow" in line]
    assert "this is a slow machine" in line and "`bf16.enabled`" in line and "'auto'" in line
