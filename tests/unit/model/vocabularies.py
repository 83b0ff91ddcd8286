"""Small predictions for tests, and a counter of what is built from them."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamask.batch import Measure

MEASURES = get_args(Measure)
WIDTH = 8
# logits of a block and of a piece, for 101 tokens
SIZES = [(1, 1), (101 * 4, 101), (101 * 5, 101 * 2), (10**9, 10**9)]


def problem(rows=13, tokens=101, shift=0.0, dtype=torch.float64, width=WIDTH):
    """Rows, weight, bias and labels; the logits have a standard deviation of about 6."""
    bias = shift + torch.randn(tokens)
    inputs = 2 * torch.randn(rows, width), torch.randn(tokens, width), bias
    labels = torch.randint(tokens, (rows,))
    return *(t.to(dtype).requires_grad_() for t in inputs), labels


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor had that was made; views and what is written in place are not made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        had = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *(t.numel() for t in made if t.untyped_storage().data_ptr() not in had)])
        return result
