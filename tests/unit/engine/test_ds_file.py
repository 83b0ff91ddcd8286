"""DeepSpeed's file: what is not its to say is refused, with everything else that is wrong, and the rest is kept."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel

from megamask.config.checks import find_problems
from megamask.config.pretrain_config import PretrainConfig
from megamask.engine import ds_file
from megamask.engine.ds_file import (
    OURS,
    complete_ds_config,
    ds_problems,
    parse_ds_config,
    read_ds_config,
    stage_is_known,
    zero_stage,
)
from megamask.engine.optimizer import OptimizerConfig
from megamask.engine.teacher_ds_file import teacher_ds_problems
from megamask.errors import ConfigError
from megamask.runtime.precision import PrecisionSupport

ROOT = Path(__file__).parent.parent.parent.parent
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture
def written(tmp_path: Path):
    def write(content: dict | str) -> Path:
        (tmp_path / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / "ds.json"

    return write


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_packaged_files_have_no_problems(path: Path) -> None:
    assert read_ds_config(path) == json.loads(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_bare_name_means_a_packaged_file(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_ds_config(Path(path.stem)) == read_ds_config(path)


@pytest.mark.parametrize("name", ["zero5", "ds_configs/zero2.json"])
def test_a_wrong_name_lists_the_packaged_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_ds_config(Path(name))
    assert f"`{name}`" in str(caught.value) and all(path.stem in str(caught.value) for path in FILES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ZERO2", "Did you mean `zero2`?"),
        ("zero2.jsn", "Did you mean `zero2`?"),
        ("", "`deepspeed` is empty, or"),
        ("/", "`/` is a folder"),
    ],
)
def test_a_missing_file_gets_a_suggestion(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_ds_config(Path(name))


def test_a_packaged_file_is_found_with_its_ending_unless_there_is_such_a_file(
    written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_ds_config(Path("zero2.json")) == read_ds_config(Path("zero2"))
    written({"zero_optimization": {"stage": 1}}).rename("zero2.json")
    assert zero_stage(read_ds_config(Path("zero2.json"))) == 1


def test_bounds_of_deepspeed_are_in_our_words(written) -> None:
    _, (problem,) = parse_ds_config(written({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}))
    assert problem.startswith("`zero_optimization.reduce_bucket_size` in ") and problem.endswith("0, but is -1.")
    _, (problem,) = parse_ds_config(written({"zero_optimization": {"stage": True}}))
    assert problem.startswith("`zero_optimization.stage` in ")
    assert problem.endswith(" must be 0, 1, 2 or 3, but is true.")


def test_all_problems_are_reported_and_the_rest_is_kept(written) -> None:
    wrong = {"optimizer": {}, "bf17": {}, "zero_optimization": {"stage": 7, "bucket": 1}, "bf16": {"enabled": False}}
    ds, sentences = parse_ds_config(written(wrong))
    assert len(sentences) == 4
    assert all(name in " ".join(sentences) for name in ("optimizer", "bf17", "stage", "zero_optimization.bucket"))
    assert ds["bf16"] == {"enabled": False}
    assert zero_stage(ds) == 0
    with pytest.raises(ConfigError) as caught:
        read_ds_config(written(wrong))
    assert list(caught.value.problems) == sentences


@pytest.mark.parametrize(
    ("content", "stage"),
    [
        ({}, 0),
        ({"zero_optimization": {}}, 0),
        ({"bf17": {}}, 0),
        ({"zero_optimization": {"stage": 3}}, 3),
        ({"zero_optimization": {"stage": 3, "bucket": 1}}, 3),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}}, 3),
        ({"zero_optimization": {"stage": 4}}, None),
        ({"zero_optimization": {"stag": 3}}, None),
        ({"zero_optimization": 3}, None),
        ({"zero_optimisation": {"stage": 3}}, None),
    ],
)
def test_the_stage_is_known_unless_it_is_itself_wrong(content: dict, stage: int | None, written) -> None:
    ds, _ = parse_ds_config(written(content))
    assert stage_is_known(ds) == (stage is not None)
    assert zero_stage(ds) == (stage or 0)
    # nothing is said about a stage that is not known
    _, sentences = parse_ds_config(written(content | {"bf16": {"enabled": True}}))
    assert any("ZeRO stage 0" in sentence for sentence in sentences) == (stage == 0)
    _, sentences = teacher_ds_problems("teacher.deepspeed", written(content))
    assert any("needs ZeRO stage 3" in sentence for sentence in sentences) == (stage == 0)
    _, sentences = find_problems(PretrainConfig(optimizer=OptimizerConfig("muon")), written(content), 1)
    assert any("'muon' needs ZeRO stage" in sentence for sentence in sentences) == (stage == 0)


@pytest.mark.parametrize("section", [name for name in ds_file.SECTIONS])
def test_a_typo_in_any_section_is_found(section: str, written) -> None:
    _, sentences = parse_ds_config(written({section: {"enabledd": True}}))
    assert len(sentences) == 1
    assert f"`{section}.enabledd`" in sentences[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lamb_and_muon_have_their_stages(stage: int) -> None:
    ds = {"zero_optimization": {"stage": stage}}
    assert zero_stage(ds) == stage
    assert bool(ds_problems(OptimizerConfig("lamb"), ds)) == (stage > 0)
    assert bool(ds_problems(OptimizerConfig("muon"), ds)) == (stage == 0)
    assert ds_problems(OptimizerConfig("adamw"), ds) == []
    assert zero_stage({}) == 0


def test_settings_of_the_run_complete_the_file() -> None:
    ds = {"zero_optimization": {"stage": 2}}
    full = complete_ds_config(ds, OptimizerConfig(max_grad_norm=0.5), 3, 12, 1000)
    assert full["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert full["gradient_clipping"] == 0.5
    assert (full["train_batch_size"], full["gradient_accumulation_steps"]) == (12, 3)
    assert ds == {"zero_optimization": {"stage": 2}}
    # whatever it fills in, a file may not say
    assert {"train_batch_size", "gradient_clipping", "gradient_accumulation_steps", "steps_per_print"} <= OURS.keys()


# ---- precision


@pytest.mark.parametrize("section", ds_file.PRECISION)
@pytest.mark.parametrize("bf16", [True, False])
def test_auto_is_what_the_devices_support(section: str, bf16: bool, written) -> None:
    stage = {"zero_optimization": {"stage": 1}}
    ds = read_ds_config(written({section: {"enabled": "auto"}} | stage))
    support = PrecisionSupport(bf16, "they are asked")
    assert ds_file.precision(ds) == "auto"
    assert ds_file.choose_precision(ds, support).precision == ("bf16" if bf16 else "fp32")
    decided = ds_file.resolve_auto(ds, support)
    assert decided == {section: {"enabled": bf16}} | stage
    assert ds[section] == {"enabled": "auto"}
    # what is ordered stays, and decided is ordered
    for other in (PrecisionSupport(True, ""), PrecisionSupport(False, "")):
        assert ds_file.resolve_auto(decided, other) == decided
        assert ds_file.choose_precision(decided, other).precision == ("bf16" if bf16 else "fp32")
    assert ds_file.precision(stage) == "fp32"


@pytest.mark.parametrize("section", ds_file.PRECISION)
@pytest.mark.parametrize("value", ["Auto", "true", 1, 0, None, [], "bf16"])
def test_enabled_is_true_false_or_auto(section: str, value: object, written) -> None:
    ds, sentences = parse_ds_config(written({section: {"enabled": value}}))
    assert section not in ds
    assert len(sentences) == 1 and "true, false or 'auto'" in sentences[0] and f"{section}.enabled" in sentences[0]


def test_auto_is_only_for_precision(written) -> None:
    wrong = {"flops_profiler": {"enabled": "auto"}, "bf16": {"enabled": "auto", "check_grad_overflow": "auto"}}
    _, sentences = parse_ds_config(written(wrong))
    assert len(sentences) == 2


def test_bf16_at_stage_0_is_refused_as_auto_too(written) -> None:
    _, sentences = parse_ds_config(written({"bf16": {"enabled": "auto"}}))
    assert len(sentences) == 1 and "ZeRO stage 0" in sentences[0]


def test_packaged_files_follow_the_devices_or_are_fp32() -> None:
    precisions = {path.stem: ds_file.precision(read_ds_config(path)) for path in FILES if "teacher" not in path.stem}
    assert precisions.pop("fp32") == "fp32"
    assert set(precisions.values()) == {"auto"}


# ---- every key at every level


def tables() -> dict[str, dict[str, Any]]:
    """The keys of every level that we know, by the path of their section, with what they may be."""
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "comms_logger": CommsLoggerConfig}
    keys = {"": ds_file.SINGLE | dict.fromkeys(ds_file.SECTIONS, dict)}
    keys |= {name: table for name, table in ds_file.SECTIONS.items() if table}
    pending = list(models.items())
    while pending:
        path, model = pending.pop()
        keys[path] = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
        for name, kind in keys[path].items():
            inside = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
            pending += [(f"{path}.{name}", one) for one in inside]
    return keys


TABLES = tables()


def at(path: str, inside: dict) -> dict:
    """A file that says ``inside`` in the section ``path``."""
    for name in reversed(path.split(".") if path else []):
        inside = {name: inside}
    return inside


@pytest.mark.parametrize("path", TABLES)
def test_a_misspelt_key_at_any_level_is_corrected(path: str, written) -> None:
    wrong = {f"{name[:-1]}{name[-1]}{name[-1]}": name for name in TABLES[path]}
    _, sentences = parse_ds_config(written(at(path, dict.fromkeys(wrong, 1))))
    dot = "." if path else ""
    assert len(sentences) == len(wrong)
    for typo, name in wrong.items():
        (sentence,) = [one for one in sentences if f"`{path}{dot}{typo}`" in one]
        assert f"Did you mean `{path}{dot}{name}`?" in sentence


SCALARS = (True, 3, 0.5, "many", "3", "true", "auto", [1], {"a": 1})


@pytest.mark.parametrize("path", TABLES)
def test_a_value_of_the_wrong_type_at_any_level_is_refused(path: str, written) -> None:
    tried = 0
    for name, kind in TABLES[path].items():
        # a value that is not a string is neither a number nor a boolean in a string
        auto = ["auto"] if path in ds_file.PRECISION and name == "enabled" else []
        wrong = [value for value in SCALARS if not right(kind, value) and value not in auto]
        for value in wrong:
            ds, sentences = parse_ds_config(written(at(path, {name: value})))
            where = f"{path}.{name}" if path else name
            assert len(sentences) == 1 and where in sentences[0], (where, value, sentences)
            assert name not in ds or ds == {"zero_optimization": {"stage": None}}
        tried += len(wrong)
    assert tried >= 4 * len(TABLES[path])


def right(kind: Any, value: Any) -> bool:
    """Whether a value may be of a type, judged by the types alone."""
    kinds = [one for one in (kind, *get_args(kind)) if isinstance(one, type)]
    if value == "auto":
        return False
    if any(issubclass(one, (BaseModel, dict)) for one in kinds):
        return isinstance(value, dict)  # what is inside is looked at at its own level
    if any(one in (list, list[str]) or get_origin(one) is list for one in (kind, *kinds)):
        return value == [1] and kind is list
    if get_origin(kind) is Literal or any(issubclass(one, Enum) for one in kinds):
        return value in (get_args(kind) or [one.value for one in kinds[0]]) and not isinstance(value, bool)
    plain = {bool: bool, int: int, float: (int, float), str: str, Path: str}
    return any(
        isinstance(value, plain[one]) and (one is bool) == isinstance(value, bool) for one in kinds if one in plain
    )


def test_sizes_may_be_written_as_deepspeed_writes_them(written) -> None:
    content = '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}'
    assert parse_ds_config(written(content)) == ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}, [])


@pytest.mark.parametrize("name", OURS)
def test_keys_that_the_run_decides_are_refused(name: str, written) -> None:
    for value in (1, "auto", {}, None, False):
        _, sentences = parse_ds_config(written({name: value}))
        assert len(sentences) == 1 and f"must not set `{name}`" in sentences[0]


def test_a_bucket_has_at_most_the_size_of_the_model() -> None:
    for stage, given, completed in ((1, 100, 100), (3, 5000, 1000), (0, 5000, 5000)):
        ds = {"zero_optimization": {"stage": stage, "reduce_bucket_size": given}}
        full = complete_ds_config(ds, OptimizerConfig(), 3, 12, 1000)
        assert full["zero_optimization"]["reduce_bucket_size"] == completed


def test_all_completed_keys_are_refused_in_a_file(written) -> None:
    """What `complete_ds_config` sets, no file can have set."""
    muon = complete_ds_config({"zero_optimization": {"stage": 3}}, OptimizerConfig("muon"), 3, 12, 1000)
    for name in muon.keys() - {"zero_optimization"}:
        assert parse_ds_config(written({name: muon[name]}))[1]
    assert muon["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1000, "reduce_scatter": False}
    twice = {"zero_optimization": {"stage": 3, "reduce_scatter": True}}
    assert "`zero_optimization.reduce_scatter` false" in ds_problems(OptimizerConfig("muon"), twice)[0]
    assert ds_problems(OptimizerConfig("adamw"), twice) == []


@pytest.mark.parametrize("key", ["cpu_offload", "cpu_offload_param"])
def test_old_names_are_refused(key: str, written) -> None:
    """DeepSpeed would offload, and no check would know."""
    ds, sentences = parse_ds_config(written({"zero_optimization": {"stage": 3, key: True}}))
    assert len(sentences) == 1 and f"`zero_optimization.{key}`" in sentences[0] and "Use `offload_" in sentences[0]
    assert ds == {"zero_optimization": {"stage": 3}}


def test_old_and_new_names_of_one_thing_are_refused(written) -> None:
    section = {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}
    ds, sentences = parse_ds_config(written({"zero_optimization": section}))
    assert len(sentences) == 1 and "cpu_offload" in sentences[0]
    assert ds == {"zero_optimization": {"stage": 2}}


def test_without_the_type_check_strings_are_taken_for_numbers(written, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed itself does."""
    monkeypatch.setattr(ds_file, "_type_problems", lambda *given: [])
    with pytest.raises(AssertionError):
        test_a_value_of_the_wrong_type_at_any_level_is_refused("zero_optimization", written)
