"""Nothing that is loaded runs code, leaves its folder or reaches a shell; nobody else can write where a run writes."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import stat
import string
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from megamask import hf
from megamask.checkpoint import resume
from megamask.config import checks, recipes
from megamask.errors import ConfigError, MegamaskError
from megamask.hf import Card
from megamask.hf.importing import import_model
from tests.hostile import corpus, targets
from tests.hostile.fuzzing import Target, Watch
from tests.hostile.targets import TARGETS
from tests.system.commands import shell, training

EXPORT = "export"


def _exported(folder: Path) -> None:
    """The tokenizer of a folder goes into an export."""
    model = import_model(folder)
    hf.export_model(model.weights, model.shape, folder, folder / "out", card=Card("a", "b", 1, "c"))


ALL = TARGETS | {EXPORT: Target(targets._model, _exported)}


@contextmanager
def looked_into(folder: Path) -> Iterator[list[str]]:
    """The names in ``folder`` that anybody opened, whatever library or process did it (inotify)."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    opened, accessed, created, modified = 0x20, 0x1, 0x100, 0x2
    assert (
        handle >= 0 and libc.inotify_add_watch(handle, os.fsencode(folder), opened | accessed | created | modified) > 0
    )
    seen: list[str] = []
    try:
        yield seen
        raw = b""
        while True:
            try:
                raw += os.read(handle, 65536)
            except BlockingIOError:
                break
        while raw:
            _, mask, _, size = struct.unpack("iIII", raw[:16])
            name = raw[16 : 16 + size].rstrip(b"\0").decode()
            if not mask & 0x40000000:  # the folder itself may be listed
                seen.append(name)
            raw = raw[16 + size :]
    finally:
        os.close(handle)


def loaded(target: Target, do: Callable[[Path], object], folder: Path, *, sealed: bool) -> tuple[str, list[str]]:
    """Read a folder after ``do`` was done to it, in a child: what it ended with, what it did that is forbidden."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            for stream, how in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
                os.dup2(os.open(os.devnull, how), stream)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(30)  # a pipe without a writer would be waited for
            do(folder)
            if sealed:
                with suppress(Exception):  # what is forged beyond sealing
                    target.seal(folder)
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            watch = Watch(folder, allowed=["/dev/"])
            with watch:
                try:
                    target.read(folder)
                    ended = "read"
                except MegamaskError as error:
                    ended = f"refused: {error}"
                except BaseException as error:
                    ended = f"{type(error).__name__}: {error}"
            os.write(write, json.dumps((ended[:400], watch.seen[:5])).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        content = file.read()
    _, status = os.waitpid(child, 0)
    return tuple(json.loads(content)) if content else (f"died of {os.WTERMSIG(status) or status}", [])


def assert_harmless(tmp_path: Path, every: int = 1) -> None:
    """Each, or one of ``every`` so many, artefacts is read or refused, and does nothing else."""
    canary, secret = tmp_path / "canary", tmp_path / "secret"
    secret.mkdir()
    for name in ("tokens.npy", "model.safetensors", "config.json"):
        (secret / name).write_bytes(b"nobody may read this")
    tried = refused = 0
    wrong = []
    for number, (name, what, do) in enumerate([*corpus.artefacts(canary, secret)][::every]):
        sound, folder = tmp_path / "sound" / name, tmp_path / str(number)
        if not sound.exists():
            sound.mkdir(parents=True)
            ALL[name].begin(sound)
        shutil.copytree(sound, folder)
        with looked_into(secret) as seen:
            ended, did = loaded(ALL[name], do, folder, sealed=number % 2 == 0)
        if "is a link" in what:
            seen = [one for one in seen if "link" not in what]  # it was put there just now
        tried += 1
        refused += ended.startswith("refused")
        if canary.exists() or did or seen or not ended.startswith(("refused", "read")):
            wrong.append(f"{name}, {what}: {ended}; did {did}; looked at {seen}; canary {canary.exists()}")
            canary.unlink(missing_ok=True)
        shutil.rmtree(folder)
    print(f"{tried} artefacts, {refused} refused, {tried - refused} read for what they are, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
    assert tried >= 60 and refused > tried / 2


def test_no_artefact_runs_code_or_leads_away(tmp_path: Path) -> None:
    assert_harmless(tmp_path, every=2)  # tests/soak has them all


@pytest.mark.parametrize("load", [corpus.plain_pickle, corpus.plain_array])
def test_a_loader_that_knows_no_better_is_seen(load: Callable[[Path, Path], None], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    plain = Target(lambda folder: [], lambda folder: load(folder, canary))
    (tmp_path / "in").mkdir()
    _, did = loaded(plain, lambda folder: None, tmp_path / "in", sealed=False)
    assert canary.exists()
    assert any("os.system" in one for one in did) and any("pickle.find_class" in one for one in did)


def test_a_look_into_a_folder_is_seen(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 16)
    with looked_into(tmp_path) as seen:
        try:
            torch.load  # noqa: B018
            from safetensors import safe_open

            safe_open(tmp_path / "model.safetensors", "pt")  # opened by Rust, unheard by Python
        except Exception:
            pass
    assert "model.safetensors" in seen


# ---- names


def names(count: int, seed: int = 0) -> Iterator[str]:
    """Folder names that mean something to a shell, a terminal, a file system or Slurm."""
    pieces = [
        "$(touch CANARY)",
        "`touch CANARY`", "; touch CANARY;", "| touch CANARY", "&& touch CANARY", "'", '"', "\\", "\n",
        "\n#SBATCH --wrap=touch CANARY\n",
        "\r", "\0", "\x1b]0;x\x07", "-", "--", "-rf", " ", "  ", "~", "*", "?", "[a]",
        "{a,b}", "%j", "%n", "${HOME}", "$IFS", "..", "/", "//", ".", "é", "\u202e", "\ud800", "\U0001f600", "#", "!",
        "<", ">", "a" * 300, "con", "a:b",
    ]  # fmt: skip
    draw = random.Random(seed)
    for _ in range(count):
        words = (
            draw.choice((*pieces, "".join(draw.choices(string.ascii_letters, k=3)))) for _ in range(draw.randint(1, 5))
        )
        yield "".join(words)


def named(root: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """``--output`` of ``count`` strange names: a folder below ``root``, or a sentence; returns how many of each."""
    from dataclasses import replace

    monkeypatch.setattr(resume, "describe_environment", lambda: {})
    monkeypatch.chdir(root)
    before = set(os.listdir(root.parent))
    base = recipes.find_recipe("tiny")
    made = refused = 0
    for name in names(count):
        output = Path(str(root) + os.sep + name.replace("CANARY", str(root / "canary")))
        if not Path(os.path.normpath(output)).is_relative_to(root):
            continue  # who types a path out of a folder means that
        try:
            checks.check_config(replace(base, output=output), None, 1)
            resume.open_run(output, {}).close()
            made += 1
            assert output.is_dir() and output.name.isprintable()
        except MegamaskError as error:
            refused += 1
            assert str(error).replace("\n", "").isprintable()
    assert not (root / "canary").exists()
    assert set(os.listdir(root.parent)) == before
    return made, refused


def test_names_of_runs_reach_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int = 300) -> None:
    (tmp_path / "root").mkdir()
    made, refused = named(tmp_path / "root", count, monkeypatch)
    print(f"names: {made} folders made, {refused} refused")
    assert made and refused


def test_a_name_that_no_terminal_shows_is_refused() -> None:
    from dataclasses import replace

    for name in ("a\nb", "a\x1b[2Jb", "a\ud800b"):
        with pytest.raises(ConfigError, match=r"`output` must contain only printable characters"):
            checks.check_config(replace(recipes.find_recipe("tiny"), output=Path(name)), None, 1)


# ---- what a run leaves, and what it tells


SECRETS = {
    name: f"hidden-{number:02d}-{'x' * 20}"
    for number, name in enumerate(
        f"{who}_{what}"
        for who in ("HF", "HUGGING_FACE_HUB", "WANDB", "AWS", "GITHUB", "OPENAI")
        for what in ("TOKEN", "API_KEY", "SECRET_ACCESS_KEY", "PASSWORD", "CREDENTIALS")
    )
}


def leaks(folder: Path, *outputs: str) -> list[str]:
    """Where one of the secrets stands: files below ``folder``, or what was told."""
    inside = [(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    inside += [("told", one.encode()) for one in outputs]
    return [where for where, raw in inside if any(secret.encode() in raw for secret in SECRETS.values())]


def open_to_others(folder: Path) -> list[str]:
    """Files and folders that others than their owner may read or write."""
    return [
        str(path)
        for path in [folder, *folder.rglob("*")]
        if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink()
    ]


def test_a_run_keeps_secrets_and_lets_nobody_in(data: Path, tmp_path: Path) -> None:
    """Under the strictest mask of modes, with secrets in the environment and a shared folder for what is brief."""
    assert len(SECRETS) == 30
    shared = tmp_path / "shared"
    shared.mkdir()
    wrapper = (
        "import os, sys; os.umask(0o077); from megamask import pretrain;"
        " from megamask.runtime import ranks; code = pretrain.main(sys.argv[1:]);"
        "fds = [f'/proc/self/fd/{f}' for f in os.listdir('/proc/self/fd')];"
        "own = [os.readlink(f) for f in fds if os.path.lexists(f)];"
        "own = {o[8:-1] for o in own if o.startswith('socket:')};"
        "rows = [l.split() for t in ('tcp', 'tcp6') for l in open(f'/proc/net/{t}').readlines()[1:]];"
        "print('LISTENS', [r[1] for r in rows if r[3] == '0A' and r[9] in own]); ranks.exit_process(code)"
    )
    arguments = training(data, tmp_path / "run", steps=2, export=True)
    env = SECRETS | {"TMPDIR": str(shared), "HF_HUB_OFFLINE": "1"}
    ended = shell(sys.executable, "-c", wrapper, *arguments, env=env)
    assert ended.code == 0, ended.err
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert not leaks(tmp_path / "run", ended.out, ended.err)
    copied = tmp_path / "run" / "tokenizer"  # as open as the text's own
    assert not [path for path in open_to_others(tmp_path / "run") if not Path(path).is_relative_to(copied)]
    assert not [path for path in shared.rglob("*") if "torchinductor" not in str(path)]
    heard = next(line for line in ended.out.splitlines() if line.startswith("LISTENS"))
    addresses = [address.split(":")[0] for address in eval(heard.removeprefix("LISTENS"))]
    print(heard)
    assert all(address in ("0100007F", "00000000000000000000000001000000") for address in addresses), heard


def test_a_leak_and_an_open_door_are_seen(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps(SECRETS))
    (tmp_path / "environment.json").chmod(0o644)
    assert leaks(tmp_path) and leaks(tmp_path / "none", SECRETS["HF_TOKEN"]) == ["told"]
    assert str(tmp_path / "environment.json") in open_to_others(tmp_path)
