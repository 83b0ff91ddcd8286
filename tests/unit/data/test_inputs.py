"""The files of a folder are read, counted or refused; none is left out silently."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megamask.data.inputs import Inputs, find_inputs
from megamask.errors import DataError


def make(folder: Path, files: dict[str, str | bytes]) -> Path:
    """The folder with these files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def names(inputs: Inputs) -> list[str]:
    return [source.name.split("/", 1)[1] for source in inputs.sources]


def refused(*given: object, **how) -> str:
    with pytest.raises(DataError) as caught:
        find_inputs([str(one) for one in given], **how)
    return str(caught.value)


def test_files_of_a_folder_are_sorted_by_name(tmp_path):
    make(tmp_path, {"b.txt": "bb", "a.jsonl.gz": gzip.compress(b"{}"), "below/c.TXT": "cc", "notes.pdf": "x"})
    inputs = find_inputs([str(tmp_path)])
    assert names(inputs) == ["a.jsonl.gz", "b.txt", "below/c.TXT"]
    assert inputs.unsupported.files == {".pdf": 1}
    size = (tmp_path / "a.jsonl.gz").stat().st_size
    assert inputs.sentence() == f"Reading 1 .jsonl.gz ({size}.0B), 2 .txt (4.00B); unsupported: 1 .pdf (1.00B)."
    assert inputs.facts()["read"][".txt"] == {"files": 2, "bytes": 4}


def test_a_readme_beside_records_gives_a_warning(tmp_path):
    records = gzip.compress(json.dumps([{"text": f"record {n}"} for n in range(300)]).encode())
    make(tmp_path, {"part.json.gz": records, "README.txt": "About these data.\n\n" * 60})
    inputs = find_inputs([str(tmp_path)])
    assert names(inputs) == ["README.txt", "part.json.gz"]
    [remark] = inputs.warnings()
    assert remark.startswith(f"{tmp_path.name}/README.txt will be read as text") and "`exclude`" in remark
    inputs = find_inputs([str(tmp_path)], exclude=["README*"])
    assert names(inputs) == ["part.json.gz"] and inputs.excluded == 1
    assert not list(inputs.warnings())


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("part.tar", "Unpack .tar files."),
        ("part.tar.gz", "Unpack .tar.gz files."),
        ("part.ZIP", "Unpack .zip files."),
        ("part.jsonl.lz4", "Convert .lz4 files"),
        ("data-00000.arrow", "Give each folder of a saved dataset"),
        ("part-00000.gz", "Rename .gz files so that their names say what is inside, such as .jsonl.gz."),
    ],
)
def test_unsupported_files_that_look_like_data_are_refused(tmp_path, name, cure):
    make(tmp_path, {"README.txt": "About these data, at length. " * 9})
    (tmp_path / name).write_bytes(b"data")
    sentence = refused(tmp_path)
    assert "which look like the data: 1 ." in sentence and cure in sentence and "`exclude`" in sentence
    assert names(find_inputs([str(tmp_path)], exclude=[name])) == ["README.txt"]
    assert cure in refused(tmp_path / name)  # given by itself
    (tmp_path / "README.txt").unlink()
    assert cure in refused(tmp_path)  # alone


def test_a_folder_with_more_unsupported_than_read_bytes_is_refused(tmp_path):
    make(tmp_path, {"a.txt": "a" * 100, "b.md": "b" * 100, "c.md": "", "cover.png": b"p" * 1000})
    assert find_inputs([str(tmp_path)]).unsupported.files == {".md": 2, ".png": 1}
    (tmp_path / "c.md").write_text("c")
    sentence = refused(tmp_path)
    assert "more bytes than those that are read: 1 .png (1.00kB), 2 .md (101B). Only 1 .txt" in sentence
    assert "Rename .md files to .txt if they are plain text." in sentence
    (tmp_path / "part-00000").write_text("x" * 1000)
    assert "1 without ending (1.00kB)" in refused(tmp_path, exclude=["*.md"])


def test_hidden_names_are_counted_and_not_read(tmp_path):
    hidden = {
        ".hidden.txt": "x", ".git/objects/b.txt": "x" * 99, "_SUCCESS": "", "__MACOSX/a.txt": "x",
        "deep/.ipynb_checkpoints/a.txt": "x", "dataset_info.json": "{}",
    }  # fmt: skip
    make(tmp_path, {"a.txt": "a"} | hidden)
    inputs = find_inputs([str(tmp_path)])
    assert names(inputs) == ["a.txt"]
    assert inputs.hidden == len(hidden) and f"; {len(hidden)} hidden." in inputs.sentence()
    # a folder that is named is read, whatever its name
    assert names(find_inputs([str(tmp_path / ".git")])) == ["objects/b.txt"]


def test_links_are_followed_once_and_broken_links_refused(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", {"a.txt": "a", "deep/b.txt": "b"})
    folder = make(tmp_path / "folder", {"own.txt": "c"})
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(elsewhere)
    (folder / "file.txt").symlink_to(elsewhere / "a.txt")
    assert names(find_inputs([str(folder)])) == ["file.txt", "linked/a.txt", "linked/deep/b.txt", "own.txt"]
    (folder / "broken.txt").symlink_to(tmp_path / "nothing.txt")
    assert "broken.txt is a link to a file that does not exist" in refused(folder)
    assert len(find_inputs([str(folder)], exclude=["broken*"]).sources) == 4


def test_a_text_beside_its_compressed_copy_gives_a_warning(tmp_path):
    make(tmp_path, {"x.txt": "a", "x.txt.gz": gzip.compress(b"a"), "y.txt": "b"})
    [remark] = find_inputs([str(tmp_path)]).warnings()
    assert "x.txt" in remark and "x.txt.gz" in remark and "both are read" in remark


def test_a_folder_without_supported_files_is_refused(tmp_path):
    make(tmp_path, {"a.pdf": "xx", "b.pdf": "xx", "c.md": "x", ".d.txt": "x"})
    sentence = refused(tmp_path)
    assert "contains no file that can be read" in sentence
    assert "It contains 2 .pdf (4.00B), 1 .md (1.00B)." in sentence and "1 are hidden." in sentence


def test_empty_files_are_named_together_and_may_be_skipped(tmp_path):
    make(tmp_path, {"a.txt": "a", "b.jsonl": "", "c.jsonl": ""})
    sentence = refused(tmp_path)
    assert f"{tmp_path}/b.jsonl, {tmp_path}/c.jsonl are empty. (`on_bad_document` skip counts" in sentence
    assert len(find_inputs([str(tmp_path)], skip_empty=True).sources) == 3


def test_a_pattern_that_excludes_nothing_is_refused(tmp_path):
    make(tmp_path, {"a.txt": "a", "drafts/b.txt": "b"})
    assert "`exclude` names '*.md', but no file of a folder matches it" in refused(tmp_path, exclude=["*.md"])
    assert "`exclude` names 'a*'" in refused(tmp_path / "a.txt", exclude=["a*"])
    assert names(find_inputs([str(tmp_path)], exclude=["drafts/*"])) == ["a.txt"]
