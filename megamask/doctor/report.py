"""The report of `megamask doctor`: what a run needs, as plain tables, then everything that is wrong."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace

import psutil
import torch

from megamask.config import cli
from megamask.config.phases import phase_targets, run_phases, run_tokens
from megamask.config.pretrain_config import PretrainConfig
from megamask.data.mixed_sources import MixedPacks
from megamask.doctor import memory, step_memory
from megamask.doctor.checks import Examination, examine
from megamask.doctor.measured_steps import MeasuredSteps, measure_steps, measured_lines
from megamask.doctor.memory import ModelSize, PackSize
from megamask.doctor.nodes import ask_nodes, node_facts, node_problems
from megamask.doctor.report_text import duration, in_gb, indented, readable_number
from megamask.doctor.run_time import disk_problems, packs_of_a_step, predict_disk, predict_time
from megamask.doctor.settings import DoctorCommand, parse_memory
from megamask.doctor.step_memory import PlannedMemory, TeacherSize
from megamask.doctor.this_machine import check_port, machine_facts, port_facts, port_problems
from megamask.engine import ds_file
from megamask.engine.optimizer import parameter_groups
from megamask.engine.teacher_ds_file import teacher_ds_problems
from megamask.errors import ConfigError, raise_all
from megamask.model.padded_grids import PaddedGrids
from megamask.runtime.output_folder import existing_parent
from megamask.runtime.text_table import aligned_table
from megamask.study.planned_cost import Texts, mean_step_flops
from megamask.teacher.frozen_lm import MaskedLM
from megamask.teacher.teacher import teacher_precision
from megamask.training import summary
from megamask.training.flop_counter import teacher_flops
from megamask.training.flops import PackFlops
from megamask.training.initial_weights import InitialModel
from megamask.training.run_text import RunText


def run_doctor(command: DoctorCommand) -> int:
    """`megamask doctor`: print the report. Raises ConfigError with everything that is wrong, for exit code 2."""
    if command.list_recipes:
        print(cli.show_recipes())
        return 0
    if command.print_config:
        print(cli.show_config(command.run))
        return 0
    examination = examine(command)
    print("\n".join(report_lines(command, examination)), flush=True)
    raise_all(ConfigError, examination.problems)
    return 0


def report_lines(command: DoctorCommand, examination: Examination) -> list[str]:
    """The report about a planned run, as far as it could be read."""
    lines = [f"recipe {command.recipe}, output {command.run.output}", *command.notes, *examination.notes, ""]
    if examination.text is not None:
        lines += ["text", *indented(text_facts(command, examination.text)), ""]
    if examination.text is not None and examination.model is not None:
        plan = planned_memory(command, examination, examination.text, examination.model)
        lines += ["model", *indented(model_facts(examination, examination.model, plan)), ""]
        lines += [*memory_report(command, plan, examination.text), ""]
        examination.problems += memory_problems(plan, memory_limit(command))
        lines += ["time and disk", *indented(time_facts(command, examination, examination.text, plan)), ""]
    nodes, port = ask_nodes(), check_port()
    examination.problems += [*node_problems(nodes), *port_problems(port)]
    return [
        *lines,
        "this machine",
        *indented(machine_facts()),
        "",
        "nodes",
        *indented([*port_facts(port), *node_facts(nodes)]),
    ]


def text_facts(command: DoctorCommand, text: RunText) -> list[str]:
    """How much text there is, how often the run reads it, and the loss of a guess by frequency."""
    config, packs, shards = command.run, text.packs, text.train
    counts = torch.from_numpy(shards.unigram).double()
    guess = float((counts * text.unigram.double())[counts > 0].sum() / counts.sum())
    ids = packs.token_ids.size
    if isinstance(packs, MixedPacks):
        lines = summary.mixture_lines(config, packs)
    else:
        epochs = packs.epochs(run_phases(config).packs_before(config.steps))
        lines = [
            f"{shards.folder}: {shards.tokens:,} tokens in {shards.documents:,} documents",
            f"{len(packs):,} pack{'s' * (len(packs) != 1)} of {config.packs.tokens:,} tokens, {packs.fill:.1%} full; "
            f"the run reads them {epochs:.2f} times" + (" at most" if config.time_budget else ""),
        ]
    lines += [
        *summary.phase_lines(config),
        f"{packs.left_out:,} tokens of text are in no pack",
        _targets(config),
        f"vocabulary: {ids:,} tokens"
        + ("" if ids % 64 == 0 else ", not a multiple of 64: products with it are slower on GPUs"),
        f"loss of a uniform guess (ln V): {math.log(ids):.3f} nats; of a guess by frequency: {guess:.3f}, where a run "
        "that learns nothing stays",
    ]
    if packs.short:
        lines.append(f"{packs.shortage} They are left out.")
    return lines


def _targets(config: PretrainConfig) -> str:
    """How many tokens of a pack are predicted, over the run."""
    numbers = phase_targets(config)
    least, most = min(numbers), max(numbers)
    if least == most:
        return f"targets in a pack: {most:,}"
    return f"targets in a pack: {least:,} to {most:,}; their number changes over {len(numbers)} values"


def planned_memory(
    command: DoctorCommand, examination: Examination, text: RunText, model: InitialModel
) -> PlannedMemory:
    """The numbers that memory depends on, with the first pack of each phase as the typical ones."""
    config = command.run
    packs = [_pack_size(config, text, number) for number in run_phases(config).first_packs]
    parameters = list(model.objective.parameters())
    muon = [
        p
        for group in parameter_groups(model.objective, config.optimizer)
        if group.get("use_muon")
        for p in group["params"]
    ]
    size = ModelSize(_count(parameters), _count(muon), max(p.numel() for p in parameters))
    return PlannedMemory(
        config=config,
        shape=model.shape,
        size=size,
        pack=PackSize(packs[0].tokens, max(pack.cells for pack in packs), max(pack.scores for pack in packs)),
        place=step_memory.placement_of(examination.ds, command.num_ranks, command.machine.gpus is not None),
        gpu=command.machine.gpus is not None,
        bf16=ds_file.choose_precision(examination.ds, examination.support).precision == "bf16",
        teacher=None if examination.teacher is None else _teacher_size(command, examination, examination.teacher),
    )


def _teacher_size(command: DoctorCommand, examination: Examination, teacher: MaskedLM) -> TeacherSize:
    weight, file = teacher.weight, command.run.teacher.deepspeed
    numbers = {id(p): p for p in teacher.states.parameters()}
    inside = any(p.data_ptr() == weight.data_ptr() for p in numbers.values())
    total = _count(numbers.values()) + (0 if inside else weight.numel())
    size = ModelSize(total, 0, max(weight.numel(), *(p.numel() for p in numbers.values())))
    in_bf16 = teacher_precision(command.run.teacher, examination.support).precision == "bf16"
    place = None
    if file is not None:
        ds, _ = teacher_ds_problems("teacher.deepspeed", file)
        given = step_memory.placement_of(ds, command.num_ranks, command.machine.gpus is not None)
        place = replace(given, bits16=in_bf16)
    return TeacherSize(size, weight.shape[1], 2 if in_bf16 else 4, place)


def _pack_size(config: PretrainConfig, text: RunText, number: int) -> PackSize:
    layout = text.packs.batch(number).layout
    grids = PaddedGrids.by_length(layout).grids
    scores = sum(grid.index.shape[0] * grid.index.shape[1] ** 2 for grid in grids)
    if config.model.attention == "reference":
        scores = layout.rows**2
    return PackSize(layout.rows, sum(grid.index.numel() for grid in grids), scores)


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def model_facts(examination: Examination, model: InitialModel, plan: PlannedMemory) -> list[str]:
    """The shape of the model and its precision."""
    shape = model.shape
    lines = [
        f"{shape.family or shape.preset} encoder, {shape.num_layers} layers of width {shape.hidden_size}: "
        f"{plan.size.weights:,} parameters",
        f"precision: {ds_file.choose_precision(examination.ds, examination.support)}",
    ]
    if plan.size.muon:
        lines.append(f"Muon trains {plan.size.muon:,} of them, AdamW the rest")
    if plan.teacher:
        lines.append(f"teacher: {plan.teacher.size.weights:,} parameters of {plan.teacher.bytes} bytes")
    return [*lines, *summary.compiling_again(plan.config)]


def memory_report(command: DoctorCommand, plan: PlannedMemory, text: RunText) -> list[str]:
    """Memory of a device by line for the requested placement, and the sums of all placements, with what fits."""
    config = command.run
    limit = memory_limit(command)
    given = plan.place
    lines = [
        f"memory of one device in GB (10^9 bytes), {given.name}, {given.ranks} rank{'s' * (given.ranks != 1)}, "
        f"packs of {config.packs.tokens:,}"
    ]
    columns = (("plain", False), ("with activation checkpointing", True))
    with_and_without = [step_memory.device_lines(plan, given, on) for _, on in columns]
    rows: list[Sequence[str]] = [
        ("", *(name + " (as given)" * (on == config.model.activation_checkpointing) for name, on in columns))
    ]
    rows += [(name, *(in_gb(column[name]) for column in with_and_without)) for name in with_and_without[0]]
    rows.append(("sum", *(in_gb(math.fsum(column.values())) for column in with_and_without)))
    lines += indented(aligned_table(rows))
    startup = step_memory.startup_memory(plan, given)
    lines.append(f"  the start, which makes one tensor after the other, needs {in_gb(startup)}")
    if before := step_memory.entropy_pass(plan, given):
        lines.append(f"  the pass that finds entropies needs {in_gb(before)} before a step, at another time")
    lines += ["", *indented(aligned_table(_stages(plan, limit)))]
    if plan.gpu:
        lines.append(f"  {_host_of_node(plan, command.machine.nodes)}")
    if limit is None:
        return [*lines, "  Without `gpu_memory` it is not known what fits."]
    most = min(packs.shards.tokens for packs in text.held_out.values())
    return [
        *lines,
        f"  fits: at most {in_gb(limit)} GB, {1 - memory.RESERVE:.0%} of the memory; the rest is for CUDA, NCCL and "
        "gaps of the allocator",
        f"  a pack can have at most {most:,} tokens, as many as the validation split of this text; packs of more than "
        f"{step_memory.MOST_TOKENS:,} were not tried",
        f"  {_advice(plan, limit)}",
    ]


def _host_of_node(plan: PlannedMemory, nodes: int) -> str:
    """The memory that the ranks of a node need together on its host."""
    ranks = plan.place.ranks // nodes
    start, training, save = (in_gb(ranks * size) for size in step_memory.host_peaks(plan, plan.place).values())
    return (
        f"host of a node with {ranks} rank{'s' * (ranks != 1)}: {start} GB at the start, {training} in training, "
        f"{save} at a save; in addition Python, its libraries and the text"
    )


def memory_problems(plan: PlannedMemory, limit: float | None) -> list[str]:
    """A sentence if the run fits into ``limit`` bytes of a device in no stage and with no offload to the host."""
    if limit is None or step_memory.fastest_placement(plan, limit) is not None:
        return []
    peaks = {place: step_memory.peak_memory(plan, place, True) for place in step_memory.placements(plan)}
    place, least = min(peaks.items(), key=lambda pair: pair[1])
    return [
        f"{_advice(plan, limit)} The least memory of a rank is {in_gb(least)} GB, with {place.name} and "
        f"`model.activation_checkpointing`, but {in_gb(limit)} GB may be used: {in_gb(least - limit)} GB are missing."
    ]


def memory_limit(command: DoctorCommand) -> float | None:
    """Bytes that a rank may use: of a GPU as stated, or of this machine's memory its share; None if not known."""
    if command.machine.gpus is None:
        return (1 - memory.RESERVE) * psutil.virtual_memory().total / command.num_ranks
    stated = command.machine.gpu_memory and parse_memory(command.machine.gpu_memory)
    return (1 - memory.RESERVE) * stated if stated else None


def _stages(plan: PlannedMemory, limit: float | None) -> list[Sequence[str]]:
    """A row for each placement: memory of a device and of the host, and the largest pack."""
    head = ("", "state", "step", "peak", "with checkpointing", "host of a rank: start", "training", "save")
    fits = () if limit is None else ("fits", "largest packs.tokens", "with checkpointing")
    rows: list[Sequence[str]] = [(*head, *fits)]
    for place in step_memory.placements(plan):
        state = math.fsum(step_memory.state_memory_of(plan, place).device.values())
        peaks = [step_memory.peak_memory(plan, place, on) for on in (False, True)]
        step = math.fsum(step_memory.device_lines(plan, place, False).values()) - state
        host = step_memory.host_peaks(plan, place)
        name = f"{place.name} (as given)" if place == plan.place else place.name
        row = [name, in_gb(state), in_gb(step), *map(in_gb, peaks), *map(in_gb, host.values())]
        if limit is not None:
            row.append("yes" if peaks[0] <= limit else "with checkpointing" if peaks[1] <= limit else "no")
            row += [f"{step_memory.largest_pack(plan, place, on, limit):,}" for on in (False, True)]
        rows.append(row)
    return rows


def _advice(plan: PlannedMemory, limit: float) -> str:
    """A sentence about the placement to use."""
    if (chosen := step_memory.fastest_placement(plan, limit)) is None:
        if not any(step_memory.largest_pack(plan, place, True, limit) for place in step_memory.placements(plan)):
            return "Nothing fits, however small the packs are: use more GPUs, or a smaller model."
        return "Nothing fits: use smaller packs (`packs.tokens`), more GPUs, or a smaller model."
    place, checkpointing = chosen
    how = " with `model.activation_checkpointing`" if checkpointing else ""
    return f"fastest of those that fit, because it communicates least: {place.name}{how}"


def time_facts(command: DoctorCommand, examination: Examination, text: RunText, plan: PlannedMemory) -> list[str]:
    """FLOPs, tokens, time, jobs, and the disk for checkpoints."""
    config, machine = command.run, command.machine
    teacher = None
    if examination.teacher is not None:
        teacher = teacher_flops(examination.teacher.states, examination.teacher.weight)
    squares = squares_per_token(text, config)
    parts = mean_step_flops(config, PackFlops.of(config, plan.shape, teacher), squares)
    step = math.fsum(parts[part] for part in ("student", "scoring", "teacher"))
    tokens = run_tokens(config)
    shares = ", ".join(f"{part} {parts[part] / step:.0%}" for part in ("student", "scoring", "teacher") if parts[part])
    most = " at most" if config.time_budget else ""
    lines = [
        f"{config.steps:,} steps of {summary.tokens_per_step(config)} tokens, {tokens:,} tokens{most}",
        packs_of_a_step(config, command.num_ranks),
        f"{step * config.steps / tokens:.3e} FLOPs a token, {step * config.steps:.3e} in all{most} ({shares})",
    ]
    disk = predict_disk(config, plan.size.weights, plan.size.muon)
    folder = existing_parent(config.output)
    free, inodes = shutil.disk_usage(folder).free, os.statvfs(folder)
    examination.problems += disk_problems(config.output, free, disk)
    probe = measured_steps(command, examination, text)
    lines += measured_lines(probe) if probe else []
    time = predict_time(config, machine, command.num_ranks, step, probe.tokens_per_second if probe else None)
    if time is None:
        lines.append("time: not known. Give `tokens_per_second` or `probe`, which measures it, or `peak_flops`.")
    else:
        lines.append(f"rate: {readable_number(time.rate)} tokens/s, {time.source}")
        lines.append(f"time: {duration(time.seconds)}, without validation and checkpoints")
        if time.jobs is not None:
            lines.append(
                f"jobs of {machine.job_time}: at least {time.jobs:,}, one after the other. Each also starts, and with "
                "slurm/run.sh it saves and stops 300 s before its limit"
            )
    lines.append(
        f"checkpoint: {in_gb(disk.checkpoint)} GB, {disk.written:,} in the run, {config.checkpoint.keep} kept; "
        f"disk: {in_gb(disk.most)} GB at most"
    )
    lines.append(f"{folder}: {in_gb(free)} GB free" + (f", {inodes.f_favail:,} inodes free" if inodes.f_files else ""))
    return lines


def measured_steps(command: DoctorCommand, examination: Examination, text: RunText) -> MeasuredSteps | None:
    """The requested probe, if the run could start and this machine has its devices; else a problem says why not."""
    if command.machine.probe is None or examination.problems:
        return None
    if command.machine.gpus is not None and not torch.cuda.is_available():
        examination.problems.append("`probe` with `gpus` needs a GPU, but this machine has none. Use it in a job.")
        return None
    return measure_steps(command, text, command.machine.probe)


def squares_per_token(text: RunText, config: PretrainConfig) -> dict[int, float]:
    """`Texts.squares_of` a text; of a mixture the mean of its sources by their shares."""
    packs, texts = text.packs, Texts()
    if not isinstance(packs, MixedPacks):
        return texts.squares_of((text.train.folder,), (1.0,), config)
    folders = tuple(source.shards.folder for source in packs.sources.values())
    return texts.squares_of(folders, tuple(packs.shares.values()), config)
