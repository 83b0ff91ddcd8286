"""A teacher computes what its model computes, from any source and in any packing, or is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megamask.batch import MaskPlan
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.data import tokenizer as tokenizers
from megamask.data.tokenizer_training import train_tokenizer as train_tokenizer
from megamask.engine.ds_file import teacher_ds_problems as file_problems
from megamask.entropy.exact import PURPOSE, measure_entropy
from megamask.entropy.source import AuditConfig, EntropyConfig
from megamask.errors import CheckpointError, ConfigError, DataError
from megamask.errors.setting_rules import settings_problems
from megamask.hf.layer_subset import pick_layers
from megamask.hf.tensor_names import WEIGHTS
from megamask.masking.rng import PackRng
from megamask.model.cross_entropy_and_kl import token_stats
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives.mlm import MLM
from megamask.objectives.objective import ObjectiveConfig, build_objective
from megamask.schedules import Schedule
from megamask.teacher.settings import teacher_problems
from megamask.teacher.teacher import DistillConfig, Teacher, TeacherConfig, TeacherEntropy, join_packs
from tests.batches import pack
from tests.tolerances import assert_close

SIZES = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "max_positions": 64}
FULL = DistillConfig(Schedule(start=0.5))
LENGTHS = [[9, 20, 3], [14, 14, 6], [25, 5]]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def packs(ids):
    """Packs with padding at the end, and plans that hide every third token."""
    batches = [pack(n, padding=4, number=k, seed=k, ids=ids) for k, n in enumerate(LENGTHS)]
    return batches, [plan_of(batch, ids) for batch in batches]


def plan_of(batch, ids) -> MaskPlan:
    targets = batch.maskable.nonzero().squeeze(1)[::3]
    visible = torch.ones_like(batch.maskable).index_fill_(0, targets, False).nonzero().squeeze(1)
    return MaskPlan(batch.tokens.index_fill(0, targets, ids.mask), targets, batch.tokens[targets], targets, visible)


def randomise(model) -> None:
    """Random values in biases and norms too, so that a test notices a missing one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


@pytest.fixture
def student(ids):
    def make(preset="modern", **settings) -> MLM:
        config = ModelConfig(preset, init_std=0.2, **{**SIZES, **settings})
        encoder = Encoder(config.shape(ids), config)
        model = MLM(encoder, MaskedLMHead(encoder, config)).eval()
        randomise(model)
        return model

    return make


@pytest.fixture
def first_weights(tmp_path, tokenizer):
    """Saves an MLM of ours as initial weights; returns the folder."""

    def save(model: MLM, name="first") -> Path:
        folder = tmp_path / name
        tokenizers.load_tokenizer(tokenizer).save(folder / "tokenizer")
        model.encoder.shape.save(folder)
        save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / WEIGHTS)
        return folder

    return save


@pytest.fixture
def theirs(tmp_path, tokenizer, ids):
    """Saves a small model of transformers with the tokenizer; returns folder and model."""

    def save(kind: str, name="theirs", **changes):
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        sizes |= {"max_position_embeddings": 64, "embedding_size": 16}
        if kind == "distilbert":
            sizes = {"n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
        special = {"pad_token_id": ids.pad, "bos_token_id": ids.cls, "eos_token_id": ids.sep}
        special |= {"cls_token_id": ids.cls, "sep_token_id": ids.sep}
        config = CONFIG_MAPPING[kind](
            **{"vocab_size": ids.size, "initializer_range": 0.2, **sizes, **special, **changes}
        )
        model = AutoModelForMaskedLM.from_config(config).eval()
        randomise(model)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save


@pytest.fixture
def load(tokenizer, ids):
    def load(path, distill=FULL, *, length=25, vocab_size=None, **settings) -> Teacher:
        config = TeacherConfig(str(path), **{"precision": "fp32", **settings})
        return Teacher.load(config, distill, tokenizer=tokenizer, ids=ids, length=length, vocab_size=vocab_size)

    return load


def logits_of(soft):
    return F.linear(soft.hidden, soft.weight, soft.bias)


def padded_logits(model, inputs, layout):
    """The logits of transformers' model for every row, each sequence alone."""
    logits = [model(input_ids=part[None]).logits[0] for part in inputs.split(layout.lengths.tolist()) if len(part)]
    return torch.cat(logits)


# ---- soft targets and entropies


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
def test_any_model_of_transformers_gives_packed_the_logits_it_gives_alone(theirs, load, packs, kind):
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


# ---- errors


def test_another_tokenizer_is_refused_with_its_first_difference(student, first_weights, load, ids):
    folder = first_weights(student())
    file = folder / "tokenizer" / "tokenizer.json"
    whole = json.loads(file.read_text())

    def refused(change, sentence):
        content = json.loads(json.dumps(whole))
        change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=sentence):
            load(folder)

    def larger(content):
        content["model"]["vocab"]["xyz"] = ids.size

    def swapped(content):
        words = content["model"]["vocab"]
        words["##q"], words["##z"] = words["##z"], words["##q"]

    first = min(whole["model"]["vocab"][token] for token in ("##q", "##z"))
    refused(
        larger, f"`teacher.path` has a vocabulary of {ids.size + 1} tokens, but data's tokenizer has {ids.size}; both"
    )
    refused(swapped, rf"`teacher.path` has '##[qz]' at the id {first}, but data's tokenizer has '##[qz]'; both must")
    refused(
        lambda content: content["normalizer"]["normalizers"][1].update(lowercase=True),
        r"differ in `normalizer\.normalizers\[1\]\.lowercase`: true in one, false",
    )
    refused(lambda content: content.update(pre_tokenizer={"type": "WhitespaceSplit"}), "differ in `pre_tokenizer")
    refused(
        lambda content: content["model"].update(max_input_chars_per_word=7),
        r"differ in `model\.max_input_chars_per_word`: 7 in one, 100",
    )

    settings = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(whole))
    roles = json.loads(settings.read_text())
    settings.write_text(json.dumps(roles | {"mask_token": "[UNK]"}))
    with pytest.raises(ConfigError, match=r"has the id \d as its mask token, but data's tokenizer has"):
        load(folder)


def test_a_smaller_vocabulary_or_table_is_refused(theirs, load, ids):
    folder, _ = theirs("bert", vocab_size=ids.size - 1)
    with pytest.raises(ConfigError, match=f"has logits for {ids.size - 1} tokens, but its tokenizer has {ids.size}"):
        load(folder)
    train_tokenizer("wordpiece", ["other words of another text"] * 20, size=ids.size - 1).save(folder)
    with pytest.raises(ConfigError, match="has a vocabulary of") as error:
        load(folder)
    assert len(error.value.problems) == 1


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(student, first_weights, load):
    folder = first_weights(student())
    file = str(folder / "tokenizer" / "tokenizer.json")
    backend = Backend.from_file(file)
    backend.enable_truncation(7)
    backend.enable_padding()
    backend.save(file)
    load(folder)


@pytest.mark.parametrize(("kind", "longest"), [("bert", 64), ("roberta", 63), ("distilbert", 64)])
def test_sequences_longer_than_its_positions_are_refused(theirs, load, packs, ids, kind, longest):
    assert ids.pad == 0  # RoBERTa counts from behind it
    folder, _ = theirs(kind)
    teacher = load(folder, length=longest)
    batch = pack([longest], ids=ids)
    teacher.targets([batch], [plan_of(batch, ids)], 0.0)
    with pytest.raises(ConfigError, match=f"`packs.length` must be at most {longest}, the number of positions"):
        load(folder, length=longest + 1)


@pytest.mark.parametrize("kind", ["ours", "bert", "roberta"])
def test_missing_or_corrupt_weights_and_nan_are_sentences(student, first_weights, theirs, load, kind):
    folder = first_weights(student()) if kind == "ours" else theirs(kind)[0]
    file = folder / WEIGHTS
    tensors, whole = load_file(file), file.read_bytes()
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    save_file(tensors | {name: tensors[name] * torch.nan}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{folder} has NaN or Inf in the tensor "):
        load(folder)
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=f"{file} is not a valid safetensors file"):
        load(folder)
    less = {n: t for n, t in tensors.items() if "norm" not in n.lower()}
    save_file(less, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors"):
        load(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load(folder)


def test_folders_that_are_not_models_are_refused(load, tmp_path, run: RunFolder, theirs):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a run of megamask"):
        load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"`teacher.path` must be a folder or the name of a model"):
        load("no/such-model")
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        load(run.path)
    folder, _ = theirs("roberta")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"contains no tokenizer\.json"):
        load(folder)
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "strange", "auto_map": {"AutoModelForMaskedLM": "evil.Evil"}}))
    with pytest.raises(CheckpointError, match=f"transformers cannot load {folder}: "):
        load(folder)


def test_a_corrupt_checkpoint_is_refused(student, first_weights, load, run):
    folder = first_weights(model := student())
    for name in ("shape.json", "tokenizer"):
        (folder / name).rename(run.path / name)
    save_checkpoint(run, 7, {f"weights/{n}": p.detach() for n, p in model.named_parameters()}, {}, keep=3)
    file = next(run.checkpoint(7).glob("*.safetensors"))
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        load(run.path)


def test_a_model_that_ends_in_more_than_a_matrix_is_refused(theirs, load, monkeypatch):
    folder, model = theirs("roberta")
    forward = type(model.lm_head).forward
    monkeypatch.setattr(type(model.lm_head), "forward", lambda self, x: 1.1 * forward(self, x))
    with pytest.raises(ConfigError, match=r"\(roberta\) computes logits that differ by"):
        load(folder)
    monkeypatch.setattr(type(model.lm_head), "forward", lambda self, x: forward(self, x) + self.bias)
    with pytest.raises(ConfigError, match=r"does more at its end than multiply by one matrix and add its bias"):
        load(folder)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(ConfigError, match="has no output embedding that is a single matrix"):
        load(folder)


def test_settings_without_effect_and_out_of_bounds_are_refused(tmp_path):
    off, on = DistillConfig(), DistillConfig(Schedule("ramp", start=0.0, end=1.0, at=0.1, until=0.3), temperature=2.0)
    assert (
        not settings_problems(off, "distill") and not settings_problems(on, "distill") and not off.active and on.active
    )
    assert not settings_problems(TeacherConfig(), "teacher") and not settings_problems(
        TeacherConfig("x", "fp32", None, 4), "teacher"
    )
    said = settings_problems(
        DistillConfig(temperature=2.0, positions="all", reduction="sequence", stored=tmp_path), "distill"
    )
    assert [s.split("`")[1] for s in said] == [
        f"distill.{p}" for p in ("temperature", "positions", "reduction", "stored")
    ]
    said = settings_problems(TeacherConfig(precision="fp32", deepspeed=tmp_path, packs_per_pass=2), "teacher")
    assert [s.split("`")[1] for s in said] == ["teacher.precision", "teacher.deepspeed", "teacher.packs_per_pass"]
    bad = settings_problems(
        DistillConfig(Schedule(start=1.5), temperature=0.0, positions="all", stored=tmp_path), "distill"
    )
    assert {s.split("`")[1] for s in bad} == {"distill.weight.start", "distill.temperature", "distill.positions"}
    assert "`teacher.packs_per_pass` must be at least 1, but is 0." in settings_problems(
        TeacherConfig("x", packs_per_pass=0), "teacher"
    )


def test_sections_that_need_each_other(tmp_path):
    off, on = DistillConfig(), DistillConfig(Schedule(start=0.5))
    stored = dataclasses.replace(on, stored=tmp_path)
    nobody, somebody = TeacherConfig(), TeacherConfig("x")
    none, asked = EntropyConfig(), EntropyConfig("teacher")
    audited = EntropyConfig("probe", audit=AuditConfig(200, fall_back=("teacher",)))
    for sound in (
        (nobody, off, none),
        (somebody, on, none),
        (somebody, off, asked),
        (nobody, stored, none),
        (somebody, stored, audited),
    ):
        assert not teacher_problems(*sound)
    for wrong in (
        (nobody, on, none),
        (nobody, off, asked),
        (nobody, off, audited),
        (somebody, off, none),
        (somebody, stored, none),
    ):
        assert len(teacher_problems(*wrong)) == 1


def test_deepspeed_files_of_a_teacher(tmp_path):
    for name in ("teacher_offload", "teacher_shard"):
        assert not file_problems("teacher.deepspeed", ROOT / "ds_configs" / f"{name}.json")[1]
    wrong = tmp_path / "wrong.json"
    wrong.write_text(
        json.dumps(
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
        )
    )
    said = " ".join(settings_problems(TeacherConfig("x", deepspeed=wrong), "teacher"))
    assert all(word in said for word in ("`bf16`", "needs ZeRO stage 3", "offload_optimizer"))
    with pytest.raises(ConfigError, match="cannot be read"):
        settings_problems(TeacherConfig("x", deepspeed=tmp_path / "none.json"), "teacher")


# ---- a subset of layers as initial weights


@pytest.mark.parametrize("preset", ["bert", "modern"])
@torch.no_grad()
def test_picked_layers_compute_what_they_did(student, packs, preset):
    deep = student(preset, num_layers=6)
    weights = {n: p.detach() for n, p in deep.named_parameters()}
    shape, picked = pick_layers(weights, deep.encoder.shape, (0, 2, 5))
    encoder = Encoder(shape)
    shallow = MLM(encoder, MaskedLMHead(encoder)).eval()
    assert not shallow.load_state_dict(picked, strict=False).unexpected_keys
    assert picked.keys() == dict(shallow.named_parameters()).keys()
    batch = packs[0][0]
    x = deep.encoder.embed(batch.tokens, batch.layout)
    for layer in (0, 2, 5):
        rows = slice(layer, layer + 1)
        final, deep.encoder.final_norm = deep.encoder.final_norm, torch.nn.Identity()
        x = deep.encoder.run(x, batch.layout, rows)
        deep.encoder.final_norm = final
    expected = deep.head.logits(deep.encoder.final_norm(x))
    assert_close(shallow.head.logits(encoder.run(encoder.embed(batch.tokens, batch.layout), batch.layout)), expected)


def test_a_layer_that_becomes_the_first_loses_its_attention_norm(student):
    model = student("modern")
    weights = {n: p.detach() for n, p in model.named_parameters()}
    shape, picked = pick_layers(weights, model.encoder.shape, (0, 1, 2))
    assert shape == model.encoder.shape and picked.keys() == weights.keys()
    shape, picked = pick_layers(weights, shape, (1, 2))
    encoder = Encoder(shape)
    assert picked.keys() == dict(MLM(encoder, MaskedLMHead(encoder)).named_parameters()).keys()


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ((), "`init_layers` must name at least one layer"),
        ((0, 6), r"`init_layers` must name layers from 0 to 5, but is \(0, 6\)"),
        ((-1,), "must name layers from 0 to 5"),
        ((0, 2, 1), "must be in ascending order"),
        ((1, 1), "must be in ascending order"),
        ((0, 2, 3), "puts layer 3, which has global attention, at position 2, which has local attention"),
        ((1,), "puts layer 1, which has local attention, at position 0, which has global attention"),
    ],
)
def test_layers_that_do_not_fit_are_refused(student, layers, sentence):
    model = student("modern", num_layers=6, global_every=3, local_window=8)
    weights = dict(model.named_parameters())
    with pytest.raises(ConfigError, match=sentence):
        pick_layers(weights, model.encoder.shape, layers)
    assert pick_layers(weights, model.encoder.shape, (0, 1, 5, 3)[:3])[0].num_layers == 3
