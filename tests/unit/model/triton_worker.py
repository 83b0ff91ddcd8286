"""Runs the kernel in Triton's interpreter, or compiles it, in a process of its own: the choice is made at import.

triton_worker.py interpret INPUTS OUTPUTS    tensors `<case>/<name>` in, statistics `<case>/<name>` out
triton_worker.py compile                     prints the registers spilled, by bytes of the inputs and capability
"""

from __future__ import annotations

import sys

import triton
from safetensors.torch import load_file, save_file
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megamask.model import kernels

SMALL = (16, 32, 16, 4, 2)  # many tiles of few numbers


def interpret(inputs: str, outputs: str) -> None:
    tensors, results = load_file(inputs), {}
    for case in sorted({name.split("/")[0] for name in tensors}):
        rows, weight, bias, labels, shares = (
            tensors[f"{case}/{name}"] for name in ("rows", "weight", "bias", "labels", "shares")
        )
        stats = kernels.fused_token_stats(rows, weight, bias, labels, SMALL, int(shares))
        results |= {f"{case}/{name}": value.contiguous() for name, value in stats._asdict().items()}
    save_file(results, outputs)


def build() -> None:
    arguments = ("rows", "weight", "bias", "labels", "kept", "m", "v", "d", "share", "ROWS", "TOKENS", "WIDTH")
    for itemsize, dtype in (2, "bf16"), (4, "fp32"):
        *sizes, warps, stages = kernels.TILES[itemsize]
        kinds = (f"*{dtype}", f"*{dtype}", "*fp32", "*i64", "*fp32", *["i32"] * 4, *["constexpr"] * 3)
        constants = dict(zip(arguments[-3:], sizes, strict=True))
        aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 7)}
        source = ASTSource(kernels._sum_up, dict(zip(arguments, kinds, strict=True)), constants, aligned)
        for capability in 80, 90:
            built = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
            )
            print(itemsize, capability, built.asm["cubin"][:4])


if __name__ == "__main__":
    interpret(*sys.argv[2:]) if sys.argv[1] == "interpret" else build()
