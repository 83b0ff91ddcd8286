"""Whether the copies of a tensor on several ranks are the same bit for bit. A bit that flips in a memory is found here.

Costs one reading of the tensors on the device and one all-reduce of two numbers for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from jaxtyping import Int64
from torch import Tensor

from megamask.errors import WeightsDivergedError
from megamask.runtime import ranks


@torch.no_grad()
def check_replicas(tensors: Mapping[str, Tensor], steps: int) -> None:
    """Compare ``tensors``, which should be the same on all ranks, after ``steps`` optimizer steps. Collective.

    Raises WeightsDivergedError, on all ranks, if one rank differs. With more than two ranks the error names it.
    """
    sums = torch.stack([_sum_of_bits(tensor) for tensor in tensors.values()])
    maxima = ranks.maximum(torch.cat([sums, ~sums]))  # the maximum of ~x is ~ of the minimum of x
    differs = maxima[: len(sums)] != ~maxima[len(sums) :]
    if not differs.any():
        return
    by_rank = ranks.gather(sums[differs].tolist())
    majority = [Counter(column).most_common(1)[0][0] for column in zip(*by_rank, strict=True)]
    wrong = [str(rank) for rank, values in enumerate(by_rank) if values != majority]
    culprits = " ".join(wrong) if ranks.world() > 2 else "0 or 1"
    names = [name for name, different in zip(tensors, differs.tolist(), strict=True) if different]
    raise WeightsDivergedError(
        f"After {steps} optimizer steps {', '.join(names[:3])} ({len(names)} tensors in all) are not the same on all "
        f"ranks; rank {culprits} is at fault. Its memory or device is unreliable: exclude that machine and run the "
        "same command again. It resumes from the newest checkpoint."
    )


def _sum_of_bits(tensor: Tensor) -> Int64[Tensor, ""]:
    """The bits of ``tensor`` as integers, added up modulo 2^64: any single flipped bit changes the sum."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    even = len(data) // 8 * 8
    return data[:even].view(torch.int64).sum() + data[even:].sum(dtype=torch.int64)
