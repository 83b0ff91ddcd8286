"""Attention without padding on a real GPU: all rows ask, or only some; and the objectives that leave rows out."""

from __future__ import annotations

import pytest
import torch

from megamask.model.attention import QueryKeyLayout, attend
from tests.batches import pack
from tests.tolerances import assert_close
from tests.unit.objectives.test_visible_tokens import LATE, corrupted, gradients, late

pytestmark = pytest.mark.gpu

LENGTHS = [130, 1, 33, 64, 260]


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", ["padded", "varlen"])
def test_packed_attention_equals_the_reference(backend, share):
    layout = pack(LENGTHS, padding=24).layout.to("cuda")
    rows = torch.arange(layout.rows, device="cuda")
    queries = QueryKeyLayout(layout)
    if share is not None:
        rows = rows[torch.rand(layout.rows, device="cuda") < share]
        queries = QueryKeyLayout(layout, rows)
    exact = [torch.randn(layout.rows, 4, 32, dtype=torch.float64, device="cuda", requires_grad=True) for _ in range(3)]
    expected = attend(*exact, QueryKeyLayout(layout), "reference")[rows]
    inputs = [t.detach().bfloat16().requires_grad_() for t in exact]
    outputs = attend(inputs[0][rows], *inputs[1:], queries, backend)
    assert_close(outputs, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, exact, upstream)
    for gradient, want in zip(torch.autograd.grad(outputs, inputs, upstream.bfloat16()), wanted, strict=True):
        assert_close(gradient, want)


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_masks_that_enter_late_are_the_same_without_padding(preset, name):
    batch = pack([17, 3, 40, 9], padding=4)
    plan_of_batch = corrupted(batch)
    wanted = gradients(late(LATE[name], preset), batch, plan_of_batch)
    model = late(LATE[name], preset, attention="varlen").bfloat16().cuda()
    grads = gradients(model, batch.to("cuda"), plan_of_batch.to("cuda"))
    for tensor, want in wanted.items():
        scale = want.abs().max().clamp(min=1e-12)
        assert_close(grads[tensor].cpu().double() / scale, want / scale, torch.bfloat16)
