"""Every bad input ends in a sentence with its culprit and an exit code of its kind; nothing that was there is lost."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from transformers import BertConfig, BertForMaskedLM

from megamask import command, files, pretrain, publish
from megamask.checkpoint import RunFolder, read_tensors
from megamask.data.tokenizer import train as train_tokenizer
from megamask.engine import ds_file
from megamask.hf import exporting
from megamask.log import SummaryWriter
from megamask.objectives.mlm import MLM
from tests.system.commands import Ended, content, flags, metrics, run, train, training
from tests.system.conftest import STEPS
from tools import annotate_entropy, convert_from_hf, convert_to_hf, prepare_data

CONFIG, DATA, CHECKPOINT, NUMBERS, STORAGE = 2, 3, 4, 5, 7


def said(ended: Ended, code: int, *culprits: str) -> None:
    """It ended with ``code``, and the sentence names every culprit."""
    told = " ".join((ended.out + ended.err).replace("│", " ").split())  # the parser draws boxes and breaks lines
    assert ended.code == code, told
    assert "Traceback" not in told
    for culprit in culprits:
        assert culprit in told


# ---- settings


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["--stepz", "3"], ["--stepz", "--steps"]),
        (["--model.hiden-size", "3"], ["--model.hiden-size", "--model.hidden-size"]),
        (["--model.size", "huge"], ["huge", "--model.size", "xxl"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--recipe", "smal"], ["`smal`", "Did you mean `small`?"]),
        (["--config", "nowhere.yaml"], ["`nowhere.yaml` cannot be read: No such file"]),
        (["--deepspeed", "nowhere.json"], ["`nowhere.json` cannot be read: No such file"]),
        (["--init", "nowhere"], ["`init` names nowhere", "tools/convert_from_hf.py"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_flag(arguments: list[str], culprits: list[str], data: Path, tmp_path: Path) -> None:
    said(train(data, tmp_path / "run", *arguments), CONFIG, *culprits)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("said_in_file", "culprits"),
    [
        (b"stepz: 3\npacks: {lenght: 3}", ["wrong.yaml", "`stepz`", "`steps`", "`packs.lenght`", "`packs.length`"]),
        (b"steps: soon\nmodel: {size: huge}\nexprt: true", ["`steps`", "'soon'", "`model.size`", "'huge'", "`export`"]),
        (b"packs: 12", ["`packs`"]),
        (b"recipe: smal", ["`smal`", "`small`"]),
        (b"[1, 2]", ["wrong.yaml` must hold a table of settings"]),
        (b"a: [", ["wrong.yaml` is neither YAML nor JSON"]),
        (b"steps: \xff", ["wrong.yaml` is neither YAML nor JSON", "0xff"]),
    ],
    ids=str,
)
def test_a_wrong_file_of_settings(said_in_file: bytes, culprits: list[str], data: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_bytes(said_in_file)
    said(train(data, tmp_path / "run", "--config", tmp_path / "wrong.yaml"), CONFIG, *culprits)
    assert not (tmp_path / "run").exists()


DOUBLED = '{"bf16": {"enabled": true, "enabled": false}, "bf16": {}}'


@pytest.mark.parametrize(
    ("said_in_file", "culprits"),
    [
        ("{", ["is not JSON"]),
        ("[]", ["hold one JSON object"]),
        (DOUBLED, ["the key `enabled` twice", "the key `bf16` twice"]),
        ('{"zero_optimisation": {}}', ["`zero_optimisation`", "Did you mean `zero_optimization`?"]),
        ('{"zero_optimization": {"stag": 2}}', ["`zero_optimization.stag`", "`zero_optimization.stage`"]),
        ('{"zero_optimization": {"stage": 4}}', ["`zero_optimization.stage`", "4"]),
        ('{"zero_optimization": {"stage": "auto"}}', ["`zero_optimization.stage`", "'auto'"]),
        ('{"zero_optimization": 2}', ["zero_optimization", "be an object"]),
        ('{"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}', ["`zero_optimization.offload_optimizer"]),
        ('{"bf16": true}', ["bf16", "be an object"]),
        ('{"bf16": {"enable": true}}', ["`bf16.enable`", "`bf16.enabled`"]),
        ('{"bf16": {"enabled": true}}', ["`bf16` at ZeRO stage 0"]),
        ('{"torch_autocast": {"enable": true}}', ["`torch_autocast.enable`", "`torch_autocast.enabled`"]),
        ('{"torch_autocast": {"enabled": true, "dtype": "float16"}}', ["torch_autocast.dtype", "'float16'"]),
        (json.dumps({name: 1 for name in ds_file.OURS}), [f"must not set `{name}`" for name in ds_file.OURS]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_wrong_deepspeed_file(said_in_file: str, culprits: list[str], data: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(said_in_file)
    said(train(data, tmp_path / "run", "--deepspeed", tmp_path / "wrong.json"), CONFIG, "wrong.json", *culprits)
    assert not (tmp_path / "run").exists()


def test_everything_wrong_is_said_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "wrong.json").write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 2}, "bf17": {}}')
    wrong = {
        "steps": 0,
        "packs__per_step": 3,
        "packs__length": 2048,
        "packs__tokens": 4096,
        "model__dropout": 1.5,
        "masking__ratio__start": 1.5,
        "optimizer__kind": "lamb",
        "optimizer__rate__peak": 0,
        "validation__every": 0,
        "checkpoint__keep": 1,
        "log__every": 0,
    }
    ended = train(data, tmp_path / "run", "--deepspeed", tmp_path / "wrong.json", **wrong)
    names = [f"`{name.replace('__', '.')}`" for name in wrong if name != "packs__tokens"]
    said(ended, CONFIG, *names, "`train_batch_size`", "`bf17`", "use 4")
    assert len(ended.err.splitlines()) == len(names) + 2
    assert not (tmp_path / "run").exists()


GUIDED = {"masking.score": "entropy", "entropy.source": "exact"}


@pytest.mark.parametrize(
    ("settings", "culprits"),
    [
        ({"entropy.sorce": "probe"}, ["--entropy.sorce", "--entropy.source"]),
        ({"entropy.source": "prob"}, ["'prob'", "--entropy.source", "'probe'"]),
        ({"masking.score": "entropy"}, ["`masking.score` 'entropy' needs `entropy.source`"]),
        ({"entropy.source": "probe"}, ["`entropy.source` 'probe' has no effect", "`masking.score`"]),
        ({"entropy.measure": "min"}, ["`entropy.measure` has no effect without `entropy.source`"]),
        ({"masking.entropy.cap": 0.1}, ["`masking.entropy` has no effect on random masking"]),
        (GUIDED | {"masking.entropy.strategy": "low", "entropy.candidates": 2.0}, ["`entropy.candidates`", "'low'"]),
        (GUIDED | {"entropy.source": "teacher"}, ["`entropy.source` 'teacher' needs `teacher.path`"]),
        ({"teacher.path": "somewhere"}, ["`teacher.path` has no effect"]),
        ({"teacher.sweep": 2}, ["`teacher.sweep` has no effect without `teacher.path`"]),
        ({"distill.temperature": 2.0}, ["`distill.temperature` has no effect while `distill.weight` is 0"]),
        ({"packs.views": 3, "packs.per-step": 8}, ["`packs.views` must divide `packs.per_step` (8)", "is 3"]),
        ({"init-layers": 0}, ["`init_layers` has no effect without `init`"]),
    ],
    ids=lambda value: " ".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_a_wrong_guide(settings: dict[str, object], culprits: list[str], data: Path, tmp_path: Path) -> None:
    said(train(data, tmp_path / "run", *flags(settings)), CONFIG, *culprits)
    assert not (tmp_path / "run").exists()


def test_a_moving_average_needs_whole_weights(data: Path, tmp_path: Path) -> None:
    settings = flags(GUIDED | {"entropy.average": 0.9, "deepspeed": "ds_configs/zero3.json"})
    said(train(data, tmp_path / "run", *settings), CONFIG, "`entropy.average` needs whole weights", "use 0, 1 or 2")
    assert not (tmp_path / "run").exists()


def test_nvme_without_libaio_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_file, "_has_async_io", lambda: False)
    ended = train(data, tmp_path / "run", "--deepspeed", "ds_configs/zero3_nvme.json")
    said(ended, CONFIG, "NVMe needs libaio")
    assert not (tmp_path / "run").exists()


def test_what_a_run_or_print_config_wrote_is_read_back(finished: Path, data: Path) -> None:
    again = command.parse(["--config", str(finished / "config.json")])
    asked = command.parse(training(data, finished, steps=STEPS, checkpoint__every=4, validation__every=4))
    assert again.run == asked.run
    assert again.recipe == asked.recipe
    shown = run(pretrain.main, *training(data, finished, steps=STEPS), "--recipe", "span", "--print-config")
    (finished.parent / "shown.json").write_text(shown.out)
    assert run(pretrain.main, "--config", finished.parent / "shown.json", "--print-config").out == shown.out


def test_a_runs_own_file_goes_on_with_the_run(copy: Path) -> None:
    ended = run(pretrain.main, "--config", copy / "config.json", "--output", copy, "--resume", "must")
    assert ended.code == 0, ended.err
    assert f"going on after step {STEPS}" in ended.out


# ---- text


def prepare(source: Path, output: Path, *more: object) -> Ended:
    small = ["--tokenizer", "wordpiece", "--vocab-size", "100", "--valid-share", "0.2", "--workers", "1"]
    return run(
        prepare_data.main, "--input", source, "--output", output, *(more if "--tokenizer" in more else [*small, *more])
    )


@pytest.mark.parametrize(
    ("name", "inside", "culprits"),
    [
        ("none.txt", None, ["none.txt does not exist"]),
        ("empty.txt", b"", ["empty.txt is empty"]),
        ("strange.doc", b"text", ["strange.doc is of no known kind"]),
        ("latin.txt", b"good\n\ncaf\xe9\n", ["latin.txt, line 3 is not UTF-8: byte 9 is 0xe9"]),
        ("list.jsonl", b'{"text": "good"}\n[1]\n', ["list.jsonl, line 2 (byte 17) must be a JSON object"]),
        ("lacks.jsonl", b'{"txt": "good"}\n', ["lacks.jsonl, line 1", "lacks the field 'text'", "'txt'"]),
        ("broken.jsonl", b'{"text": "go\n', ["broken.jsonl, line 1", "is no JSON"]),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00", ["cut.txt.gz is damaged or cut short"]),
    ],
)
def test_text_that_cannot_be_read(name: str, inside: bytes | None, culprits: list[str], tmp_path: Path) -> None:
    if inside is not None:
        (tmp_path / name).write_bytes(inside)
    said(prepare(tmp_path / name, tmp_path / "data"), DATA, *culprits)
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_text_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("text")
    (tmp_path / "secret.txt").chmod(0)
    said(prepare(tmp_path / "secret.txt", tmp_path / "data"), DATA, "secret.txt cannot be read: Permission denied")


def test_bad_documents_are_counted_if_one_asks_for_it(tmp_path: Path) -> None:
    good = "".join(json.dumps({"text": f"word number {n} of many"}) + "\n" for n in range(60))
    (tmp_path / "mixed.jsonl").write_bytes(good.encode() + b'[1]\n{"txt": 1}\n{"text": "caf\xe9"}\n')
    ended = prepare(tmp_path / "mixed.jsonl", tmp_path / "data", "--on-bad-document", "skip")
    said(ended, 0, "63 documents read (3 bad")


@pytest.mark.parametrize("role", ["mask", "pad", "cls", "sep"])
def test_a_tokenizer_without_a_special_token(role: str, data: Path, tmp_path: Path) -> None:
    lacking = Path(shutil.copytree(data / "tokenizer", tmp_path / "tokenizer"))
    model = json.loads((lacking / "tokenizer.json").read_text())
    token = f"[{role.upper()}]"
    model["model"]["vocab"] = {word: n for word, n in model["model"]["vocab"].items() if word != token}
    model["added_tokens"] = [added for added in model["added_tokens"] if added["content"] != token]
    model["post_processor"] = None
    (lacking / "tokenizer.json").write_text(json.dumps(model))
    Backend.from_file(str(lacking / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("some words\n\nand more\n")
    ended = prepare(tmp_path / "text.txt", tmp_path / "data", "--tokenizer", lacking)
    said(ended, DATA, f"has no {role} token", token)
    assert not (tmp_path / "data").exists()


# ---- shards


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(data, tmp_path / "shards", ignore=shutil.ignore_patterns("packs")))


def refused(shards: Path, output: Path, *culprits: str, **more: object) -> None:
    before = content(shards)
    said(train(shards, output, **more), DATA, *culprits)
    assert content(shards) == before
    assert not (output / "checkpoints").exists()


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "run", "nowhere is no folder", "tools/prepare_data.py")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "run", "empty holds no manifest.json", "tools/prepare_data.py")


def test_shards_that_lack_a_file_or_its_end(shards: Path, tmp_path: Path) -> None:
    (shards / "starts_word.npy").unlink()
    tokens = shards / "train-00000.tokens.npy"
    size = tokens.stat().st_size
    os.truncate(tokens, size - 2)
    culprits = ["starts_word.npy is missing", f"train-00000.tokens.npy must have {size} bytes, but has {size - 2}"]
    refused(shards, tmp_path / "run", *culprits)


def test_shards_with_one_bit_flipped(shards: Path, tmp_path: Path) -> None:
    tokens = shards / "train-00000.tokens.npy"
    damaged = bytearray(tokens.read_bytes())
    damaged[-2] ^= 1  # another token of the vocabulary, in the last place
    tokens.write_bytes(damaged)
    refused(shards, tmp_path / "run", tokens.name)


def test_shards_of_another_tokenizer(shards: Path, tmp_path: Path) -> None:
    path = shards / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"[UNK]"', '"[ODD]"'))
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["files"]["tokenizer/tokenizer.json"]["bytes"] = path.stat().st_size
    (shards / "manifest.json").write_text(json.dumps(manifest))
    refused(shards, tmp_path / "run", "is not the tokenizer that these shards were made with")


def test_a_vocabulary_larger_than_the_integer_type(shards: Path, tmp_path: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["token_ids"]["size"] = 70_000
    (shards / "manifest.json").write_text(json.dumps(manifest))
    refused(shards, tmp_path / "run", "a vocabulary of 70000 tokens does not fit", "uint16")


def test_fewer_tokens_than_a_pack(shards: Path, tmp_path: Path) -> None:
    refused(shards, tmp_path / "run", "fewer than one pack of 1048576", packs__tokens=2**20)


def test_a_token_that_the_vocabulary_lacks(shards: Path, tmp_path: Path) -> None:
    """Unverified, the damage shows when the token is read, sizes being right; what was saved until then stays."""
    tokens = np.load(shards / "train-00000.tokens.npy", mmap_mode="r+")
    tokens[len(tokens) // 2] = 60_000
    tokens.flush()
    ended = train(shards, tmp_path / "run", steps=1000, checkpoint__every=20, validation__every=1000, verify=False)
    said(ended, DATA, "train-00000.tokens.npy holds the id 60000", "but the vocabulary has 300")


BY_SIDECAR = {"masking__score": "entropy", "entropy__source": "sidecar"}


def test_entropies_that_nobody_wrote(shards: Path, tmp_path: Path) -> None:
    culprits = ["has no entropies for the split 'train'", "tools/annotate_entropy.py"]
    said(train(shards, tmp_path / "run", **BY_SIDECAR), DATA, *culprits)
    assert not RunFolder(tmp_path / "run").steps()


def test_entropies_of_another_kind(shards: Path, finished: Path, tmp_path: Path) -> None:
    asked = ["--data", shards, "--teacher", finished, "--workers", 1, "--signal", "clean", "--measure", "min"]
    said(run(annotate_entropy.main, *asked, "--length", 32), 0)
    culprits = ["`entropy.signal` is 'masked'", "'clean'", "`entropy.measure` is 'shannon'", "'min'", "`packs.length`"]
    said(train(shards, tmp_path / "run", **BY_SIDECAR), DATA, *culprits)
    assert not RunFolder(tmp_path / "run").steps()


# ---- teachers


@pytest.fixture
def teacher(data: Path, tmp_path: Path) -> Path:
    """A model of transformers with the tokenizer of the text, to be spoilt."""
    shutil.copytree(data / "tokenizer", tmp_path / "teacher")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def taught(data: Path, output: Path, teacher: Path) -> Ended:
    return train(data, output, "--teacher.path", teacher, "--distill.weight.start", 0.5)


def of_another_vocabulary(teacher: Path) -> None:
    smaller = train_tokenizer("wordpiece", ["other words of another text"] * 20, size=60)
    smaller.save(teacher)


def of_another_tokenizer(teacher: Path) -> None:
    path = teacher / "tokenizer.json"
    path.write_text(path.read_text().replace('"[UNK]"', '"[ODD]"'))


def without_weights(teacher: Path) -> None:
    (teacher / "model.safetensors").unlink()


def cut_short(teacher: Path) -> None:
    weights = teacher / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def with_a_nan(teacher: Path) -> None:
    weights = load_file(teacher / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.weight"][3, 5] = math.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "culprits"),
    [
        (of_another_vocabulary, ["`teacher.path` has a vocabulary of", "tokens, but data's tokenizer has 300"]),
        (of_another_tokenizer, ["`teacher.path` has '[ODD]'", "but data's tokenizer has '[UNK]'"]),
        (without_weights, ["teacher holds no model.safetensors"]),
        (cut_short, ["teacher/model.safetensors is no safetensors file"]),
        (with_a_nan, ["teacher holds numbers", "layers.0.mlp_out.weight", "not finite"]),
        (shutil.rmtree, ["`teacher.path`"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_teacher_that_cannot_be(
    spoil: Callable[[Path], None], culprits: list[str], data: Path, teacher: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(teacher, tmp_path / "whole"))
    spoil(teacher)
    said(taught(data, tmp_path / "run", teacher), CHECKPOINT, *culprits)
    assert not RunFolder(tmp_path / "run").steps()
    # what was refused left nothing behind that a run with a sound one would stumble over
    said(taught(data, tmp_path / "run", whole), 0)


# ---- run folders and checkpoints


def resumed(copy: Path, data: Path, *arguments: object, **more: object) -> Ended:
    same = {"steps": STEPS, "checkpoint__every": 4, "validation__every": 4}
    return train(data, copy, *arguments, **(same | more))


def damage(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    inside = bytearray(file.read_bytes())
    inside[-1] ^= 1
    file.write_bytes(inside)


def test_a_folder_that_holds_another_run(copy: Path, data: Path) -> None:
    before = content(copy)
    ended = resumed(copy, data, seed=7, masking__unit="word")
    said(ended, CONFIG, "copy holds another run", "`seed` is 7 here, but 1 there", "`masking.unit` is 'word' here")
    assert content(copy) == before


@pytest.mark.parametrize(
    ("resume", "culprits"),
    [("never", ["holds a run with a checkpoint of step 12", "'never'"]), ("nowhere", ["nowhere holds none"])],
)
def test_a_start_that_cannot_be(resume: str, culprits: list[str], copy: Path, data: Path) -> None:
    before = content(copy)
    said(resumed(copy, data, "--resume", resume), CHECKPOINT, *culprits)
    assert content(copy) == before


def test_a_run_that_must_go_on_but_never_began(data: Path, tmp_path: Path) -> None:
    said(train(data, tmp_path / "run", "--resume", "must"), CHECKPOINT, "holds no checkpoint", "'must'")


def test_going_back_to_an_older_checkpoint(copy: Path, data: Path, finished: Path) -> None:
    ended = resumed(copy, data, "--resume", RunFolder(copy).checkpoint(4))
    said(ended, 0, "going on after step 4", "step-12 is newer than the start and was set aside")
    found, expected = (dict(read_tensors(RunFolder(run).checkpoint(STEPS))) for run in (copy, finished))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metrics(copy) == metrics(finished)


def test_a_damaged_checkpoint_is_set_aside_for_an_older_one(copy: Path, data: Path, finished: Path) -> None:
    damage(RunFolder(copy).checkpoint(STEPS))
    ended = resumed(copy, data)
    said(ended, 0, "step-12/rank-00000.safetensors is damaged", "was set aside", "going on after step 8")
    assert metrics(copy) == metrics(finished)


def test_nothing_but_damaged_checkpoints(copy: Path, data: Path) -> None:
    for step in RunFolder(copy).steps():
        damage(RunFolder(copy).checkpoint(step))
    culprits = [f"step-{step}/rank-00000.safetensors is damaged" for step in RunFolder(copy).steps()]
    said(resumed(copy, data), CHECKPOINT, "There is no checkpoint that is whole", *culprits)
    # and it does not start afresh the next time, as if there had never been any
    said(resumed(copy, data), CHECKPOINT, "only damaged ones")


def test_a_settings_record_that_is_damaged(copy: Path, data: Path) -> None:
    (copy / "config.json").write_text("{")
    said(resumed(copy, data), CONFIG, "config.json is damaged")


def test_exports_of_what_is_no_run(copy: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    said(run(convert_to_hf.main, "--run", tmp_path, "--output", output), CHECKPOINT, "so it is no run")
    ended = run(convert_to_hf.main, "--run", copy, "--step", 5, "--output", output)
    said(ended, CHECKPOINT, "no checkpoint of step 5; it has 12, 8, 4")
    damage(RunFolder(copy).checkpoint(STEPS))
    said(run(convert_to_hf.main, "--run", copy, "--output", output), CHECKPOINT, "rank-00000.safetensors is damaged")
    for no_record in ("[]", "{", "3"):
        (copy / "config.json").write_text(no_record)
        said(run(convert_to_hf.main, "--run", copy, "--output", output), CHECKPOINT, "so it is no run")
    assert not output.exists()


def test_imports_of_what_is_no_model(tmp_path: Path) -> None:
    said(run(convert_from_hf.main, "--model", tmp_path, "--output", tmp_path / "start"), CHECKPOINT, str(tmp_path))
    assert not (tmp_path / "start").exists()


# ---- storage


def test_no_space_for_the_checkpoints(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10**9, 10**9, 1000))
    said(train(data, tmp_path / "run"), STORAGE, "1,000 bytes free", "Free some space")
    assert not RunFolder(tmp_path / "run").steps()


def full_disk(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the disk be full whenever the checkpoint of one of ``steps`` is written."""
    write = files.write

    def failing(path, chunks):
        if any(path.parent.name.startswith(f".tmp-step-{step}-") for step in steps):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, chunks)

    monkeypatch.setattr(publish.files, "write", failing)


def test_a_full_disk_does_not_stop_training(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, {8})
    ended = resumed(tmp_path / "run", data)
    said(ended, 0, "could not save checkpoint 8: No space left on device", "Training goes on")
    assert RunFolder(tmp_path / "run").steps() == [12, 4]
    assert metrics(tmp_path / "run") == metrics(finished)


@pytest.mark.parametrize(
    ("full", "kept"), [({6, 8, 10}, [4, 2]), ({12}, [10, 8, 6])], ids=["thrice in a row", "the last"]
)
def test_a_disk_that_stays_full(
    full: set[int], kept: list[int], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, full)
    ended = resumed(tmp_path / "run", data, checkpoint__every=2)
    said(ended, STORAGE, f"could not save checkpoint {max(full)}: No space left on device")
    assert RunFolder(tmp_path / "run").steps() == kept
    monkeypatch.undo()
    said(resumed(tmp_path / "run", data, checkpoint__every=2), 0, f"going on after step {kept[0]}")


def test_figures_that_cannot_be_written_do_not_stop_training(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = SummaryWriter.add_scalar

    def failing(self, name, value, step):
        if step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, name, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", failing)
    said(resumed(tmp_path / "run", data), 0, "The figures of step 6 could not be written: No space left on device.")
    assert metrics(tmp_path / "run") == metrics(finished)


def test_an_export_that_cannot_be_written_leaves_the_older_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "exported"
    said(run(convert_to_hf.main, "--run", finished, "--output", output), 0)
    before = content(tmp_path)

    def failing(*given, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporting, "save_file", failing)
    ended = run(convert_to_hf.main, "--run", finished, "--output", output)
    said(ended, STORAGE, f"{output} cannot be written: No space left on device")
    assert content(tmp_path) == before


# ---- numbers that are none


def poison(monkeypatch: pytest.MonkeyPatch, what: str, first: int, last: int) -> None:
    """Let the losses of some steps, from 0, or their gradients alone, be no numbers."""
    forward = MLM.forward

    def poisoned(self, batch, plan, soft=None):
        losses = forward(self, batch, plan, soft)
        if first <= batch.number / 2 <= last and losses.total.requires_grad:  # two packs a step; not a validation
            if what == "loss":
                return replace(losses, total=losses.total * math.nan)
            losses.total.register_hook(lambda gradient: gradient * math.nan)
        return losses

    monkeypatch.setattr(MLM, "forward", poisoned)


@pytest.mark.parametrize(
    ("what", "ds"),
    [("loss", "zero0"), ("loss", "zero2"), ("loss", "zero3"), ("gradient", "zero0"), ("gradient", "zero2")],
)
def test_what_is_no_number_is_never_saved(
    what: str, ds: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, what, 5, 99)
    arguments = {"deepspeed": f"ds_configs/{ds}.json", "steps": 12, "checkpoint__every": 5}
    ended = train(data, tmp_path / "run", **arguments)
    said(ended, NUMBERS, "Step 10 was dropped", what, "the last of 5 such steps in a row", "`optimizer.rate.peak`")
    assert RunFolder(tmp_path / "run").steps()[0] == 5
    assert all(torch.isfinite(tensor).all() for _, tensor in read_tensors(RunFolder(tmp_path / "run").checkpoint(5)))
    monkeypatch.undo()
    said(train(data, tmp_path / "run", **arguments), 0, "going on after step 5")


def test_a_step_that_deepspeed_skips_is_counted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 DeepSpeed leaves out the step of a gradient that is no number."""
    poison(monkeypatch, "gradient", 2, 2)
    said(train(data, tmp_path / "run", deepspeed="ds_configs/cpu.json", checkpoint__every=1), 0)
    skipped = metrics(tmp_path / "run", "skipped_steps")
    assert skipped == {(step, "skipped_steps"): float(step == 3) for step in range(1, 5)}
    before, after = (dict(read_tensors(RunFolder(tmp_path / "run").checkpoint(step))) for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
