"""Gradients that are sums over many rows are as good in 16 bits as the 16 bits that hold them."""

from __future__ import annotations

import pytest
import torch

from megamask.model.sums import LayerNorm, Table
from tests.tolerances import assert_close

ROWS = 4096


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradients_of_a_norm_over_many_rows(bias):
    norm = LayerNorm(8, bias=bias)
    exact = torch.nn.LayerNorm(8, bias=bias)
    inputs = torch.randn(ROWS, 8).bfloat16()
    upstream = (torch.randn(ROWS, 8) + 0.5).bfloat16()  # not centred: a sum that grows with the rows
    outputs = norm.bfloat16()(inputs)
    expected = exact(inputs.float())
    assert_close(outputs, expected)
    outputs.backward(upstream)
    expected.backward(upstream.float())
    for one, other in zip(norm.parameters(), exact.parameters(), strict=True):
        assert one.grad.dtype == torch.bfloat16
        assert_close(one.grad / ROWS, other.grad / ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_a_row_looked_up_many_times(dtype):
    table = Table(5, 8).to(dtype)
    ids = torch.randint(3, (ROWS,))  # and two rows that are never looked up
    upstream = (torch.randn(ROWS, 8) + 0.5).to(dtype)
    outputs = table(ids)
    assert torch.equal(outputs, table.weight[ids])
    outputs.backward(upstream)
    expected = torch.zeros(5, 8).index_add_(0, ids, upstream.float())
    assert_close(table.weight.grad / ROWS, expected / ROWS)
    assert (table.weight.grad[3:] == 0).all()
