"""A teacher computes what its model computes, from any source and in any packing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megamask.batch import MaskPlan
from megamask.checkpoint.save import save_checkpoint
from megamask.entropy.exact import PURPOSE, measure_entropy
from megamask.entropy.source import EntropyConfig
from megamask.errors import ConfigError
from megamask.hf.tensor_names import WEIGHTS
from megamask.masking.rng import PackRng
from megamask.model.cross_entropy_and_kl import token_stats
from megamask.objectives.objective import ObjectiveConfig, build_objective
from megamask.schedules import Schedule
from megamask.teacher.teacher import DistillConfig, TeacherEntropy, join_packs
from tests.tolerances import assert_close
from tests.unit.teacher.models import LENGTHS, logits_of, padded_logits


@pytest.mark.parametrize("preset", ["bert", "modern"])
@torch.no_grad()
def test_a_model_as_its_own_teacher_gives_its_own_logits(student, first_weights, load, packs, preset):
    model = student(preset)
    batches, plans = packs
    for soft, batch, plan in zip(load(first_weights(model)).targets(batches, plans, 0.3), batches, plans, strict=True):
        assert soft.share == 0.5 and soft.rows is None
        assert_close(logits_of(soft), model.head.logits(model.represent(batch, plan)))


@torch.no_grad()
def test_a_run_is_the_teacher_of_its_newest_checkpoint(student, first_weights, load, packs, run):
    model, older = student(), student()
    folder = first_weights(model)
    for name in ("shape.json", "tokenizer"):
        (folder / name).rename(run.path / name)
    for step, weights in ((2, older), (7, model)):
        tensors = {f"weights/{n}": p.detach() for n, p in weights.named_parameters()}
        save_checkpoint(run, step, tensors | {"exp_avg/x": torch.zeros(1)}, {}, keep=3)
    teachers = [load(path) for path in (run.path, run.checkpoint(7), run.checkpoint(2))]
    assert teachers[0].fingerprint == teachers[1].fingerprint != teachers[2].fingerprint
    targets = [teacher.targets(*packs, 0.0) for teacher in teachers]
    expected = [model.head.logits(model.represent(batch, plan)) for batch, plan in zip(*packs, strict=True)]
    for newest, same, old, logits in zip(*targets, expected, strict=True):
        assert_close(logits_of(newest), logits)
        assert torch.equal(logits_of(same), logits_of(newest))
        assert not torch.allclose(logits_of(old), logits)


@torch.no_grad()
def test_a_run_of_3ml_can_teach_and_one_of_mae_lm_cannot(student, first_weights, load, packs, run):
    model = student()
    folder = first_weights(model)
    for name in ("shape.json", "tokenizer"):
        (folder / name).rename(run.path / name)

    def publish_run(step: int, config: ObjectiveConfig) -> Path:
        learns = build_objective(config, model.encoder, model.head)
        save_checkpoint(run, step, {f"weights/{n}": p.detach() for n, p in learns.named_parameters()}, {}, keep=4)
        return run.checkpoint(step)

    (batch, *_), (plan, *_) = packs
    (soft,) = load(publish_run(1, ObjectiveConfig("three_ml", depth=1))).targets([batch], [plan], 0.0)
    assert_close(logits_of(soft), model.head.logits(model.represent(batch, plan)))
    for step, config in ((2, ObjectiveConfig("mae_lm")), (3, ObjectiveConfig("three_ml", depth=1, mask_vector="own"))):
        with pytest.raises(ConfigError, match=r"whose encoder has never seen \[MASK\]") as error:
            load(publish_run(step, config))
        assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    "kind", ["bert", "modernbert", "roberta", "distilbert", "albert", "electra", "mpnet", "convbert", "deberta-v2"]
)
@torch.no_grad()
def test_packed_logits_of_any_model_equal_single_ones(theirs, load, packs, kind):
    folder, model = theirs(kind)
    for soft, batch, plan in zip(load(folder).targets(*packs, 0.0), *packs, strict=True):
        expected = padded_logits(model, plan.inputs, batch.layout)[plan.targets]
        assert_close(logits_of(soft).log_softmax(-1), expected.log_softmax(-1))


@torch.no_grad()
def test_a_model_in_several_files_is_the_same_teacher(theirs, load, packs):
    folder, model = theirs("roberta")
    whole = load(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    pieces = load(folder)
    assert pieces.fingerprint == whole.fingerprint
    for a, b in zip(whole.targets(*packs, 0.0), pieces.targets(*packs, 0.0), strict=True):
        assert torch.equal(a.hidden, b.hidden)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@torch.no_grad()
def test_several_packs_per_pass_give_the_results_of_single_packs(theirs, load, packs, kind):
    folder, _ = theirs(kind)
    one, all_at_once = (load(folder, packs_per_pass=sweep) for sweep in (1, 2))
    for a, b in zip(one.targets(*packs, 0.0), all_at_once.targets(*packs, 0.0), strict=True):
        assert_close(b.hidden, a.hidden)
    for signal in ("clean", "masked"):
        entropies = [teacher.entropies(packs[0], signal, 3, "shannon", seed=1) for teacher in (one, all_at_once)]
        for a, b in zip(*entropies, strict=True):
            assert_close(b, a)


@torch.no_grad()
def test_one_padded_batch_gives_the_results_of_length_groups(theirs, load, packs):
    folder, _ = theirs("roberta")
    groups, whole = load(folder), load(folder)
    whole._states._module.one_batch = True
    for a, b in zip(groups.targets(*packs, 0.0), whole.targets(*packs, 0.0), strict=True):
        assert_close(b.hidden, a.hidden)


@pytest.mark.parametrize("measure", ["shannon", "renyi", "min", "margin", "loss"])
@pytest.mark.parametrize("signal", ["clean", "masked"])
@torch.no_grad()
def test_entropies_equal_those_of_the_model(student, first_weights, load, packs, ids, signal, measure):
    model = student()
    batches = packs[0]

    def ask(batch, plan):
        rows = model.head.transform(model.represent(batch, plan))
        return token_stats(rows, model.head.decoder.weight, model.head.decoder.bias, plan.labels).of(measure)

    teacher = load(first_weights(model))
    config = EntropyConfig("teacher", signal, measure, num_passes=3)
    twice = [*batches, dataclasses.replace(batches[0], number=9, source_pack=batches[0].number)]
    entropies = TeacherEntropy(teacher, config, seed=5)(twice)
    assert torch.equal(entropies[-1], entropies[0])
    for batch, entropy in zip(batches, entropies, strict=False):
        expected = measure_entropy(ask, batch, signal, 3, ids.mask, PackRng(5, batch.number, PURPOSE))
        assert_close(entropy, expected)
        assert_close(
            teacher.entropy_at(batch, MaskPlan.hide_nothing(batch), measure), ask(batch, MaskPlan.hide_nothing(batch))
        )


@torch.no_grad()
def test_in_bf16_it_is_the_bf16_model_with_one_copy_of_the_table(student, first_weights, theirs, load, packs):
    model = student()
    for folder in (first_weights(model), theirs("roberta")[0]):
        teacher = load(folder, precision="bf16")
        tables = [p for p in teacher._states._module.parameters() if p.shape == teacher.weight.shape]
        assert [p.data_ptr() for p in tables].count(teacher.weight.data_ptr()) == 1
        assert teacher.weight.dtype == torch.bfloat16 and not any(p.requires_grad for p in tables)
        assert all(soft.hidden.dtype == torch.bfloat16 for soft in teacher.targets(*packs, 0.0))
    teacher = load(first_weights(model, "again"), precision="bf16")
    model = model.bfloat16()
    for soft, batch, plan in zip(teacher.targets(*packs, 0.0), *packs, strict=True):
        assert torch.equal(soft.hidden, model.head.transform(model.represent(batch, plan)))


def test_a_weight_of_0_makes_no_pass(student, first_weights, load, packs):
    distill = DistillConfig(Schedule("step", start=0.0, end=1.0, at=0.5), temperature=2.0)
    teacher = load(first_weights(student()), distill)
    later = teacher.targets(*packs, 0.5)
    assert all(soft.share == 1 and soft.temperature == 2 for soft in later)
    teacher._states = None  # a pass would fail
    assert teacher.targets(*packs, 0.49) == [None] * 3


@pytest.mark.parametrize("positions", ["targets", "all"])
@torch.no_grad()
def test_reductions_equal_those_of_pytorch(student, first_weights, load, packs, positions):
    """The sum that SoftTargets describes, divided by the targets, against kl_div of padded (batch, length, V)."""
    model = student()
    path = first_weights(student(), "other")
    batch, plan = (some[0] for some in packs)
    logits = model.head.logits(model.encoder.run(model.encoder.embed(plan.inputs, batch.layout), batch.layout))
    for reduction in ("token", "sequence"):
        distill = DistillConfig(Schedule(start=1.0), positions=positions, reduction=reduction)
        soft = load(path, distill).targets([batch], [plan], 0.0)[0]
        rows = plan.targets if soft.rows is None else soft.rows
        terms = F.kl_div(
            logits[rows].log_softmax(-1), logits_of(soft).log_softmax(-1), reduction="none", log_target=True
        )
        loss = soft.scale * terms.sum() / len(plan.targets)
        lengths = LENGTHS[0]
        grid = torch.zeros(len(lengths), max(lengths), terms.shape[1])
        grid[batch.layout.sequence[rows], batch.layout.offset[rows]] = terms
        assert set(rows.tolist()) == set(plan.targets.tolist() if positions == "targets" else range(sum(lengths)))
        expected = grid.sum() / (len(rows) if reduction == "token" else len(lengths))
        assert_close(loss, expected)


@torch.no_grad()
def test_the_teachers_table_is_resized_to_the_students(theirs, load, packs, ids):
    folder, model = theirs("bert", vocab_size=ids.size + 6)
    cut, whole, wider = (load(folder, vocab_size=size) for size in (None, ids.size + 6, ids.size + 10))
    batch, plan = (some[0] for some in packs)
    expected = padded_logits(model, plan.inputs, batch.layout)[plan.targets]
    logits = [logits_of(teacher.targets([batch], [plan], 0.0)[0]) for teacher in (cut, whole, wider)]
    assert_close(logits[0], expected[:, : ids.size])
    assert_close(logits[1], expected)
    assert_close(logits[2].softmax(-1), F.pad(expected.softmax(-1), (0, 4)))
    assert torch.equal(logits[2].softmax(-1)[:, -4:], torch.zeros(len(expected), 4))


def test_joined_layouts_keep_lengths_and_offsets(packs):
    layouts = [batch.layout for batch in packs[0]]
    joined, begins = join_packs(layouts)
    assert begins == [0, layouts[0].rows, layouts[0].rows + layouts[1].rows]
    assert [n for n in joined.lengths.tolist() if n] == [n for each in layouts for n in each.lengths.tolist() if n]
    assert torch.equal(joined.offset, torch.cat([each.offset for each in layouts]))
