"""The DeepSpeed file: how to run (stage, offload, communication, precision), never what to train.

This module fills in what to train from the settings of the run. A file that sets it as well is refused, and so is a key
that DeepSpeed would silently ignore.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from megamask.engine.offloads import offload_problems
from megamask.engine.settings import OptimizerConfig
from megamask.errors import ConfigError, must, raise_all, unknown
from megamask.errors.json_types import type_rule
from megamask.runtime.accelerator import choose_accelerator
from megamask.runtime.precision_choice import PrecisionChoice, PrecisionSupport, Setting
from megamask.storage import strict_json

OURS = {
    "train_batch_size": "`packs.per_step` decides it",
    "train_micro_batch_size_per_gpu": "a micro-batch is one pack of `packs.tokens` tokens",
    "gradient_accumulation_steps": "`packs.per_step` and the number of ranks decide it",
    "gradient_clipping": "`optimizer.max_grad_norm` decides it",
    "optimizer": "the section `optimizer` decides it",
    "scheduler": "`optimizer.lr` decides it",
    "steps_per_print": "`log.every` decides it",
    "fp16": "megamask trains in bf16 or fp32",
    "tensorboard": "megamask writes its own TensorBoard logs",
}
"""Keys that a DeepSpeed file must not set, and which setting decides instead."""

Float = Literal["fp32", "bf16", "fp16"]
SECTIONS: dict[str, dict[str, Any]] = {
    "zero_optimization": {},
    "bf16": {},
    "comms_logger": {},
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list[str]},
    "data_types": {
        "grad_accum_dtype": Float, "param_dtype": Float, "buffer_dtype": Float, "keep_in_fp32_modules": list[str],
    },
    "aio": {
        "block_size": int, "queue_depth": int, "intra_op_parallelism": int, "single_submit": bool,
        "overlap_events": bool, "use_gds": bool,
    },
    "flops_profiler": {
        "enabled": bool, "recompute_fwd_factor": float, "profile_step": int, "module_depth": int, "top_modules": int,
        "detailed": bool, "output_file": str | None,
    },
}  # fmt: skip
"""Sections of a DeepSpeed file, with the types of their keys; those of the first three come from DeepSpeed."""
SINGLE: dict[str, Any] = {
    "communication_data_type": Float,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
}
"""Keys outside of sections, with their types."""
KNOWN = [*SECTIONS, *SINGLE]
"""Top-level keys of a DeepSpeed file that have an effect here; DeepSpeed silently ignores unknown ones."""
PACKAGED = Path(__file__).parent.parent / "ds_configs"
"""DeepSpeed files that come with megamask; a bare name such as `zero2` stands for one of them."""
PRECISION = ("bf16", "torch_autocast")
"""Sections whose `enabled` may be 'auto': bf16 where all devices support it. `resolve_auto` decides."""


def read_ds_config(path: Path) -> dict[str, Any]:
    """The content of a DeepSpeed file; raises ConfigError with all of its problems."""
    ds, problems = parse_ds_config(path)
    raise_all(ConfigError, problems)
    assert ds is not None
    return ds


def packaged_names() -> list[str]:
    """The names of the DeepSpeed files that come with megamask."""
    return sorted(path.stem for path in PACKAGED.glob("*.json"))


def parse_ds_config(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The content of a DeepSpeed file, and a sentence for each of its problems.

    ``path`` may be the name of a packaged file. Sections with problems are left out; of `zero_optimization`, the stage
    remains (`stage_is_known`). None: not a JSON object.
    """
    problems: list[str] = []
    ds = _read_object(path, problems)
    if ds is None:
        return None, problems
    problems += [f"`{path}` must not set `{key}`: {OURS[key]}. Remove the key." for key in ds if key in OURS]
    problems += [unknown(key, KNOWN, f"`{path}`") for key in ds if key not in OURS and key not in KNOWN]
    for name in [name for name in ds if name in KNOWN]:
        of_key = _section_problems(path, name, ds[name]) if name in SECTIONS else []
        of_key += _type_problems(path, name, SINGLE[name], ds[name]) if name in SINGLE else []
        if of_key and name == "zero_optimization":
            ds[name] = _stage_alone(path, ds[name])
        elif of_key:
            del ds[name]
        problems += of_key
    if "zero_optimization" not in ds and any(get_close_matches(key, ["zero_optimization"]) for key in ds):
        ds["zero_optimization"] = {"stage": None}  # the section has a misspelt name
    if ds.get("torch_autocast", {}).get("dtype", "bfloat16") not in ("bfloat16", "bf16"):
        problems.append(must(f"torch_autocast.dtype` in `{path}", "be 'bfloat16'", str(ds["torch_autocast"]["dtype"])))
    if ds.get("bf16", {}).get("enabled") and stage_is_known(ds) and zero_stage(ds) == 0:
        problems.append(
            f"`{path}` sets `bf16` at ZeRO stage 0, where DeepSpeed's first Adam step is 0.744 of what it should be. "
            'Use `"torch_autocast": {"enabled": true, "dtype": "bfloat16"}` or stage 1.'
        )
    return ds, problems


def _read_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The JSON object in a DeepSpeed file; None, with a sentence in ``problems``, if there is none."""

    def check_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"`{path}` has the key `{name}` twice. Keep one of them.")
        return dict(pairs)

    name = path.name.removesuffix(".json")
    packaged = name in packaged_names() and path.parent == Path() and not (path.suffix and path.exists())
    file = PACKAGED / f"{name}.json" if packaged else path
    cure = f"Name a file, or one that comes with megamask: {', '.join(packaged_names())}."
    try:
        if path == Path():  # what an empty value becomes
            problems.append(
                f"`deepspeed` is empty, or the folder itself. {cure} Or leave the flag out: then there is none."
            )
            return None
        if file.is_dir():
            problems.append(f"The DeepSpeed file `{path}` is a folder. {cure}")
            return None
        ds = strict_json.parse_json(strict_json.read_text(file, strict_json.LARGEST_SETTINGS), check_duplicates)
    except OSError as error:
        near = get_close_matches(name.lower(), packaged_names(), n=1)
        meant = f"Did you mean `{near[0]}`? " if near else ""
        problems.append(f"The DeepSpeed file `{path}` cannot be read: {error.strerror}. {meant}{cure}")
    except strict_json.BadRecord as error:
        problems.append(f"`{path}` is not JSON: {error}.")
    else:
        if isinstance(ds, dict):
            return ds
        problems.append(must(str(path), "hold one JSON object", ds))
    return None


def _section_problems(path: Path, name: str, section: Any) -> list[str]:
    """Sentences for a section that is not an object, unknown keys, and values that DeepSpeed would refuse later."""
    if not isinstance(section, dict):
        return [must(f"{name}` in `{path}", "be an object", section)]
    choose_accelerator()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
    }
    if name not in models:
        return _table_problems(path, name, SECTIONS[name], section)
    problems = _table_problems(path, name, _types_of(models[name]), section)
    problems = problems or _old_names(path, name, models[name], section)
    if problems:
        return problems
    try:  # bounds, and keys that exclude each other
        models[name](**(section | {"enabled": True} if section.get("enabled") == "auto" else section))
    except ValidationError as error:
        return [_model_problem(path, name, _types_of(models[name]), one) for one in error.errors()]
    except AssertionError as error:
        return [f"`{path}`: `{name}`: {error}."]
    return []


def _old_names(path: Path, name: str, model: type[BaseModel], section: dict[str, Any]) -> list[str]:
    """Sentences for keys that DeepSpeed replaces by others: checks and predictions know only the new ones."""
    extras = {key: field.json_schema_extra for key, field in model.model_fields.items() if key in section}
    return [
        f"`{name}.{key}` in `{path}` is an old name. Use `{extra['new_param']}`."
        for key, extra in extras.items()
        if isinstance(extra, dict) and extra.get("deprecated")
    ]


def _stage_alone(path: Path, section: Any) -> dict[str, Any]:
    """The section with nothing but its stage; None if the stage is wrong, or missing: its key may be misspelt."""
    alone = {"stage": section.get("stage") if isinstance(section, dict) else None}
    return {"stage": None} if _section_problems(path, "zero_optimization", alone) else alone


def _model_problem(path: Path, name: str, types: dict[str, Any], error: Any) -> str:
    """The sentence for one of pydantic's errors about the section ``name``."""
    bounds = {"ge": "be at least", "gt": "be above", "le": "be at most", "lt": "be below"}
    where = ".".join(str(part) for part in (name, *error["loc"])) + f"` in `{path}"
    context = error.get("ctx", {})
    for bound in bounds.keys() & context.keys():
        return must(where, f"{bounds[bound]} {context[bound]}", error["input"])
    if error["type"] == "value_error":
        return f"`{where}`: {context['error']}."
    return must(where, type_rule(types.get(str(error["loc"][0]), dict)), error["input"])


def _types_of(model: type[BaseModel]) -> dict[str, Any]:
    """The type of each key of a pydantic model, under its name and under its alias."""
    fields = model.model_fields.items()
    return {name: field.annotation for key, field in fields for name in (key, field.alias) if name}


def _table_problems(path: Path, name: str, types: dict[str, Any], section: dict[str, Any]) -> list[str]:
    """Sentences for unknown keys and values of the wrong type in ``section``, at all its levels."""
    names = [f"{name}.{key}" for key in types]
    problems = [unknown(f"{name}.{key}", names, f"`{path}`") for key in section if key not in types]
    for key, value in section.items():
        if name in PRECISION and key == "enabled":
            if value != "auto" and not isinstance(value, bool):
                problems.append(must(f"{name}.enabled` in `{path}", "be true, false or 'auto'", value))
            continue
        problems += _type_problems(path, f"{name}.{key}", types[key], value) if key in types else []
    return problems


def _type_problems(path: Path, name: str, expected: Any, value: Any) -> list[str]:
    """Sentences for a ``value`` that is not of the ``expected`` JSON type: "3" does not count as 3, nor 1 as true."""
    options = (expected, *get_args(expected))
    model = next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)
    if model and value is not None:
        if isinstance(value, dict):
            return _table_problems(path, name, _types_of(model), value)
        return [must(f"{name}` in `{path}", "be an object", value)]
    if isinstance(value, bool) and bool not in options:
        return [must(f"{name}` in `{path}", type_rule(expected), value)]  # pydantic takes true for stage 1
    if value == "auto":
        return [must(f"{name}` in `{path}", type_rule(expected), value)]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # DeepSpeed's documentation writes sizes such as 5e8
    try:
        TypeAdapter(expected).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return [must(f"{name}` in `{path}", type_rule(expected), value)]
    return []


def stage_is_known(ds: dict[str, Any]) -> bool:
    """Whether `parse_ds_config` could tell the ZeRO stage of this content, as given or by default."""
    return ds.get("zero_optimization", {}).get("stage", 0) is not None


def zero_stage(ds: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed file; 0 if it is not known."""
    return int(ds.get("zero_optimization", {}).get("stage") or 0)


def precision(ds: dict[str, Any]) -> Setting:
    """The precision of a DeepSpeed file: of weights (`bf16`), or of matrix products only (`torch_autocast`)."""
    enabled = [ds.get(name, {}).get("enabled", False) for name in PRECISION]
    if True in enabled:
        return "bf16"
    return "auto" if "auto" in enabled else "fp32"


def choose_precision(ds: dict[str, Any], support: PrecisionSupport) -> PrecisionChoice:
    """The precision of a run under a DeepSpeed file, on devices with ``support``."""
    names = [f"`{name}.enabled` in the DeepSpeed file" for name in PRECISION if ds.get(name, {}).get("enabled")]
    return PrecisionChoice(names[0] if names else "", precision(ds), support)


def resolve_auto(ds: dict[str, Any], support: PrecisionSupport) -> dict[str, Any]:
    """A DeepSpeed file with true or false for each `enabled` that is 'auto'."""
    auto = [name for name in PRECISION if ds.get(name, {}).get("enabled") == "auto"]
    return ds | {name: ds[name] | {"enabled": support.bf16} for name in auto}


def default_ds_config(config: OptimizerConfig) -> dict[str, Any]:
    """The default if no file is set: ZeRO 1 under Muon, which needs it, else no ZeRO."""
    return {"zero_optimization": {"stage": 1}} if config.kind == "muon" else {}


def ds_problems(config: OptimizerConfig, ds: dict[str, Any], name: str = "optimizer") -> list[str]:
    """Sentences for conflicts between the optimizer and the DeepSpeed file."""
    problems = []
    stage = zero_stage(ds)
    if config.kind == "lamb" and stage > 0:
        problems.append(
            f"`{name}.kind` 'lamb' needs ZeRO stage 0, but the DeepSpeed file says {stage}: its trust ratio is a "
            "norm of whole tensors, which ZeRO partitions. Use `--deepspeed zero0` or another optimizer."
        )
    if config.kind == "muon" and stage == 0:
        problems.append(
            f"`{name}.kind` 'muon' needs ZeRO stage 1, 2 or 3, but the DeepSpeed file says 0: there DeepSpeed's Muon "
            "may not orthogonalise. Use `--deepspeed zero1`."
        )
    section = ds.get("zero_optimization", {})
    if config.kind == "muon" and stage == 3 and section.get("reduce_scatter"):
        problems.append(
            f"`{name}.kind` 'muon' at ZeRO stage 3 needs `zero_optimization.reduce_scatter` false, but the DeepSpeed "
            "file says true. Remove the key."
        )
    return problems + offload_problems(section, stage, config.kind, name)


def complete_ds_config(
    ds: dict[str, Any], config: OptimizerConfig, accumulate: int, packs_per_step: int, num_weights: int
) -> dict[str, Any]:
    """The DeepSpeed file, completed with what the settings and the model of the run decide."""
    complete = {
        **ds,
        "train_batch_size": packs_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if zero_stage(ds) == 0:
        return complete
    zero = ds["zero_optimization"]
    # DeepSpeed gives a bucket all of its memory, also where the model has fewer gradients
    complete["zero_optimization"] = {**zero, "reduce_bucket_size": min(bucket_size(ds), num_weights)}
    if config.kind == "muon" and zero_stage(ds) == 3:
        complete["zero_optimization"]["reduce_scatter"] = False
    return complete


def bucket_size(ds: dict[str, Any]) -> int:
    """The gradients that DeepSpeed reduces together at stages 1 to 3, in elements."""
    return int(ds.get("zero_optimization", {}).get("reduce_bucket_size", 500_000_000))
