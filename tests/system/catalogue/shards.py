"""Shards that are missing, damaged, or do not fit the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megamask.__main__ import main
from megamask.training import loop
from tests.hostile.targets import vouch
from tests.system.catalogue.row import (
    CONFIG,
    DATA,
    Command,
    Ground,
    Plant,
    Row,
    append,
    as_it_was,
    cut,
    missing,
    rows,
)
from tests.system.commands import run

TOKENS, OFFSETS = "train-00000.tokens.npy", "train-00000.offsets.npy"


def shards(spoil: Callable[[Path], object], **more: object) -> Plant:
    """Shards that something happened to."""

    def plant(ground: Ground) -> Command:
        spoil(copied := ground.copy(ground.data))
        return ground.train(data=copied, **more)

    return plant


def unseen(spoil: Callable[[Path], object]) -> Plant:
    """The same, with hashes forged to fit: who reads it must see it."""
    return shards(lambda folder: (spoil(folder), vouch(folder)))


def record(change: Callable[[dict], object]) -> Plant:
    """A manifest that says something else."""

    def spoil(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return shards(spoil)


def flip(folder: Path) -> None:
    raw = bytearray((folder / TOKENS).read_bytes())
    raw[-2] ^= 1  # another token of the vocabulary, in the last place
    (folder / TOKENS).write_bytes(raw)


def saved(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def overwrite(name: str, inside: bytes) -> Callable[[Path], object]:
    """The first bytes of a file."""
    return lambda folder: (folder / name).write_bytes(inside + (folder / name).read_bytes()[len(inside) :])


def link_away(folder: Path) -> None:
    outside = folder.parent / "outside.npy"
    (folder / TOKENS).rename(outside)
    (folder / TOKENS).symlink_to(outside)


def other_words(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"[UNK]"', '"[ODD]"'))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["tokenizer/tokenizer.json"]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def listed(name: str) -> Callable[[dict], object]:
    return lambda content: content["files"].update({name: {"bytes": 1, "sha256": ""}})


def in_shard(**facts: object) -> Callable[[dict], object]:
    return lambda content: content["splits"]["train"]["shards"][0].update(facts)


def twice(content: dict) -> None:
    content["splits"]["train"]["shards"] *= 2


def grows(ground: Ground) -> Command:
    """A shard that is another while it is read, as the next epoch finds."""
    copied = ground.copy(ground.data)
    evaluate = loop.evaluate

    def growing(*given) -> None:
        append(TOKENS)(copied)
        evaluate(*given)

    ground.patch.setattr(loop, "evaluate", growing)
    return ground.train(data=copied, steps=1000, validation__every=1000, checkpoint__every=1000)


def other_kind(ground: Ground) -> Command:
    """A sidecar of another signal, measure and length."""
    copied = ground.copy(ground.data)
    flags = ["--data", copied, "--teacher", ground.finished, "--workers", 1, "--signal", "clean", "--measure", "min"]
    assert run(main, "annotate", "entropy", *flags, "--length", 32).code == 0
    return ground.train(data=copied, **BY_SIDECAR)


BY_SIDECAR = {"masking__score": "entropy", "entropy__source": "sidecar"}
STRAY = saved(TOKENS, lambda tokens: np.full_like(tokens, 60_000))
NO_ID = (f"{TOKENS} contains the id 60000 at token", "but the vocabulary has 300")
SHARDS = [
    *rows(CONFIG, shards, ("no folder", shutil.rmtree, ["data is not a folder", "megamask prepare"])),
    *rows(
        DATA, shards,
        ("no manifest", missing("manifest.json"), ["data contains no manifest.json", "megamask prepare"]),
        ("a manifest cut short", cut("manifest.json", -9), ["manifest.json is not valid JSON"]),
        ("a shard cut short", cut(TOKENS, -2), [f"{TOKENS} has", "were written", "Copy it again"]),
        ("a shard of no bytes", cut(TOKENS, 0), [f"{TOKENS} has 0 bytes, but"]),
        ("a shard that grew", append(OFFSETS), [f"{OFFSETS} has"]),
        ("a flipped bit", flip, [f"{TOKENS} is damaged: its sha256 is not that of the bytes written"]),
        ("a file that is gone", missing("starts_word.npy"), ["starts_word.npy is missing"]),
        (
            "a shard that nobody lists", lambda folder: shutil.copy(folder / TOKENS, folder / "train-00009.tokens.npy"),
            ["train-00009.tokens.npy is not listed in manifest.json"],
        ),
        ("a link that leads away", link_away, [f"{TOKENS} is not a regular file"]),
    ),
    *rows(
        DATA, unseen,
        ("another magic number", overwrite(TOKENS, b"\x93NUMPZ"), [f"{TOKENS} is not an array"]),
        ("another version of the header", overwrite(TOKENS, b"\x93NUMPY\x09"), [f"{TOKENS} is not an array"]),
        ("signed ids", saved(TOKENS, lambda ids: ids.astype(np.int16)), [f"{TOKENS} must have", "uint16", "int16"]),
        ("ids from the other end", saved(TOKENS, lambda ids: ids.astype(">u2")), [f"{TOKENS} must have", ">u2"]),
        ("ids in a table", saved(TOKENS, lambda ids: ids[None]), [f"{TOKENS} must have", "has (1,"]),
        ("offsets that do not fit", saved(OFFSETS, lambda at: at[::-1].copy()), [f"{OFFSETS} does not fit its tokens"]),
        ("an id that the vocabulary lacks, hashed", STRAY, NO_ID),
    ),
    *rows(
        DATA, record,
        ("another format", lambda record: record.update(format="?"), ["manifest.json is not a manifest of megamask"]),
        ("another version", lambda record: record.update(version=2), ["manifest.json: version` must be 1, but is '2'"]),
        (
            "a count that overflows", in_shard(tokens=2**63),
            ["manifest.json is damaged: `splits.train.shards.0.tokens`"],
        ),
        ("a count below 0", in_shard(documents=-1), ["manifest.json is damaged: `splits.train.shards.0.documents`"]),
        (
            "counts that disagree", in_shard(tokens=1),
            ["train must have 1 tokens, as its shards have", f"{TOKENS} must have 1"],
        ),
        ("a shard listed twice", twice, ["lists the shard 'train-00000' twice"]),
        ("a shard not listed", lambda record: record["files"].pop(TOKENS), [f"does not list {TOKENS}"]),
        ("a shard not there", in_shard(name="train-00007"), ["does not list train-00007.tokens.npy"]),
        ("a path with ..", listed("../outside.npy"), ["lists '../outside.npy', which leads out of the folder"]),
        ("an absolute path", listed("/etc/passwd"), ["lists '/etc/passwd', which leads out of the folder"]),
        ("a large id", in_shard(largest=300), ["train-00000 contains the id 300, but the vocabulary has 300"]),
        (
            "a vocabulary that is too large", lambda record: record["token_ids"].update(size=70_000),
            ["a vocabulary of 70000 tokens does not fit", "uint16"],
        ),
        (
            "mask is pad, in shards", lambda record: record["token_ids"].update(mask=0),
            ["the mask token has the id of another"],
        ),
        (
            "a mask that is text", lambda record: record["token_ids"].update(mask=400),
            ["lies outside the vocabulary of 300"],
        ),
        ("no validation", lambda record: record["splits"].pop("valid"), ["contains no documents in the split 'valid'"]),
    ),
    Row(
        "another tokenizer inside", shards(other_words, verify=False), DATA,
        ("is not the tokenizer that made these shards",),
    ),
    Row("an id that the vocabulary lacks", shards(STRAY, verify=False), DATA, NO_ID),
    Row("less than a pack", shards(as_it_was, packs__tokens=2**20), DATA, ("fewer than one pack of 1048576",)),
    Row("a shard that grows in use", grows, DATA, (f"{TOKENS} has", "was changed during the run"), stays=False),
    Row(
        "no entropies", shards(as_it_was, **BY_SIDECAR), DATA,
        ("has no entropies for the split 'train'", "megamask annotate entropy"),
    ),
    Row(
        "no tags", shards(as_it_was, masking__score="part_of_speech"), DATA,
        ("has no tags for the split 'train'", "--tags"),
    ),
    Row(
        "entropies of another kind", other_kind, DATA,
        ("`entropy.signal` is 'masked'", "'clean'", "`entropy.measure` is 'shannon'", "'min'", "`packs.length`"),
    ),
]  # fmt: skip
