"""Settings, flags and files of settings that cannot be run."""

from __future__ import annotations

import json
from functools import partial

from megamask.engine import ds_file, offloads
from megamask.runtime import versions
from tests.system.catalogue.row import CONFIG, Command, Ground, Plant, Row, rows
from tests.system.commands import flags


def typed(arguments: list[str]) -> Plant:
    """Flags."""
    return lambda ground: ground.train(*arguments)


def set_to(settings: dict[str, object]) -> Plant:
    """Settings that cannot be together."""
    return lambda ground: ground.train(*flags(settings))


def file(content: str | bytes, flag: str = "--config", name: str = "wrong.toml") -> Plant:
    """A file of settings."""

    def plant(ground: Ground) -> Command:
        (ground.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return ground.train(flag, ground.folder / name)

    return plant


deepspeed = partial(file, flag="--deepspeed", name="wrong.json")


def ranks(world: int) -> Plant:
    """Two packs a step among so many ranks, of which this is the first."""

    def plant(ground: Ground) -> Command:
        ground.patch.setenv("RANK", "0")
        ground.patch.setenv("WORLD_SIZE", str(world))
        return ground.train()

    return plant


def pytorch(version: str) -> Plant:
    """Another PyTorch."""

    def plant(ground: Ground) -> Command:
        ground.patch.setattr(versions, "version", lambda name: version)
        return ground.train()

    return plant


def no_libaio(ground: Ground) -> Command:
    ground.patch.setattr(offloads, "has_async_io", lambda: False)
    return ground.train("--deepspeed", "ds_configs/zero3_nvme.json")


GUIDED = {"masking.score": "entropy", "entropy.source": "exact"}
TWICE = '{"bf16": {"enabled": true, "enabled": false}, "bf16": {}}'
OFFLOADED = '{"zero_optimization": {"stage": 2, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}'
SETTINGS = [
    *rows(
        CONFIG, typed,
        ("an unknown flag", ["--stepz", "3"], ["--stepz", "--steps"]),
        ("an unknown flag of a section", ["--model.hiden-size", "3"], ["--model.hiden-size", "--model.hidden-size"]),
        ("an unknown flag of a guide", ["--entropy.sorce", "probe"], ["--entropy.sorce", "--entropy.source"]),
        ("a flag that is none of its words", ["--model.size", "huge"], ["huge", "--model.size", "xxl"]),
        ("a word for a number", ["--steps", "many"], ["--steps", "many"]),
        ("a recipe that is not there", ["--recipe", "smal"], ["`smal`", "Did you mean `small`?"]),
        ("no file of settings", ["--config", "nowhere.toml"], ["`nowhere.toml` cannot be read: No such file"]),
        ("no DeepSpeed file", ["--deepspeed", "nowhere.json"], ["`nowhere.json` cannot be read: No such file"]),
        ("no first weights", ["--init", "nowhere"], ["`init` names nowhere", "megamask import"]),
    ),
    *rows(
        CONFIG, file,
        (
            "unknown keys in a file", "stepz = 3\npacks = {lenght = 3}",
            ["wrong.toml", "`stepz`", "`steps`", "`packs.lenght`", "`packs.length`"],
        ),
        ("a key in the wrong section", "length = 3", ["`length`", "`packs.length`"]),
        (
            "values of the wrong type", "steps = 'soon'\nmodel = {size = 'huge'}\nexprt = true",
            ["`steps`", "'soon'", "`model.size`", "'huge'", "`export`"],
        ),
        ("a value for a section", "packs = 12", ["`packs`"]),
        ("a key that is there twice", "steps = 1\nsteps = 2", ["wrong.toml` is not TOML: Cannot overwrite a value"]),
        ("a recipe that is not there, in a file", "recipe = 'smal'", ["`smal`", "`small`"]),
        ("a file that is not TOML", "a = [", ["wrong.toml` is not TOML"]),
        ("a date in a file", "steps = 2020-01-01", ["wrong.toml` is not TOML: it contains a date"]),
        ("a file that is not UTF-8", b"steps = \xff", ["wrong.toml` is not TOML", "byte 8 is 0xff"]),
    ),
    *rows(
        CONFIG, partial(file, name="wrong.json"),
        ("a JSON file without a table", "[1, 2]", ["wrong.json` must contain a table of settings"]),
        ("a key that is there twice in JSON", '{"steps": 1, "steps": 2}', ["it has the key 'steps' twice"]),
    ),
    *rows(
        CONFIG, partial(file, name="wrong.yaml"),
        ("a YAML file", "steps: 1", ["wrong.yaml` must be a TOML or JSON file"]),
    ),
    *rows(
        CONFIG, deepspeed,
        ("DeepSpeed: no JSON", "{", ["wrong.json` is not JSON"]),
        ("DeepSpeed: no object", "[]", ["hold one JSON object"]),
        ("DeepSpeed: keys twice", TWICE, ["the key `enabled` twice", "the key `bf16` twice"]),
        ("DeepSpeed: unknown key", '{"zero_optimisation": {}}', ["`zero_optimisation`", "`zero_optimization`?"]),
        ("DeepSpeed: gradient_clipp1ng", '{"gradient_clipp1ng": 1}', ["`gradient_clipp1ng`"]),
        ("DeepSpeed: no such stage", '{"zero_optimization": {"stage": 4}}', ["`zero_optimization.stage`", "4"]),
        ("DeepSpeed: no section", '{"zero_optimization": 2}', ["zero_optimization", "be an object"]),
        ("DeepSpeed: bf16 at stage 0", '{"bf16": {"enabled": true}}', ["`bf16` at ZeRO stage 0"]),
        (
            "DeepSpeed: float16", '{"torch_autocast": {"enabled": true, "dtype": "float16"}}',
            ["torch_autocast.dtype", "'float16'"],
        ),
        (
            "DeepSpeed: what is not its to say", json.dumps(dict.fromkeys(ds_file.OURS, 1)),
            [*map("not set `{}`".format, ds_file.OURS)],
        ),
        ("NVMe below stage 3", OFFLOADED, ["NVMe needs ZeRO stage 3", "says 2"]),
    ),
    *rows(
        CONFIG, set_to,
        ("no source of entropy", {"masking.score": "entropy"}, ["`masking.score` 'entropy' needs `entropy.source`"]),
        ("a source for nothing", {"entropy.source": "probe"}, ["`entropy.source` has no effect", "`masking.score`"]),
        ("no such source", {"entropy.source": "prob"}, ["'prob'", "--entropy.source", "'probe'"]),
        ("a measure of nothing", {"entropy.measure": "min"}, ["`entropy.measure` has no effect"]),
        (
            "a share of nothing to skip", {"masking.entropy.skip_top": 0.1},
            ["`masking.entropy` has no effect with `masking.score` 'uniform', only with 'entropy'"],
        ),
        (
            "candidates for low", GUIDED | {"masking.entropy.strategy": "low", "entropy.candidates": 2.0},
            ["`entropy.candidates`", "'low'"],
        ),
        ("no teacher to ask", GUIDED | {"entropy.source": "teacher"}, ["'teacher' needs `teacher.path`"]),
        ("a teacher for nothing", {"teacher.path": "somewhere"}, ["`teacher.path` has no effect"]),
        ("a sweep of nothing", {"teacher.packs_per_pass": 2}, ["`teacher.packs_per_pass` has no effect without"]),
        ("a temperature of nothing", {"distill.temperature": 2.0}, ["`distill.temperature` has no effect"]),
        ("masks that do not divide", {"packs.masks_per_text": 3, "packs.per-step": 8}, ["must divide", "is 3"]),
        ("layers of nothing", {"init-layers": 0}, ["`init_layers` has no effect without `init`"]),
        (
            "an average at stage 3", GUIDED | {"entropy.ema_decay": 0.9, "deepspeed": "ds_configs/zero3.json"},
            ["`entropy.ema_decay` needs whole weights", "use stage 0, 1 or 2"],
        ),
        (
            "lamb at stage 2", {"optimizer.kind": "lamb", "deepspeed": "ds_configs/zero2.json"},
            ["`optimizer.kind` 'lamb' needs ZeRO stage 0", "says 2"],
        ),
    ),
    *rows(CONFIG, ranks, ("packs that cannot be shared", 3, ["of ranks (3), but is 2", "use 3", "that fits (1, 2)"])),
    *rows(
        CONFIG, pytorch,
        ("an old PyTorch", "2.9.1+cu128", ["PyTorch must be 2.11 or newer, but is 2.9.1+cu128"]),
        ("no PyTorch that is known", "strange", ["PyTorch must be", "but is strange"]),
    ),
    Row("NVMe without libaio", no_libaio, CONFIG, ("NVMe needs libaio",)),
]  # fmt: skip
