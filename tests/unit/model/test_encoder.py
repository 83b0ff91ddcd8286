"""What an encoder of packed rows is, as relations: a sequence does not know its neighbours."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from megamask.batch import Layout
from megamask.errors.setting_rules import settings_problems
from megamask.model import attention
from megamask.model.attention import QueryKeyLayout, attend
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives.mlm import MLM
from tests.batches import IDS, pack
from tests.tolerances import assert_close
from tests.unit.model.models import PRESETS, config, objective, plan

LENGTHS = [17, 3, 1, 64, 9, 33, 2]
BACKENDS = ["reference", "padded"]
LOCAL = {"global_every": 3, "local_window": 8}
KINDS = [("bert", {}), ("modern", {}), ("modern", LOCAL)]


def states(model, tokens, layout):
    return model.encoder.run(model.encoder.embed(tokens, layout), layout)


def gradients(model, batch):
    model.zero_grad()
    losses = model(batch, plan(batch))
    losses.total.backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset, settings", KINDS)
def test_a_sequence_alone_equals_the_sequence_in_a_pack(preset, settings, backend):
    model = objective(preset, attention=backend, **settings)
    batch = pack(LENGTHS, padding=5)
    together = states(model, batch.tokens, batch.layout)
    ends = batch.layout.cu_seqlens.unique().tolist()
    for start, end in itertools.pairwise(ends):
        rows = slice(start, end)
        layout = Layout(torch.tensor([0, end - start], dtype=torch.int32), 64, batch.layout.positions[rows])
        assert_close(together[rows], states(model, batch.tokens[rows], layout))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 0, 5])
@pytest.mark.parametrize("lengths, padding", [(LENGTHS, 5), ([16, 16, 16], 0)])
def test_attention_back_ends_agree_with_the_reference_in_value_and_gradients(lengths, padding, window, dtype):
    layout = QueryKeyLayout(pack(lengths, padding=padding).layout)
    assert layout.key_grids.is_dense == (padding == 0)
    exact = [torch.randn(layout.keys.rows, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs = [t.detach().to(dtype).requires_grad_() for t in exact]
    expected = attend(*exact, layout, "reference", window=window)
    outputs = attend(*inputs, layout, "padded", window=window)
    assert outputs.dtype == dtype
    assert_close(outputs, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, exact, upstream)
    for gradient, want in zip(torch.autograd.grad(outputs, inputs, upstream.to(dtype)), wanted, strict=True):
        assert_close(gradient, want)


@pytest.mark.parametrize("backend", ["reference", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_subset_of_queries_gets_the_same_outputs(backend, dtype, share):
    layout = pack(LENGTHS, padding=5).layout
    rows = (torch.rand(layout.rows) < share).nonzero().squeeze(1)
    q, k, v = exact = [torch.randn(layout.rows, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = attend(q, k, v, QueryKeyLayout(layout), "reference")[rows]
    inputs = [t.detach().to(dtype).requires_grad_() for t in exact]
    outputs = attend(inputs[0][rows], *inputs[1:], QueryKeyLayout(layout, rows), backend)
    assert_close(outputs, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, exact, upstream)
    for gradient, want in zip(torch.autograd.grad(outputs, inputs, upstream.to(dtype)), wanted, strict=True):
        assert_close(gradient, want)


def test_attention_in_bf16_keeps_32_bits_on_a_cpu_that_does_not_multiply_in_bf16(monkeypatch):
    layout = QueryKeyLayout(pack(LENGTHS, padding=5).layout)
    inputs = [torch.randn(layout.keys.rows, 4, 8, dtype=torch.bfloat16) for _ in range(3)]
    expected = attend(*(x.float() for x in inputs), layout, "padded").bfloat16()
    monkeypatch.setattr(attention, "_multiplies_in_bf16", lambda: False)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(attend(*inputs, layout, "padded"), expected)
    monkeypatch.setattr(attention, "_multiplies_in_bf16", lambda: True)
    assert not torch.equal(attend(*inputs, layout, "padded"), expected)


def test_the_reference_is_softmax_attention():
    q, k, v = (torch.randn(6, 2, 4, dtype=torch.float64) for _ in range(3))
    layout = Layout.of(torch.tensor([0, 6]), 6, 6)
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)))
    assert_close(attend(q, k, v, QueryKeyLayout(layout), "reference"), expected.transpose(0, 1))


@pytest.mark.parametrize("preset, settings", KINDS)
def test_rows_left_out_keep_their_positions(preset, settings):
    """Leaving out the last rows of every sequence is the same as never having had them."""
    model = objective(preset, **settings)
    long, short = pack([20, 30]), pack([12, 12])
    rows = torch.cat([torch.arange(12), 20 + torch.arange(12)])
    layout = long.layout.keep(rows)
    assert torch.equal(layout.positions, short.layout.positions)
    tokens = long.tokens[rows]
    assert_close(states(model, tokens, layout), states(model, tokens, short.layout))


@pytest.mark.parametrize("preset", PRESETS)
def test_positions_matter(preset):
    model = objective(preset)
    batch = pack([9])
    moved = dataclasses.replace(batch.layout, positions=batch.layout.positions.flip(0))
    assert not torch.allclose(states(model, batch.tokens, batch.layout), states(model, batch.tokens, moved))


@pytest.mark.parametrize("preset, settings", KINDS)
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_run_in_two_parts_is_the_run(preset, settings, cut):
    model, batch = objective(preset, **settings), pack(LENGTHS)
    x = model.encoder.embed(batch.tokens, batch.layout)
    below = model.encoder.run(x, batch.layout, slice(0, cut))
    above = model.encoder.run(below, batch.layout, slice(cut, None))
    assert torch.equal(above, states(model, batch.tokens, batch.layout))


@pytest.mark.parametrize("preset, settings", KINDS)
def test_activation_checkpointing_changes_nothing(preset, settings):
    batch = pack(LENGTHS)
    losses, wanted = gradients(objective(preset, **settings), batch)
    loss, grads = gradients(objective(preset, activation_checkpointing=True, **settings), batch)
    assert torch.equal(loss.total, losses.total)
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


def test_activation_checkpointing_drops_the_same_values_again():
    model = objective("bert", dropout=0.5)
    batch = pack(LENGTHS)
    torch.manual_seed(1)
    _, wanted = gradients(model, batch)
    wanted = {name: grad.clone() for name, grad in wanted.items()}
    model.encoder.checkpointing = True
    torch.manual_seed(1)
    _, grads = gradients(model, batch)
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_compilation_changes_nothing(preset):
    batch = pack(LENGTHS)
    losses, wanted = gradients(objective(preset, dtype=torch.float32), batch)
    loss, grads = gradients(objective(preset, dtype=torch.float32, compile=True), batch)
    assert_close(loss.total, losses.total)
    for name in wanted:
        assert_close(grads[name], wanted[name])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_16_bits_are_close_to_32(preset, autocast):
    batch = pack(LENGTHS)
    expected, wanted = gradients(objective(preset, dtype=torch.float32, init_std=0.05), batch)
    model = objective(preset, dtype=torch.float32 if autocast else torch.bfloat16, init_std=0.05)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, grads = gradients(model, batch)
    assert_close(total.nll, expected.nll, torch.bfloat16)
    for name in wanted:
        scale = wanted[name].abs().max()
        assert_close(grads[name] / scale, wanted[name] / scale, torch.bfloat16)


@pytest.mark.parametrize("preset", PRESETS)
def test_dropout_acts_only_in_training(preset):
    model, batch = objective(preset, dropout=0.5), pack(LENGTHS)
    assert not torch.equal(states(model, batch.tokens, batch.layout), states(model, batch.tokens, batch.layout))
    model.eval()
    assert torch.equal(states(model, batch.tokens, batch.layout), states(model, batch.tokens, batch.layout))


SIZES_IN_MILLIONS = {"base": 110, "large": 340, "xl": 1300, "xxl": 3900}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size, millions", SIZES_IN_MILLIONS.items())
def test_sizes_have_the_number_of_parameters_they_are_known_by(preset, size, millions):
    chosen = ModelConfig(preset=preset, size=size)
    with torch.device("meta"):
        encoder = Encoder(chosen.shape(dataclasses.replace(IDS, size=30_522)), chosen)
        model = MLM(encoder, MaskedLMHead(encoder, chosen))
    # two digits, which is how the literature names them
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("preset", PRESETS)
def test_initial_predictions_are_near_uniform(preset):
    chosen = config(preset)
    encoder = Encoder(chosen.shape(IDS), chosen)
    batch = pack(LENGTHS)
    nll = MLM(encoder, MaskedLMHead(encoder, chosen))(batch, plan(batch)).nll
    assert nll.mean().item() == pytest.approx(torch.tensor(IDS.size).log().item(), rel=0.05)


def test_few_parameter_tensors_and_no_buffers():
    modern, bert = objective("modern"), objective("bert")
    assert not list(modern.buffers()) and not list(bert.buffers())
    assert len(list(modern.encoder.layers[1].parameters())) == 6
    assert modern.head.decoder.weight is modern.encoder.embedding.tokens.weight
    # what weight decay must leave alone is what has less than two dimensions
    small = {name for name, p in bert.named_parameters() if p.ndim < 2}
    assert small == {name for name, _ in bert.named_parameters() if "norm" in name or name.endswith("bias")}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_used_only_in_calls_of_their_own_module(preset):
    """ZeRO-3 gathers a parameter in the hooks of its module's call; outside, it is empty."""
    model, batch = objective(preset), pack(LENGTHS)
    kept = {}

    def gather(module, _):
        for name, p in module.named_parameters(recurse=False):
            p.data = kept[module, name]

    def release(module, *_):
        for p in module.parameters(recurse=False):
            p.data = p.data.new_empty(0)

    expected = model(batch, plan(batch)).total.item()
    for module in model.modules():
        kept |= {(module, name): p.data for name, p in module.named_parameters(recurse=False)}
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    for module in model.modules():
        release(module)
    with torch.no_grad():
        assert model(batch, plan(batch)).total.item() == expected
        assert model.entropy(batch).isfinite().all()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"num_layers": 0}, "`model.num_layers` must lie in [1, 4096], but is 0."),
        ({"hidden_size": 2**30}, "`model.hidden_size` must lie in [1, 2**20], but is 1073741824."),
        (
            {"hidden_size": 100},
            "`model.hidden_size` must be divisible by 64, but is 100. Or set `model.num_heads` too.",
        ),
        (
            {"hidden_size": 128, "num_heads": 3},
            "`model.hidden_size` must be divisible by `model.num_heads` (3), but is 128.",
        ),
        ({"dropout": 1.0}, "`model.dropout` must lie in [0, 1), but is 1.0."),
        ({"init_std": 0.0}, "`model.init_std` must lie in (0, 1), but is 0.0."),
        ({"global_every": 3, "local_window": 7}, "`model.local_window` must be at least 2 and even, but is 7."),
        (
            {"preset": "bert", "global_every": 3},
            "`model.global_every` has no effect with `model.preset` 'bert', only with 'modern'. "
            "Remove it or change `model.preset`.",
        ),
        (
            {"dropout": 0.1, "attention": "varlen"},
            "`model.dropout` must be 0 when `model.attention` is 'varlen', but is 0.1.",
        ),
    ],
)
def test_a_wrong_setting_is_named(settings, sentence):
    assert settings_problems(ModelConfig(**settings), "model") == [sentence]


def test_all_wrong_settings_are_named_at_once():
    config = ModelConfig(num_layers=0, num_heads=0, dropout=2.0, init_std=-1.0, local_window=3)
    assert len(settings_problems(config, "model")) == 6


def test_every_size_of_every_preset_is_in_order():
    for preset in PRESETS:
        for size in ("tiny", "small", "base", "large", "xl", "xxl"):
            assert settings_problems(ModelConfig(preset=preset, size=size), "model") == []
