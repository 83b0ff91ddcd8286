"""Soft targets from disk: samples of a teacher's distribution at the targets of masks that are fixed in advance.

For each target of a pack, K tokens are drawn with replacement from softmax(logits / temperature) and stored as distinct
tokens with counts (Anshumann et al. 2025, "Sparse Logit Sampling"). In expectation, counts / K are the teacher's
probabilities, so the gradient of the student is unbiased; a renormalized top-k would be sharper than the teacher. A
stored token takes 3 or 5 bytes, and a target 12 to 50 tokens; reading is a look into a memory-mapped file.

    manifest.json               which run they fit, how many packs and draws, size and sha256 of each file
    part-00000.tokens.npy       (targets of the part's packs, K), uint16 or uint32
    part-00000.counts.npy       the same shape, uint8; 0 fills up a row
    part-00000.offsets.npy      the row at which each pack begins

A part contains ``PART`` packs. The samples are a function of (seed, pack number), like masks. A folder fits runs with
the same text, packs, masks, seed and temperature; any other run refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from megamask.batch import MaskPlan, PackedBatch, SoftTargets, TokenIds
from megamask.data.manifest import Count, file_problems, validation_problems
from megamask.data.shards import id_type
from megamask.errors import ConfigError, DataError, raise_all
from megamask.masking.rng import PackRng, send
from megamask.runtime import ranks
from megamask.storage import strict_json
from megamask.storage.dotted import flatten
from megamask.storage.file_list import FileList
from megamask.storage.npy import is_increasing, map_array
from megamask.teacher.settings import DistillConfig
from megamask.teacher.target_source import distill_scale

FORMAT, VERSION = "megamask teacher samples", 1
PART = 64
BLOCK = 2**22
"""Logits that are computed at a time."""
PURPOSE = "teacher"
KINDS = ("tokens", "counts", "offsets")
CURE = "Make them again with `megamask annotate targets`."


@dataclass(frozen=True)
class TargetsManifest:
    """What a folder of samples holds, and how they were made."""

    facts: dict[str, Any]
    """The settings on which the masks depend."""
    packs: Count
    files: FileList
    draws: int = 0
    model: str = ""
    """Fingerprint of the teacher."""
    precision: str = ""
    method: int = 0
    """Version of the code that made the samples."""

    def record(self) -> dict[str, Any]:
        """The manifest as JSON."""
        return {"format": FORMAT, "version": VERSION} | asdict(self)


class StoredTargets:
    """A `TargetSource` that reads what `megamask annotate targets` wrote."""

    def __init__(self, folder: Path, manifest: TargetsManifest, distill: DistillConfig, ids: TokenIds):
        self.folder, self.manifest, self.distill, self.ids = folder, manifest, distill, ids
        self._part = lru_cache(maxsize=8)(self._open)

    @classmethod
    def open(
        cls,
        distill: DistillConfig,
        ids: TokenIds,
        *,
        facts: dict[str, Any],
        targets: Int64[np.ndarray, " packs"],
        verify: bool = True,
    ) -> StoredTargets:
        """The folder ``distill.stored``, checked against the run; DataError or ConfigError with every problem.

        ``facts`` are the settings on which the masks of the run depend, ``targets`` the number of targets of each pack
        that the run reads (`fixed_masks`). ``verify`` compares every byte with its sha256. Collective.
        """
        folder = distill.stored
        assert folder is not None
        manifest = read_targets_manifest(folder)
        raise_all(ConfigError, _differences(folder, manifest, facts))
        if manifest.packs < len(targets):
            raise ConfigError(
                f"`distill.stored` has {manifest.packs} packs, but the run needs {len(targets)}. Store more packs, "
                "or let `distill.weight` end earlier."
            )
        stored = cls(folder, manifest, distill, ids)

        def check() -> None:
            raise_all(DataError, _damage(folder, manifest, verify))
            raise_all(DataError, stored._mismatches(targets, verify))

        ranks.on_rank_zero(check)
        return stored

    def _mismatches(self, targets: Int64[np.ndarray, " packs"], read_ids: bool) -> list[str]:
        """A sentence for the first pack with another number of ``targets``, or with an id outside the vocabulary.

        Checking ids reads every sample.
        """
        for part in range(-(-self.manifest.packs // PART)):
            tokens, _, offsets = self._part(part)
            expected = targets[part * PART : (part + 1) * PART]
            stored = np.diff(offsets)[: len(expected)]
            if len(different := np.flatnonzero(stored != expected)):
                pack = int(different[0])
                return [_wrong_count(self.folder, part * PART + pack, int(stored[pack]), int(expected[pack]))]
            if read_ids and tokens.max(initial=0) >= self.ids.size:
                return [
                    f"{self.folder / target_file_names(part)[0]} contains the token id {tokens.max()}, but the "
                    f"vocabulary has {self.ids.size} tokens. {CURE}"
                ]
        return []

    def targets(
        self, batches: Sequence[PackedBatch], plans: Sequence[MaskPlan], progress: float
    ) -> list[SoftTargets | None]:
        """The stored samples of each pack; None while the weight is 0."""
        share = self.distill.weight(progress)
        if share == 0:
            return [None] * len(batches)
        soft: list[SoftTargets | None] = []
        for batch, plan in zip(batches, plans, strict=True):
            tokens, counts = self._pack(batch.number, len(plan.targets), plan.targets.device)
            scale = distill_scale(self.distill, batch, plan, len(plan.targets), self.ids)
            soft.append(SoftTargets(share, self.distill.temperature, scale, tokens=tokens, counts=counts))
        return soft

    def _pack(self, number: int, targets: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if number >= self.manifest.packs:
            raise DataError(f"{self.folder} has {self.manifest.packs} packs, but the run needs pack {number}.")
        tokens, counts, offsets = self._part(number // PART)
        rows = slice(*offsets[number % PART : number % PART + 2].tolist())
        if rows.stop - rows.start != targets:
            raise DataError(_wrong_count(self.folder, number, rows.stop - rows.start, targets))
        if tokens[rows].max(initial=0) >= self.ids.size:
            raise DataError(
                f"{self.folder / target_file_names(number // PART)[0]} contains the token id {tokens[rows].max()} in "
                f"pack {number}, but the vocabulary has {self.ids.size} tokens. {CURE}"
            )
        shape = tokens[rows].shape
        drawn = [torch.from_numpy(each[rows].astype(np.int64)).flatten() for each in (tokens, counts)]
        ids, often = (each.view(shape) for each in send(drawn, device))
        return ids, often.float()

    def _open(self, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        files = (self.folder / name for name in target_file_names(part))
        try:
            tokens, counts, offsets = (map_array(file) for file in files)
        except (ValueError, OSError) as error:
            raise DataError(f"{self.folder}: the arrays of part {part} cannot be read: {error}. {CURE}") from None
        packs = min(PART, self.manifest.packs - part * PART)
        if not (
            tokens.dtype in (np.uint16, np.uint32) and counts.dtype == np.uint8 and offsets.dtype == np.int64
            and tokens.ndim == 2 and tokens.shape == counts.shape and offsets.shape == (packs + 1,)
            and offsets[0] == 0 and offsets[-1] == len(tokens) and is_increasing(offsets)
        ):  # fmt: skip
            raise DataError(f"{self.folder}: the arrays of part {part} do not fit together. {CURE}")
        return tokens, counts, offsets


def _wrong_count(folder: Path, number: int, stored: int, targets: int) -> str:
    return f"{folder} has {stored} targets for pack {number}, but its mask has {targets}. {CURE}"


def target_file_names(part: int) -> list[str]:
    """The files of a part: tokens, counts, offsets."""
    return [f"part-{part:05d}.{kind}.npy" for kind in KINDS]


def read_targets_manifest(folder: Path) -> TargetsManifest:
    """The manifest in ``folder``; DataError if there is none of this format."""
    path = folder / "manifest.json"
    missing = f"{folder} has no manifest.json, so its samples are not complete. {CURE}"
    record = strict_json.read_object(path, DataError, missing, CURE)
    if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise DataError(f"{path} is not a manifest of teacher samples, version {VERSION}. {CURE}")
    try:
        return TypeAdapter(TargetsManifest).validate_json(strict_json.to_json(record), strict=True)
    except ValidationError as error:
        raise DataError(*validation_problems(TargetsManifest, path, error, CURE)) from None


def _differences(folder: Path, manifest: TargetsManifest, facts: dict[str, Any]) -> list[str]:
    stored, wanted = flatten(manifest.facts), flatten(facts)
    return [
        f"`distill.stored` ({folder}) was made with `{key}` {stored.get(key)!r}, but the run has {wanted.get(key)!r}, "
        "so its masks or its teacher would differ. Use the same value, or make the samples again with `megamask "
        "annotate targets`."
        for key in sorted(stored.keys() | wanted.keys())
        if stored.get(key) != wanted.get(key)
    ]


def _damage(folder: Path, manifest: TargetsManifest, verify: bool) -> list[str]:
    listed = manifest.files
    names = [name for part in range(-(-manifest.packs // PART)) for name in target_file_names(part)]
    for name in names:
        if name not in listed:
            return [f"{folder / 'manifest.json'} does not list {name}. {CURE}"]
    return list(file_problems(folder, {name: listed[name] for name in names}, verify, CURE).values())


@torch.no_grad()
def sample_targets(soft: SoftTargets, draws: int, rng: PackRng) -> tuple[Int64[Tensor, "Q K"], Int64[Tensor, "Q K"]]:
    """``draws`` tokens from the teacher's distribution at each target, as distinct tokens and their counts.

    Sampling by inversion: each uniform number in (0, 1) falls into the interval of one token in the cumulative
    probabilities, which are computed in fp64 for some targets at a time.
    """
    assert soft.hidden is not None and soft.weight is not None and soft.bias is not None
    rows = len(soft.hidden)
    uniform = rng.uniform(rows * draws, soft.hidden.device).view(rows, draws)
    drawn = torch.empty(rows, draws, dtype=torch.long, device=soft.hidden.device)
    step = max(1, BLOCK // len(soft.weight))
    for begin in range(0, rows, step):
        some = slice(begin, begin + step)
        # in place: new memory for each step would cost half the time
        logits = (soft.hidden[some] @ soft.weight.t()).double().add_(soft.bias)
        cumulative = logits.div_(soft.temperature).softmax(-1).cumsum_(-1)
        drawn[some] = torch.searchsorted(cumulative, uniform[some] * cumulative[:, -1:], right=True)
    return count_tokens(drawn.clamp_(max=len(soft.weight) - 1))


def count_tokens(drawn: Int64[Tensor, "Q K"]) -> tuple[Int64[Tensor, "Q K"], Int64[Tensor, "Q K"]]:
    """The distinct ids of each row, ascending, and their counts; count 0 fills up a row."""
    drawn = drawn.sort(-1).values
    is_new = torch.ones_like(drawn)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    index = is_new.cumsum(-1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(1, index, torch.ones_like(drawn))
    return torch.zeros_like(drawn).scatter_(1, index, drawn), counts


def part_arrays(
    samples: Sequence[tuple[Int64[Tensor, "_Q K"], Int64[Tensor, "_Q K"]]], vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, counts and offsets of a part, from the samples of its packs."""
    tokens = torch.cat([tokens for tokens, _ in samples]).cpu().numpy().astype(id_type(vocab_size))
    counts = torch.cat([counts for _, counts in samples]).cpu().numpy().astype(np.uint8)
    return tokens, counts, np.cumsum([0, *(len(tokens) for tokens, _ in samples)]).astype(np.int64)
