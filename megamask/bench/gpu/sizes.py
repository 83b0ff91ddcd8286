"""How large every measurement is: on a GPU, and tiny, to try all of them on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megamask.bench.gpu.settings import GpuBenchConfig
from megamask.bench.settings import BenchConfig
from megamask.data import prepare
from megamask.data.shards import Shards

VOCABULARY = 32_768
"""Tokens of the text that the machine has."""
ModelSize = Literal["tiny", "small", "base", "large", "xl", "xxl"]


@dataclass(frozen=True)
class Sizes:
    """Numbers of everything, elements or tokens unless noted."""

    matrix: int
    """Rows and columns of the matrices of the largest product."""
    copy_bytes: int
    attention_tokens: int
    heads: tuple[tuple[int, int], ...]
    """Number and width."""
    lengths: tuple[int, ...]
    prediction_rows: int
    vocabulary: int
    widths: tuple[int, ...]
    length: int
    """Longest sequence of a pack."""
    rounds: int
    steps: int
    """Steps of a round."""
    ratios: tuple[float, ...]
    """Masked shares at which late [MASK]s are measured."""
    packs: dict[str, int]
    """Tokens of a pack by the size of a model."""
    compared_pack: int
    """Tokens of a pack where variants take turns."""
    run_pack: int
    """Tokens of a pack of the run."""
    compile: bool


FULL = Sizes(
    matrix=8192,
    copy_bytes=2**32,
    attention_tokens=32_768,
    heads=((12, 64), (6, 128)),
    lengths=(128, 256, 512, 1024),
    prediction_rows=8192,
    vocabulary=50_368,
    widths=(768, 1024, 2048),
    length=512,
    rounds=3,
    steps=8,
    ratios=(0.15, 0.3, 0.5),
    packs={"base": 32_768, "large": 32_768, "xl": 16_384},
    compared_pack=16_384,
    run_pack=16_384,
    compile=True,
)
TINY = Sizes(
    matrix=128,
    copy_bytes=2**20,
    attention_tokens=128,
    heads=((2, 16),),
    lengths=(32, 64),
    prediction_rows=64,
    vocabulary=500,
    widths=(32, 64),
    length=32,
    rounds=1,
    steps=1,
    ratios=(0.3,),
    packs={"base": 128, "large": 128, "xl": 128},
    compared_pack=128,
    run_pack=256,
    compile=False,
)


def sizes(config: GpuBenchConfig) -> Sizes:
    """Those of ``config.size``."""
    return FULL if config.size == "full" else TINY


def model_size(config: GpuBenchConfig, size: str) -> Any:
    """The size of the model that a part named ``size`` measures: that one, or tiny."""
    return size if config.size == "full" else "tiny"


def open_text(config: GpuBenchConfig) -> Shards:
    """The shards of ``config.data``, or the text of this machine, which takes a minute the first time."""
    if config.data:
        return Shards.open(config.data)
    tiny = config.size == "tiny"
    return Shards.open(prepare.local_data(prepare.CACHE) if tiny else prepare.local_data(prepare.CACHE, VOCABULARY))


def bench_config(config: GpuBenchConfig, size: str, *, compiled: bool = False) -> BenchConfig:
    """Settings of `megamask bench` for variants that take turns: BERT of ``size``, both sides without dropout.

    ``compiled`` adds compiled variants of both sides, each of which takes a minute to compile.
    """
    chosen = sizes(config)
    return BenchConfig(
        data=config.data,
        preset=("bert",),
        size=model_size(config, size),
        precisions=("bf16",) if config.size == "full" else ("fp32",),
        length=chosen.length,
        pack_tokens=chosen.compared_pack,
        dropout=0.0,
        rounds=chosen.rounds,
        steps=chosen.steps,
        compile=compiled and chosen.compile,
    )
