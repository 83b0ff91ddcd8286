"""Stored entropies and samples equal those of the teacher, whatever the number of processes or kills."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from megamask import annotate
from megamask.__main__ import main
from megamask.annotate import LARGEST, EntropyAnnotation, SampleAnnotation, store_entropies, store_targets, window_batch
from megamask.batch import Layout, MaskPlan, PackedBatch, SoftTargets
from megamask.config import predetermined_masks
from megamask.config.checks import config_problems
from megamask.config.pretrain_config import PacksConfig, PretrainConfig
from megamask.data import index, shard_writer
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.data.tokenizer import SPECIAL, Tokenizer
from megamask.entropy.exact import PURPOSE, measure_entropy
from megamask.entropy.sidecar import StoredEntropy, sidecar_facts_of, top_of
from megamask.errors import CheckpointError, ConfigError, DataError
from megamask.hf.tensor_names import WEIGHTS
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.model.cross_entropy_and_kl import token_stats
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives.mlm import MLM
from megamask.runtime.progress_bar import ProgressBar
from megamask.schedules import Schedule
from megamask.storage import file_list
from megamask.storage import resumable as parts
from megamask.teacher import stored_targets
from megamask.teacher.stored_targets import StoredTargets, count_tokens
from megamask.teacher.teacher import DistillConfig, Teacher, TeacherConfig

LENGTHS = [31, 7, 50, 3, 90, 12, 25, 40, 1, 18, 22, 70]
SIZE, LENGTH = 60, 32
SPLITS = ("train", "valid")


def tokenizer() -> Tokenizer:
    words = [f"w{n}" for n in range(len(SPECIAL), SIZE)]
    backend = Backend(models.WordPiece({w: n for n, w in enumerate([*SPECIAL, *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Two shards of random documents with an [UNK] here and there, and parts so small that there are several."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    units = {
        split: [shard_writer.EncodedDocuments(rng.integers(1, SIZE, sum(n)), np.array(n)) for n in some]
        for split, some in (("train", (LENGTHS[:6], LENGTHS[6:])), ("valid", ([20, 9, 33],)))
    }
    for some in units.values():
        for tokens, *_ in some:
            tokens[(tokens > 1) & (tokens < len(SPECIAL))] = 7
    shard_writer.write_shards(folder, tokenizer(), units, facts={}, shard_tokens=100)
    monkeypatch.setattr(annotate, "ROWS", 64)
    monkeypatch.setattr(annotate, "PARTS", 3)
    return folder


@pytest.fixture
def model() -> MLM:
    config = ModelConfig("modern", num_layers=2, hidden_size=24, num_heads=2, intermediate_size=32, init_std=0.3)
    ids = shard_writer.token_ids(tokenizer())
    encoder = Encoder(config.shape(ids), config)
    return MLM(encoder, MaskedLMHead(encoder, config)).eval()


@pytest.fixture
def teacher(tmp_path, model) -> Path:
    folder = tmp_path / "teacher"
    tokenizer().save(folder / "tokenizer")
    model.encoder.shape.save(folder)
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / WEIGHTS)
    return folder


@pytest.fixture
def config(data, teacher) -> EntropyAnnotation:
    return EntropyAnnotation(data, str(teacher), length=LENGTH, precision="fp32", workers=1)


def entropy_of(model: MLM, batch, plan, measure="shannon"):
    rows = model.head.transform(model.represent(batch, plan))
    return token_stats(rows, model.head.decoder.weight, model.head.decoder.bias, plan.labels).of(measure)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.entropy.*"))}


def assert_codes(codes, nats, top) -> None:
    """Bytes are the nats rounded; a hair's breadth of rounding in the nats may tip a byte that stands on the edge."""
    exact = 255 * (nats.double() / top).clamp(0, 1)
    assert (codes.double() - exact).abs().max() < 0.5 + 1e-3


# ---- entropies


@pytest.mark.parametrize("measure", ["shannon", "margin"])
@torch.no_grad()
def test_each_token_is_scored_within_its_piece(config, data, model, measure):
    store_entropies(dataclasses.replace(config, signal="clean", measure=measure, num_passes=4))
    top = top_of(measure, SIZE)
    for split in SPLITS:
        shards = Shards.open(data, split, verify=True)
        for tokens, offsets, codes in zip(shards.parts, shards.offsets(), shards.sidecar("entropy"), strict=True):
            for begin, end in pairwise(offsets):
                for at in range(begin, end, LENGTH - 2):
                    some = slice(at, min(end, at + LENGTH - 2))
                    piece = torch.from_numpy(tokens[some].astype(np.int64))
                    nats = alone(model, piece, shards.token_ids, measure)
                    piece_codes = torch.from_numpy(codes[some].copy())
                    special = piece < len(SPECIAL)
                    assert not piece_codes[special].any()
                    assert_codes(piece_codes[~special], nats[~special], top)


def alone(model, piece, ids, measure):
    """How unsure the model is of each token of a piece that it sees whole, and nothing else."""
    tokens = torch.cat([torch.tensor([ids.cls]), piece, torch.tensor([ids.sep])])
    rows = len(tokens)
    layout = Layout.of(torch.tensor([0, rows]), rows, rows)
    words = torch.ones(rows, dtype=torch.bool)
    batch = PackedBatch(0, tokens, layout, words, words)
    return entropy_of(model, batch, MaskPlan.hide_nothing(batch), measure)[1:-1]


@torch.no_grad()
def test_stored_entropies_equal_those_of_the_live_teacher(config, data, teacher):
    store_entropies(dataclasses.replace(config, signal="clean"))
    train = Shards.open(data)
    packs = Packs(train, tokens=128, length=LENGTH, seed=3)
    facts = sidecar_facts_of(train.sidecar_facts("entropy"), str(data))
    assert not facts.problems("clean", "shannon", LENGTH, SIZE)
    loaded = Teacher.load(
        TeacherConfig(str(teacher), "fp32"), DistillConfig(), tokenizer=data / "tokenizer", ids=train.token_ids,
        length=LENGTH,
    )  # fmt: skip
    for number in range(len(packs)):
        batch = packs.batch(number)
        (live,) = loaded.entropies([batch], "clean", 4, "shannon", seed=0)
        assert_codes(batch.entropy[batch.maskable], live[batch.maskable], facts.top)
        (read,) = StoredEntropy(facts)([batch])
        assert (read - live)[batch.maskable].abs().max() < 0.51 * facts.top / 255


@torch.no_grad()
def test_the_masked_signal_hides_each_token_once(config, data, model):
    store_entropies(dataclasses.replace(config, num_passes=3))
    assert Shards.open(data).sidecar_facts("entropy")["signal"] == "masked"
    train, number = Shards.open(data), 0
    for pieces, codes in zip(index.document_pieces(train, LENGTH), train.sidecar("entropy"), strict=True):
        at = 0
        for window in index.windows(iter([pieces]), annotate.ROWS):
            batch, text = window_batch(train, window, number, LENGTH)

            def ask(batch, plan):
                assert (plan.inputs[plan.targets] == train.token_ids.mask).all()
                return entropy_of(model, batch, plan)

            nats = measure_entropy(ask, batch, "masked", 3, train.token_ids.mask, PackRng(0, number, PURPOSE))
            piece_codes = torch.from_numpy(codes[at : at + len(text)].copy())
            assert_codes(piece_codes, nats[text] * batch.maskable[text], top_of("shannon", SIZE))
            at, number = at + len(text), number + 1
        assert at == len(codes)


def test_a_killed_annotation_resumes_with_the_same_bytes(config, data, monkeypatch):
    store_entropies(config)
    whole = content(data)
    assert sorted(whole) == ["train-00000.entropy.npy", "train-00001.entropy.npy", "train.entropy.json",
                             "valid-00000.entropy.npy", "valid.entropy.json"]  # fmt: skip
    for path in data.glob("*.entropy.*"):
        path.unlink()
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["sidecars"]
    (data / "manifest.json").write_text(json.dumps(manifest))

    made, save = [], parts._save

    def die_at_the_third(work, name, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(name)
        save(work, name, *rest)

    monkeypatch.setattr(parts, "_save", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        store_entropies(config)
    work = next(data.glob(".entropy-*.partial"))
    assert Shards.open(data).sidecar("entropy") is None
    # a finished part that was damaged since is made again, the other is not
    path = work / f"{made[0]}.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    again = []
    monkeypatch.setattr(parts, "_save", lambda work, name, *rest: again.append(name) or save(work, name, *rest))
    store_entropies(config)
    assert made[0] in again and made[1] not in again
    assert content(data) == whole and not list(data.glob(".entropy-*"))
    again.clear()
    store_entropies(config)
    assert not again  # it is there


def test_wrong_annotation_settings_are_sentences(config, data, teacher):
    bad = dataclasses.replace(config, signal="clean", num_passes=2, length=5, workers=-1)
    with pytest.raises(ConfigError) as error:
        store_entropies(bad)
    assert {problem.split("`")[1] for problem in error.value.problems} == {"num_passes", "length", "workers"}
    with pytest.raises(ConfigError, match="must be at most 1024, the number of positions of"):
        store_entropies(dataclasses.replace(config, length=1025))
    (teacher / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        store_entropies(config)


def test_the_command_prints_how_to_use_the_entropies(config, data, capsys):
    flags = ["--data", str(data), "--teacher", config.teacher, "--length", str(LENGTH), "--workers", "1"]
    assert main(["annotate", "entropy", *flags]) == 0
    assert f"--entropy.signal masked --entropy.measure shannon --packs.length {LENGTH}" in capsys.readouterr().out
    assert main(["annotate", "entropy", *flags, "--num-passes", "0"]) == ConfigError.exit_code
    assert "`num_passes` must be at least 1" in capsys.readouterr().err


# ---- samples


@pytest.fixture
def run(data, teacher, tmp_path, monkeypatch) -> PretrainConfig:
    """A run of 6 steps of 2 packs, of which the teacher is heard in all but the last two."""
    monkeypatch.setattr(stored_targets, "PART", 3)
    return PretrainConfig(
        data=data, steps=6, seed=4, packs=PacksConfig(tokens=96, length=LENGTH, per_step=2),
        masking=MaskingConfig(Schedule("linear", 0.3, 0.1)),
        teacher=TeacherConfig(str(teacher), "fp32", packs_per_pass=2),
        distill=DistillConfig(Schedule("step", 0.5, 0.0, at=0.6), temperature=2.0, stored=tmp_path / "stored"),
    )  # fmt: skip


HOW = SampleAnnotation(draws=9, workers=1)


def stored_of(run: PretrainConfig, fingerprint: str, ids) -> StoredTargets:
    facts, targets = predetermined_masks.facts(run, fingerprint), predetermined_masks.targets(run)
    return StoredTargets.open(run.distill, ids, facts=facts, targets=targets)


def opened(run: PretrainConfig, **changes) -> StoredTargets:
    config = dataclasses.replace(run, **changes)
    train = Shards.open(config.data)
    return stored_of(config, train.fingerprint, train.token_ids)


@torch.no_grad()
def test_stored_samples_are_those_of_the_teacher_at_the_masks_of_the_run(run, data, model, teacher):
    store_targets(run, data, HOW)
    targets_of_run, train = opened(run), Shards.open(data)
    assert targets_of_run.manifest.packs == len(predetermined_masks.targets(run)) == 8
    packs = Packs(train, tokens=96, length=LENGTH, seed=4, per_step=2)
    masker = Masker(run.masking, train.token_ids)
    for number in range(8):
        step = number // 2
        batch = packs.batch(number)
        plan = masker(batch, progress=step / 6, rng=PackRng(4, number))
        (soft,) = targets_of_run.targets([batch], [plan], step / 6)
        assert (soft.share, soft.temperature, soft.scale) == (0.5, 2.0, 1.0)
        assert soft.counts.sum(-1).tolist() == [9] * len(plan.targets)
        logits = model.head.logits(model.represent(batch, plan))
        live = SoftTargets(
            1.0, 2.0, hidden=model.head.transform(model.represent(batch, plan)),
            weight=model.head.decoder.weight, bias=model.head.decoder.bias,
        )  # fmt: skip
        tokens, counts = stored_targets.sample_targets(live, 9, PackRng(4, number, stored_targets.PURPOSE))
        assert torch.equal(soft.tokens, tokens) and torch.equal(soft.counts, counts.float())
        # and inversion by hand: the first token whose cumulated probability exceeds the number drawn
        drawn = PackRng(4, number, stored_targets.PURPOSE).uniform(9 * len(logits), torch.device("cpu")).view(-1, 9)
        cumulated = (logits.double() / 2).softmax(-1).cumsum(-1)
        expected = [sorted((c > u).nonzero()[0].item() for u in us) for us, c in zip(drawn, cumulated, strict=True)]
        assert (
            torch.repeat_interleave(soft.tokens.flatten(), soft.counts.flatten().long()).view(-1, 9).tolist()
            == expected
        )
    assert targets_of_run.targets([batch], [plan], 0.61) == [None]
    with pytest.raises(DataError, match=r"has 8 packs, but the run needs pack 8"):
        targets_of_run.targets([packs.batch(8)], [plan], 0.0)


@torch.no_grad()
def test_sample_shares_equal_the_probabilities_of_the_teacher(model):
    """Numbers evenly spread over (0, 1) are shared out by the probabilities themselves."""
    rows, draws = 5, 1000

    class Even(PackRng):
        def uniform(self, count, device):
            return ((torch.arange(draws, dtype=torch.float64) + 0.5) / draws).repeat(count // draws)

    hidden = torch.randn(rows, 24)
    for temperature in (1.0, 3.0):
        weight, bias = model.head.decoder.weight.detach(), torch.randn(SIZE)
        soft = SoftTargets(1.0, temperature, hidden=hidden, weight=weight, bias=bias)
        tokens, counts = stored_targets.sample_targets(soft, draws, Even(0, 0))
        shares = torch.zeros(rows, SIZE).scatter_add_(1, tokens, counts.float() / draws)
        expected = (F.linear(hidden, weight, bias) / temperature).softmax(-1)
        assert (shares - expected).abs().max() <= 1 / draws + 1e-6


def test_a_token_without_probability_is_never_drawn():
    hidden, weight = torch.ones(1, 1), torch.zeros(4, 1)
    soft = SoftTargets(1.0, hidden=hidden, weight=weight, bias=torch.tensor([-1e4, 0.0, -1e4, 0.0]))
    tokens, counts = stored_targets.sample_targets(soft, 200, PackRng(0, 0))
    assert set(tokens[counts > 0].tolist()) == {1, 3}


def test_count_tokens_is_a_histogram():
    drawn = torch.randint(5, (7, 9))
    tokens, counts = count_tokens(drawn)
    for row, some, often in zip(drawn, tokens, counts, strict=True):
        expected = torch.bincount(row, minlength=5)
        histogram = torch.zeros(5, dtype=torch.long).scatter_add_(0, some, often)
        assert torch.equal(histogram, expected)
        assert (often > 0).sum() == (expected > 0).sum()


def test_a_killed_sampling_resumes_with_the_same_bytes(run, data, tmp_path, monkeypatch):
    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    store_targets(run, data, HOW)
    whole = files(tmp_path / "stored")
    other = dataclasses.replace(run, distill=dataclasses.replace(run.distill, stored=tmp_path / "other"))
    made, save = [], parts._save

    def die_at_the_second(work, name, *rest):
        if made:
            raise KeyboardInterrupt
        made.append(name)
        save(work, name, *rest)

    monkeypatch.setattr(parts, "_save", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        store_targets(other, data, HOW)
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(parts, "_save", lambda work, name, *rest: made.append(name) or save(work, name, *rest))
    store_targets(other, data, HOW)
    assert files(tmp_path / "other") == whole and made.count(made[0]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "other", "stored", "teacher"]
    store_targets(other, data, HOW)
    assert len(made) == len(set(made))  # it is there
    with pytest.raises(DataError, match="contains other samples"):
        store_targets(other, data, dataclasses.replace(HOW, draws=5))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 5}, "seed"),
        ({"steps": 7}, "steps"),
        ({"masking": MaskingConfig(Schedule("linear", 0.3, 0.2))}, "masking.ratio.end"),
        ({"masking": MaskingConfig(Schedule("linear", 0.3, 0.1), "word")}, "masking.unit"),
        ({"packs": PacksConfig(tokens=128, length=LENGTH, per_step=2)}, "packs.tokens"),
        ({"packs": PacksConfig(tokens=96, length=LENGTH, per_step=4)}, "packs.per_step"),
    ],
)
def test_samples_for_another_run_name_the_setting_that_differs(run, data, changes, key):
    store_targets(run, data, HOW)
    opened(run)
    with pytest.raises(ConfigError, match=rf"`distill.stored` \(.*\) was made with `{key}` .*, but the run has"):
        opened(run, **changes)


@pytest.mark.parametrize("fault", ["one target less", "an id outside the vocabulary"])
def test_samples_that_do_not_fit_the_masks_are_refused(run, data, tmp_path, fault):
    store_targets(run, data, HOW)
    folder = tmp_path / "stored"
    manifest = json.loads((folder / "manifest.json").read_text())

    def put(name: str, array: np.ndarray) -> None:
        """Replace a file, and vouch for it."""
        np.save(folder / name, array)
        manifest["files"] |= file_list.to_record(file_list.list_files(folder, [name]))
        (folder / "manifest.json").write_text(json.dumps(manifest))

    if fault == "one target less":
        offsets = np.load(folder / "part-00001.offsets.npy")
        offsets[1] -= 1
        put("part-00001.offsets.npy", offsets)
        sentence = r"has \d+ targets for pack 3, but its mask has \d+"
    else:
        tokens = np.load(folder / "part-00001.tokens.npy")
        tokens[-1] = Shards.open(data).token_ids.size
        put("part-00001.tokens.npy", tokens)
        sentence = r"part-00001.tokens.npy contains the token id \d+, but the vocabulary has \d+"
    with pytest.raises(DataError, match=sentence):
        opened(run)


def test_another_temperature_text_or_more_steps_are_refused(run, data, tmp_path):
    run = dataclasses.replace(run, masking=MaskingConfig(Schedule(start=0.2)))
    store_targets(run, data, HOW)
    opened(run, steps=5)  # with a ratio that stays, the number of steps makes no difference
    with pytest.raises(ConfigError, match=r"has 8 packs, but the run needs 14"):
        opened(run, steps=11)
    with pytest.raises(ConfigError, match=r"`distill.temperature` 2.0, but the run has 1.0"):
        opened(run, distill=dataclasses.replace(run.distill, temperature=1.0))
    with pytest.raises(ConfigError, match=r"with `text` 'other', but|`text` '[0-9a-f]+', but the run has 'other'"):
        stored_of(run, "other", Shards.open(data).token_ids)
    other = dataclasses.replace(run, masking=MaskingConfig(Schedule(start=0.2), score="entropy"))
    assert any(
        "`masking.score` must be 'uniform' with `distill.stored`" in problem for problem in config_problems(other)
    )
    file = tmp_path / "stored" / "part-00001.tokens.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{file} is damaged"):
        opened(run)
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{file} has"):
        opened(run)
    file.unlink()
    with pytest.raises(DataError, match=f"{file} is missing"):
        opened(run)
    (tmp_path / "stored" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        opened(run)


def test_the_command_takes_the_flags_of_the_run(run, data, teacher, tmp_path, capsys):
    flags = [
        "--data",
        data,
        "--seed",
        4,
        "--steps",
        4,
        "--packs.tokens",
        96,
        "--packs.length",
        LENGTH,
        "--packs.per-step",
        2,
    ]
    flags += ["--distill.stored", tmp_path / "stored", "--teacher.path", teacher, "--draws", 4, "--workers", 1]
    flags = [str(flag) for flag in flags]
    assert main(["annotate", "targets", *flags, "--distill.weight.start", "0.5", "--packs", "5"]) == 0
    assert json.loads((tmp_path / "stored" / "manifest.json").read_text())["packs"] == 5
    assert main(["annotate", "targets", *flags, "--draws", "256"]) == ConfigError.exit_code
    output = capsys.readouterr().err
    assert "`draws` must lie in [1, 255]" in output and "`distill.weight` is 0" in output


# ---- parts and progress


def test_reported_progress_adds_up_to_the_total(config, data, run, monkeypatch):
    """The time left is right only if what is reported is what was promised."""
    reported: list[int] = []
    total: list[int] = []

    class Bar(ProgressBar):
        def __init__(self, label, size=None, unit="step", *, done=0):
            super().__init__(label, size, unit, done=done)
            total.append(size)

        def update(self, count=1):
            reported.append(count)

    monkeypatch.setattr(parts, "ProgressBar", Bar)
    store_entropies(config)
    shards = [Shards.open(data, split) for split in SPLITS]
    assert total == [sum(each.tokens for each in shards)] == [sum(reported)]
    assert len(reported) > len(SPLITS)  # per window, not once at the end
    total.clear(), reported.clear()
    store_targets(run, data, HOW)
    assert total == [len(predetermined_masks.targets(run))] == [sum(reported)]


def test_the_number_of_parts_does_not_depend_on_the_text_size(data, monkeypatch):
    """Few large parts would leave all processes but one idle at the end, and lose much with a kill."""
    shards = Shards.open(data)
    windows = [
        w for pieces in index.document_pieces(shards, LENGTH) for w in index.windows(iter([pieces]), annotate.ROWS)
    ]

    def sizes(parts, largest=LARGEST):
        monkeypatch.setattr(annotate, "PARTS", parts)
        monkeypatch.setattr(annotate, "LARGEST", largest)
        made = [part for some in annotate._entropy_parts(shards, LENGTH) for part in some]
        # the windows and their numbers are the same however they are shared out
        numbered = [(first + n, w) for _, (_, first, some), _ in made for n, w in enumerate(some)]
        assert [number for number, _ in numbered] == list(range(len(windows)))
        for (_, one), other in zip(numbered, windows, strict=True):
            assert all(map(np.array_equal, one, other))
        return [len(part.task[2]) for part in made]

    assert len(windows) > 5
    assert set(sizes(256)) == {1}
    assert max(sizes(2)) == len(windows) // 2
    assert max(sizes(1, largest=2)) == 2
