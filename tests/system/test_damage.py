"""Whatever happens to a file of a checkpoint: it is named, the one before is used, and the run comes to the same."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from megamask.checkpoint import format
from megamask.checkpoint.format import verify_on_all_ranks
from megamask.checkpoint.run_folder import RunFolder
from megamask.errors import CheckpointError
from megamask.storage import atomic_write, file_list
from megamask.training import finish
from tests.system.commands import content, train
from tests.system.conftest import STEPS
from tests.system.test_story import assert_same_run


def damages(path: Path, bits: int, seed: int = 0) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file: (in words, its bytes; None if it is gone)."""
    whole = path.read_bytes()
    for length in sorted({0, 1, len(whole) // 2, len(whole) - 1}):
        yield f"cut to {length}", whole[:length]
    yield "a byte more", whole + b"\0"
    yield "gone", None
    yield "zeros", bytes(len(whole))
    draw = random.Random(f"{seed} {path.name}")
    places = [0, 7, 8 * len(whole) - 8, 8 * len(whole) - 1]
    for place in [*places, *(draw.randrange(8 * len(whole)) for _ in range(bits))]:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        yield f"bit {place} flipped", bytes(flipped)


def sweep(folder: Path, bits: int) -> dict:
    """Every damage to every file, one at a time, and each two files swapped; what was not seen or not named."""
    tried, missed = 0, []
    contents = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    def see(what: str, *names: str) -> None:
        nonlocal tried
        tried += 1
        try:
            verify_on_all_ranks(folder)
            missed.append(f"{what} was not seen")
        except CheckpointError as error:
            if not any(name in str(error) for name in names):
                missed.append(f"{what} was not named: {error}")

    for path, whole in contents.items():
        for what, text in damages(path, bits):
            path.unlink() if text is None else path.write_bytes(text)
            see(f"{path.name} {what}", path.name)
            path.write_bytes(whole)
    for one, two in ((one, two) for one in contents for two in contents if one < two):
        one.write_bytes(contents[two]), two.write_bytes(contents[one])
        see(f"{one.name} and {two.name} swapped", one.name, two.name)
        one.write_bytes(contents[one]), two.write_bytes(contents[two])
    verify_on_all_ranks(folder)
    return {"files": len(contents), "damages": tried, "missed": missed}


def test_every_damage_is_seen_and_named(copy: Path, bits: int = 64) -> None:
    unnoticed = sweep(RunFolder(copy).checkpoint(STEPS), bits)
    print(f"\ndamages: {unnoticed}")
    assert unnoticed["missed"] == []
    assert unnoticed["damages"] > unnoticed["files"] * bits


def test_a_file_whose_hash_is_not_looked_at_is_found(copy: Path, monkeypatch) -> None:
    folder = RunFolder(copy).checkpoint(STEPS)
    known = format.read_manifest(folder).files["state.json"].sha256
    read = file_list.sha256
    monkeypatch.setattr(file_list, "sha256", lambda path: known if path.name == "state.json" else read(path))
    assert sweep(folder, 8)["missed"]


def test_a_run_resumes_from_the_newest_intact_checkpoint(copy: Path, data: Path, finished: Path) -> None:
    run = RunFolder(copy)
    newest, second, oldest = (run.checkpoint(step) for step in run.steps())
    shard = newest / "rank-00000.safetensors"
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)
    (second / "state.json").write_text("{")
    run.latest.write_bytes(b"\xff" * 1000)
    ended = train(data, copy, steps=STEPS, checkpoint__every=4, validation__every=4)
    assert ended.code == 0, ended.err
    assert f"{shard} is damaged" in ended.out and f"{second / 'state.json'} has 1 bytes" in ended.out
    assert f"resuming after step {oldest.name.removeprefix('step-')} of" in ended.out
    assert_same_run(copy, finished, STEPS)
    assert run.latest.read_text() == f"step-{STEPS}\n"


def test_without_an_intact_checkpoint_nothing_starts(copy: Path, data: Path) -> None:
    run = RunFolder(copy)
    steps = run.steps()
    for step in steps:
        (run.checkpoint(step) / "MANIFEST.json").write_text(json.dumps({"step": step}))
    before = content(copy / "logs")
    ended = train(data, copy, steps=STEPS, checkpoint__every=4, validation__every=4)
    assert ended.code == CheckpointError.exit_code == 4
    assert all(f"step-{step}/MANIFEST.json is damaged" in ended.err for step in steps)
    again = train(data, copy, steps=STEPS, checkpoint__every=4, validation__every=4)
    assert again.code == 4
    assert content(copy / "logs") == before


def test_storage_that_fails_around_the_last_steps_costs_no_checkpoint(
    copy: Path, data: Path, finished: Path, monkeypatch
) -> None:
    run, more = RunFolder(copy), {"steps": STEPS, "checkpoint__every": 4, "validation__every": 4}
    shutil.rmtree(run.checkpoint(STEPS))
    lines = run.logs / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes() + "Jörg".encode("utf-16") + b"\n" + lines.read_bytes()[:500])
    write, tried = atomic_write.write_file, []

    def full(path: Path, chunks) -> file_list.FileEntry:
        if "metrics" in path.name and not tried:
            tried.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, chunks)

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(atomic_write, "write_file", full)
        patch.setattr(finish, "plot_curve", fails)
        patch.setattr(finish, "export_checkpoint", fails)
        ended = train(data, copy, export=True, **more)
    assert ended.code == 7, ended.err
    assert f"{lines} cannot be written: No space left on device" in ended.out
    assert "could not draw" in ended.out and "its checkpoints are saved, but the model was not exported" in ended.err
    assert_same_run(copy, finished, STEPS)
    again = train(data, copy, export=True, **more)
    assert again.code == 0 and (run.export / "model.safetensors").is_file(), again.err
