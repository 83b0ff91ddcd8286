"""Settings of a teacher and of distillation that have no effect, are out of range or need others."""

from __future__ import annotations

import dataclasses
import json

from megamask.engine.teacher_ds_file import teacher_ds_problems as file_problems
from megamask.entropy.source import AuditConfig, EntropyConfig
from megamask.errors.setting_rules import settings_problems
from megamask.schedules import Schedule
from megamask.teacher.settings import teacher_problems
from megamask.teacher.teacher import DistillConfig, TeacherConfig
from tests.unit.teacher.models import ROOT


def test_settings_without_effect_and_out_of_bounds_are_refused(tmp_path):
    off, on = DistillConfig(), DistillConfig(Schedule("ramp", start=0.0, end=1.0, at=0.1, until=0.3), temperature=2.0)
    assert (
        not settings_problems(off, "distill") and not settings_problems(on, "distill") and not off.active and on.active
    )
    assert not settings_problems(TeacherConfig(), "teacher") and not settings_problems(
        TeacherConfig("x", "fp32", None, 4), "teacher"
    )
    problems = settings_problems(
        DistillConfig(temperature=2.0, positions="all", reduction="sequence", stored=tmp_path), "distill"
    )
    assert [s.split("`")[1] for s in problems] == [
        f"distill.{p}" for p in ("temperature", "positions", "reduction", "stored")
    ]
    problems = settings_problems(TeacherConfig(precision="fp32", deepspeed=tmp_path, packs_per_pass=2), "teacher")
    assert [s.split("`")[1] for s in problems] == ["teacher.precision", "teacher.deepspeed", "teacher.packs_per_pass"]
    bad = settings_problems(
        DistillConfig(Schedule(start=1.5), temperature=0.0, positions="all", stored=tmp_path), "distill"
    )
    assert {s.split("`")[1] for s in bad} == {"distill.weight.start", "distill.temperature", "distill.positions"}
    assert "`teacher.packs_per_pass` must be at least 1, but is 0." in settings_problems(
        TeacherConfig("x", packs_per_pass=0), "teacher"
    )


def test_sections_that_need_each_other(tmp_path):
    off, on = DistillConfig(), DistillConfig(Schedule(start=0.5))
    stored = dataclasses.replace(on, stored=tmp_path)
    nobody, somebody = TeacherConfig(), TeacherConfig("x")
    none, by_teacher = EntropyConfig(), EntropyConfig("teacher")
    audited = EntropyConfig("probe", audit=AuditConfig(200, fall_back=("teacher",)))
    for sound in (
        (nobody, off, none),
        (somebody, on, none),
        (somebody, off, by_teacher),
        (nobody, stored, none),
        (somebody, stored, audited),
    ):
        assert not teacher_problems(*sound)
    for wrong in (
        (nobody, on, none),
        (nobody, off, by_teacher),
        (nobody, off, audited),
        (somebody, off, none),
        (somebody, stored, none),
    ):
        assert len(teacher_problems(*wrong)) == 1


def test_deepspeed_files_of_a_teacher(tmp_path):
    for name in ("teacher_offload", "teacher_shard"):
        assert not file_problems("teacher.deepspeed", ROOT / "ds_configs" / f"{name}.json")[1]
    wrong = tmp_path / "wrong.json"
    wrong.write_text(
        json.dumps(
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
        )
    )
    problems = " ".join(settings_problems(TeacherConfig("x", deepspeed=wrong), "teacher"))
    assert all(word in problems for word in ("`bf16`", "needs ZeRO stage 3", "offload_optimizer"))
    (problem,) = settings_problems(TeacherConfig("x", deepspeed=tmp_path / "none.json"), "teacher")
    assert "cannot be read" in problem
