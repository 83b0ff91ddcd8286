"""What is read is what was written, or the damage is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from megamask.checkpoint import format
from megamask.checkpoint.format import read_manifest, read_state, read_tensors, read_weights, verify
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.errors import CheckpointError
from megamask.storage import atomic_write, file_list

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    names = ("embed", "layers.0.qkv", "layers.0.out", "norm")
    return {
        f"{kind}/{name}": torch.randn(3, 5, generator=rng) for kind in ("weights", "exp_avg", "z") for name in names
    }


@pytest.fixture
def saved(run):
    save_checkpoint(run, 7, some_tensors(), {"step": 7, "loss": 0.1 + 0.2})
    return run.checkpoint(7)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), max_size=3)), max_size=6), st.integers(0, 99)
)
def test_the_library_reads_what_we_serialise(kinds, seed):
    rng = torch.Generator().manual_seed(seed)
    tensors = {f"{i}": torch.randint(0, 2, shape, generator=rng).to(kind) for i, (kind, shape) in enumerate(kinds)}
    tensors_read = load(b"".join(format.serialise(tensors)))
    assert tensors_read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensors_read[name].dtype == tensor.dtype
        assert torch.equal(tensors_read[name], tensor)


def test_a_view_is_serialised_as_its_values():
    whole = torch.arange(12.0).reshape(3, 4)
    tensors_read = load(b"".join(format.serialise({"turned": whole.T, "part": whole[:, 1]})))
    assert torch.equal(tensors_read["turned"], whole.T)
    assert torch.equal(tensors_read["part"], whole[:, 1])


def test_round_trip_is_exact(run, saved):
    tensors = some_tensors()
    tensors_read = dict(read_tensors(saved))
    assert tensors_read.keys() == tensors.keys()
    assert all(torch.equal(tensors_read[name], tensors[name]) for name in tensors)
    assert read_state(saved) == {"step": 7, "loss": 0.1 + 0.2}
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    for place, step in ((run.path, None), (run.path, 7), (saved, None)):
        read = read_weights(place, step)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_reading_by_name_and_prefix(saved):
    assert {name for name, _ in read_tensors(saved, "exp_avg/")} == {n for n in some_tensors() if n.startswith("exp_")}
    assert [name for name, _ in read_tensors(saved, names=["z/norm"])] == ["z/norm"]
    with pytest.raises(CheckpointError, match="lacks the tensor z/other"):
        list(read_tensors(saved, names=["z/norm", "z/other"]))


def test_every_truncation_is_named(saved):
    for file in sorted(saved.iterdir()):
        whole = file.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 1, len(whole) + 1):
            file.write_bytes((whole + b" ")[:length])
            with pytest.raises(CheckpointError, match=file.name):
                verify(saved)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            verify(saved)
        file.write_bytes(whole)
    assert verify(saved).step == 7


@settings(deadline=None)
@given(data=st.data())
def test_every_flipped_bit_is_named(tmp_path_factory, data):
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.checkpoints.mkdir()
    save_checkpoint(run, 7, some_tensors(), {"step": 7})
    folder = run.checkpoint(7)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match=file.name):
        verify(folder)
    with pytest.raises(CheckpointError, match=file.name):
        read_weights(run.path)


def test_swapped_files_of_two_ranks_are_named(run):
    """Each is a valid file of the right size; only the hash knows."""
    folder = run.checkpoint(3)
    folder.mkdir()
    parts = [{"a": torch.zeros(4)}, {"a": torch.ones(4)}]
    contents = {f"rank-0000{i}.safetensors": format.serialise(part) for i, part in enumerate(parts)}
    files = {name: atomic_write.write_file(folder / name, chunks) for name, chunks in contents.items()}
    files["state.json"] = atomic_write.write_file(folder / "state.json", [b"{}"])
    manifest = format.Manifest(3, "launch", files)
    atomic_write.write_file(folder / "MANIFEST.json", [format.render_manifest(manifest)])
    assert verify(folder) == manifest
    with pytest.raises(CheckpointError, match="twice"):
        list(read_tensors(folder))
    one, two = (folder / name for name in contents)
    one.rename(folder / "x"), two.rename(one), (folder / "x").rename(two)
    assert file_list.damage(folder, files).keys() == contents.keys()
    assert not file_list.damage(folder, files, hashes=False)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", ".hidden", ""])
def test_a_manifest_cannot_name_files_outside(run, saved, name):
    manifest = format.Manifest(7, "launch", {name: file_list.FileEntry(1, "0" * 64)})
    (saved / "MANIFEST.json").write_bytes(format.render_manifest(manifest))
    with pytest.raises(CheckpointError, match="not a plain name"):
        read_manifest(saved)


def test_a_link_is_not_a_file_of_a_checkpoint(saved, tmp_path):
    file = saved / "state.json"
    shutil.move(file, tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        verify(saved)


def test_a_forged_or_strange_manifest_is_damage(saved):
    path = saved / "MANIFEST.json"
    whole = json.loads(path.read_bytes())
    strange = [b"", b"null", b"[]", b'{"sha256": 1}', b"\xff\xfe", b"[" * 100_000]
    strange += [json.dumps({**whole, key: value}, indent=1).encode() for key in whole for value in (None, -1, [], "x")]
    strange += [path.read_bytes() + b"\n", path.read_bytes().replace(b'"step"', b'"step": 7, "step"')]
    for text in strange:
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged"):
            read_manifest(saved)


STRANGE = [None, -1, [], {}, "x", True, 0.5, float("inf"), float("nan"), 10**400, "../../etc", "x" * 10**6, [[]] * 9]


def test_a_forged_manifest_with_a_valid_hash_adds_no_file(saved, tmp_path):
    """Each field removed and retyped, by somebody who can seal a manifest: an error in words, or the same checkpoint.

    What must not be is a crash, a file outside the folder, or other files than those whose hashes are named.
    """
    path, outside = saved / "MANIFEST.json", tmp_path / "secret"
    outside.write_text("secret")
    whole = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "sha256"}
    genuine = read_manifest(saved)

    def forged(holder: dict, key: str):
        rest = dict(holder)
        value = rest.pop(key)
        yield rest
        for strange in (*STRANGE, str(outside), [value], {key: value}):
            yield {**rest, key: strange}

    bodies = [body for key in whole for body in forged(whole, key)]
    for number, entry in enumerate(whole["files"]):
        for key in entry:
            for other in forged(entry, key):
                bodies.append({**whole, "files": [*whole["files"][:number], other, *whole["files"][number + 1 :]]})
        bodies.append({**whole, "files": [*whole["files"], entry]})
        bodies.append({**whole, "files": whole["files"][:number] + whole["files"][number + 1 :]})
    refused = 0
    for body in bodies:
        path.write_bytes(format._seal(body))
        try:
            manifest = verify(saved)
        except CheckpointError:
            refused += 1
        else:
            assert manifest.step == genuine.step
            assert manifest.files.items() <= genuine.files.items()
            assert "state.json" in manifest.files
    assert refused > 0.7 * len(bodies)  # the name of a launch may be any, and a file may be left out


def test_a_manifest_that_is_too_large_is_not_read(saved):
    with (saved / "MANIFEST.json").open("r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged"):
        read_manifest(saved)


def test_a_newer_format_is_refused_with_a_sentence(saved, monkeypatch):
    manifest = read_manifest(saved)
    monkeypatch.setattr(format, "FORMAT", format.FORMAT + 1)
    (saved / "MANIFEST.json").write_bytes(format.render_manifest(manifest))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="Use a newer megamask"):
        read_weights(saved)


def test_a_renamed_checkpoint_of_another_step_is_refused(run, saved):
    saved.rename(run.checkpoint(8))
    with pytest.raises(CheckpointError, match="step 7"):
        verify(run.checkpoint(8))


def test_a_missing_checkpoint_is_named(run, saved, tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint of step 8; it has 7"):
        read_weights(run.path, 8)
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        read_weights(tmp_path / "nowhere")
