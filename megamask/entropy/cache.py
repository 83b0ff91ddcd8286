"""The entropies of the previous epoch of the run itself: what the loss said at the targets, a byte per token.

Costs a byte per token and epoch on disk, a read per token, and per step one message of 16 bytes for each target, for
which the host waits. Nothing is computed, but what is read is up to an epoch old, and only what was a target is known.

In the run folder lies a file for each epoch, a byte for each token of the text. While epoch e runs, the file before it
is read and its own, which began as a copy, is written. So what is read never changes while it is read, and steps that
are taken again after a resume write again what they wrote: kill and resume are bit for bit. Three rules see to it:

- A step belongs as a whole to the epoch of its first text, also if it ends in the next.
- Rank 0 alone writes, in the order of the packs. Every rank hears every row, since type means must be alike on all.
- The file of a new epoch is copied, synced and renamed into place, while all wait; then all open it anew.

The file system must show what one node has written, synced and closed to a node that opens the file later (POSIX, and
NFS with its close-to-open rule). Files are memory-mapped, so a text may be larger than memory.

A token that was never a target has its type's running mean over the run, drawn by the weight of one observation to
what its rarity suggests: the rarest token at the top of the range, a certain one at the bottom.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask import files, ranks
from megamask.batch import Losses, MaskPlan, Measure, PackedBatch
from megamask.entropy.frequency import surprise
from megamask.entropy.sidecar import from_bytes, to_bytes, top_of
from megamask.entropy.source import text_of
from megamask.errors import CheckpointError, StorageError

UNKNOWN, FIRST = 0, 1
"""The code of a token that was never a target, and the first that stands for an entropy."""
PAST = 0.999
"""Weight per step of the past in the mean of a token type: it follows the last thousand steps."""


@runtime_checkable
class Text(Protocol):
    """What the cache needs of shards."""

    @property
    def tokens(self) -> int: ...
    @property
    def unigram(self) -> Int64[np.ndarray, " V"]: ...


@runtime_checkable
class Places(Protocol):
    """What the cache needs of packs."""

    per_step: int
    views: int

    @property
    def shards(self) -> Text: ...
    def __len__(self) -> int: ...
    def places(self, number: int) -> Int64[Tensor, " T"]: ...


class Cache:
    """A source of the `masked` signal, an epoch old; see the module.

    In the checkpoint: which files are read and written, and the means of the token types.
    """

    def __init__(self, packs: Places, folder: Path, measure: Measure):
        """``packs`` are those of the training text; ``folder`` is the cache's own, in the run folder."""
        self.packs, self.folder, self.tokens = packs, folder, packs.shards.tokens
        rare = surprise(torch.from_numpy(packs.shards.unigram))
        self.top = top_of(measure, len(rare))
        # in codes: the rarest token is the least sure one, whichever way the measure runs
        share = rare / rare.max() if self.top > 0 else 1 - rare / rare.max()
        self._guess = FIRST + (255 - FIRST) * share
        self._sums, self._counts = torch.zeros_like(rare), torch.zeros_like(rare)
        self._read_epoch = self._write_epoch = -1
        self._reader: np.ndarray | None = None
        self._writer: np.memmap | None = None
        self._rows: list[tuple[int, Tensor]] = []

    def _epoch(self, step: int) -> int:
        return step * (self.packs.per_step // self.packs.views) // len(self.packs)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:05d}.bytes"

    # ---- reading

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """For each row what was last seen in an earlier epoch, or the mean of its type, in nats."""
        found: dict[int, Tensor] = {}
        mean = (self._sums + self._guess) / (self._counts + 1)
        for batch in batches:
            if text_of(batch) not in found:
                found[text_of(batch)] = self._look_up(batch, mean.to(batch.tokens.device))
        return [found[text_of(batch)] for batch in batches]

    def _look_up(self, batch: PackedBatch, mean: Float[Tensor, " V"]) -> Float[Tensor, " T"]:
        known = mean[batch.tokens]
        if self._reader is not None:
            places = self.packs.places(batch.number).numpy()
            # rows that are no text read the place -1, the last: any finite number will do
            codes = torch.from_numpy(self._reader[places]).to(known.device)
            known = torch.where(codes == UNKNOWN, known, codes.float())
        return from_bytes(known, self.top, FIRST)

    # ---- writing

    def observe(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """Keep the entropies at the targets until the step is settled."""
        codes = to_bytes(losses.entropy.detach(), self.top, FIRST).long()
        places = self.packs.places(batch.number).to(plan.targets.device)[plan.targets]
        # one message for all: where, and in the low byte how unsure, above it of which type
        self._rows.append((batch.number, torch.stack([places, plan.labels * 256 + codes], 1)))

    def settle(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Write down what all ranks observed in this step; turn to the next file if the epoch ends with it."""
        assert self._rows, "a step observes every pack"
        per_step = self.packs.per_step
        step = self._rows[0][0] // per_step
        self._turn_to(self._epoch(step))
        message = torch.zeros(per_step, *self._rows[0][1].shape, dtype=torch.int64, device=self._rows[0][1].device)
        for number, rows in self._rows:
            message[number % per_step] = rows
        self._rows = []
        self._take(add_over_ranks(message).flatten(0, 1).cpu())
        self._turn_to(self._epoch(step + 1))

    def _take(self, rows: Int64[Tensor, "n 2"]) -> None:
        places, types, codes = rows[:, 0], rows[:, 1] // 256, rows[:, 1] % 256
        # sums of whole numbers: the same on all ranks in whatever order
        size = len(self._guess)
        new = torch.zeros(2, size, dtype=torch.int64)
        new.index_add_(1, types, torch.stack([codes, torch.ones_like(codes)]))
        self._sums, self._counts = PAST * self._sums + new[0], PAST * self._counts + new[1]
        if self._writer is not None:
            # of several views of a text the last one stays
            self._writer[places.numpy()] = codes.numpy().astype(np.uint8)

    def _turn_to(self, epoch: int) -> None:
        """Go on to a later epoch: its file begins as a copy of the last one, which is read from now on. Collective."""
        if epoch <= self._write_epoch:
            return
        self.flush()
        self._writer = None
        last, self._read_epoch, self._write_epoch = self._write_epoch, self._write_epoch, epoch
        ranks.by_main(lambda: self._begin(epoch, last))
        self._open()

    def _begin(self, epoch: int, last: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f".{self._path(epoch).name}"
        try:
            with beside.open("wb") as file:
                if last >= 0:
                    with self._path(last).open("rb") as source:
                        shutil.copyfileobj(source, file, files.BLOCK)
                else:  # room is taken now: a full disk under a memory-mapped file would kill the process
                    os.posix_fallocate(file.fileno(), 0, self.tokens)
                file.flush()
                os.fsync(file.fileno())
            files.rename(beside, self._path(epoch))
            files.sync(self.folder)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise StorageError(
                f"The entropies of epoch {epoch} need {self.tokens:,} bytes in {self.folder}: {error.strerror}. "
                "Make room, and start the same command again."
            ) from None

    def _open(self) -> None:
        if self._read_epoch >= 0:
            # a plain view: indexing a memmap object costs more than the read
            self._reader = np.asarray(np.memmap(self._path(self._read_epoch), np.uint8, "r"))
        if ranks.is_main():
            self._writer = np.memmap(self._path(self._write_epoch), np.uint8, "r+")

    def flush(self) -> None:
        """Make durable what was written; before a checkpoint of this step becomes visible."""
        if self._writer is not None:
            self._writer.flush()

    def prune(self, oldest: int) -> None:
        """Delete the files that no checkpoint from step ``oldest`` on needs. On rank 0."""
        held = sorted(self.folder.glob("epoch-*.bytes"))
        # a checkpoint needs the file that its step writes, and the one before it
        writes = [path for path in held if path <= self._path(self._epoch(oldest))]
        for path in writes[:-2]:
            path.unlink()

    # ---- state

    def state_dict(self) -> dict[str, Tensor]:
        """The epochs of the two files, and the sums and counts of the token types."""
        epochs = torch.tensor([self._read_epoch, self._write_epoch])
        return {"epochs": epochs, "sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there; raises CheckpointError if the files of that time are missing or of another length."""
        self._sums, self._counts = state["sums"].cpu().clone(), state["counts"].cpu().clone()
        self._read_epoch, self._write_epoch = state["epochs"].tolist()
        self._rows, self._reader, self._writer = [], None, None
        for epoch in (self._read_epoch, self._write_epoch):
            if epoch >= 0:
                self._check(self._path(epoch))
        if self._write_epoch >= 0:
            self._open()

    def _check(self, path: Path) -> None:
        size = path.stat().st_size if path.is_file() else None
        if size != self.tokens:
            raise CheckpointError(
                f"The checkpoint goes on with the entropies in {path}, which must have {self.tokens} bytes, but "
                f"{'is missing' if size is None else f'has {size}'}. Restore it, or start the run anew."
            )
