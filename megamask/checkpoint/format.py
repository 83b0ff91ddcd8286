"""Checkpoints: where they are, what is in them, whether they are complete. Loading one never runs code.

    checkpoints/step-N/
        rank-00000.safetensors ...   what at most 64 ranks wrote; every tensor whole, fp32, by name, in exactly one file
        state.json                   counters and small state
        MANIFEST.json                format, step, launch, and the size and sha256 of every file above

Any number of ranks in any ZeRO stage can read it. Reading first hashes every byte, at about the speed of the disk, then
maps the files into memory. `save` writes checkpoints, `resume` chooses the one to resume from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamask.checkpoint.run_folder import STEP_NAME, RunFolder
from megamask.errors import SHOWN, CheckpointError, StorageError, listed, raise_all
from megamask.runtime import ranks
from megamask.runtime.entry_point import full_disk
from megamask.storage import atomic_write, file_list, strict_json
from megamask.storage.file_list import FileEntry, FileList
from megamask.storage.tensor_stream import TensorStream, as_stream

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
WEIGHTS = "weights/"

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    launch: str
    files: FileList


class NewerFormat(CheckpointError):
    """The checkpoint is complete, but a newer version of megamask wrote it."""


def serialise(tensors: Mapping[str, Tensor] | TensorStream) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, block by block. The widest types come first, so all tensors are aligned."""
    stream = as_stream(tensors)
    meta = stream.meta
    order = sorted(meta, key=lambda name: -meta[name].element_size())  # of one type in the order of a stream
    header, end = {}, 0
    for name in order:
        begin, end = end, end + meta[name].nbytes
        kind, shape = _DTYPES[meta[name].dtype], list(meta[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = stream.read(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = memoryview(flat.numpy())  # type: ignore[arg-type]
        for begin in range(0, len(data), file_list.BLOCK):
            yield data[begin : begin + file_list.BLOCK]


def render_manifest(manifest: Manifest) -> bytes:
    """The bytes of MANIFEST.json, which contains its own hash."""
    files = [{"name": name, "size": entry.bytes, "sha256": entry.sha256} for name, entry in manifest.files.items()]
    return _seal({"format": FORMAT, "step": manifest.step, "launch": manifest.launch, "files": files})


def _seal(body: dict) -> bytes:
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. It is undamaged and names only files inside of the folder.

    Raises CheckpointError if it is missing or damaged, NewerFormat, or OSError if the storage does not answer.
    """
    path = Path(folder) / MANIFEST
    try:
        text = strict_json.read_text(path, 1 << 26)
        body = strict_json.parse_json(text)
        body.pop("sha256")
        if _seal(body) != text.encode():
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} has no {MANIFEST}; it was never completed.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it is not what was written.") from None
    if body.get("format") != FORMAT:
        raise NewerFormat(
            f"{folder} has format {body.get('format')}, and this megamask reads format {FORMAT}. Use a newer megamask."
        )
    try:
        files = {str(file["name"]): FileEntry(int(file["size"]), str(file["sha256"])) for file in body["files"]}
        manifest = Manifest(int(body["step"]), str(body["launch"]), files)
        if manifest.step < 0 or len(files) < len(body["files"]):
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError):
        raise CheckpointError(f"{path} lacks a field or has an impossible value.") from None
    for name in files:
        if "/" in name or not file_list.is_inside(name):
            raise CheckpointError(f"{path} lists the file {name!r}, which is not a plain name inside the folder.")
    if STATE not in files:
        raise CheckpointError(f"{path} does not list {STATE}.")
    match = STEP_NAME.fullmatch(Path(folder).name)
    if match and int(match[1]) != manifest.step:
        raise CheckpointError(f"{folder} contains the checkpoint of step {manifest.step}, but its name differs.")
    return manifest


def complete(folder: Path) -> bool:
    """Whether a checkpoint was completed and still has all its files, by name and size."""
    try:
        return not file_list.damage(folder, read_manifest(folder).files, hashes=False)
    except NewerFormat:
        return True
    except CheckpointError:
        return False


def verify(folder: Path) -> Manifest:
    """Hash every byte of a checkpoint and return its manifest. Raises CheckpointError with each damaged file."""
    manifest = read_manifest(folder)
    raise_all(CheckpointError, _first(file_list.damage(folder, manifest.files)))
    return manifest


def _first(problems: Mapping[str, str]) -> list[str]:
    """The first sentences, and the number of the others: a checkpoint has a file for each rank."""
    sentences, more = list(problems.values()), len(problems) - SHOWN
    return [*sentences[:SHOWN], f"{more} more of its files are damaged."] if more > 0 else sentences


def on_all_ranks(act: Callable[[], Answer], what: str, folder: Path, need: int = 0) -> list[Answer]:
    """Call ``act`` on each rank and return all results. An error on any rank is raised on all. Collective."""
    outcome: tuple[Answer | None, str, bool]
    try:
        outcome = (act(), "", True)
    except Exception as error:  # the other ranks wait for it
        storage = isinstance(error, (OSError, StorageError))
        outcome = (None, storage_sentence(error, what, folder, need), storage)
    outcomes = ranks.gather(outcome)
    problems = [problem for _, problem, _ in outcomes if problem]
    if not all(storage for _, _, storage in outcomes):
        raise RuntimeError("\n".join(problems))
    raise_all(StorageError, problems)
    return [answer for answer, _, _ in outcomes]  # type: ignore[misc]


def storage_sentence(error: Exception, what: str, folder: Path, need: int = 0) -> str:
    """Which rank could not do ``what``, why, and how much space is free."""
    reason = (error.strerror if isinstance(error, OSError) else "") or full_disk(error)
    reason = reason or f"{type(error).__name__}: {error}"
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    try:
        space = f" {shutil.disk_usage(folder).free:,} bytes are free under {folder}"
    except OSError as failure:
        why = "" if failure.strerror == reason else f": {failure.strerror}"
        space = f" The free space under {folder} is unknown{why}"
    space += f", {need:,} bytes are needed." if need else "."
    return f"Rank {ranks.rank()} could not {what}: {reason}{where}.{space}"


def verify_on_all_ranks(folder: Path) -> Manifest:
    """`verify`, with the files divided among the ranks. All ranks get the same result. Collective.

    Raises StorageError if a rank reads something else than rank 0: a file system that shows changes late does not
    make a checkpoint unusable.
    """

    def look() -> Manifest:
        try:
            manifest = read_manifest(folder)
            raise_all(CheckpointError, _first(file_list.damage(folder, manifest.files, hashes=False)))
        except OSError as error:
            raise StorageError(storage_sentence(error, f"read {folder}", folder)) from None
        return manifest

    manifest = ranks.on_rank_zero(look)
    share = dict(list(manifest.files.items())[ranks.rank() :: ranks.world()])

    def read() -> dict[str, str]:
        # rank 0 sees them all, so this rank will
        atomic_write.wait_until(lambda: not file_list.damage(folder, share, hashes=False))
        return file_list.damage(folder, share)

    problems = {
        name: problem for each in on_all_ranks(read, f"read {folder}", folder) for name, problem in each.items()
    }
    if problems and ranks.world() > 1:
        damaged = {name: manifest.files[name] for name in problems}

        def read_again() -> dict[str, str]:
            return file_list.damage(folder, damaged) if ranks.is_main() else {}

        if not on_all_ranks(read_again, f"read {folder}", folder)[0]:
            raise StorageError(
                f"Rank 0 reads {folder} without damage, but other ranks do not. Check their storage:", *_first(problems)
            )
    raise_all(CheckpointError, _first(problems))
    return manifest


def read_tensors(folder: Path, prefix: str = "", names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each (name, tensor) of a verified checkpoint under ``prefix``, or exactly ``names``; memory-mapped, on the CPU.

    Raises CheckpointError if a name is missing or in two files.
    """
    folder = Path(folder)
    wanted = None if names is None else set(names)
    seen: set[str] = set()
    for file_name in read_manifest(folder).files:
        if not file_name.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / file_name, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in seen:
                        raise CheckpointError(f"{folder} contains the tensor {name} twice.")
                    if name.startswith(prefix) and (wanted is None or name in wanted):
                        seen.add(name)
                        yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / file_name} is not a safetensors file: {error}.") from None
    missing = sorted((wanted or set()) - seen)
    if missing:
        raise CheckpointError(f"{folder} lacks {listed(missing, 'tensor')}.")


def read_state(folder: Path) -> dict:
    """The small state of a verified checkpoint."""
    path = Path(folder) / STATE
    try:
        state = json.loads(strict_json.read_text(path, strict_json.LARGEST))
        if isinstance(state, dict):
            return state
    except (OSError, ValueError, RecursionError):
        pass
    raise CheckpointError(f"{path} is not a JSON object, so the state of the run is unknown.") from None


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """The checkpoint folder at ``path``, or the one of ``step`` (else the newest) in the run folder ``path``."""
    path = Path(path)
    if (path / MANIFEST).exists() and step is None:
        return path
    steps = RunFolder(path).steps()
    if not steps:
        raise CheckpointError(f"{path} contains no checkpoint and is not one.")
    if step is not None and step not in steps:
        raise CheckpointError(f"{path} has no checkpoint of step {step}; it has {listed(map(str, steps))}.")
    return RunFolder(path).checkpoint(steps[0] if step is None else step)


def read_weights(path: Path, step: int | None = None) -> dict[str, Tensor]:
    """The full fp32 weights by name, of a checkpoint or of a run's checkpoint at ``step`` (else the newest).

    Verifies every hash first and raises CheckpointError with each damaged file.
    """
    folder = find_checkpoint(path, step)
    verify(folder)
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in read_tensors(folder, WEIGHTS)}
