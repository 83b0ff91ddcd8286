"""Tasks are read from every layout of their files, and every fault is reported with its file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from megamask.errors import DataError
from megamask.evaluation.formats.rows import few_classes, limit_train
from megamask.evaluation.read_tasks import TaskFiles, find_tasks, hash_task, read_task
from megamask.evaluation.settings import TASK_NAMES
from megamask.evaluation.tasks import TASKS, Answer, TaskData
from tests.unit.evaluation.files import LINES, write_lines, write_table


def read(folder: Path, name: str) -> TaskData:
    (files,) = find_tasks(folder, (name,)).tasks
    data = read_task(files)
    assert data.files == hash_task(files)
    return data


def problems(folder: Path, name: str) -> tuple[str, ...]:
    with pytest.raises(DataError) as error:
        read(folder, name)
    return error.value.problems


def test_names_of_settings_are_those_of_the_tasks() -> None:
    assert tuple(TASKS) == TASK_NAMES


def test_json_lines_give_the_same_examples_compressed(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "sst2.jsonl", LINES)
    data = read(tmp_path, "sst2")
    (tmp_path / "glue_sst2.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    packed = read(tmp_path, "sst2")
    assert packed.train.texts == data.train.texts and (packed.test.labels == data.test.labels).all()
    assert (len(data.train), len(data.test)) == (20, 20)
    assert data.test.texts[0] == ("so good, film 0",) and data.test.labels[:2].tolist() == [1, 0]
    assert data.layout == "json_lines"


def test_labels_get_the_numbers_of_the_task(tmp_path: Path) -> None:
    records = [
        {"split": split, "sentence1": "a", "sentence2": "b", "label": label}
        for split in ("train", "test")
        for label in TASKS["snli"].labels
    ]
    write_lines(tmp_path / "snli.jsonl", records)
    assert read(tmp_path, "snli").test.labels.tolist() == [0, 1, 2]


def test_test_is_reported_before_dev_and_dev_is_counted(tmp_path: Path) -> None:
    test = [record | {"split": "test"} for record in LINES if record["split"] == "dev"][:4]
    write_lines(tmp_path / "sst2.jsonl", [*LINES, *test])
    data = read(tmp_path, "sst2")
    assert len(data.test) == 4 and data.counts["left_out/unused_dev_examples"] == 20


def test_every_fault_is_named_with_its_line(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "sst2.jsonl",
        [
            *LINES,
            {"split": "train", "sentence": "x", "label": 2},
            {"split": "eval", "sentence": "x", "label": 1},
            {"split": "train", "label": 1},
            {"split": "dev", "sentence": ["x"], "label": 1},
            {"split": "dev", "sentence": "x", "label": -1},
            {"split": "dev", "sentence": "half of \ud800", "label": 1},
        ],
    )
    with file.open("a") as handle:
        handle.write("not JSON\n[1]\n")
    first = len(LINES) + 1
    sentences = problems(tmp_path, "sst2")
    assert [f"{file}, line {first + i}" in sentence for i, sentence in enumerate(sentences)] == [True] * 8
    assert "the label must be one of 0, 1, but is 2" in sentences[0]
    assert "train, dev or test, but is 'eval'" in sentences[1]
    assert "no value for the field 'sentence'" in sentences[2] and "must be a string, but is list" in sentences[3]
    assert "not public" in sentences[4] and "unpaired surrogate" in sentences[5]
    assert "not valid JSON" in sentences[6] and "is list" in sentences[7]


def test_a_null_and_a_key_that_appears_twice_are_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "sst2.jsonl", [*LINES, {"split": "train", "sentence": "x", "label": None}])
    with file.open("a") as handle:
        handle.write('{"split": "train", "sentence": "x", "label": 1, "label": 0}\n')
    without, twice = problems(tmp_path, "sst2")
    assert "no value for the field 'label'; its fields with a value are 'split', 'sentence'." in without
    assert "it has the key 'label' twice" in twice


def test_an_empty_split_and_a_single_class_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "sst2.jsonl", [record for record in LINES if record["split"] == "train"])
    assert "dev or test must have examples" in problems(tmp_path, "sst2")[0]
    write_lines(tmp_path / "sst2.jsonl", [record for record in LINES if record["label"] == 1])
    assert "has only 1" in problems(tmp_path, "sst2")[0]


@pytest.mark.parametrize("label", [5.1, -0.1, "nan", None, True])
def test_a_similarity_lies_in_its_range(tmp_path: Path, label: object) -> None:
    write_lines(
        tmp_path / "stsb.jsonl",
        [
            {"split": split, "sentence1": "a", "sentence2": "b", "label": value}
            for split, value in (("train", 0), ("dev", label))
        ],
    )
    assert len(problems(tmp_path, "stsb")) == 1


def test_repeats_ignore_case_and_punctuation(tmp_path: Path) -> None:
    repeated = {"split": "dev", "sentence": "A good, film: 3!", "label": 1}
    write_lines(tmp_path / "sst2.jsonl", [*LINES, repeated])
    assert read(tmp_path, "sst2").counts["test_examples_in_train"] == 1


def test_glue_has_no_quoting_and_cola_no_header(tmp_path: Path) -> None:
    rows = ['gj04|1||He said "no.', 'gj04|0|*|Said "he no.']
    for split in ("train", "dev"):
        write_table(tmp_path / "CoLA" / f"{split}.tsv", *rows)
    data = read(tmp_path, "cola")
    assert data.test.texts == (('He said "no.',), ('Said "he no.',)) and data.test.labels.tolist() == [1, 0]
    assert data.layout == "official"


TABLES = {
    "sst2": ("SST-2", "dev", "sentence|label", ["x|0", "y|1"]),
    "mrpc": ("MRPC", "dev", "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", ["0|1|2|a|b", "1|3|4|c|d"]),
    "stsb": ("STS-B", "dev", "index|genre|sentence1|sentence2|score", ["0|news|a|b|2.5", "1|news|c|d|0"]),
    "qqp": ("QQP", "dev", "id|qid1|qid2|question1|question2|is_duplicate", ["0|1|2|a|b|0", "1|3|4|c|d|1"]),
    "mnli": ("MNLI", "dev_matched", "index|sentence1|sentence2|label1|gold_label",
             ["0|a|b|neutral|entailment", "1|a|b|neutral|neutral", "2|c|d|neutral|-"]),
    "mnli_mismatched": ("MNLI", "dev_mismatched", "index|sentence1|sentence2|label1|gold_label",
                        ["0|a|b|neutral|entailment", "1|a|b|neutral|contradiction"]),
    "qnli": ("QNLI", "dev", "index|question|sentence|label", ["0|a|b|entailment", "1|c|d|not_entailment"]),
    "rte": ("RTE", "dev", "index|sentence1|sentence2|label", ["0|a|b|entailment", "1|c|d|not_entailment"]),
    "wnli": ("WNLI", "dev", "index|sentence1|sentence2|label", ["0|a|b|0", "1|c|d|1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_glue_have_their_own_columns(tmp_path: Path, name: str) -> None:
    folder, dev, header, rows = TABLES[name]
    for split in ("train", dev):
        write_table(tmp_path / folder / f"{split}.tsv", header, *rows)
    data = read(tmp_path, name)
    assert len(data.test) == 2 and len(data.test.texts[0]) == len(TASKS[name].fields)
    assert data.test.texts[0][0] in ("a", "x")
    assert data.counts.get("left_out/without_gold_label", 0) == (2 if name == "mnli" else 0)


def test_only_qqp_may_have_incomplete_lines(tmp_path: Path) -> None:
    for name in ("qqp", "rte"):
        folder, _, header, rows = TABLES[name]
        write_table(tmp_path / folder / "train.tsv", header, *rows, "7|1|2")
        write_table(tmp_path / folder / "dev.tsv", header, *rows)
    assert read(tmp_path, "qqp").counts["left_out/incomplete_lines"] == 1
    assert f"{tmp_path / 'RTE' / 'train.tsv'}, line 4 has too few columns: 'label'" in problems(tmp_path, "rte")[0]


def test_a_wrong_column_is_named(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write_table(tmp_path / "RTE" / f"{split}.tsv", "index|premise|sentence2|label", "0|a|b|entailment")
    assert "must have the columns 'sentence1'; its columns are 'index', 'premise'" in problems(tmp_path, "rte")[0]


def test_snli_and_blimp_and_the_original_mrpc_are_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        records = [
            {"gold_label": label, "sentence1": "a", "sentence2": "b"} for label in ("neutral", "-", "entailment")
        ]
        (tmp_path / "snli_1.0").mkdir(exist_ok=True)
        write_lines(tmp_path / "snli_1.0" / f"snli_1.0_{split}.jsonl", records)
        (tmp_path / "MRPC").mkdir(exist_ok=True)
        _, _, header, rows = TABLES["mrpc"]
        write_table(tmp_path / "MRPC" / f"msr_paraphrase_{split}.txt", header, *rows)
    assert read(tmp_path, "snli").test.labels.tolist() == [1, 0] and len(read(tmp_path, "mrpc").test) == 2
    (tmp_path / "blimp").mkdir()
    for uid in ("island", "binding"):
        pair = {"sentence_good": "Who ran?", "sentence_bad": "Ran who?", "UID": uid}
        write_lines(tmp_path / "blimp" / f"{uid}.jsonl", [pair])
    assert read(tmp_path, "blimp").test.groups == ("binding", "island")


def squad(answers: list[dict[str, object]]) -> str:
    paragraph = {"context": "The river froze.", "qas": [{"id": "1", "question": "What froze?", "answers": answers}]}
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]})


def test_squad_has_several_answers_at_their_places(tmp_path: Path) -> None:
    answers = [{"text": "The river", "answer_start": 0}, {"text": "river", "answer_start": 4}]
    for split in ("train", "dev"):
        (tmp_path / f"{split}-v1.1.json").write_text(squad(answers))
    data = read(tmp_path, "squad")
    assert data.test.texts == (("What froze?", "The river froze."),)
    assert data.test.answers == ((Answer("The river", 0), Answer("river", 4)),)
    (tmp_path / "dev-v1.1.json").write_text(squad([{"text": "river", "answer_start": 5}]))
    assert "an answer must occur in the context at its `answer_start`" in problems(tmp_path, "squad")[0]
    (tmp_path / "dev-v1.1.json").write_text(squad([{"text": "", "answer_start": 0}]))
    assert "an answer must have text, but is empty" in problems(tmp_path, "squad")[0]
    (tmp_path / "dev-v1.1.json").write_text(json.dumps({"data": [{}]}))
    assert "is not a file of SQuAD 1.1" in problems(tmp_path, "squad")[0]


def test_a_missing_task_is_named_and_one_that_is_there_twice_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "sst2.jsonl", LINES)
    tasks = find_tasks(tmp_path, ("rte", "sst2"))
    assert [files.task.name for files in tasks.tasks] == ["sst2"]
    files = "snli.jsonl or snli_1.0/snli_1.0_train.jsonl and snli_1.0/snli_1.0_test.jsonl"
    assert find_tasks(tmp_path, ("sst2", "snli")).missing == {"snli": f"snli: put {files} into {tmp_path}."}
    assert tasks.missing == {"rte": f"rte: put glue_rte.jsonl or RTE/train.tsv and RTE/dev.tsv into {tmp_path}."}
    with pytest.raises(DataError, match="none of these tasks"):
        find_tasks(tmp_path, ("rte",))
    for split in ("train", "dev"):
        write_table(tmp_path / "SST-2" / f"{split}.tsv", "sentence|label", "x|0")
    with pytest.raises(DataError, match="Move one of them"):
        find_tasks(tmp_path, ())


def test_a_limit_draws_the_same_examples_each_time(tmp_path: Path) -> None:
    write_lines(tmp_path / "sst2.jsonl", LINES)
    data = read(tmp_path, "sst2")
    few = limit_train(data, 5)
    assert few.train.texts == limit_train(data, 5).train.texts and len(few.train) == len(few.train.labels) == 5
    assert set(few.train.texts) < set(data.train.texts) and few.test is data.test
    assert few.counts["train_examples"] == 5 and limit_train(data, 20) is data


def test_a_limit_that_leaves_one_class_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "sst2.jsonl", LINES)
    data = read(tmp_path, "sst2")
    (sentence,) = few_classes(data, 1)
    assert "`max_train` must leave two classes of sst2" in sentence
    assert few_classes(data, 15) == few_classes(data, None) == []


def hub(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    """Stand in for the network: two rows in each split."""
    columns = {"question": ["a", "c"], "sentence": ["b", "d"], "label": [0, 1], "idx": [0, 1]}
    features = datasets.Features(
        question=datasets.Value("string"), sentence=datasets.Value("string"),
        label=datasets.ClassLabel(names=names), idx=datasets.Value("int32"),
    )  # fmt: skip
    table = datasets.Dataset.from_dict(columns, features)

    def load(repository: str, config: str, *, split: str) -> datasets.Dataset:
        assert (repository, config) == ("nyu-mll/glue", "qnli") and split in ("train", "validation")
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_the_hub_gives_the_same_examples_as_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dev, header, rows = TABLES["qnli"]
    for split in ("train", dev):
        write_table(tmp_path / folder / f"{split}.tsv", header, *rows)
    local = read(tmp_path, "qnli")
    hub(monkeypatch, ["entailment", "not_entailment"])
    remote = read_task(TaskFiles(TASKS["qnli"]))
    assert remote.test.texts == local.test.texts and (remote.test.labels == local.test.labels).all()
    assert remote.layout == "hub" and remote.files == hash_task(TaskFiles(TASKS["qnli"]))
    hub(monkeypatch, ["not_entailment", "entailment"])
    with pytest.raises(DataError, match="labels must be entailment, not_entailment, but are"):
        read_task(TaskFiles(TASKS["qnli"]))


def test_without_network_and_cache_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **settings: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"neither from the network nor from the cache: no network. Set `data`"):
        read_task(TaskFiles(TASKS["rte"]))
    with pytest.raises(DataError, match="blimp: nyu-mll/glue does not have it"):
        find_tasks(None, ("blimp",))


TEXTS = os.environ.get("MEGAMASK_EVALUATION_DATA", "")


@pytest.mark.skipif(not TEXTS, reason="MEGAMASK_EVALUATION_DATA is not the folder of the evaluation data")
@pytest.mark.parametrize(
    ("name", "train", "test", "repeats"),
    [("cola", 8551, 527, 6), ("stsb", 5749, 1500, 6), ("trec", 5452, 500, 11), ("blimp", 0, 13400, 0)],
)
def test_counts_of_the_local_data(name: str, train: int, test: int, repeats: int) -> None:
    counts = read(Path(TEXTS), name).counts
    assert counts == {"train_examples": train, "test_examples": test, "test_examples_in_train": repeats}
