"""The tensors of a checkpoint of transformers: which files hold them, and which of them are the model.

Files: those that ``model.safetensors.index.json`` names, else ``model.safetensors`` alone, as transformers chooses.
Tensors: a model may be saved under another prefix (``module.``, ``backbone.``), without a masked-language head, with
heads for other tasks, or with a shared tensor under either of its names. All of that is recognised by names.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamask.errors import CheckpointError, listed, raise_all
from megamask.hf.tensor_names import BODY, LEFT_OUT, PARTS, TIED, UNTIED, WEIGHTS, tensor_names
from megamask.model.shape import EncoderShape
from megamask.storage import strict_json

INDEX = "model.safetensors.index.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of tensors that are taken as weights."""


# ---- which files


def read_hf_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model in ``folder``; raises CheckpointError for a missing or damaged file."""
    raise_all(CheckpointError, list(_leads_away(folder)))
    listing = _index(folder)
    found: dict[str, Tensor] = {}
    for path in _files(folder, listing):
        if not path.is_file():
            raise CheckpointError(f"{path} is no regular file.")
        try:
            found |= load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if lacking := sorted(listing.keys() - found.keys()):
        raise CheckpointError(f"{folder / INDEX} lists {listed(lacking, 'tensor')}, but the files do not hold it.")
    return found


def save_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write ``model.safetensors`` with the permissions that other new files have."""
    path = folder / WEIGHTS
    save_file(tensors, path, metadata={"format": "pt"})
    probe = folder / f".tmp-{WEIGHTS}"
    probe.touch()
    shutil.copymode(probe, path)  # safetensors gives the owner alone access, whatever the umask
    probe.unlink()


def _index(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the index; empty if there is no index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        said = strict_json.read_json(path)["weight_map"]
        listing = {str(tensor): str(file) for tensor, file in said.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is no index of safetensors files.") from None
    for name in sorted(set(listing.values())):
        if not re.fullmatch(r"model[\w.-]*\.safetensors", name, re.ASCII):
            raise CheckpointError(f"{path} names {name!r}, which is no safetensors file of a model in its folder.")
    return listing


def _files(folder: Path, listing: Mapping[str, str]) -> list[Path]:
    alone, parts = folder / WEIGHTS, sorted(set(listing.values()))
    if not parts:
        if alone.exists():
            return [alone]
        raise CheckpointError(
            f"{folder} holds no {WEIGHTS}. Other formats can run code when they are read; load the model with "
            "transformers where you trust it and `save_pretrained` it."
        )
    if alone.exists() and parts != [WEIGHTS]:
        raise CheckpointError(
            f"{folder} holds {WEIGHTS} and an index of other files ({parts[0]}), so it is not clear which is the "
            "model. Remove the one that is not."
        )
    if missing := [name for name in parts if not (folder / name).exists()]:
        raise CheckpointError(f"{folder / INDEX} names {listed(missing, 'file')}, which {folder} does not hold.")
    return [folder / name for name in parts]


def _leads_away(folder: Path) -> Iterator[str]:
    """Sentences for files by which transformers would go on to other folders, or wait for ever."""
    if (folder / "adapter_config.json").exists():
        yield f"{folder} holds an adapter (adapter_config.json) of another model. Merge them, and save the whole."
    for path in folder.glob("*.json"):
        if not path.is_file():
            yield f"{path} is no regular file."


# ---- which tensors


@dataclass(frozen=True)
class ChosenTensors:
    """The tensors of a model under the names that transformers gives them; without a head if there is none."""

    tensors: dict[str, Tensor]
    has_head: bool
    notes: tuple[str, ...]
    """A sentence for a prefix that was dropped, and one for tensors that were left out."""


def choose_tensors(
    tensors: Mapping[str, Tensor], shape: EncoderShape, where: Path, *, tied: bool = True, new_head: bool = False
) -> ChosenTensors:
    """The encoder, and the masked-language head if there is one (and no ``new_head`` is wanted), among ``tensors``.

    ``tied``: whether the configuration says that the output matrix is the token table. Raises CheckpointError, naming
    ``where``, for tensors that are missing, not known, or that should be one and differ.
    """
    own = BODY[shape.preset]
    wanted = {name for parts in tensor_names(shape).values() for name in parts}
    head = {name for name in wanted if not name.startswith(own)}
    found = {_modern_norm(name): tensor for name, tensor in tensors.items()}
    prefix = _encoder_prefix(found, {name.removeprefix(own) for name in wanted - head}, where)
    chosen, others = _sorted_out(found, shape, prefix, head)
    problems = [] if new_head or head.isdisjoint(chosen) else _untied(chosen, shape, where, tied)
    for copy, original in TIED[shape.preset].items():
        tensor = chosen.pop(copy, None)
        if tensor is not None and original not in chosen:
            chosen[original] = tensor
    has_head = not head.isdisjoint(chosen)
    if new_head or (shape.preset == "modern" and any(name.endswith("classifier.weight") for name in others)):
        # ModernBERT's classifiers have a layer that is called `head.dense`, too
        others += [] if new_head else sorted(head & chosen.keys())
        chosen, has_head = {name: tensor for name, tensor in chosen.items() if name not in head}, False
    expected = wanted if has_head else wanted - head
    if lacking := sorted(expected - chosen.keys()):
        problems.append(f"{where} lacks {listed(lacking, 'tensor')}.")
    problems += _quantized(chosen, where)
    if strange := sorted(chosen.keys() - expected):
        problems.append(f"{where} has {listed(strange, 'tensor')}, for which there is no place.")
    raise_all(CheckpointError, problems)
    notes = []
    if prefix not in ("", own):
        notes.append(f"The encoder in {where} is read under the prefix {prefix!r}.")
    if others:
        notes.append(f"Left out, as neither encoder nor masked-language head: {listed(others, 'tensor')}.")
    return ChosenTensors(chosen, has_head, tuple(notes))


def _quantized(tensors: Mapping[str, Tensor], where: Path) -> list[str]:
    """A sentence if some of the weights are integers or 8-bit numbers."""
    others = sorted(name for name, tensor in tensors.items() if tensor.dtype not in FLOATS)
    if not others:
        return []
    kinds = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in others}))
    return [
        f"{where} has {listed(others, 'tensor')} of the type {kinds}, so its weights are quantized. Load the model in "
        "transformers, dequantize it and save it with `save_pretrained`."
    ]


def _modern_norm(name: str) -> str:
    """BERT's first checkpoints call the two vectors of a norm gamma and beta."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def _encoder_prefix(found: Collection[str], body: Collection[str], where: Path) -> str:
    """What stands before the names of the encoder's tensors; CheckpointError unless there is one encoder."""
    counts = _prefixes(found, body)
    most = max(counts.values(), default=0)
    likely = [prefix for prefix, count in counts.items() if 2 * count > most]
    if 2 * most < len(body):
        few = ", ".join(sorted(found)[:3])
        raise CheckpointError(
            f"{where} holds no encoder of the kind that its config.json names: under no prefix are there more than "
            f"{most} of its {len(body)} tensors. It holds {len(found)}, such as {few}."
        )
    if len(likely) > 1:
        raise CheckpointError(
            f"{where} holds {len(likely)} encoders, under the prefixes {listed(map(repr, likely))}. Save the one that "
            "is meant."
        )
    return likely[0]


def _prefixes(found: Iterable[str], known: Iterable[str]) -> Counter[str]:
    """How many of the ``known`` names stand behind each prefix; a prefix is empty or ends with a dot."""
    counts: Counter[str] = Counter()
    known = set(known)
    for name in found:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in known:
                counts["".join(f"{part}." for part in parts[:cut])] += 1
    return counts


def _sorted_out(
    found: Mapping[str, Tensor], shape: EncoderShape, prefix: str, head: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """What belongs to encoder or head, by its name in transformers, and the names of all else."""
    own, heads = BODY[shape.preset], {*head, *TIED[shape.preset]}
    inner = tuple(prefix + part for part in PARTS[shape.preset])
    above = max(_prefixes(found, heads).items(), key=lambda pair: pair[1], default=("", 0))[0]
    chosen, others = {}, []
    for name, tensor in found.items():
        inside = name.startswith(inner)
        renamed = own + name.removeprefix(prefix) if inside else name.removeprefix(above)
        if renamed.startswith(LEFT_OUT):
            continue
        if inside or renamed in heads:
            chosen[renamed] = tensor
        else:
            others.append(name)
    return chosen, sorted(others)


def _untied(chosen: Mapping[str, Tensor], shape: EncoderShape, where: Path, tied: bool) -> list[str]:
    """Sentences for an output matrix or bias that is not the tensor that megamask takes for it."""
    pairs = TIED[shape.preset]
    differing = [
        f"{copy} and {original}"
        for copy, original in pairs.items()
        if copy in chosen and original in chosen and not _equal(chosen[copy], chosen[original])
    ]
    matrix = next(iter(pairs))
    if differing:
        return [f"{where} must have one tensor as {' and as '.join(differing)}, but they differ. {UNTIED}"]
    if not tied and matrix not in chosen:
        return [
            f"{where / 'config.json'} says that the output matrix is not the token table (tie_word_embeddings is "
            f"false), but {where} lacks {matrix}. {UNTIED}"
        ]
    return []


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
