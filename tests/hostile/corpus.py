"""Artefacts that try to run code, or to lead out of their folder. Each is harmless but for a canary that it touches."""

# ruff: noqa: E501 (tables of strange things)
from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from tests.hostile import targets


class Bomb:
    """Pickled, it calls ``function`` with ``given`` when it is read."""

    def __init__(self, function: Callable, *given: object):
        self.function, self.given = function, given

    def __reduce__(self):
        return self.function, self.given


def bombs(canary: Path) -> dict[str, bytes]:
    """Pickles that touch ``canary`` when they are loaded, by way of what they do it with."""
    touch = f"touch '{canary}'"
    write = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    one = pickle.dumps(Bomb(os.system, touch))
    return {
        "system": one,
        "posix": b"cposix\nsystem\n(S" + repr(touch).encode() + b"\ntR.",
        "eval": pickle.dumps(Bomb(eval, write)),
        "exec": pickle.dumps(Bomb(exec, write)),
        "protocol-0": pickle.dumps(Bomb(os.system, touch), protocol=0),
        "nested": pickle.dumps({"weights": [Bomb(pickle.loads, one)]}),
        "getattr": pickle.dumps(Bomb(eval, f"getattr(__import__('os'), 'sys' + 'tem')({touch!r})")),
        "tensors": pickle.dumps({"weight": torch.zeros(2), "state": Bomb(os.system, touch)}),
    }


def wrapped(pickled: bytes) -> dict[str, bytes]:
    """A pickle as the formats carry it that were made of pickles."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
        file.writestr("archive/Data.pkl", pickled)
    doubled = twice.getvalue().replace(b"Data.pkl", b"data.pkl")  # two members of one name
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            file.addfile(member, io.BytesIO(pickled))
    head = repr({"descr": "|O", "fortran_order": False, "shape": (1,)}).encode()
    head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + pickled
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("train_tokens.npy", array)
    return {
        "plain": pickled,
        "zip": archive.getvalue(),
        "zip-twice": doubled,
        "tar": tar.getvalue(),
        "npy": array,
        "npz": packed.getvalue(),
    }


def out_of_pickles(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Every way to carry the first pickle, and every other pickle as it is."""
    pickles = bombs(canary)
    yield from wrapped(pickles.pop("system")).items()
    yield from pickles.items()


Artefact = tuple[str, Callable[[Path], object], Callable[[Path], None]]
"""What it is, what is done to the sound folder of its target, and what reads the folder."""


def in_place(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(raw)


def artefacts(canary: Path, secret: Path) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """(target, what it is, what is done to the target's folder). ``secret`` is a folder that nobody may look into."""
    pickles = dict(out_of_pickles(canary))
    for kind, raw in pickles.items():
        yield "model", f"weights are a pickle ({kind})", in_place("model.safetensors", raw)
        yield (
            "checkpoint",
            f"a rank's file is a pickle ({kind})",
            in_place("run/checkpoints/step-4/rank-00000.safetensors", raw),
        )
        yield "shard arrays", f"tokens are a pickle ({kind})", in_place("train-00000.tokens.npy", raw)
    for kind in ("plain", "zip", "npy", "npz"):
        raw = pickles[kind]
        yield "checkpoint", f"state is a pickle ({kind})", in_place("run/checkpoints/step-4/state.json", raw)
        yield "first weights", f"weights are a pickle ({kind})", in_place("model.safetensors", raw)
        yield "stored samples", f"tokens are a pickle ({kind})", in_place("part-00000.tokens.npy", raw)
        yield "sidecars", f"entropies are a pickle ({kind})", in_place("train-00000.entropy.npy", raw)
        yield (
            "packs",
            f"an index is a pickle ({kind})",
            lambda f, raw=raw: next((f / "packs").rglob("first.npy")).write_bytes(raw),
        )
        yield "tokenizer", f"a tokenizer is a pickle ({kind})", in_place("tokenizer.json", raw)
        yield "run folder", f"a record of settings is a pickle ({kind})", in_place("run/config.json", raw)
    yield from _old_formats(pickles["zip"])
    yield from _code(canary)
    yield from _settings(canary)
    yield from _out_of_the_folder(secret)


def _old_formats(raw: bytes) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    for name in (
        "pytorch_model.bin",
        "model.ckpt.index",
        "tf_model.h5",
        "flax_model.msgpack",
        "training_args.bin",
        "model.pt",
    ):

        def alone(folder: Path, name=name) -> None:
            (folder / "model.safetensors").unlink()
            (folder / name).write_bytes(raw)

        yield "model", f"{name} alone", alone
        yield "model", f"{name} beside", in_place(name, raw)
    for name in (".metadata", "__0_0.distcp", "mp_rank_00_model_states.pt", "rank-00001.pt", "rng_state.pth"):
        yield "checkpoint", f"{name} in a checkpoint", in_place(f"run/checkpoints/step-4/{name}", raw)
    for name in ("vocab.pkl", "tokenizer.pkl", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt"):
        yield "tokenizer", f"{name} beside a tokenizer", in_place(name, raw)


def _changed(name: str, **more: object) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | more))

    return act


def _code(canary: Path) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """Models and tokenizers that bring Python along."""
    lines = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nraise RuntimeError\n"
    auto = {f"Auto{kind}": "modeling_evil.Evil" for kind in ("Config", "Model", "ModelForMaskedLM")}
    auto["AutoTokenizer"] = ["modeling_evil.Evil", "modeling_evil.Evil"]

    def with_code(**more: object) -> Callable[[Path], None]:
        def act(folder: Path) -> None:
            for name in (
                "modeling_evil.py",
                "configuration_evil.py",
                "tokenization_evil.py",
                "__init__.py",
                "conftest.py",
            ):
                (folder / name).write_text(lines)
            _changed("config.json", **more)(folder)

        return act

    yield "model", "auto_map of a known type", with_code(auto_map=auto)
    yield "model", "auto_map of an unknown type", with_code(auto_map=auto, model_type="evil")
    yield "model", "auto_map of a type that only transformers computes", with_code(auto_map=auto, model_type="roberta")
    yield (
        "model",
        "trust_remote_code in config.json",
        with_code(auto_map=auto, model_type="evil", trust_remote_code=True),
    )
    nested = {"trust_remote_code": True, "auto_map": auto, "model_type": "evil"}
    for key in ("text_config", "backbone_config", "encoder", "quantization_config", "auto_map"):
        yield "model", f"trust_remote_code in config.json: {key}", with_code(model_type="evil", **{key: nested})
    yield (
        "model",
        "custom code in a repository",
        with_code(auto_map={k: f"someone/evil--{v}" for k, v in auto.items()}, model_type="evil"),
    )
    yield (
        "model",
        "its own attention",
        with_code(model_type="distilbert", _attn_implementation="kernels-community/evil"),
    )
    yield "model", "a quantiser", with_code(model_type="distilbert", quantization_config={"quant_method": "evil"})

    def tokenizer(folder: Path) -> None:
        (folder / "modeling_evil.py").write_text(lines)
        _changed("tokenizer_config.json", auto_map=auto, tokenizer_class="Evil", trust_remote_code=True)(folder)

    yield "model", "a tokenizer with auto_map", tokenizer
    yield "tokenizer", "a tokenizer with auto_map", tokenizer
    yield "export", "a tokenizer with auto_map", tokenizer


def _settings(canary: Path) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    touch = f"touch {canary}"
    for kind, text in {
        "shell": f"output = '$({touch})'",
        "backticks": f"output = '`{touch}`'",
        "escape": 'output = "\\u0000\\u001b[2J"',
        "nested arrays": "steps = " + "[" * 10_000,
        "nested tables": ".".join("a" * 10_000) + " = 1",
        "a long number": "steps = " + "9" * 10_000,
        "a date": "steps = 2020-01-01T00:00:00Z",
        "infinity": "steps = inf",
    }.items():
        yield "settings", f"TOML: {kind}", in_place("few.toml", text.encode())


def _out_of_the_folder(secret: Path) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """Names and links that lead to ``secret``."""
    up = os.path.join(*[".."] * 30, str(secret)[1:])
    for kind, name in {"absolute": str(secret / "tokens.npy"), "up": f"{up}/tokens.npy", "NUL": "a\0b", "long": "a" * 5000,
                       "windows": "..\\..\\secret", "empty": "", "dot": ".", "device": "/dev/zero"}.items():  # fmt: skip

        def listed(folder: Path, name=name) -> None:
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
            (folder / "manifest.json").write_text(json.dumps(manifest))

        def shard(folder: Path, name=name) -> None:
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["splits"]["train"]["shards"][0]["name"] = name.removesuffix(".tokens.npy")
            (folder / "manifest.json").write_text(json.dumps(manifest))

        def entry(folder: Path, name=name) -> None:
            path = folder / "run" / "checkpoints" / "step-4" / "MANIFEST.json"
            body = json.loads(path.read_text())
            body["files"][0]["name"] = name
            path.write_text(json.dumps(body))
            targets._seal(folder)

        yield "shard manifest", f"a file {kind}", listed
        yield "shard manifest", f"a shard {kind}", shard
        yield "checkpoint", f"a file {kind}", entry

    def index(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        _changed("config.json", model_type="distilbert")(folder)
        weights = {"distilbert.embeddings.word_embeddings.weight": f"{up}/model.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))

    def adapter(folder: Path) -> None:
        adapter_config = {"peft_type": "LORA", "base_model_name_or_path": str(secret), "task_type": None}
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config))
        (folder / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        _changed("config.json", model_type="distilbert")(folder)

    yield "model", "an index that leads away", index
    yield "model", "an adapter of a model elsewhere", adapter
    for target, name in (("shard arrays", "train-00000.tokens.npy"), ("checkpoint", "run/checkpoints/step-4/rank-00000.safetensors"),
                         ("checkpoint", "run/checkpoints/step-4/state.json"), ("stored samples", "part-00000.tokens.npy")):  # fmt: skip

        def linked(folder: Path, name=name) -> None:
            shutil.copyfile(folder / name, secret / Path(name).name)
            (folder / name).unlink()
            (folder / name).symlink_to(secret / Path(name).name)

        yield target, f"{Path(name).name} is a link", linked
    for target, name in (("shard manifest", "manifest.json"), ("checkpoint", "run/checkpoints/step-4/MANIFEST.json"),
                         ("settings", "few.toml"), ("deepspeed file", "ds.json"), ("run folder", "run/config.json"),
                         ("tokenizer", "tokenizer.json"), ("first weights", "shape.json"), ("model", "config.json"),
                         ("model", "model.safetensors"), ("stored samples", "manifest.json"), ("text", "a.jsonl")):  # fmt: skip
        for kind, make in {
            "pipe": os.mkfifo,
            "device": lambda path: path.symlink_to("/dev/zero"),
            "folder": os.mkdir,
        }.items():

            def special(folder: Path, name=name, make=make) -> None:
                (folder / name).unlink()
                make(folder / name)

            yield target, f"{Path(name).name} is a {kind}", special


def plain_pickle(folder: Path, canary: Path) -> None:
    """What a loader does that knows no better: the control."""
    (folder / "weights.pt").write_bytes(wrapped(bombs(canary)["system"])["zip"])
    torch.load(folder / "weights.pt", weights_only=False)


def plain_array(folder: Path, canary: Path) -> None:
    """The same with numpy."""
    (folder / "weights.npy").write_bytes(wrapped(bombs(canary)["system"])["npy"])
    np.load(folder / "weights.npy", allow_pickle=True)
