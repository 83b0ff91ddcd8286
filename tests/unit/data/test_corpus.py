"""Warnings and counts while documents are read."""

from __future__ import annotations

from collections import Counter

from megamask.data.corpus import Corpus
from megamask.data.inputs import find_inputs
from megamask.data.read_documents import ReadOptions


def test_a_warning_is_printed_once_for_each_file(tmp_path, capsys):
    for name in ("a.csv", "b.csv"):
        rows = "".join(f"{name} {n},{n}\n" for n in range(120))
        (tmp_path / name).write_text(f'text,id\n"{name},0\n{rows}1"",1\n",2\nlast of {name},3\n')
    corpus = Corpus(find_inputs([str(tmp_path)]).sources, ReadOptions(), "stop", 0.0, 0.0)
    for _ in range(2):
        counts: Counter[str] = Counter()
        assert len(list(corpus.documents(counts, "reading"))) == counts["documents"] == 4
    errors = capsys.readouterr().err
    for name in ("a.csv", "b.csv"):
        assert errors.count(f"{tmp_path / name}, line 2 starts a row of 123 lines") == 1
