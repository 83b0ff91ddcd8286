"""Subsets by a field of the records: each document in its folder, one tokenizer, and refusals in sentences."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megamask.data import encoding
from megamask.data.corpus import Document
from megamask.data.formats.fields import subset_name_rule
from megamask.data.formats.lines import SubsetText
from megamask.data.inputs import find_inputs
from megamask.data.mixture import BLOCK
from megamask.data.prepare import prepare, prepared_folders
from megamask.data.read_documents import ReadOptions, read_documents
from megamask.data.report import prepare_and_report
from megamask.data.settings import PrepareConfig
from megamask.data.shards import Shards
from megamask.data.subsets import SubsetCounts, TextSample, empty_subsets_problem, tokenizer_quotas
from megamask.data.tokenizer import load_tokenizer
from megamask.errors import ConfigError, DataError

WORDS = {
    "en": "the river froze and no ship could leave that harbour for three weeks".split(),  # noqa: SIM905
    "de": "der fluss fror zu und kein schiff konnte den hafen verlassen".split(),  # noqa: SIM905
    "el": "το ποτάμι πάγωσε και κανένα πλοίο δεν μπορούσε πια να φύγει".split(),  # noqa: RUF001, SIM905
}


def documents(language: str, count: int) -> list[str]:
    """Different texts: the digits of their numbers choose the words."""
    words = WORDS[language]
    return [" ".join(words[int(digit)] for digit in f"{number:05d}{number * 7919:09d}") for number in range(count)]


COUNTS = {"en": 160, "de": 60, "el": 30}
RECORDS = [
    {"lang": language, "text": text, "id": number}
    for number in range(max(COUNTS.values()))
    for language, count in COUNTS.items()
    if number < count
    for text in [documents(language, count)[number]]
]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    file = write(tmp_path / "text.jsonl", RECORDS)
    how = {"vocab_size": 400, "valid_share": 0.2, "workers": 1}
    return PrepareConfig((str(file),), tmp_path / "out", split_by="lang", **how)


def texts_in(folder: Path) -> list[tuple[int, ...]]:
    """The ids of each document of a folder of shards, over both splits."""
    texts_read = []
    for split in ("train", "valid"):
        shards = Shards.open(folder, split, verify=True)
        [bounds], [ids] = list(shards.offsets()), shards.parts
        texts_read += [tuple(ids[begin:end].tolist()) for begin, end in pairwise(bounds)]
    return texts_read


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_document_is_in_the_folder_of_its_subset(config: PrepareConfig) -> None:
    folders = prepared_folders(prepare(config))
    assert [folder.name for folder in folders] == sorted(COUNTS)
    tokenizer = load_tokenizer(folders[0] / "tokenizer")
    for folder in folders:
        expected = [tuple(ids.tolist()) for ids in tokenizer.encode(documents(folder.name, COUNTS[folder.name]))]
        assert sorted(texts_in(folder)) == sorted(expected)
        assert load_tokenizer(folder / "tokenizer").hash() == tokenizer.hash()
        for split in ("train", "valid"):
            shards = Shards.open(folder, split)
            assert shards.manifest["coverage"][split]["tokens"] == shards.tokens
            assert shards.bytes_per_token is not None


def test_bytes_do_not_depend_on_workers_units_or_stops(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(prepare(config))
    assert contents(prepare(replace(config, output=tmp_path / "two", workers=2))) == whole
    monkeypatch.setattr(encoding, "UNIT_BYTES", 3000)
    monkeypatch.setattr(encoding, "MAX_WAITING_BYTES", 4000)
    stopped, encode, left = replace(config, output=tmp_path / "stopped"), encoding._encode_unit, [3]

    def some(*given) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        encode(*given)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_encode_unit", some)
        with pytest.raises(KeyboardInterrupt):
            prepare(stopped)
    assert contents(prepare(stopped)) == whole


def test_units_hold_little_text_and_one_subset_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "UNIT_BYTES", 3000)
    monkeypatch.setattr(encoding, "MAX_WAITING_BYTES", 4000)
    read = [Document(b"", "train", record["text"], None, "a", record["lang"]) for record in RECORDS]
    in_memory, largest, units = 0, 0, []

    def counted():
        nonlocal in_memory, largest
        for document in read:
            largest = max(largest, in_memory)
            in_memory += len(document.text)
            yield document

    for unit in encoding._units(counted()):
        assert len({document.subset for document in unit}) == 1
        in_memory -= sum(len(document.text) for document in unit)
        units.append(unit)
    assert in_memory == 0 and largest <= 4000 and len(units) > 3
    for language, count in COUNTS.items():
        texts = [document.text for unit in units for document in unit if document.subset == language]
        assert texts == documents(language, count)


def test_the_same_command_changes_nothing_and_sees_a_missing_folder(config: PrepareConfig) -> None:
    output = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert prepare(config) == output
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(DataError, match="other text or with other settings"):
        prepare(replace(config, tokenizer_alpha=0.5))
    with pytest.raises(DataError, match="other text or with other settings"):
        prepare(replace(config, split_by=None))
    (output / "de").rename(output.parent / "away")
    with pytest.raises(DataError, match="lacks some of the folders"):
        prepare(config)


# ---- every format


def as_csv(path: Path) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, ["id", "text", "lang"], delimiter="\t" if path.suffix == ".tsv" else ",")
        rows.writeheader()
        rows.writerows(RECORDS)
    return path


def as_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


def as_dataset(path: Path) -> Path:
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(path))
    return path


def as_json(path: Path) -> Path:
    path.write_text(json.dumps(RECORDS, indent=1))
    return path


WRITERS = {"a.csv": as_csv, "a.tsv": as_csv, "a.parquet": as_parquet, "a": as_dataset, "a.json": as_json}
WRITERS["a.jsonl"] = lambda path: write(path, RECORDS)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_with_fields_gives_subsets(name: str, tmp_path: Path) -> None:
    [source] = find_inputs([str(WRITERS[name](tmp_path / name))]).sources
    with source.open() as raw:
        read = list(read_documents(source, ReadOptions(split_by="lang"), raw))
    assert read == [SubsetText(record["text"], record["lang"]) for record in RECORDS]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_table_without_the_column_is_refused(name: str, tmp_path: Path, config: PrepareConfig) -> None:
    wrong = replace(config, input=(str(WRITERS[name](tmp_path / name)),), split_by="language")
    with pytest.raises(DataError, match=r"has no column 'language'; its columns are .* Set `split_by`"):
        prepare(wrong)


# ---- the text of the tokenizer


def test_quotas_are_smoothed_by_alpha() -> None:
    sizes = {"en": 9000, "de": 900, "el": 100}
    assert tokenizer_quotas(sizes, 10_000, 1.0) == sizes
    assert tokenizer_quotas(sizes, 10**9, 1.0) == sizes
    powers = {name: (size / 10_000) ** 0.3 for name, size in sizes.items()}
    expected = {name: round(500 * power / sum(powers.values())) for name, power in powers.items()}
    assert tokenizer_quotas(sizes, 500, 0.3) == dict(sorted(expected.items()))


def test_a_sample_has_the_smallest_hashes_and_repeats_them() -> None:
    texts = {blake2b(text.encode(), digest_size=16).digest(): text for text in documents("de", 50)}
    sizes = [len(text.encode()) for text in texts.values()]
    sample = TextSample(sum(sizes) // 3)
    for digest, text in texts.items():
        sample.add(digest, text)
    order = sorted(texts, key=lambda digest: int.from_bytes(digest[8:], "little"))
    kept = [texts[digest] for digest in order][: len(sample.texts())]
    assert sample.texts() == list(sample.repeated()) == kept
    assert 0 <= sum(sizes) // 3 - len("".join(kept).encode()) < max(sizes)
    twice = TextSample(2 * sum(sizes) + max(sizes))
    for digest, text in texts.items():
        twice.add(digest, text)
    assert [Counter(twice.repeated())[text] for text in texts.values()].count(2) >= 48
    assert twice.texts() == [texts[digest] for digest in order]


def test_a_small_language_gets_more_tokens_with_a_smaller_alpha(config: PrepareConfig, tmp_path: Path) -> None:
    def tokens(alpha: float) -> dict[str, int]:
        """How many tokens the text of each language takes in a vocabulary that is too small for all words."""
        how = replace(config, output=tmp_path / str(alpha), tokenizer_alpha=alpha, vocab_size=110)
        return {folder.name: sum(map(len, texts_in(folder))) for folder in prepared_folders(prepare(how))}

    equal, by_size = tokens(0.0), tokens(1.0)
    assert equal["el"] < by_size["el"] and equal["en"] > by_size["en"]


# ---- refusals


def refused(config: PrepareConfig, tmp_path: Path, records: list[dict], **more) -> str:
    file = write(tmp_path / "wrong.jsonl", records)
    with pytest.raises(DataError) as caught:
        prepare(replace(config, input=(str(file),), **more))
    return str(caught.value)


def test_records_without_the_field_are_counted_and_the_first_is_named(config: PrepareConfig, tmp_path: Path) -> None:
    lacking = [dict(record) for record in RECORDS]
    for number in (7, 40, 90):
        del lacking[number]["lang"]
    problem = refused(config, tmp_path, lacking)
    assert "3 records have no value of 'lang' (`split_by`)" in problem and "up to `bad_share`" in problem
    assert "wrong.jsonl, line 8 (byte" in problem and "has no field 'lang'; its fields are 'text', 'id'" in problem
    skipping = {"on_bad_document": "skip", "bad_share": 0.01, "input": (str(tmp_path / "wrong.jsonl"),)}
    read = Shards.open(prepare(replace(config, **skipping)) / "en").manifest["read"]
    assert (read["documents"], read["bad"]) == (len(RECORDS), 3)


def test_values_that_differ_in_case_are_refused_and_whole_numbers_are_names(
    config: PrepareConfig, tmp_path: Path
) -> None:
    shouted = [dict(record) for record in RECORDS]
    for record in [record for record in shouted if record["lang"] == "en"][::2]:
        record["lang"] = "EN"
    assert "The values EN, en of 'lang' (`split_by`) differ only in case" in refused(config, tmp_path, shouted)
    numbered = [dict(record, lang=7) if record["lang"] == "en" else record for record in RECORDS]
    file = write(tmp_path / "numbered.jsonl", numbered)
    assert Shards.open(prepare(replace(config, input=(str(file),))) / "7").documents
    true = [dict(record, lang=True) if record["lang"] == "en" else record for record in RECORDS]
    assert "the field 'lang' must be a string, but is a boolean" in refused(
        config, tmp_path, true, output=tmp_path / "b"
    )


def test_a_field_without_a_name_is_refused(config: PrepareConfig) -> None:
    with pytest.raises(ConfigError, match="`split_by` must name a field, but is ''"):
        prepare(replace(config, split_by=""))


def test_a_field_that_no_record_has_is_refused_early(config: PrepareConfig, tmp_path: Path) -> None:
    many = [{"text": f"text {number}"} for number in range(BLOCK + 5)]
    assert f"None of the {BLOCK:,} records read so far has a value of 'lang'" in refused(config, tmp_path, many)


@pytest.mark.parametrize("name", ["", " de", "a/b", "..", ".hidden", "a=1", "a\nb", "x" * 201, 3.5, None])
def test_a_value_that_names_no_folder_is_refused(name: object, config: PrepareConfig, tmp_path: Path) -> None:
    assert not isinstance(name, str) or subset_name_rule(name)
    problem = refused(config, tmp_path, [*RECORDS, {"text": "some text", "lang": name}])
    assert f"line {len(RECORDS) + 1} " in problem and "the field 'lang'" in problem
    assert not (config.output.parent / "a").exists()


@pytest.mark.parametrize("name", ["en", "zh-Hans", "pt_BR", "日本語", "x" * 200])
def test_usual_names_of_languages_are_allowed(name: str) -> None:
    assert subset_name_rule(name) == ""


def test_too_many_values_are_refused(config: PrepareConfig, tmp_path: Path) -> None:
    many = [{"text": f"text {number}", "lang": str(number)} for number in range(BLOCK + 1)]
    assert f"has more than {BLOCK:,} values" in refused(config, tmp_path, many)
    counts = SubsetCounts("id")
    for number in range(BLOCK):
        counts.add(str(number), "train", "text")
    with pytest.raises(DataError, match="Name another field"):
        counts.add("more", "train", "text")


def test_a_language_without_text_in_a_split_is_refused(config: PrepareConfig, tmp_path: Path) -> None:
    rare = [{"text": "δύο", "lang": "el-polyton"}, {"text": "τρία", "lang": "el-polyton"}]
    problem = refused(config, tmp_path, RECORDS + rare, valid_share=0.05)
    assert "The split 'valid' has no text of the value el-polyton (2 documents) of 'lang'" in problem
    assert "`valid_share` must be larger, but is 0.05. Try `--valid-share 0.5`, or remove their documents, " in problem
    file = write(tmp_path / "whole.jsonl", RECORDS + rare)
    output = prepare(replace(config, input=(str(file),), valid_share=0.0))
    assert len(prepared_folders(output)) == 4


def test_the_share_that_is_advised_is_always_larger() -> None:
    assert "Try `--valid-share 0.04`" in empty_subsets_problem("lang", "valid", {"el": 127}, 0.005)
    assert "Try `--valid-share 0.08`" in empty_subsets_problem("lang", "valid", {"el": 127}, 0.04)
    assert "--valid-share" not in empty_subsets_problem("lang", "valid", {"el": 127}, 0.5)


def test_a_single_document_is_not_in_both_splits(config: PrepareConfig, tmp_path: Path) -> None:
    problem = refused(config, tmp_path, [*RECORDS, {"text": "δύο", "lang": "el-polyton"}])
    assert "no text of the value el-polyton (1 document) of 'lang'" in problem and "--valid-share" not in problem


@pytest.mark.parametrize("text", [" ", RECORDS[0]["text"]], ids=["blank", "duplicate"])
def test_a_language_that_loses_all_its_documents_is_refused(text: str, config: PrepareConfig, tmp_path: Path) -> None:
    problem = refused(config, tmp_path, [*RECORDS, {"text": text, "lang": "fi"}, {"text": text, "lang": "en"}])
    assert problem.startswith("All documents of the value fi (1) of 'lang' (`split_by`) are blank or duplicates")


def test_the_folder_of_all_sources_is_refused_with_their_names(config: PrepareConfig) -> None:
    output = prepare(config)
    with pytest.raises(DataError, match=r"its folders de, el, en do\. Name one of them, or all .*/\*`"):
        Shards.open(output)


@pytest.mark.parametrize(
    ("share", "advice"), [(0.2, "pretrain --data {}/en"), (0.0, "needs a validation split too, but `valid_share` is 0")]
)
def test_the_advice_is_a_command_that_can_start(
    share: float, advice: str, config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = write(tmp_path / "one.jsonl", [record for record in RECORDS if record["lang"] == "en"])
    prepare_and_report(replace(config, input=(str(file),), valid_share=share))
    out = capsys.readouterr().out
    assert advice.format(config.output) in out and "alpha" not in out


def test_text_without_fields_and_other_settings_are_refused(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no fields")
    with pytest.raises(DataError, match=r"the file a\.txt has no fields"):
        prepare(replace(config, input=(*config.input, str(tmp_path / "a.txt"))))
    with pytest.raises(DataError, match="are both 'text'"):
        prepare(replace(config, split_by="text"))
    with pytest.raises(ConfigError, match="`tags` must be left out with `split_by`"):
        prepare(replace(config, tags="en_core_web_sm"))
    with pytest.raises(ConfigError, match="`tokenizer_alpha` has no effect without `split_by`"):
        prepare(replace(config, split_by=None, tokenizer_alpha=0.5))


def test_a_tokenizer_that_loses_one_language_is_refused(config: PrepareConfig, tmp_path: Path) -> None:
    english = write(tmp_path / "en.jsonl", [record for record in RECORDS if record["lang"] != "el"])
    tokenizer = prepare(replace(config, input=(str(english),), output=tmp_path / "latin")) / "en" / "tokenizer"
    # less than a third of the text is Greek, but all of it is lost
    foreign = replace(config, tokenizer=str(tokenizer), vocab_size=None, lost_share=0.5)
    with pytest.raises(DataError, match=r"^lang el: The tokenizer loses 100\.00% of the text"):
        prepare(foreign)


# ---- the report


def test_the_report_has_a_row_for_each_subset_and_a_command(
    config: PrepareConfig, capsys: pytest.CaptureFixture
) -> None:
    prepare_and_report(config)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith(f"{config.output}: {len(RECORDS)} documents read (0 bad")
    rows = {cells[0]: cells[1:] for line in lines[2:5] for cells in [line.split()]}
    assert rows.keys() == COUNTS.keys()
    for language, count in COUNTS.items():
        texts = documents(language, count)
        size = len("".join(texts).encode())
        tokens = sum(map(len, load_tokenizer(config.output / language / "tokenizer").encode(texts)))
        assert rows[language][:4] == [f"{count:,}", f"{tokens:,}", f"{size:,}", f"{tokens / size:.3f}"]
        assert rows[language][4] == "0.00%"
    assert float(rows["el"][6]) > 1 > float(rows["en"][6])
    assert lines[-1] == f"  megamask pretrain --data {config.output}/* --mixture.alpha 0.3"
    assert "The validation split of 3 values: de (" in err
