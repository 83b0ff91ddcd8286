"""Shards: what was written is read, and every kind of damage is a sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megamask.data.shard_writer import EncodedDocuments, write_shards, write_sidecar
from megamask.data.shards import Shards, id_type
from megamask.errors import DataError


@pytest.fixture
def folder(make_shards):
    return make_shards(range(1, 60), shard_tokens=400)


def change(folder, act):
    """Change the manifest in place."""
    manifest = json.loads((folder / "manifest.json").read_text())
    act(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_written_is_read(folder, documents_of):
    shards = Shards.open(folder, verify=True)
    assert len(shards.names) > 2
    documents = documents_of(shards)
    assert [len(d) for d in documents] == list(range(1, 60))
    assert (shards.documents, shards.tokens) == (59, sum(range(1, 60)))
    stream = np.concatenate(documents)
    assert np.array_equal(np.concatenate(shards.parts), stream)
    assert np.array_equal(shards.unigram, np.bincount(stream, minlength=300))
    # places of the whole stream, within a shard and over several
    for places in (np.arange(5, 90), np.random.default_rng(0).permutation(len(stream)), np.arange(len(stream))):
        assert np.array_equal(shards.read(shards.parts, places), stream[places])
    assert np.array_equal(Shards.open(folder, "valid").unigram, shards.unigram)


def test_a_guess_by_frequency_guesses_no_special_id(folder):
    counts = np.load(folder / "train.unigram.npy")
    counts[1] = 10**6  # [UNK], which a text may be full of and which is never a target
    np.save(folder / "train.unigram.npy", counts)
    shards = Shards.open(folder)
    expected = [0 if number in shards.token_ids.special else count for number, count in enumerate(counts)]
    assert shards.unigram.tolist() == expected


def test_words_and_special_ids(folder, tiny_tokenizer):
    shards = Shards.open(folder)
    ids = shards.token_ids
    assert (ids.pad, ids.cls, ids.sep, ids.mask, ids.size) == (0, 2, 3, 4, 300)
    assert ids.special == (0, 1, 2, 3, 4)
    words = tiny_tokenizer.backend.get_vocab()
    assert all(shards.starts_word[number] == (not word.startswith("##")) for word, number in words.items())


def test_the_integer_type_is_the_narrowest():
    assert [str(id_type(size)) for size in (300, 65_535, 65_536, 2**20)] == ["uint16", "uint16", "uint32", "uint32"]


def test_the_fingerprint_does_not_depend_on_sidecars(make_shards):
    first, second, other = (
        make_shards(lengths, name=name) for name, lengths in (("a", [5, 6]), ("b", [5, 6]), ("c", [6, 5]))
    )
    prints = [Shards.open(folder).fingerprint for folder in (first, second, other)]
    assert prints[0] == prints[1] != prints[2]
    write_sidecar(first, "tags", "train", [np.zeros(11, np.uint8)])
    assert Shards.open(first, verify=True).fingerprint == prints[0]
    assert Shards.open(first).sidecar("tags") is not None
    assert Shards.open(first).sidecar("entropy") is None
    assert Shards.open(first, "valid").sidecar("tags") is None


def test_a_sidecar_is_replaced_as_a_whole(make_shards):
    folder = make_shards([5, 6], shard_tokens=4)
    names = Shards.open(folder).names
    assert len(names) == 2
    sizes = [len(part) for part in Shards.open(folder).parts]
    write_sidecar(folder, "entropy", "train", [np.zeros(n, np.uint8) for n in sizes], {"top": 1.5})
    write_sidecar(folder, "tags", "train", [np.zeros(n, np.uint8) for n in sizes])
    shards = Shards.open(folder, verify=True)
    assert shards.sidecar_facts("entropy") == {"top": 1.5}
    assert shards.sidecar_facts("tags") is None and Shards.open(folder, "valid").sidecar_facts("entropy") is None

    def half():
        yield np.ones(sizes[0], np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sidecar(folder, "entropy", "train", half(), {"top": 2.5})
    assert Shards.open(folder, verify=True).sidecar("entropy") is None
    write_sidecar(folder, "entropy", "train", [np.ones(n, np.uint8) for n in sizes], {"top": 2.5})
    shards = Shards.open(folder, verify=True)
    assert shards.sidecar_facts("entropy") == {"top": 2.5}
    assert all((part == 1).all() for part in shards.sidecar("entropy"))
    facts_file = folder / "train.entropy.json"
    facts_file.write_text(facts_file.read_text().replace("2.5", "3.5"))
    with pytest.raises(DataError, match=r"train\.entropy\.json is damaged"):
        Shards.open(folder, verify=True)


def test_a_sidecar_of_the_wrong_shape_is_refused(make_shards):
    folder = make_shards([5, 6])
    for wrong in (np.zeros(10, np.uint8), np.zeros(11, np.int64)):
        with pytest.raises(DataError, match="must have 11 numbers of type uint8"):
            write_sidecar(folder, "tags", "train", [wrong])
    with pytest.raises(DataError, match="must be one of tags, entropy"):
        write_sidecar(folder, "colours", "train", [])
    assert Shards.open(folder).sidecar("tags") is None


def test_ids_outside_the_vocabulary_are_not_written(tmp_path, tiny_tokenizer):
    documents = EncodedDocuments(np.array([7, 300]), np.array([2]))
    with pytest.raises(DataError, match="gave the id 300, but its vocabulary has 300"):
        write_shards(tmp_path, tiny_tokenizer, {"train": [documents]}, facts={})


def cut_short(folder):
    file = folder / "train-00001.tokens.npy"
    file.write_bytes(file.read_bytes()[:-10])


def grown(folder):
    with (folder / "train-00001.offsets.npy").open("ab") as file:
        file.write(b"x")


def other_tokenizer(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"w7"', '"w_"'))


def linked_away(folder):
    file = folder / "train-00000.tokens.npy"
    outside = folder.parent / "outside.npy"
    file.rename(outside)
    file.symlink_to(outside)


def leads_out(folder):
    change(folder, lambda m: m["files"].update({"../outside.npy": {"bytes": 1, "sha256": ""}}))


def absolute(folder):
    change(folder, lambda m: m["files"].update({"/outside.npy": {"bytes": 1, "sha256": ""}}))


def too_many_words(folder):
    change(folder, lambda m: m["token_ids"].update(size=70_000))


def too_large_id(folder):
    change(folder, lambda m: m["splits"]["train"]["shards"][0].update(largest=300))


def unlisted(folder):
    change(folder, lambda m: m["files"].pop("train-00000.tokens.npy"))


def half_a_sidecar(folder):
    shards = Shards.open(folder)
    write_sidecar(folder, "tags", "train", [np.zeros(len(part), np.uint8) for part in shards.parts])
    change(folder, lambda m: m["sidecars"]["tags"]["train"].pop("train-00001.tags.npy"))


def other_counts(folder):
    change(folder, lambda m: m["splits"]["train"]["shards"][0].update(tokens=1))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut_short, r"train-00001\.tokens\.npy has [\d,]+ bytes, but [\d,]+ were written"),
        (grown, r"train-00001\.offsets\.npy has [\d,]+ bytes, but"),
        (lambda f: (f / "starts_word.npy").unlink(), r"starts_word\.npy is missing"),
        (other_tokenizer, r"is not the tokenizer that made these shards"),
        (linked_away, r"train-00000\.tokens\.npy is not a regular file"),
        (leads_out, r"lists '\.\./outside\.npy', which leads out of the folder"),
        (absolute, r"lists '/outside\.npy', which leads out of the folder"),
        (too_many_words, r"70000 tokens does not fit into the shards' integer type uint16"),
        (too_large_id, r"contains the id 300, but the vocabulary has 300"),
        (unlisted, r"does not list train-00000\.tokens\.npy"),
        (half_a_sidecar, r"does not list train-00001\.tags\.npy"),
        (other_counts, r"train-00000\.tokens\.npy must have 1 numbers of type uint16"),
        (lambda f: (f / "manifest.json").unlink(), "contains no manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"format"'), "manifest.json is not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json must contain a JSON object"),
        (lambda f: change(f, lambda m: m.update(version=2)), "version` must be 1, but is '2'"),
        (lambda f: change(f, lambda m: m.pop("token_ids")), "manifest.json is damaged: `token_ids` is missing"),
    ],
)
def test_damage_is_a_sentence(folder, damage, sentence):
    damage(folder)
    with pytest.raises(DataError, match=sentence):
        Shards.open(folder)


def test_all_damage_is_reported_at_once(folder):
    cut_short(folder)
    grown(folder)
    (folder / "starts_word.npy").unlink()
    with pytest.raises(DataError) as caught:
        Shards.open(folder)
    assert len(caught.value.problems) == 3


def test_a_flipped_bit_is_found_by_verify(folder):
    file = folder / "train-00001.tokens.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"train-00001\.tokens\.npy is damaged: its sha256"):
        Shards.open(folder, verify=True)


def test_a_missing_folder_and_an_empty_split(tmp_path, make_shards):
    with pytest.raises(DataError, match="is not a folder"):
        Shards.open(tmp_path / "nothing")
    with pytest.raises(DataError, match="contains no documents in the split 'valid'"):
        Shards.open(make_shards([5, 6], valid=[]), "valid")


def test_offsets_that_do_not_fit_are_refused(folder):
    file = folder / "train-00000.offsets.npy"
    offsets = np.load(file)
    offsets[1] = offsets[-1] + 1
    np.save(file, offsets)
    with pytest.raises(DataError, match="does not fit its tokens"):
        list(Shards.open(folder).offsets())
