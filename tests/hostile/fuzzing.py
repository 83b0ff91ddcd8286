"""Readers under fire: hostile bytes in, a value or a MegamaskError out, and nothing else.

A target is a folder of sound files, a reader, and whatever makes a forged file look vouched for. It is struck ``count``
times in a forked child, each time with a few bytes, fields or numbers of one file changed. What the child must not do:
raise anything but a MegamaskError; open a file outside of its folder, start a process, speak to a socket or unpickle;
take more than four times the input and 64 MiB of memory, or seconds on end; die. A seed names a strike.
"""

# ruff: noqa: E501 (tables of strange things)
from __future__ import annotations

import faulthandler
import json
import math
import mmap
import os
import random
import resource
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from megamask.errors import MegamaskError

ROOT = Path(__file__).parent.parent.parent
MEMORY = 64 * 2**20
SECONDS = 20.0
"""Processor time of one strike, at most; they take milliseconds."""
FORBIDDEN = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind",
             "pickle.find_class", "ctypes.dlopen", "os.startfile", "pty.spawn")  # fmt: skip
OWN = tuple(
    str(Path(folder).resolve()) + "/"
    for folder in {sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), ROOT / "megamask", "/proc", "/sys"}
)
"""Where Python, its libraries and megamask lie: their own imports do not count."""


@dataclass(frozen=True)
class Target:
    """``begin`` makes the sound files in a folder and returns those that are struck; ``read`` reads the folder."""

    begin: Callable[[Path], list[str]]
    read: Callable[[Path], object]
    seal: Callable[[Path], None] = lambda folder: None
    """Make hashes and sizes fit what was forged; done at most of the strikes."""


@dataclass
class Findings:
    """What became of the strikes."""

    tried: int = 0
    refused: int = 0
    """Ended in a MegamaskError; the others were read."""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.tried} tried, {self.refused} refused, {len(self.wrong)} wrong"


def fuzz(target: Target, folder: Path, *, seed: int = 0, count: int = 200, seconds: float = math.inf) -> Findings:
    """Strike ``target`` ``count`` times, or for ``seconds``, in a child; what it did wrong is told, up to five."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    read, write = os.pipe()
    progress = mmap.mmap(-1, 8)
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            findings = _strike_on(target, folder, seed, count, seconds, progress)
        except BaseException:
            findings = Findings(1, 0, [f"the harness failed: {traceback.format_exc()}"])
        try:
            os.write(write, json.dumps(vars(findings)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        report = file.read()
    _, status = os.waitpid(child, 0)
    at = int.from_bytes(progress[:8], "little")
    if os.WIFSIGNALED(status) or not report:
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
        return Findings(at + 1, 0, [f"the interpreter died of {how} at strike {seed + at}"])
    return Findings(**json.loads(report))


def _strike_on(target: Target, folder: Path, seed: int, count: int, seconds: float, progress) -> Findings:
    faulthandler.disable()  # a planted crash need not be reported
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print when they panic
    os.chdir(folder)
    names = target.begin(folder)
    sound = {name: (folder / name).read_bytes() for name in names}
    others = {
        p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and str(p.relative_to(folder)) not in names
    }
    target.read(folder)
    watch = Watch(folder)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, _too_long)
    findings, began = Findings(), time.monotonic()
    while findings.tried < count and time.monotonic() - began < seconds and len(findings.wrong) < 5:
        progress[:8] = findings.tried.to_bytes(8, "little")
        draw = random.Random(seed + findings.tried)
        name = draw.choice(names)
        hostile = mutate(sound[name], draw, name)
        (folder / name).write_bytes(hostile)
        if draw.random() < 0.7:
            with suppress(Exception):  # what is forged beyond sealing
                target.seal(folder)
        wrong = _read(target, folder, len(hostile), watch, findings)
        if wrong:
            findings.wrong.append(f"strike {seed + findings.tried} on {name}: {wrong}\n{hostile[:600]!r}")
        findings.tried += 1
        for path, raw in others.items():
            if not path.is_file() or path.read_bytes() != raw:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(raw)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(sound[name])
    return findings


def _too_long(*_) -> None:
    raise TimeoutError(f"took more than {SECONDS:g} seconds")


def _read(target: Target, folder: Path, size: int, watch: Watch, findings: Findings) -> str:
    before = _peak(reset=True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with watch:
            target.read(folder)
    except MegamaskError as error:
        findings.refused += 1
        if not str(error).strip():
            return "a MegamaskError without a sentence"
    except BaseException as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if watch.seen:
        return f"it did {watch.seen[:5]}"
    if (took := _peak() - before) > MEMORY + 4 * size:
        return f"it took {took:,} bytes of memory for {size:,} of input"
    return ""


def _peak(*, reset: bool = False) -> int:
    """The most memory this process has held, in bytes, since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Watch:
    """While it is entered: which files outside of ``folder`` are opened, and which forbidden things are done.

    It sees what goes through Python, for as long as the process lives: install one in a child.
    """

    def __init__(self, folder: Path, allowed: Iterable[str] = (), packages: Iterable[str] = ()):
        self.inside = (f"{folder}/", *allowed)
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self._hear)

    def __enter__(self) -> Watch:
        self.on, self.seen = True, []
        return self

    def __exit__(self, *_) -> None:
        self.on = False

    def _hear(self, event: str, given: tuple) -> None:
        if not self.on:
            return
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(given)[:200]}")
        elif event == "open" and isinstance(given[0], (str, bytes)):
            self._opened(os.fsdecode(given[0]), given[1], given[2])

    def _opened(self, path: str, mode: str | None, flags: int) -> None:
        self.on = False  # reading the path is not an event
        try:
            there = os.path.realpath(path)
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and "__pycache__" not in there
            own = there.startswith(OWN) and not writes
            if not (f"{there}/".startswith(self.inside) or own or there in ("/dev/null", "/dev/urandom")):
                self.seen.append(f"open {path!r} {mode}")
        except (OSError, ValueError):
            pass  # no path at all: nothing was opened
        finally:
            self.on = True


# ---- what is done to bytes

# fmt: off
NUMBERS = (0, 1, -1, 2, 2**16, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320)
WORDS = ("", " ", ".", "..", "../../etc/passwd", "/etc/passwd", "a/../../b", "C:\\x", "\0", "a\0b", "\n", "\x1b[2J", "é",
         "\ud800", "\ufb01", "\uff41", "True", "1_000", "inf", "NaN", "010", "0x10", "x" * 300, "~", "$(id)", "`id`", "|O", "<u2",
         "train-00000", "a" * 5000)  # fmt: skip
BLOCKS = (b"\x00", b"\xff", b"\x00" * 8, b"\xff" * 8, b"\x80\x00\x00\x00\x00\x00\x00\x00", b"\r\n", b"\n\n", b"\xef\xbb\xbf",
          b"\xed\xa0\x80", b"\xc3", b'"', b"{", b"[" * 5000, b"]", b",", b"NaN", b"1e999", b"-", b"../", b"\\u0000", b"\\ud800",
          b"&a ", b"*a ", b"!!python/object/apply:os.system ", b"? ", b"<<: ", b"9" * 5000)  # fmt: skip


def mutate(raw: bytes, draw: random.Random, name: str) -> bytes:
    """``raw`` with one to three things changed, in ways that suit its kind."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        raw = _structured(raw, draw, name) if draw.random() < 0.6 else _bytes(raw, draw)
    return raw


def _structured(raw: bytes, draw: random.Random, name: str) -> bytes:
    try:
        if name.endswith(".json"):
            return _told(tree(json.loads(raw), draw), draw)
        if name.endswith(".npy"):
            return _array(raw, draw)
        if name.endswith(".safetensors"):
            size = int.from_bytes(raw[:8], "little")
            head = _told(tree(json.loads(raw[8 : 8 + size]), draw), draw)
            size = len(head) if draw.random() < 0.8 else draw.choice((0, 1, 2**27, 2**63, 2**64 - 1, len(raw)))
            return size.to_bytes(8, "little") + head + raw[8 + int.from_bytes(raw[:8], "little") :]
    except Exception:  # changed beyond its kind
        pass
    return _bytes(raw, draw)


def _bytes(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(raw) + 1)
    end = min(len(raw), at + draw.choice((1, 1, 2, 8, 100)))
    how = draw.randrange(7)
    if how == 0 and raw:
        at = min(at, len(raw) - 1)
        return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]
    if how == 1:
        return raw[:at]
    if how == 2:
        return raw[:at] + raw[end:]
    if how == 3:
        return raw[:at] + draw.choice(BLOCKS) + raw[at:]
    if how == 4:
        return raw[:at] + draw.choice(BLOCKS) + raw[end:]
    if how == 5:
        return raw[:end] + raw[at:]
    return draw.choice((b"", raw + raw, b"\x00" * len(raw), raw + b"\x00", draw.randbytes(64)))


def tree(value: Any, draw: random.Random) -> Any:
    """JSON with one place changed: another value, another name, one more or one less."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (dict, list)):
            places += [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
            waiting += node.values() if isinstance(node, dict) else node
    if not places:
        return strange(draw)
    node, key = draw.choice(places)
    how = draw.randrange(6)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[draw.choice((f"{key}x", str(key).upper(), draw.choice(WORDS)))] = node.pop(key)
    elif how == 2:
        other, its = draw.choice(places)
        if its in (other if isinstance(other, dict) else range(len(other))):
            node[key] = json.loads(json.dumps(other[its]))
    elif how == 3 and isinstance(node[key], (int, float)):
        node[key] = draw.choice((node[key] + 1, node[key] - 1, -node[key], float(node[key]), str(node[key])))
    else:
        node[key] = strange(draw)
    return value


def strange(draw: random.Random) -> Any:
    """A value that nobody expects."""
    deep: Any = 0
    for _ in range(draw.choice((3, 70, 400))):
        deep = [deep]
    kinds = (
        None,
        True,
        False,
        [],
        {},
        [[]],
        {"": {}},
        deep,
        math.nan,
        math.inf,
        draw.choice(NUMBERS),
        draw.choice(WORDS),
    )
    return draw.choice(
        (*kinds, [draw.choice(NUMBERS)] * draw.choice((1, 1000)), {draw.choice(WORDS): draw.choice(NUMBERS)})
    )


def _told(value: Any, draw: random.Random) -> bytes:
    """JSON as text, now and then with a key doubled."""
    text = json.dumps(value, indent=draw.choice((None, 1)))
    if draw.random() < 0.1 and "{" in text:
        at = text.index("{", draw.randrange(text.rindex("{") + 1)) + 1
        end = text.find(",", at)
        if end > 0:
            text = text[:at] + text[at : end + 1] + text[at:]
    return text.encode("utf-8", "surrogatepass")


def _array(raw: bytes, draw: random.Random) -> bytes:
    """A .npy file with another header, or other numbers."""
    array = np.load(BytesIO(raw), allow_pickle=False)
    if draw.random() < 0.3:
        array = array.copy()
        bits = np.iinfo(array.dtype) if array.dtype.kind in "iu" else None
        if len(array) and bits:
            array[draw.randrange(len(array))] = draw.choice((0, 1, bits.min, bits.max, bits.max // 2))
        out = BytesIO()
        np.save(out, array)
        return out.getvalue()
    size = len(array)
    header = {
        "descr": draw.choice(
            (array.dtype.str, "|O", ">u2", "<f8", "|V0", "|S0", "<U9", "<M8[s]", "", "O", [("a", "<u2")], 7)
        ),
        "fortran_order": draw.choice((False, True, None)),
        "shape": draw.choice(
            ((size,), (0,), (size + 1,), (-1,), (2**62,), (2**40,), (2**64,), (), (1, size), (size, 0), size, ("a",))
        ),
    }
    if draw.random() < 0.2:
        header[draw.choice(("extra", "shape "))] = 1
    npy_header = draw.choice(
        (repr(header), repr(header), "(" * 3000, "-" * 3000, "[" * 9000, "{'descr': 9**9**9}", "lambda: 0")
    )
    text = npy_header.encode() + b" " * (63 - (len(npy_header) + 10) % 64) + b"\n"
    version = draw.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    length = draw.choice((len(text), len(text), 0, 2**16 - 1, len(text) - 1))
    return (
        b"\x93NUMPY"
        + bytes(version)
        + length.to_bytes(2 if version == (1, 0) else 4, "little")
        + text
        + array.tobytes()
    )
