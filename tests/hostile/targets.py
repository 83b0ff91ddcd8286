"""What is struck: every reader of a file that may come from elsewhere, with the smallest sound files that it reads."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import lzma
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from megamask.batch import Layout, PackedBatch, TokenIds
from megamask.checkpoint import format, resume
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.config import checks, overrides, pretrain_config, recipes
from megamask.data import shard_writer, shards, tokenizer
from megamask.data.inputs import find_inputs
from megamask.data.packs import Packs
from megamask.data.read_documents import ReadOptions, document_hash, normalize_text, read_documents
from megamask.data.shards import Shards
from megamask.data.tokenizer import ROLES, SPECIAL, Tokenizer
from megamask.data.word_boundaries import word_starts
from megamask.engine import ds_file
from megamask.entropy import sidecar
from megamask.entropy.sidecar import SidecarFacts
from megamask.errors import DataError, raise_all
from megamask.hf import importing
from megamask.metrics import logger
from megamask.model.shape import EncoderShape, ModelConfig
from megamask.runtime import environment
from megamask.teacher import frozen_lm, stored_targets
from megamask.teacher.teacher import DistillConfig
from megamask.training.initial_weights import initial_weights
from tests.hostile.fuzzing import Target

LENGTHS = [9, 3, 20, 11, 1, 17, 30, 8, 14, 25]
WORDS = 24


def small_tokenizer() -> Tokenizer:
    """Five special tokens and some words."""
    words = [*SPECIAL, *(f"w{n}" if n % 3 else f"##w{n}" for n in range(len(SPECIAL), WORDS))]
    backend = Backend(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, dict(zip(ROLES, SPECIAL, strict=True)))


def make_shards(folder: Path) -> Path:
    """Two shards of train, one of valid, both sidecars."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def unit(lengths):
        return shard_writer.EncodedDocuments(
            rng.integers(len(SPECIAL), WORDS, sum(lengths)).astype(np.int64), np.array(lengths, np.int64)
        )

    units = {"train": [unit(LENGTHS), unit(LENGTHS)], "valid": [unit(LENGTHS[:4])]}
    shard_writer.write_shards(folder, small_tokenizer(), units, facts={"read": {}}, shard_tokens=50)
    for split in shards.SPLITS:
        codes = [(part % 4).astype(np.uint8) for part in Shards.open(folder, split).parts]
        shard_writer.write_sidecar(folder, "tags", split, codes, {"tags": ["NOUN", "VERB", "ADJ"]})
        facts = SidecarFacts("masked", "shannon", sidecar.top_of("shannon", WORDS), "0" * 64, 16)
        shard_writer.write_sidecar(folder, "entropy", split, codes, facts.record())
    return folder


def vouch(folder: Path) -> None:
    """Let the manifest of shards, or of stored samples, list each file as it is now."""
    path = folder / "manifest.json"
    assert path.is_file() and not path.is_symlink()  # never wait for a pipe
    manifest = json.loads(path.read_text())
    sidecars = [listed for splits in manifest.get("sidecars", {}).values() for listed in splits.values()]
    for listed in (manifest["files"], *sidecars):
        for name, fact in listed.items():
            if (folder / name).is_file():
                raw = (folder / name).read_bytes()
                fact |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    if (folder / "tokenizer").is_dir():
        manifest["tokenizer"] = tokenizer.tokenizer_hash(folder / "tokenizer")
    path.write_text(json.dumps(manifest))


def read_shards(folder: Path) -> None:
    """Everything that a run reads of its text."""
    shutil.rmtree(folder / "packs", ignore_errors=True)
    for split in shards.SPLITS:
        opened = Shards.open(folder, split, verify=True)
        packs = Packs(opened, tokens=32, length=16, seed=0)
        for number in range(len(packs)):
            packs.batch(number)
        sidecar.sidecar_facts_of(opened.sidecar_facts("entropy"), str(folder))
        opened.sidecar_facts("tags")


def _arrays(folder: Path) -> list[str]:
    make_shards(folder)
    return sorted(path.name for path in folder.glob("*.npy"))


def _manifest(folder: Path) -> list[str]:
    make_shards(folder)
    return ["manifest.json"]


def _sidecar(folder: Path) -> list[str]:
    make_shards(folder)
    return ["train.entropy.json", "train.tags.json"]


# ---- the index of packs


def _packs(folder: Path) -> list[str]:
    opened = Shards.open(make_shards(folder))
    Packs(opened, tokens=32, length=16, seed=0)
    return [str(path.relative_to(folder)) for path in sorted((folder / "packs").rglob("*")) if path.is_file()]


def _vouch_index(folder: Path) -> None:
    for index in (folder / "packs").iterdir():
        hashes = {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in index.glob("*.npy")}
        (index / "hashes.json").write_text(json.dumps(hashes))


def _read_packs(folder: Path) -> None:
    packs = Packs(Shards.open(folder), tokens=32, length=16, seed=0)
    for number in range(len(packs)):
        packs.batch(number)


# ---- checkpoints and runs


def _checkpoint(folder: Path) -> Path:
    run = RunFolder(folder / "run", "launch")
    if run.checkpoints.exists():
        shutil.rmtree(run.path)
    run.checkpoints.mkdir(parents=True)
    run.lock.write_text('{"launch": "launch"}')
    state = {"optimizer_steps": 3, "packs": 6, "teacher": ""}
    save_checkpoint(run, 3, {"weights/a": torch.arange(6.0).reshape(2, 3), "exp_avg/a": torch.ones(2, 3)}, state)
    save_checkpoint(run, 4, {"weights/a": torch.arange(6.0).reshape(2, 3), "exp_avg/a": torch.ones(2, 3)}, state)
    return run.checkpoint(4)


def _files_of_a_checkpoint(folder: Path) -> list[str]:
    checkpoint = _checkpoint(folder)
    return [
        str((checkpoint / name).relative_to(folder))
        for name in ("MANIFEST.json", "state.json", "rank-00000.safetensors")
    ]


def _seal(folder: Path) -> None:
    """Let the manifest of the checkpoint, and the manifest's own hash, say what is there now."""
    checkpoint = folder / "run" / "checkpoints" / "step-4"
    assert (checkpoint / "MANIFEST.json").is_file()
    body = json.loads((checkpoint / "MANIFEST.json").read_bytes())
    body.pop("sha256", None)
    for entry in body.get("files", []):
        name = str(entry.get("name"))
        if name == name.strip("./")[:100] and name.isprintable() and "/" not in name and (checkpoint / name).is_file():
            raw = (checkpoint / entry["name"]).read_bytes()
            entry |= {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (checkpoint / "MANIFEST.json").write_bytes(format._seal(body))


def _read_checkpoint(folder: Path) -> None:
    checkpoint = folder / "run" / "checkpoints" / "step-4"
    format.verify(checkpoint)
    dict(format.read_tensors(checkpoint))
    format.read_state(checkpoint)
    format.read_weights(folder / "run", 4)


CONFIG = {"steps": 10, "log": {"every": 10}, "teacher": None}


def _run(folder: Path) -> list[str]:
    run = folder / "run"
    environment._commit = lambda: None  # two processes of git each time
    start = resume.open_run(run, CONFIG)
    save_checkpoint(start.run, 3, {"weights/a": torch.ones(3)}, {"optimizer_steps": 3})
    start.close()
    (run / "latest").write_text("step-4\n")
    (run / "logs" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/loss": null}\n')
    EncoderShape("bert", WORDS, 0, 1, 8, 2, 16, 32, 1e-12).save(run)
    return [
        "run/config.json",
        "run/environment.json",
        "run/run.lock",
        "run/latest",
        "run/logs/metrics.jsonl",
        "run/shape.json",
    ]


def _read_run(folder: Path) -> None:
    run = folder / "run"
    for damaged in run.joinpath("checkpoints").glob(".*"):
        shutil.rmtree(damaged)
    EncoderShape.load(run)
    resume.open_run(run, CONFIG).close()
    logger.MetricsLogger(run, 2, 10).close()


# ---- settings


FEW = """steps = 12
data = "."
export = false
[optimizer.lr]
peak = 0.01
"""


def _settings(folder: Path) -> list[str]:
    values = pretrain_config.as_dict(recipes.find_recipe("tiny"))
    (folder / "run.json").write_text(json.dumps(values))
    (folder / "few.toml").write_text(FEW)
    return ["run.json", "few.toml"]


def _read_settings(folder: Path) -> None:
    for name in ("run.json", "few.toml"):
        settings = overrides.read_settings(folder / name)
        checks.check_config(overrides.override_settings(recipes.find_recipe("tiny"), settings, name), None, 1)


def _ds(folder: Path) -> list[str]:
    ds_config = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True}, "aio": {"block_size": 1048576}, "prescale_gradients": False,
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(ds_config))
    return ["ds.json"]


# ---- text

TEXT = ["some words w5", "é, half of a pair", "w6 w7 ##w8", "", "last"]


def _texts(folder: Path) -> list[str]:
    lines = "".join(json.dumps({"text": one, "more": [1, {"a": None}]}) + "\n" for one in TEXT)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.txt").write_text("\n\n".join(TEXT))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "d.txt.xz").write_bytes(lzma.compress(b"some words\n\nand more\n"))
    (folder / "e.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), codec="zstd", asbytes=True))
    words = "1\tA\ta\tNOUN\t_\t_\t0\troot\t_\t_\n2-3\tdu\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No\n"
    words += "2\tde\t_\tADP\t_\t_\t_\t_\t_\t_\n3\tle\t_\tDET\t_\t_\t_\t_\t_\t_\n\n"
    (folder / "f.conllu").write_text(f"# newdoc\n{words}# newpar\n{words}")
    (folder / "g.json").write_text(json.dumps([{"text": one, "more": [1, {"a": None}]} for one in TEXT], indent=1))
    (folder / "h.csv").write_text("id,text\n" + "".join(f'{n},"{one}, ""and""\nmore"\n' for n, one in enumerate(TEXT)))
    return ["a.jsonl", "b.txt", "c.jsonl.gz", "d.txt.xz", "e.jsonl.zst", "f.conllu", "g.json", "h.csv"]


def _read_texts(folder: Path) -> None:
    for reading in (ReadOptions(), ReadOptions(documents="lines"), ReadOptions(documents="files")):
        for source in find_inputs([str(folder)]).sources:
            with source.open() as raw:
                for document in read_documents(source, reading, raw):
                    clean = document if isinstance(document, str) else getattr(document, "text", "")
                    document_hash(normalize_text(clean))


# ---- weights of others


def _model(folder: Path) -> list[str]:
    from transformers import BertConfig, BertForMaskedLM

    small_tokenizer().save(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=WORDS, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    return ["config.json", "model.safetensors"]


def _read_model(folder: Path) -> None:
    frozen_lm.read_masked_lm(folder, "teacher.path")
    importing.import_model(folder)


def _start(folder: Path) -> list[str]:
    shape = EncoderShape("bert", WORDS, 0, 1, 8, 2, 16, 32, 1e-12)
    shape.save(folder)
    small_tokenizer().save(folder / "tokenizer")
    from megamask.hf.encoder_and_head import empty_model

    weights = {name: torch.full(tuple(p.shape), 0.01) for name, p in empty_model(shape).named_parameters()}
    weights.pop("head.decoder.weight", None)
    save_file(weights, folder / "model.safetensors")
    return ["shape.json", "model.safetensors"]


def _read_start(folder: Path) -> None:
    ids = TokenIds(WORDS, 2, 3, 0, 4, (0, 1, 2, 3, 4))
    config = recipes.find_recipe("tiny")
    from dataclasses import replace

    config = replace(config, init=folder, model=ModelConfig(), packs=replace(config.packs, length=16))
    initial_weights(config, ids, folder / "tokenizer")
    frozen_lm.read_masked_lm(folder, "teacher.path")


def _tokenizer(folder: Path) -> list[str]:
    small_tokenizer().save(folder)
    return ["tokenizer.json", "tokenizer_config.json"]


def _read_tokenizer(folder: Path) -> None:
    loaded = tokenizer.load_tokenizer(folder)
    tokenizer.token_ids(loaded)
    word_starts(loaded)
    loaded.encode(["w5 w6 some other w7", "", "[MASK] ￿ é"])
    tokenizer.tokenizer_hash(folder)


# ---- stored samples


def _stored(folder: Path) -> list[str]:
    manifest = {
        "format": stored_targets.FORMAT,
        "version": stored_targets.VERSION,
        "packs": 2,
        "facts": {"seed": 1},
        "files": {},
    }
    arrays = (np.zeros((6, 2), np.uint16), np.ones((6, 2), np.uint8), np.array([0, 3, 6]))
    for name, array in zip(stored_targets.target_file_names(0), arrays, strict=True):
        np.save(folder / name, array)
        manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    vouch(folder)
    return ["manifest.json", *stored_targets.target_file_names(0)]


def _read_stored(folder: Path) -> None:
    manifest = stored_targets.read_targets_manifest(folder)
    raise_all(DataError, list(stored_targets._damage(folder, manifest, verify=True)))
    stored = stored_targets.StoredTargets(
        folder, manifest, DistillConfig(), TokenIds(WORDS, 2, 3, 0, 4, (0, 1, 2, 3, 4))
    )
    for number in (0, 1):
        stored._pack(number, 3, torch.device("cpu"))


# ---- what is computed from numbers


def odd_batches(draw: random.Random) -> PackedBatch:
    """Packs of sequences of every odd length: 1, 2, the longest; all special, or with one token that is text."""
    ids = list(itertools.accumulate([0, *(draw.choice((1, 2, 3, 7, 16)) for _ in range(draw.randint(1, 6)))]))
    rows = ids[-1]
    layout = Layout.of(torch.tensor(ids), rows, 16)
    share = draw.choice((0.0, 0.05, 0.5, 1.0))
    maskable = torch.tensor([draw.random() < share for _ in range(rows)])
    tokens = torch.where(maskable, 5, 0)
    starts = torch.tensor([draw.random() < 0.5 for _ in range(rows)])
    return PackedBatch(draw.randrange(2**40), tokens, layout, starts, maskable)


TARGETS = {
    "shard arrays": Target(_arrays, read_shards, vouch),
    "shard manifest": Target(_manifest, read_shards),
    "sidecars": Target(_sidecar, read_shards, vouch),
    "packs": Target(_packs, _read_packs, _vouch_index),
    "checkpoint": Target(_files_of_a_checkpoint, _read_checkpoint, _seal),
    "run folder": Target(_run, _read_run),
    "settings": Target(_settings, _read_settings),
    "deepspeed file": Target(_ds, lambda folder: ds_file.read_ds_config(folder / "ds.json")),
    "text": Target(_texts, _read_texts),
    "model": Target(_model, _read_model),
    "first weights": Target(_start, _read_start),
    "tokenizer": Target(_tokenizer, _read_tokenizer),
    "stored samples": Target(_stored, _read_stored, vouch),
}
