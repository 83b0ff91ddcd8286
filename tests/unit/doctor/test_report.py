"""The whole command on a small text: what it reports, that it finds everything wrong at once, and writes nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megamask.config.cli import parse_command
from megamask.config.pretrain_config import as_dict
from megamask.doctor import step_memory
from megamask.doctor.checks import examine
from megamask.doctor.measured_steps import probe_settings
from megamask.doctor.memory import ModelSize
from megamask.doctor.report import _advice, planned_memory, report_lines, run_doctor
from megamask.doctor.settings import DoctorCommand, parse_doctor_command
from megamask.doctor.step_memory import PlannedMemory, TeacherSize, placement_of
from megamask.errors import ConfigError
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.objectives.objective import build_objective

SIZES = {"packs.tokens": 256, "packs.length": 64, "packs.per-step": 4, "model.num-layers": 3, "model.hidden-size": 64}
FLAGS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def command(text: Path, output: Path, *more: str) -> DoctorCommand:
    return parse_doctor_command(["--data", str(text), "--output", str(output), *FLAGS, *more])


def memory_of(text: Path, output: Path, *more: str) -> PlannedMemory:
    parsed = command(text, output, *more)
    examined = examine(parsed)
    assert examined.text and examined.model and not examined.problems
    return planned_memory(parsed, examined, examined.text, examined.model)


def report_of(text: Path, output: Path, *more: str) -> list[str]:
    parsed = command(text, output, *more)
    return report_lines(parsed, examine(parsed))


def test_it_reports_and_writes_nothing(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in text.rglob("*")}
    flags = ("--gpus", "2", "--gpu-memory", "80GB", "--tokens-per-second", "1000", "--job-time", "1h")
    assert run_doctor(command(text, tmp_path / "run", *flags)) == 0
    out = capsys.readouterr().out
    assert "fastest of those that fit" in out
    assert {path: path.stat().st_mtime_ns for path in text.rglob("*")} == before
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_probe_takes_steps_and_leaves_nothing(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_doctor(command(text, tmp_path / "run", "--probe", "4")) == 0
    out = capsys.readouterr().out
    rate = re.search(r"probe of 4 steps on one device here: ([\d,]+) tokens/s", out)
    assert rate and f"rate: {rate[1]} tokens/s, of the probe" in out
    assert "loader alone: " in out
    assert not list(tmp_path.iterdir())


def test_a_probe_for_gpus_needs_one(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="`probe` with `gpus` needs a GPU"):
        run_doctor(command(text, tmp_path / "run", "--gpus", "2", "--probe", "4"))


def test_a_probe_that_fails_shows_why(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamask.doctor.measured_steps.sys.executable", shutil.which("false"))
    with pytest.raises(ConfigError, match="The probe ended with code 1"):
        run_doctor(command(text, tmp_path / "run", "--probe", "4"))
    assert not list(tmp_path.iterdir())


def test_everything_wrong_is_reported_at_once(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = ("--gpus", "3", "--distill.weight.start", "0.5", "--teacher.path", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        run_doctor(command(text, tmp_path / "file" / "run", *flags))
    for part in ("`packs.per_step` must", "`teacher.path` is", "`output` is"):
        assert sum(part in problem for problem in caught.value.problems) == 1
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("recipe", ["tiny", "albert-tiny", "random-tiny", "bert"])
def test_planned_ranks_get_the_packs_of_a_run_with_as_many(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = parse_doctor_command(["--recipe", recipe, "--gpus", "8"])
    for name, value in {"RANK": "0", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert planned.run == parse_command(["--recipe", recipe]).run


def test_each_planned_rank_needs_a_pack(text: Path, tmp_path: Path) -> None:
    flags = ("--gpus", "8", "--phases", "until=0.5,per_step=12")
    rules = [problem.split(",")[0] for problem in examine(command(text, tmp_path / "run", *flags)).problems]
    assert rules == [
        f"`{name}` must be a multiple of the number of ranks (8)" for name in ("packs.per_step", "phases.0.per_step")
    ]
    divided = report_of(text, tmp_path / "run", "--gpus", "2", "--phases", "until=0.5,per_step=12")
    assert "  packs of a step: 4 to 12; micro-steps of each of 2 ranks: 2 to 6" in divided


def test_damaged_text_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_doctor(command(tmp_path / "missing", tmp_path / "run"))
    assert str(caught.value).count("is not a folder") == 1


def test_a_resume_from_a_path_needs_a_checkpoint_there(text: Path, tmp_path: Path) -> None:
    (problem,) = examine(command(text, tmp_path / "run", "--resume", str(tmp_path / "none"))).problems
    assert "`resume` must be" in problem and "none holds no checkpoint" in problem


def test_a_damaged_run_folder_is_a_problem_and_no_probe_starts(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-3").mkdir(parents=True)
    (run / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        run_doctor(command(text, run, "--probe", "4"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").touch()
    with pytest.raises(ConfigError, match="checkpoints is not a folder"):
        run_doctor(command(text, tmp_path / "other", "--probe", "4"))


def test_a_full_disk_starts_no_probe(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamask.doctor.report.shutil.disk_usage", lambda path: SimpleNamespace(free=0, total=1))
    with pytest.raises(ConfigError) as caught:
        run_doctor(command(text, tmp_path / "run", "--probe", "4"))
    (problem,) = caught.value.problems
    assert "for three checkpoints" in problem


def test_no_model_of_an_absurd_size_is_built(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_doctor(
            command(text, tmp_path / "run", "--model.hidden-size", str(64 * 10**9), "--model.num-layers", "9999")
        )
    assert any("`model.hidden_size` must lie in [1, 2**20]" in problem for problem in caught.value.problems)


def test_a_file_with_a_wrong_section_has_no_stage(text: Path, tmp_path: Path) -> None:
    """Nothing is said about a stage that the file does not have."""
    file = tmp_path / "ds.json"
    wrong = {"stage": 3, "reduce_bucket_size": "auto"}
    file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": wrong}))
    flags = ("--optimizer.kind", "muon", "--deepspeed", str(file))
    with pytest.raises(ConfigError) as caught:
        run_doctor(command(text, tmp_path / "run", *flags))
    (problem,) = caught.value.problems
    assert "reduce_bucket_size" in problem


def test_the_folder_of_another_run_is_refused(text: Path, tmp_path: Path) -> None:
    parsed = command(text, tmp_path / "run")
    fingerprint = examine(parsed).text.train.fingerprint
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    there = as_dict(replace(parsed.run, seed=2)) | {"recipe": parsed.recipe, "deepspeed": {}, "text": fingerprint}
    (tmp_path / "run" / "config.json").write_text(json.dumps(there))
    assert any("`seed`" in problem for problem in examine(parsed).problems)


@pytest.mark.parametrize(
    "more",
    [(), ("--objective.kind", "three_ml", "--objective.depth", "1"), ("--objective.kind", "mae_lm")],
    ids=["mlm", "three_ml", "mae_lm"],
)
def test_the_counted_model_is_the_one_that_a_run_builds(text: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    parsed = command(text, tmp_path / "run", *more)
    examined = examine(parsed)
    assert examined.model and examined.text
    config = parsed.run
    encoder = Encoder(examined.model.shape, config.model)
    real = build_objective(config.objective, encoder, MaskedLMHead(encoder, config.model))
    planned = {name: p.shape for name, p in examined.model.objective.named_parameters()}
    assert planned == {name: p.shape for name, p in real.named_parameters()}
    assert {p.device.type for p in examined.model.objective.parameters()} == {"meta"}


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_memory_is_that_of_the_longest_sequences(text: Path, tmp_path: Path, attention: str) -> None:
    flags = ("--model.attention", attention)
    always = memory_of(text, tmp_path / "run", *flags).pack
    short = memory_of(text, tmp_path / "run", *flags, "--packs.length", "16").pack
    assert short.scores < always.scores
    phases = ("--phases", "steps=7,length=16")
    both = memory_of(text, tmp_path / "run", *flags, *phases).pack
    assert both.scores > short.scores and both.cells >= short.cells
    assert any(
        "steps 1 to 7: sequences of at most 16 tokens" in line for line in report_of(text, tmp_path / "run", *phases)
    )


def test_a_probe_gives_each_phase_its_share(text: Path, tmp_path: Path) -> None:
    for start, taken in (("steps=900", 18), ("until=0.9", 18), ("steps=1", 1), ("steps=999", 19)):
        run = command(text, tmp_path / "run", "--steps", "1000", "--phases", f"{start},length=16,per_step=8").run
        probe = probe_settings(run, 2, 20)
        (phase,) = probe.phases
        assert (phase.steps, phase.until, phase.length, phase.per_step) == (taken, None, 16, 4)
        assert probe.packs.per_step == 2


def test_smaller_packs_are_advised_only_where_they_fit(text: Path, tmp_path: Path) -> None:
    plan = memory_of(text, tmp_path / "run")
    places = step_memory.placements(plan)
    least = min(step_memory.peak_memory(plan, place, True) for place in places)
    assert "use smaller packs" in _advice(plan, least - 1)
    assert "however small the packs are" in _advice(plan, 1.0)


def test_a_run_that_fits_nowhere_is_refused(text: Path, tmp_path: Path) -> None:
    flags = ("--gpus", "2", "--gpu-memory")
    assert run_doctor(command(text, tmp_path / "run", *flags, "80GB")) == 0
    with pytest.raises(ConfigError, match=r"Nothing fits.*GB are missing") as caught:
        run_doctor(command(text, tmp_path / "run", *flags, "1MB"))
    assert caught.value.exit_code == 2


def test_on_a_cpu_the_state_of_an_offload_needs_the_same_memory(text: Path, tmp_path: Path) -> None:
    plan = memory_of(text, tmp_path / "run")
    assert not plan.place.gpu
    plain, moved = (
        replace(plan.place, stage=3, offload_state=on, offload_weights=on, bits16=False) for on in (False, True)
    )
    sums = [math.fsum(step_memory.state_memory_of(plan, place).device.values()) for place in (plain, moved)]
    assert sums[0] == sums[1]


def test_the_largest_pack_fits_and_the_next_does_not(text: Path, tmp_path: Path) -> None:
    plan = memory_of(text, tmp_path / "run")
    for checkpointing in (False, True):
        limit = 5 * step_memory.peak_memory(plan, plan.place, checkpointing)
        tokens = step_memory.largest_pack(plan, plan.place, checkpointing, limit)
        sums = [
            step_memory.peak_memory(plan.with_tokens(size), plan.place, checkpointing) for size in (tokens, tokens + 64)
        ]
        assert sums[0] <= limit < sums[1]
    assert step_memory.largest_pack(plan, plan.place, False, 0.0) == 0


def test_the_start_needs_the_share_of_a_rank_and_one_tensor(text: Path, tmp_path: Path) -> None:
    plan = memory_of(text, tmp_path / "run", "--gpus", "4")
    one_tensor = 8.0 * plan.size.largest  # its value and the parameter, in fp32
    for ranks in (4, 400):
        place = replace(plan.place, stage=3, ranks=ranks)
        built = sum(step_memory.state_memory_of(plan, place).device.values())
        assert step_memory.startup_memory(plan, place) == pytest.approx(built + one_tensor)
    table = replace(plan, size=replace(plan.size, largest=10**12))
    assert step_memory.peak_memory(table, plan.place, True) >= 8e12


def test_copies_for_the_optimizer_take_what_the_backward_pass_freed_on_a_gpu(text: Path, tmp_path: Path) -> None:
    name = "copies for the optimizer"
    for flags, begins in (((), True), (("--gpus", "1"), False)):
        plan = memory_of(text, tmp_path / "run", *flags)
        size = replace(plan.size, weights=1000)  # far fewer than activations
        assert (step_memory.device_lines(replace(plan, size=size), plan.place, False)[name] > 0) == begins


def test_checkpointing_and_late_masks_save_activations(text: Path, tmp_path: Path) -> None:
    plan = memory_of(text, tmp_path / "run")
    late = memory_of(text, tmp_path / "run", "--objective.kind", "three_ml", "--objective.depth", "2")
    plain = step_memory.activations(plan, plan.place, False)
    assert step_memory.activations(plan, plan.place, True) < plain
    assert step_memory.activations(late, late.place, False) < plain


def test_a_partitioned_teacher_counts_its_part_and_what_a_pass_gathers(text: Path, tmp_path: Path) -> None:
    plan = memory_of(text, tmp_path / "run")
    whole = TeacherSize(ModelSize(10**9, 0, 10**6), 64, 4)
    few = {"stage": 3, "stage3_max_live_parameters": 1, "stage3_prefetch_bucket_size": 1}
    place = placement_of({"zero_optimization": few}, 4)
    placed = [replace(whole, place=place), replace(whole, place=replace(place, max_live=10**9))]
    needed = [
        step_memory.device_lines(replace(plan, teacher=teacher), plan.place, False)["teacher"]
        for teacher in (whole, *placed)
    ]
    table = 4 * plan.shape.vocab_size * 64
    assert needed == [4e9, 1e9 + table + 2 * 4e6, 1e9 + table + 4e9 + 4e6]


def test_an_offloaded_teacher_is_memory_of_the_host_on_gpus_only(text: Path, tmp_path: Path) -> None:
    flags = ("--distill.weight.start", "0.5", "--teacher.path", "x", "--teacher.deepspeed", "teacher_shard")
    for gpus, moved in (((), False), (("--gpus", "4"), True)):
        plan = memory_of(text, tmp_path / "run", *gpus)
        config = command(text, tmp_path / "run", *gpus, *flags).run
        placed = replace(plan.place, stage=3, ranks=4, offload_weights=False)
        teacher = step_memory.TeacherSize(plan.size, 128, 4, placed)
        shard = replace(plan, config=config, teacher=teacher)
        offloaded = replace(shard, teacher=replace(teacher, place=replace(placed, offload_weights=True)))
        device = [step_memory.device_lines(one, plan.place, False)["teacher"] for one in (shard, offloaded)]
        host = [step_memory.host_peaks(one, plan.place)["training"] for one in (shard, offloaded)]
        share = plan.size.weights * 4 / 4 if moved else 0.0
        assert device[0] - device[1] == pytest.approx(share) and host[1] - host[0] == pytest.approx(share)


def test_a_save_in_the_background_keeps_its_copy_while_the_run_trains(text: Path, tmp_path: Path) -> None:
    words = ("--steps", "10", "--checkpoint.every", "5")
    at_once = memory_of(text, tmp_path / "run", *words)
    background = memory_of(text, tmp_path / "run", *words, "--checkpoint.background")
    peaks = [step_memory.host_peaks(plan, plan.place) for plan in (at_once, background)]
    assert peaks[0]["training"] < peaks[1]["training"] == peaks[1]["save"] == peaks[0]["save"]


def test_the_placement_is_that_of_the_file() -> None:
    ds = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "reduce_bucket_size": 5e7}}
    place = placement_of(ds | {"bf16": {"enabled": True}}, 4)
    assert (place.stage, place.bits16, place.offload_weights, place.offload_state) == (3, True, True, False)
    assert place.bucket == 50_000_000


def test_the_report_says_how_many_tokens_of_a_pack_are_predicted(text: Path, tmp_path: Path) -> None:
    ratio = ("--masking.ratio.kind", "linear", "--masking.ratio.start", "0.5", "--masking.ratio.end", "0.25")
    for flags, words in ((("--masking.ratio.start", "0.25"), "a pack: 64"), (ratio, "a pack: 64 to 128; ")):
        assert any(words in line for line in report_of(text, tmp_path / "run", *flags))


def test_state_in_files_takes_the_memory_of_its_buffers(text: Path, tmp_path: Path) -> None:
    plan = memory_of(text, tmp_path / "run")
    plan = replace(plan, size=replace(plan.size, muon=0))  # Muon has no offload
    cpu, disk = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/tmp", "buffer_count": 4}

    def state(moments: dict[str, object], weights: dict[str, object], **more: object) -> float:
        section = {"stage": 3, "offload_optimizer": moments, "offload_param": weights, **more}
        place = placement_of({"zero_optimization": section}, 1, gpu=False)
        return sum(step_memory.state_memory_of(plan, place).device.values())

    memory = state(cpu, cpu)
    # fp32: two moments go, and four buffers for a flat partition come
    assert state(disk, cpu, sub_group_size=1000) == pytest.approx(memory - 8 * plan.size.weights + 4 * 4 * 1000)
    assert state(disk, cpu) == pytest.approx(memory + 8 * plan.size.weights)
    weights = disk | {"max_in_cpu": 0, "buffer_size": 1000}
    assert state(cpu, weights) == pytest.approx(memory - 4 * plan.size.weights + 4 * 4 * 1000)
    assert state(cpu, weights | {"max_in_cpu": 1e9}) == pytest.approx(memory + 4 * 4 * 1000)


def test_a_placement_says_what_is_where() -> None:
    cpu, disk = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/tmp"}
    names = [
        placement_of(
            {"zero_optimization": {"stage": 3, "offload_optimizer": moments, "offload_param": weights}}, 1
        ).name
        for moments, weights in ((cpu, cpu), (disk, disk), (cpu, disk), ({}, disk), ({}, {}))
    ]
    assert names == [
        "ZeRO 3, moments and weights on the host", "ZeRO 3, moments and weights in files",
        "ZeRO 3, moments on the host, weights in files", "ZeRO 3, weights in files", "ZeRO 3",
    ]  # fmt: skip


def test_the_report_mentions_missing_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamask.data.prepare.CACHE", tmp_path / "cache")
    parsed = parse_doctor_command(["--output", str(tmp_path / "run")])
    lines = report_lines(parsed, examine(parsed))
    assert any("not prepared yet" in line for line in lines)
    assert any("not a Slurm job" in line for line in lines)
    assert not list(tmp_path.iterdir())
