"""What entropy sources and teachers cost: the time of a step with them as a multiple of a plain step.

A step has `MASKS_PER_TEXT` packs in all variants, so that one pass can serve that many masks of one text. Teachers are
untrained copies of the student: their predictions are useless, but their cost is real.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megamask.batch import TokenIds
from megamask.bench.measure import Medians
from megamask.bench.megamask_variant import DsFile, MegamaskVariant
from megamask.bench.settings import BenchConfig
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import PacksConfig
from megamask.data.shard_writer import write_sidecar
from megamask.data.shards import Shards
from megamask.entropy.sidecar import SidecarFacts, top_of
from megamask.entropy.source import EntropyConfig
from megamask.masking.entropy import EntropyScoreConfig
from megamask.masking.masker import MaskingConfig
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.runtime import ranks
from megamask.schedules import Schedule
from megamask.teacher.frozen_lm import HiddenStatesFn, MaskedLM
from megamask.teacher.teacher import DistillConfig, Teacher, TeacherConfig

MASKS_PER_TEXT = 4
PLAIN = "plain"
GOALS = {
    "frequency": 1.01, "probe": 1.02, "sidecar": 1.01, "exact, clean": 1.40,
    f"exact, clean, {MASKS_PER_TEXT} masks per text": 1.12,
}  # fmt: skip
"""Goals for the time of a step, as a multiple of a plain one, from base size up."""


def overhead_variants(
    config: BenchConfig, shards: Shards, ds: DsFile, scratch: Path
) -> dict[str, Callable[[], MegamaskVariant]]:
    """What builds a plain run, and one for each source and for a teacher, by its name.

    ``scratch`` is an empty folder for a sidecar.
    """
    preset = config.preset[0]
    plain = PretrainConfig(
        packs=PacksConfig(tokens=config.pack_tokens, length=config.length, per_step=MASKS_PER_TEXT),
        model=config.model(preset, compiled=config.compile),
        masking=MaskingConfig(Schedule(start=config.ratio)),
        seed=0,
    )
    score = MaskingConfig(
        Schedule(start=config.ratio), score="entropy", entropy=EntropyScoreConfig(), random_share=Schedule(start=0.1)
    )
    guided = replace(plain, masking=score)
    clean = EntropyConfig("exact", signal="clean")
    with_shared_pass = replace(guided, packs=replace(plain.packs, masks_per_text=MASKS_PER_TEXT))
    by_teacher = replace(guided, entropy=EntropyConfig("teacher", signal="clean"))
    distilled = replace(plain, distill=DistillConfig(weight=Schedule(start=0.5)))
    beside = annotated(shards, scratch, config.length)
    # the score itself, from a table: what the selection costs is in all of them
    configs = {
        PLAIN: plain,
        "frequency": replace(guided, entropy=EntropyConfig("frequency")),
        "probe": replace(guided, entropy=EntropyConfig("probe")),
        "sidecar": replace(guided, entropy=EntropyConfig("sidecar")),
        "exact, clean": replace(guided, entropy=clean),
        f"exact, clean, {MASKS_PER_TEXT} masks per text": replace(with_shared_pass, entropy=clean),
        "exact, clean, head at 2 x budget": replace(guided, entropy=replace(clean, candidates=2.0)),
        "teacher, clean": by_teacher,
        "distillation": distilled,
    }

    def build(name: str) -> MegamaskVariant:
        run = configs[name]
        taught = run in (by_teacher, distilled)
        teacher = untrained(plain, shards.token_ids, run.distill) if taught else None
        return MegamaskVariant(name, run, beside if name == "sidecar" else shards, ds, teacher)

    return {name: partial(build, name) for name in configs}


def untrained(config: PretrainConfig, ids: TokenIds, distill: DistillConfig) -> Teacher:
    """A teacher of the student's shape."""
    torch.manual_seed(1)
    encoder = Encoder(config.model.shape(ids), replace(config.model, dropout=0.0))
    head = MaskedLMHead(encoder, config.model)
    weight, bias = head.decoder.weight.detach(), head.decoder.bias.detach()
    teacher_config = TeacherConfig("untrained", precision="bf16" if torch.cuda.is_available() else "fp32")
    return Teacher(MaskedLM(HiddenStatesFn(encoder, head), weight, bias, None, Path()), teacher_config, distill, ids)


def annotated(shards: Shards, scratch: Path, length: int) -> Shards:
    """A copy of the shards with a sidecar of entropies: some bytes, for it is the reading that is measured."""

    def write() -> None:
        shutil.copytree(shards.folder, scratch, dirs_exist_ok=True)
        bytes_of = ((np.asarray(part) % 251).astype(np.uint8) for part in Shards.open(scratch, "train").parts)
        facts = SidecarFacts("masked", "shannon", top_of("shannon", shards.token_ids.size), "none", length)
        write_sidecar(scratch, "entropy", "train", bytes_of, facts.record())

    ranks.on_rank_zero(write)
    return Shards.open(scratch, "train")


def overheads_markdown(medians: Mapping[str, Medians], *, by_cpu: bool) -> list[str]:
    """The table: the time of each variant for the same amount of text, as a multiple of the plain one's."""
    speed = {name: of_variant.speed(by_cpu=by_cpu) for name, of_variant in medians.items()}
    lines = ["| variant | tokens/s | time of a plain step | goal, from base size up |", "| --- | ---: | ---: | ---: |"]
    for name, tokens in speed.items():
        goal = f"{GOALS[name]:.2f}" if name in GOALS else ""
        lines.append(f"| {name} | {tokens:,.0f} | {speed[PLAIN] / tokens:.3f} | {goal} |")
    return lines
