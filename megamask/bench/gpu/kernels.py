"""Ceilings of the device, attention in its two forms, and the statistics kernel beside eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megamask.batch import Layout
from megamask.bench.gpu.figures import NEEDS_CUDA, Figure
from megamask.bench.gpu.goals import BESIDE_EAGER, ENTROPY_ERROR
from megamask.bench.gpu.settings import GpuBenchConfig
from megamask.bench.gpu.sizes import Sizes, sizes
from megamask.bench.gpu.timing import Measurement, PeakMemory, each, seconds_of
from megamask.model.attention import QueryKeyLayout, attend
from megamask.model.shape import Backend
from megamask.model.statistics import token_stats
from megamask.runtime import ranks

CHECKED_ROWS = 512
"""Rows that are compared with 64 bits."""


def matmul_rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """FLOP/s of a product of random matrices; zeros would be faster."""
    first, second = (
        torch.randn(n, m, device=ranks.device(), dtype=dtype) for n, m in ((rows, inner), (inner, columns))
    )
    result = torch.empty(rows, columns, device=ranks.device(), dtype=dtype)
    return 2.0 * rows * inner * columns / seconds_of(lambda: torch.mm(first, second, out=result))


def ceilings(config: GpuBenchConfig) -> Iterator[Figure]:
    """Rates of large matrix products and of copies. fp32 is without TF32, as training computes it."""
    chosen = sizes(config)
    n, tokens = chosen.matrix, chosen.packs["base"]
    shapes = {"bf16": (n, n, n, torch.bfloat16), "fp32": (n, n, n, torch.float32)}
    if config.size == "full":
        shapes |= {
            f"bf16, feed-forward block of {size}": (tokens, width, 4 * width, torch.bfloat16)
            for size, width in (("base", 768), ("large", 1024), ("xl", 2048))
        }
    products: list[Measurement] = [
        (f"matmul {name}", partial(_product, f"matmul {name}", *shape)) for name, shape in shapes.items()
    ]
    yield from each([*products, ("copies", partial(_copies, chosen.copy_bytes))])


def _product(name: str, rows: int, inner: int, columns: int, dtype: torch.dtype) -> Iterator[Figure]:
    yield Figure(name, matmul_rate(rows, inner, columns, dtype), "FLOP/s", {"shape": [rows, inner, columns]})


def _copies(size: int) -> Iterator[Figure]:
    device = ranks.device()
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source))
    yield Figure("copy on the device", 2 * size / seconds, "B/s", {"bytes": size, "counted": "read and written"})
    if device.type != "cuda":
        yield Figure("copy from the host, pinned", error=NEEDS_CUDA)
        return
    pinned = torch.ones(size // 4, dtype=torch.uint8).pin_memory()
    seconds = seconds_of(lambda: target[: size // 4].copy_(pinned, non_blocking=True))
    yield Figure("copy from the host, pinned", size // 4 / seconds, "B/s", {"bytes": size // 4})


# ---- attention


def attention_backends(config: GpuBenchConfig) -> Iterator[Figure]:
    """A forward and a backward pass of `varlen` beside `padded`, for full sequences and for mixed lengths."""
    chosen = sizes(config)
    yield from each(
        (name, partial(_attention, name, _lengths(chosen, length, mixed), heads, width))
        for heads, width in chosen.heads
        for length in chosen.lengths
        for mixed in (False, True)
        for name in [f"heads of {width}, {'mixed lengths to' if mixed else 'length'} {length}"]
    )
    heads, width = chosen.heads[0]
    length = chosen.lengths[-1]
    name = f"heads of {width}, length {length}, window of {length // 8} to each side"
    yield from each([(name, partial(_windowed, name, _lengths(chosen, length, False), heads, width, length // 8))])


def _lengths(chosen: Sizes, length: int, mixed: bool) -> Layout:
    """Sequences that fill the tokens: all of ``length``, or drawn evenly from 1 to ``length``."""
    tokens, draws = chosen.attention_tokens, torch.Generator().manual_seed(0)
    lengths = torch.full((tokens // length,), length)
    if mixed:
        drawn = torch.randint(1, length + 1, (4 * tokens // length + 4,), generator=draws)
        lengths = drawn[: int((drawn.cumsum(0) < tokens).sum())]
        lengths = torch.cat([lengths, (tokens - lengths.sum())[None].clamp(max=length)])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Layout.of(ends, int(ends[-1]), length)


def _both_passes(layout: Layout, heads: int, width: int, backend: Backend, window: int | None = None) -> float:
    """Seconds; what follows from the layout is computed before, as once for all layers of a step."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    shape, device = (layout.rows, heads, width), ranks.device()
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    queries, upstream = QueryKeyLayout(layout.to(device)), torch.randn_like(q)

    def work() -> None:
        torch.autograd.grad(attend(q, k, v, queries, backend, window=window), (q, k, v), upstream)

    return seconds_of(work)


def _attention(name: str, layout: Layout, heads: int, width: int) -> Iterator[Figure]:
    flops = 14.0 * heads * width * float(layout.lengths.double().square().sum())  # 4 forward, 10 backward
    setting = {"tokens": layout.rows, "heads": heads, "flops": flops}
    padded = _both_passes(layout, heads, width, "padded")
    yield Figure(f"padded, {name}", padded, "s", setting)
    if not torch.cuda.is_available():
        yield Figure(f"varlen, {name}", error=NEEDS_CUDA)
        return
    varlen = _both_passes(layout, heads, width, "varlen")
    yield Figure(f"varlen, {name}", varlen, "s", setting)
    yield Figure(f"varlen, {name}, rate", flops / varlen, "FLOP/s")
    yield Figure(f"padded / varlen, {name}", padded / varlen, "x")


def _windowed(name: str, layout: Layout, heads: int, width: int, window: int) -> Iterator[Figure]:
    """The back end that training would choose for layers with local attention."""
    seconds = _both_passes(layout, heads, width, "auto", window)
    yield Figure(f"auto, {name}", seconds, "s", {"tokens": layout.rows, "heads": heads})


# ---- statistics of predictions


def prediction_statistics(config: GpuBenchConfig) -> Iterator[Figure]:
    """`token_stats`, on CUDA the Triton kernel, beside eager PyTorch with whole logits in 32 bits."""
    chosen = sizes(config)
    yield from each((f"width {width}", partial(_statistics, chosen, width)) for width in chosen.widths)


def eager_statistics(rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and log-probability of the label in the precision of ``bias``, with tensors of rows by tokens."""
    log_probs = torch.log_softmax((rows @ weight.t()).to(bias.dtype) + bias, -1)
    return -(log_probs.exp() * log_probs).sum(-1), log_probs.gather(1, labels[:, None]).squeeze(1)


@torch.no_grad()
def _statistics(chosen: Sizes, width: int) -> Iterator[Figure]:
    device = ranks.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    count, tokens = chosen.prediction_rows, chosen.vocabulary
    rows = (3 * torch.randn(count, width, device=device)).to(dtype)
    weight = (torch.randn(tokens, width, device=device) / width**0.5).to(dtype)
    bias, labels = torch.randn(tokens, device=device), torch.randint(tokens, (count,), device=device)
    setting = {"rows": count, "tokens": tokens, "precision": str(dtype).removeprefix("torch.")}
    taken: dict[str, float] = {}
    forms: dict[str, Callable[..., object]] = {"token_stats": token_stats, "eager": eager_statistics}
    for name, form in forms.items():
        taken[name] = seconds_of(partial(form, rows, weight, bias, labels), repeats=10)
        yield Figure(f"{name}, width {width}", taken[name], "s", setting)
        with PeakMemory() as peak:
            form(rows, weight, bias, labels)
        yield peak.figure(f"{name}, width {width}, extra memory")
    yield Figure(f"{BESIDE_EAGER}, width {width}", taken["eager"] / taken["token_stats"], "x", setting)
    some = (rows[:CHECKED_ROWS], weight, bias, labels[:CHECKED_ROWS])
    exact, _ = eager_statistics(some[0].double(), weight.double(), bias.double(), some[3])
    error = (token_stats(*some).entropy.double() - exact).abs().max().item()
    yield Figure(f"token_stats, width {width}, {ENTROPY_ERROR}", error, "nats", {"rows": CHECKED_ROWS})
