"""Everything that is wrong with a planned run, by the checks that `megamask pretrain` makes before its first step.

Nothing is written, and no process group or engine starts. Costs one reading of the text (unless `verify` is off, and
for the index of packs unless it is stored beside the shards), of the initial weights and of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from megamask.checkpoint.inspect import inspect_folder
from megamask.checkpoint.resume import checkpoint_candidates
from megamask.checkpoint.resume_decision import has_begun
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.settings_changes import find_changes
from megamask.config.checks import find_problems
from megamask.config.pretrain_config import MAY_DIFFER_ON_RESUME, PretrainConfig, as_dict, check_change
from megamask.config.sources import data_folders
from megamask.data import pos_tagger, prepare
from megamask.data.manifest import check_shard_manifest
from megamask.data.tokenizer import TOKENIZER
from megamask.doctor.settings import DoctorCommand
from megamask.engine import ds_file
from megamask.errors import MegamaskError
from megamask.runtime.output_folder import output_problems
from megamask.runtime.precision import device_support
from megamask.runtime.precision_choice import PrecisionSupport
from megamask.storage import strict_json
from megamask.teacher.frozen_lm import MaskedLM, read_masked_lm
from megamask.teacher.teacher import teacher_misfits
from megamask.training.entropy_sources import sidecar_facts
from megamask.training.initial_weights import InitialModel, initial_model
from megamask.training.run_text import RunText, open_sources
from megamask.training.setup import open_stored_targets


@dataclass
class Examination:
    """What was read of a planned run, as far as it could be, and sentences for everything that is wrong."""

    ds: dict[str, Any] = field(default_factory=dict)
    support: PrecisionSupport = field(default_factory=lambda: PrecisionSupport(False, ""))
    text: RunText | None = None
    """None: there is none yet, or it is damaged."""
    model: InitialModel | None = None
    teacher: MaskedLM | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Add the sentences of an error of megamask to the problems."""
        try:
            yield
        except MegamaskError as error:
            self.problems += error.problems


def examine(command: DoctorCommand) -> Examination:
    """Check a planned run, and read what its memory and time depend on."""
    config, examination = command.run, Examination()
    ds, problems = find_problems(config, command.deepspeed, command.num_ranks)
    examination.support = planned_support(command)
    examination.ds = ds_file.resolve_auto(ds, examination.support)
    examination.problems += problems
    with examination.collect():
        check_change(config, command.change)
    _read_text(config, examination)
    if examination.text is not None:
        _check_parts(config, examination, examination.text)
        if not any(problem.startswith("`model.") for problem in problems):
            with examination.collect():
                ids, tokenizer = examination.text.packs.token_ids, examination.text.train.folder / TOKENIZER
                examination.model = initial_model(config, ids, tokenizer)
        _check_folder(command, ds, examination, examination.text)
    examination.problems += output_problems(config.output, "checkpoints")
    return examination


def planned_support(command: DoctorCommand) -> PrecisionSupport:
    """Whether the devices of the run multiply in bf16: as stated for GPUs, else as this CPU does."""
    if command.machine.gpus is None:
        return device_support(torch.device("cpu"))
    multiplies = "are taken to multiply" if command.machine.gpu_bf16 else "do not multiply"
    return PrecisionSupport(command.machine.gpu_bf16, f"the GPUs of the run {multiplies} in bf16 (`gpu_bf16`)")


def _read_text(config: PretrainConfig, examination: Examination) -> None:
    folders = data_folders(config.data) or (prepare.local_folder(prepare.CACHE),)
    if not all(folder.is_dir() for folder in folders):  # `check_config` names those in `data`
        if config.data is None:
            examination.notes.append(
                "`data` is not given, and the text of this machine is not prepared yet: the first run does that. Its "
                "model is not known before."
            )
        return
    if config.verify:
        before = len(examination.problems)
        for folder in folders:
            with examination.collect():
                check_shard_manifest(folder, verify=True)
        if len(examination.problems) > before:
            return
    with examination.collect():
        examination.text = open_sources(config, folders, store=False)


def _check_parts(config: PretrainConfig, examination: Examination, text: RunText) -> None:
    """Check what else a run reads: teacher, stored targets, sidecars, tags."""
    if config.teacher.path is not None:
        with examination.collect():
            teacher = read_masked_lm(config.teacher.path, "teacher.path")
            ids, length = text.packs.token_ids, config.packs.length
            examination.problems += teacher_misfits(
                teacher, config.teacher.path, text.train.folder / TOKENIZER, ids, length
            )
            examination.teacher = teacher
    if config.distill.stored:
        with examination.collect():
            open_stored_targets(config, text)
    if "sidecar" in config.entropy.kinds:
        with examination.collect():
            sidecar_facts(config, text.train)
    if config.masking.score == "part_of_speech":
        with examination.collect():
            pos_tagger.tag_names(text.train)


def _check_folder(command: DoctorCommand, ds: dict[str, Any], examination: Examination, text: RunText) -> None:
    """Check a run folder that exists: whether this is its run, and what a resume would do."""
    run = RunFolder(command.run.output)
    with examination.collect():
        checkpoint_candidates(run, command.resume)
    if command.resume == "never" and run.steps():
        examination.problems.append(
            f"{run.path} holds a run with checkpoints, and `resume` is 'never'. Choose another folder, or 'auto'."
        )
    if not has_begun(run):
        if command.resume == "must":
            examination.problems.append(
                f"{run.path} holds no checkpoint, and `resume` is 'must'. Use 'auto' for a new run."
            )
        return
    identity = as_dict(command.run) | {"recipe": command.recipe, "deepspeed": ds, "text": text.train.fingerprint}
    # a config.json that cannot be read is a problem of the folder
    with examination.collect(), suppress(strict_json.BadRecord, OSError):
        find_changes(run, identity, tuple(MAY_DIFFER_ON_RESUME.union(command.change)), text.train)
    with examination.collect():
        report = inspect_folder(run.path, hashes=False)
        (examination.problems if report.exit_code else examination.notes).extend(report.resume)
