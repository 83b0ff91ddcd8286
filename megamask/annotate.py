"""Annotation: what a teacher predicts for a text is stored once, and any number of runs read it.

`store_entropies` writes a byte per token beside the shards, the entropy of the teacher by either signal. Each token has
the context that it has in training: its piece of at most ``length`` tokens. `store_targets` writes samples of the
teacher's distribution at the targets of masks that are fixed in advance (`teacher.stored_targets`).

The work is divided into parts, which worker processes take one by one (`storage.resumable`). After a kill, the same
command continues, and the bytes do not depend on the number of processes. Costs: the forward pass of the teacher over
the text (`clean` one, `masked` ``num_passes``), with the head at every token once, and the memory of one teacher per
process.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from megamask.batch import Layout, MaskPlan, PackedBatch
from megamask.config import predetermined_masks
from megamask.config.checks import fixed_mask_problems
from megamask.config.cli import TargetAnnotation
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.sources import data_folders
from megamask.data import index, prepare
from megamask.data.index import Pieces
from megamask.data.manifest import Split
from megamask.data.mixed_sources import joined_fingerprint
from megamask.data.shard_writer import write_sidecar
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER
from megamask.entropy import exact
from megamask.entropy.sidecar import SidecarFacts, to_bytes, top_of
from megamask.errors import ConfigError, DataError, raise_all
from megamask.errors.setting_rules import settings_problems
from megamask.masking.masker import Masker
from megamask.masking.rng import PackRng
from megamask.runtime import precision, ranks
from megamask.runtime.precision import Precision, Setting
from megamask.schedules import Schedule
from megamask.storage import atomic_write, file_list, resumable
from megamask.storage import workdir as working
from megamask.storage.resumable import Part, Report, Worker
from megamask.teacher import frozen_lm, stored_targets
from megamask.teacher.annotation_settings import EntropyAnnotation, SampleAnnotation
from megamask.teacher.stored_targets import TargetsManifest
from megamask.teacher.teacher import DistillConfig, Teacher, TeacherConfig
from megamask.training.run_text import open_splits, training_packs

ROWS = 8192
"""Approximate tokens of a window, which goes through the teacher in one pass."""
PARTS, LARGEST = 256, 64
"""Parts of a text, and the most windows of a part. Small parts keep all processes busy until the end, and a kill loses
little work."""
# part of the identity of a result: increase it whenever the written bytes change
METHOD = 1


def annotate_entropy(config: EntropyAnnotation) -> None:
    """`megamask annotate entropy`."""
    folder = store_entropies(config)
    facts = Shards.open(folder).sidecar_facts("entropy")
    assert facts is not None
    print(
        f"{folder}: entropies of every token. Train with --entropy.source sidecar --entropy.signal {facts['signal']} "
        f"--entropy.measure {facts['measure']} --packs.length {facts['length']}."
    )


def annotate_targets(config: TargetAnnotation) -> None:
    """`megamask annotate targets`."""
    for note in config.notes:
        print(note, file=sys.stderr)
    folder = store_targets(config.run, config.run.data or prepare.local_data(prepare.CACHE), config.samples)
    print(f"{folder}: samples of the teacher. Train with the same flags, without --teacher.path.")


def store_entropies(config: EntropyAnnotation) -> Path:
    """Write the sidecar `entropy` of all splits and return the folder; do nothing if it exists.

    Raises ConfigError, DataError, CheckpointError.
    """
    raise_all(ConfigError, settings_problems(config))
    config = replace(config, precision=_print_precision("`precision`", config.precision))
    splits = [Shards.open(config.data, split) for split in get_args(Split) if _has_tokens(config.data, split)]
    facts = _facts(config, splits[0])
    if all(shards.sidecar_facts("entropy") == facts for shards in splits):
        return config.data
    identity = _identity({"facts": facts, "text": splits[0].fingerprint, "rows": [ROWS, PARTS, LARGEST]})
    # named after the request, so that the finished parts of another request stay
    with working.folder(config.data / f".entropy-{identity[:16]}.partial", identity, config.data) as work:
        by_shard = {shards.split: list(_entropy_parts(shards, config.length)) for shards in splits}
        parts = [part for shards_parts in by_shard.values() for shard_parts in shards_parts for part in shard_parts]
        resumable.run_parts(parts, work, partial(_entropy_worker, config), config.workers, "entropies", "token")
        for shards in splits:
            joined = (resumable.join_parts([part.name for part in each], work) for each in by_shard[shards.split])
            write_sidecar(config.data, "entropy", shards.split, joined, facts)
    return config.data


def _print_precision(setting: str, value: Setting) -> Precision:
    """The precision of the teacher on this machine; prints it with the reason."""
    choice = precision.precision_here(value, setting)
    print(*precision.precision_lines(choice), sep="\n", flush=True)
    return choice.precision


def _has_tokens(folder: Path, split: Split) -> bool:
    manifest = Shards.open(folder, "train").manifest
    return bool(manifest["splits"].get(split, {}).get("tokens"))


def _facts(config: EntropyAnnotation, shards: Shards) -> dict[str, Any]:
    """The record beside the bytes: `SidecarFacts`, and how they were computed."""
    model = frozen_lm.read_masked_lm(config.teacher, "teacher").fingerprint()
    top = top_of(config.measure, shards.token_ids.size)
    facts = SidecarFacts(config.signal, config.measure, top, model, config.length).record()
    passes = {"passes": config.num_passes} if config.signal == "masked" else {}
    return facts | passes | {"precision": config.precision, "method": METHOD}


def _entropy_parts(shards: Shards, length: int) -> Iterator[list[Part]]:
    """The parts of each shard: runs of windows of its pieces, in the order of the text, numbered over all shards."""
    windows = [list(index.windows(iter([pieces]), ROWS)) for pieces in index.document_pieces(shards, length)]
    most = min(max(1, sum(map(len, windows)) // PARTS), LARGEST)
    number = 0
    for shard, shard_windows in zip(shards.names, windows, strict=True):
        tasks: list[Part] = []
        for begin in range(0, len(shard_windows), most):
            run = shard_windows[begin : begin + most]
            tokens = sum(int(sizes.sum()) for _, sizes in run)
            tasks.append(Part(f"{shard}-{begin // most:06d}", (shards.split, number, run), tokens))
            number += len(run)
        yield tasks


def _entropy_worker(config: EntropyAnnotation) -> Worker:
    """Computes the entropies of the windows of a part: a byte for each token, in the order of the text."""
    train = Shards.open(config.data, "train")
    ids = train.token_ids
    teacher = Teacher.load(
        TeacherConfig(config.teacher, config.precision),
        DistillConfig(),
        tokenizer=config.data / TOKENIZER,
        ids=ids,
        length=config.length,
        vocab_size=ids.size,
    )
    top = top_of(config.measure, ids.size)

    def make(task: tuple[Split, int, list[Pieces]], report: Report) -> list[np.ndarray]:
        split, first, windows = task
        shards = train if split == "train" else Shards.open(config.data, split)
        codes = []
        for number, window in enumerate(windows, start=first):
            batch, text = window_batch(shards, window, number, config.length)
            batch, text = batch.to(ranks.device()), text.to(ranks.device())
            entropy = torch.zeros(batch.layout.rows, device=ranks.device())
            rng = PackRng(0, number, exact.PURPOSE)
            for plan in exact.entropy_plans(batch, config.signal, config.num_passes, ids.mask, rng):
                entropy[plan.targets] = teacher.entropy_at(batch, plan, config.measure).float()
                report(int(batch.maskable[plan.targets].sum()))
            # special tokens in the text are never masked
            codes.append((to_bytes(entropy, top) * batch.maskable)[text].cpu().numpy())
            report(len(text) - int(batch.maskable.sum()))
        return [np.concatenate(codes)]

    return make


def window_batch(shards: Shards, window: Pieces, number: int, length: int) -> tuple[PackedBatch, Int64[Tensor, " N"]]:
    """Consecutive pieces as a batch, and the positions of its text, in the order of the text."""
    starts, sizes = window
    ids = shards.token_ids
    ends = np.cumsum(sizes + 2)
    begins = ends - sizes - 2
    is_text = np.ones(ends[-1], bool)
    is_text[begins] = is_text[ends - 1] = False
    tokens = np.empty(ends[-1], np.int64)
    tokens[begins], tokens[ends - 1] = ids.cls, ids.sep
    tokens[is_text] = shards.read(shards.parts, starts[0] + np.arange(sizes.sum()))
    layout = Layout.of(torch.from_numpy(np.concatenate([[0], ends])), int(ends[-1]), length)
    ordinary = np.ones(ids.size, bool)
    ordinary[list(ids.special)] = False
    maskable, rows = torch.from_numpy(ordinary[tokens]), torch.from_numpy(is_text)
    # a teacher does not need to know where words begin
    return PackedBatch(number, torch.from_numpy(tokens), layout, rows, maskable), rows.nonzero().squeeze(1)


# ---- samples of the teacher at fixed masks


def store_targets(config: PretrainConfig, data: Path | tuple[Path, ...], how: SampleAnnotation) -> Path:
    """Store samples of ``config.teacher`` at the targets of a run with ``config`` in ``config.distill.stored``.

    ``data`` is the run's text, or the sources of its mixture. The run itself then has no `teacher.path`. Does nothing
    if the samples exist. Raises ConfigError, DataError, CheckpointError.
    """
    raise_all(ConfigError, _sample_problems(config, how))
    teacher_precision = _print_precision("`teacher.precision`", config.teacher.precision)
    config = replace(config, teacher=replace(config.teacher, precision=teacher_precision))
    output = config.distill.stored
    assert output is not None and config.teacher.path is not None
    sources = open_splits(data_folders(data), "train")
    for train in sources.values() if config.masking.unit != "token" else ():
        train.check_words()
    fingerprint = joined_fingerprint(list(sources.values()))
    manifest = TargetsManifest(
        facts=json.loads(json.dumps(predetermined_masks.facts(config, fingerprint))),
        packs=how.packs or len(predetermined_masks.targets(config)),
        files={},
        draws=how.draws,
        model=frozen_lm.read_masked_lm(config.teacher.path, "teacher.path").fingerprint(),
        precision=config.teacher.precision,
        method=METHOD,
    )
    if output.exists():
        if replace(stored_targets.read_targets_manifest(output), files={}) != manifest:
            raise DataError(f"{output} contains other samples. Choose another `distill.stored`, or delete it.")
        return output
    identity = _identity(manifest.record())
    work = output.with_name(f".{output.name}.partial")
    with working.folder(work, identity, output):
        tasks: list[Part] = [
            Part(f"part-{n:05d}", numbers, len(numbers))
            for n, numbers in enumerate(_cut(range(manifest.packs), stored_targets.PART))
        ]
        worker = partial(_sample_worker, config, data_folders(data), how.draws)
        resumable.run_parts(tasks, work, worker, how.workers, "samples", "pack", stored_targets.KINDS)
        names = [name for n in range(len(tasks)) for name in stored_targets.target_file_names(n)]
        with atomic_write.atomic_folder(output, output.with_name(f".{output.name}.ready")) as ready:
            for name in names:
                os.link(work / name, ready / name)
            record = replace(manifest, files=file_list.list_files(ready, names)).record()
            atomic_write.write_atomic(ready / "manifest.json", json.dumps(record, indent=1) + "\n")
    return output


def _cut(numbers: range, size: int) -> Iterator[range]:
    return (numbers[begin : begin + size] for begin in range(0, len(numbers), size))


def _sample_problems(config: PretrainConfig, how: SampleAnnotation) -> list[str]:
    problems = settings_problems(how) + fixed_mask_problems(config)
    for section in ("distill", "teacher", "masking", "packs"):
        problems += settings_problems(getattr(config, section), section)
    if config.distill.stored is None:
        problems.append("`distill.stored` must be the folder to write, but is missing.")
    if config.teacher.path is None:
        problems.append("`teacher.path` must be the model of the teacher, but is missing.")
    if config.teacher.deepspeed is not None:
        problems.append("`teacher.deepspeed` has no effect here: each process has the whole teacher. Remove it.")
    return problems


def _sample_worker(config: PretrainConfig, folders: tuple[Path, ...], draws: int) -> Worker:
    """Samples the teacher at the targets of the packs of a part, with the masks that the run will draw."""
    packs, sizes = training_packs(config, open_splits(folders, "train")), config.packs
    ids = packs.token_ids
    masker = Masker(config.masking, ids)
    # samples for every pack, whatever the weight at its step
    distill = DistillConfig(Schedule(start=1.0), config.distill.temperature)
    teacher = Teacher.load(config.teacher, distill, tokenizer=folders[0] / TOKENIZER, ids=ids, length=sizes.length)

    def plan_of(batch: PackedBatch) -> MaskPlan:
        progress = batch.number // sizes.per_step / config.steps
        return masker(batch, progress=progress, rng=PackRng(config.seed, batch.number))

    def make(numbers: range, report: Report) -> Sequence[np.ndarray]:
        samples = []
        for some in _cut(numbers, config.teacher.packs_per_pass):
            batches = [packs.batch(number).to(ranks.device()) for number in some]
            softs = teacher.targets(batches, [plan_of(batch) for batch in batches], 0.0)
            for number, soft in zip(some, softs, strict=True):
                assert soft is not None
                rng = PackRng(config.seed, number, stored_targets.PURPOSE)
                samples.append(stored_targets.sample_targets(soft, draws, rng))
            report(len(some))
        return stored_targets.part_arrays(samples, ids.size)

    return make


def _identity(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request | {"torch": torch.__version__}, sort_keys=True).encode()).hexdigest()
