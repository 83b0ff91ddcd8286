"""Command lines as a user types them: in this process, which is fast, or in one of their own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from megamask import pretrain

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "packs.tokens": 256,
    "packs.length": 64,
    "packs.per-step": 2,
    "model.num-layers": 2,
    "model.hidden-size": 32,
    "model.num-heads": 2,
    "model.intermediate-size": 48,
    "validation.packs": 3,
    "log.every": 1,
}
"""What makes any recipe small enough for a test."""
ADAMW = {
    "optimizer.kind": "adamw",
    "optimizer.muon-lr-scale": 20.0,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.lr.peak": 3e-3,
}
"""The optimizer that runs in every ZeRO stage, which the first recipe's does not."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def text(documents: int, seed: int = 0) -> str:
    """Made-up English: blocks of words, of which some are frequent."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(200)]
    often = [1 / (rank + 1) for rank in range(len(words))]
    blocks = (" ".join(draw.choices(words, often, k=draw.randint(15, 120))) for _ in range(documents))
    return "\n\n".join(f"{block}." for block in blocks) + "\n"


def flags(settings: dict[str, object]) -> list[str]:
    """{"steps": 3, "export": False} -> --steps 3 --no-export."""
    words = []
    for name, value in settings.items():
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def training(data: Path, output: Path, **more: object) -> list[str]:
    """The arguments of a small run; ``more`` names settings with __ for a dot."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in more.items()}
    plain = {} if "recipe" in named else ADAMW
    return flags({"data": data, "output": output} | TINY | plain | {"steps": 4, "export": False} | named)


def run(main: Callable[[list[str]], int], *arguments: object) -> Ended:
    """What ``main`` does with a command line, in this process, which stays as it was."""
    before, out, err = dict(os.environ), io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # what the parsers do
        code = int(end.code or 0)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Ended(code, out.getvalue(), err.getvalue())


def train(data: Path, output: Path, *arguments: object, **more: object) -> Ended:
    """A small run of pretrain.py, in this process."""
    return run(pretrain.main, *training(data, output, **more), *arguments)


def clean() -> dict[str, str]:
    """The environment of a user: nothing that a launcher or an earlier run has set."""
    strange = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in strange and "SLURM" not in name}
    # the scripts of this Python's environment, such as the launchers
    return kept | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def shell(*command: object, env: dict[str, str] | None = None, timeout: float = 300) -> Ended:
    """A command in a process of its own, from the root of the project."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env=clean() | (env or {}), capture_output=True, text=True, timeout=timeout, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(run: Path, *names: str) -> dict[tuple[int, str], float]:
    """The figures in a run's metrics, by (step, name): losses, rate and norm, or those of ``names``."""
    names = names or ("train/loss", "train/accuracy", "valid/loss", "valid/accuracy", "lr", "grad_norm", "mask_ratio")
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def content(folder: Path) -> dict[str, str]:
    """The hash of every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
