"""The entropies of the previous epoch of the run itself: what the loss said at the targets, a byte per token.

Costs a byte per token of the text in the run folder, one in each epoch that is read and one in each checkpoint, which
is so much longer to write and to hash; a read per token; and per step one message of 16 bytes for each target, for
which the host waits. Nothing is computed, but what is read is up to an epoch old, and only what was a target is known.

Rank 0 writes to a file of this launch alone, a byte for each token of the text. At the end of an epoch a copy of it is
made durable, and read by all in the next epoch. Each checkpoint holds the bytes themselves, as a tensor like any other,
and the hash of the file that is read: so its own hashes tell whether they are whole, an older checkpoint has older ones
to go on with, and kill and resume are bit for bit. Three rules see to it:

- A step belongs as a whole to the epoch of its first text, also if it ends in the next.
- Rank 0 alone writes, in the order of the packs. Every rank hears every row, since type means must be alike on all.
- The file that is read is hashed, synced and renamed into place, while all wait; then all open it anew.

If that file is not what was written when a run resumes, no older checkpoint helps, for it has the same; to forget an
epoch is not called for either. What the checkpoint holds is read in its place until the epoch ends: the same tokens,
some of them seen more lately. The run says so, and is then no longer the same to the bit.

The file system must show what one node has written, synced and closed to a node that opens the file later (POSIX, and
NFS with its close-to-open rule). Files are memory-mapped, so a text may be larger than memory.

A token that was never a target has its type's running mean over the run, drawn by the weight of one observation to
what its rarity suggests: the rarest token at the top of the range, a certain one at the bottom.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megamask.batch import Losses, MaskPlan, Measure, PackedBatch
from megamask.entropy.frequency import unigram_surprisal
from megamask.entropy.sidecar import from_bytes, to_bytes, top_of
from megamask.entropy.source import source_packs
from megamask.errors import CheckpointError, StorageError
from megamask.runtime import ranks
from megamask.storage import durable

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

    In the checkpoint: what was seen of each token, which file is read and its hash, and the means of the token types.
    """

    def __init__(self, packs: Places, folder: Path, measure: Measure):
        """``packs`` are those of the training text; ``folder`` is the cache's own, in the run folder."""
        self.packs, self.folder, self.tokens = packs, folder, packs.shards.tokens
        rare = unigram_surprisal(torch.from_numpy(packs.shards.unigram))
        self.top = top_of(measure, len(rare))
        # in codes: the rarest token is the least sure one, whichever way the measure runs
        share = rare / rare.max() if self.top > 0 else 1 - rare / rare.max()
        self._guess = FIRST + (255 - FIRST) * share
        self._sums, self._counts = torch.zeros_like(rare), torch.zeros_like(rare)
        self._read_epoch = self._write_epoch = -1
        self._hash = b""
        self._reader: np.ndarray | None = None
        self._writer: np.ndarray | None = None
        self._rows: list[tuple[int, Tensor]] = []
        self.lost = ""
        """A sentence if the file that was read is not what was written."""

    def _epoch(self, step: int) -> int:
        return step * (self.packs.per_step // self.packs.views) // len(self.packs)

    def _path(self, epoch: int) -> Path:
        """What was seen by the end of ``epoch``."""
        return self.folder / f"epoch-{epoch:05d}.bytes"

    # ---- reading

    def __call__(self, batches: Sequence[PackedBatch]) -> list[Float[Tensor, " T"]]:
        """For each row what was last seen in an earlier epoch, or the mean of its type, in nats."""
        found: dict[int, Tensor] = {}
        mean = (self._sums + self._guess) / (self._counts + 1)
        for batch in batches:
            if source_packs(batch) not in found:
                found[source_packs(batch)] = self._look_up(batch, mean.to(batch.tokens.device))
        return [found[source_packs(batch)] for batch in batches]

    def _look_up(self, batch: PackedBatch, mean: Float[Tensor, " V"]) -> Float[Tensor, " T"]:
        known = mean[batch.tokens]
        if self._reader is not None:
            places = self.packs.places(batch.number).numpy()
            # rows that are no text read the place -1, the last: any finite number will do
            codes = torch.from_numpy(self._reader[places]).to(known.device)
            known = torch.where(codes == UNKNOWN, known, codes.float())
        return from_bytes(known, self.top, FIRST)

    # ---- writing

    def update(self, batch: PackedBatch, plan: MaskPlan, losses: Losses) -> None:
        """Keep the entropies at the targets until the step is settled."""
        codes = to_bytes(losses.entropy.detach(), self.top, FIRST).long()
        places = self.packs.places(batch.number).to(plan.targets.device)[plan.targets]
        # one message for all: where, and in the low byte how unsure, above it of which type
        self._rows.append((batch.number, torch.stack([places, plan.labels * 256 + codes], 1)))

    def sync(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
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
        """Go on to a later epoch: what was seen by the end of the last one is read from now on. Collective."""
        if epoch <= self._write_epoch:
            return
        self._read_epoch, self._write_epoch = self._write_epoch, epoch
        self._hash = ranks.on_rank_zero(self._begin)
        self._open()

    def _begin(self) -> bytes:
        """Make the file that is read in this epoch, if anything was seen before it; its hash."""
        with self._room():
            if self._read_epoch < 0:
                self._write_to(None)
                return b""
            assert self._writer is not None
            return self._keep(self._writer)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise StorageError(
                f"The entropies of epoch {self._write_epoch} need {self.tokens:,} bytes in {self.folder}: "
                f"{error.strerror}. Make room, and start the same command again."
            ) from None

    def _keep(self, seen: np.ndarray) -> bytes:
        """Make durable what is to be read."""
        path = self._path(self._read_epoch)
        beside = path.with_name(f".{path.name}")
        beside.unlink(missing_ok=True)
        try:
            entry = _write(beside, seen)
            durable.rename(beside, path)
            durable.sync(self.folder)
        finally:
            beside.unlink(missing_ok=True)
        return bytes.fromhex(entry.sha256)

    def _write_to(self, seen: np.ndarray | None) -> None:
        """Go on from what was ``seen``, in a file that no other launch has."""
        path = self.folder / "now.bytes"
        path.unlink(missing_ok=True)  # an earlier launch may still have it open, on a network
        try:
            if seen is None:  # room is taken now: a full disk under a memory-mapped file would kill the process
                with path.open("xb") as file:
                    os.posix_fallocate(file.fileno(), 0, self.tokens)
            else:
                _write(path, seen)
            # a plain view: indexing a memmap object costs more than the access
            self._writer = np.asarray(np.memmap(path, np.uint8, "r+"))
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def _open(self) -> None:
        if self._read_epoch < 0:
            return
        path = self._path(self._read_epoch)
        try:
            self._reader = np.asarray(np.memmap(path, np.uint8, "r"))
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}. Rank 0 has just read or made it.") from None

    def prune(self, oldest: int) -> None:
        """Delete the files that no checkpoint from step ``oldest`` on needs. On rank 0."""
        read = sorted(path for path in self.folder.glob("epoch-*.bytes") if path < self._path(self._epoch(oldest)))
        for path in read[:-1]:
            path.unlink()

    # ---- state

    def state_dict(self) -> dict[str, Tensor]:
        """What was seen (on rank 0 alone, until the next step), the epochs, the file's hash, and the types' means."""
        epochs, digest = [self._read_epoch, self._write_epoch], list(self._hash)
        state = {"epochs": torch.tensor(epochs), "hash": torch.tensor(digest, dtype=torch.uint8)}
        seen = {} if self._writer is None else {"seen": torch.from_numpy(self._writer)}
        return state | seen | {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there. Raises CheckpointError if what was seen is of another text. Collective."""
        self._sums, self._counts = state["sums"].cpu().clone(), state["counts"].cpu().clone()
        self._read_epoch, self._write_epoch = state["epochs"].tolist()
        self._hash = bytes(state["hash"].tolist())
        self._rows, self._reader, self._writer = [], None, None
        if self._write_epoch >= 0:
            self._hash, self.lost = ranks.on_rank_zero(lambda: self._restore(state["seen"].numpy()))
            self._open()

    def _restore(self, seen: np.ndarray) -> tuple[bytes, str]:
        if len(seen) != self.tokens:
            raise CheckpointError(
                f"The checkpoint holds the entropies of {len(seen):,} tokens, but the text has {self.tokens:,}. Go on "
                "with the text of that run, or start a run anew."
            )
        with self._room():
            self._write_to(seen)
            path = self._path(self._read_epoch)
            if self._read_epoch < 0 or (path.is_file() and bytes.fromhex(durable.sha256(path)) == self._hash):
                return self._hash, ""
            found = "is not what was written" if path.exists() else "is missing"
            return self._keep(seen), (
                f"{path} {found}. Until its epoch ends, the entropies that the checkpoint holds are read in its place: "
                "the run goes on, but is no longer the same to the bit."
            )


def _write(path: Path, codes: np.ndarray) -> durable.FileEntry:
    data = codes.data
    return durable.write_file(
        path, (data[begin : begin + durable.BLOCK] for begin in range(0, len(data), durable.BLOCK))
    )
