"""Make tests/data/old_run: a run of commit af542c6, which has other names of settings, stopped before its end.

    git worktree add /tmp/old af542c6
    python tests/data/make_old_run.py /tmp/old

The run sets as many of the renamed settings as one run can. Its learning rate is constant, because later commits decay
it from another step on. `continuation.jsonl` holds the figures that af542c6 itself computed after the checkpoint.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STOP, STEPS = 4, 8
MODEL = "--model.num-layers 2 --model.hidden-size 16 --model.num-heads 2 --model.intermediate-size 32"
SETTINGS = f"""
--data shards --output run --recipe tiny --steps {STEPS} --log.every 1 --validation.every {STOP} --validation.packs 3
--checkpoint.every {STOP} --checkpoint.keep 3 --packs.tokens 256 --packs.length 64 --packs.per-step 2 --packs.views 2
{MODEL} --model.global-every 1 --model.local-window 128
--optimizer.kind adamw --optimizer.muon-rate 20.0 --optimizer.clip 0.5
--optimizer.rate.kind wsd --optimizer.rate.peak 3e-3 --optimizer.rate.warmup 0 --optimizer.rate.decay 0
--masking.score entropy --masking.entropy.cap 0.02
--masking.explore.kind ramp --masking.explore.start 0.5 --masking.explore.end 0.2
--masking.explore.at 0.1 --masking.explore.until 0.5
--masking.corruption.mask 0.8 --masking.corruption.random 0.1 --masking.corruption.keep 0.1
--entropy.source probe --entropy.audit.every 3 --entropy.passes 2
--spikes.policy rewind --spikes.back 4 --spikes.rewinds 2 --spikes.broken-in-row 4 --spikes.broken-in-100 9
--hang.timeout 900 --hang.longest 3600
"""


def text() -> str:
    """Made-up English: blocks of words, some of them frequent."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    blocks = (" ".join(draw.choices(words, weights, k=draw.randint(15, 60))) for _ in range(120))
    return "".join(f"{block}.\n\n" for block in blocks)


def make(old: Path, folder: Path) -> None:
    """Prepare the text and train with the commit at ``old`` in ``folder``, then cut the run off after `STOP` steps."""

    def command(script: str, *arguments: str) -> None:
        environment = {"PYTHONPATH": str(old), "PATH": "/usr/bin:/bin", "HOME": tempfile.gettempdir()}
        subprocess.run([sys.executable, str(old / script), *arguments], cwd=folder, env=environment, check=True)

    (folder / "corpus.txt").write_text(text())
    shards = ["--input", "corpus.txt", "--output", "shards", "--tokenizer", "wordpiece", "--vocab-size", "300"]
    command("tools/prepare_data.py", *shards, "--valid-share", "0.2", "--workers", "1")
    command("megamask/pretrain.py", *SETTINGS.split())
    run = folder / "run"
    log = run / "logs" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= STOP))
    (folder / "continuation.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] > STOP))
    (run / "latest").write_text(f"step-{STOP}\n")
    # what a resume does not read, some of it with names of the machine
    for name in (f"checkpoints/step-{STEPS}", "export", "tensorboard", "../shards/packs"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("curve.png", "environment.json", "run.lock", "../corpus.txt"):
        (run / name).unlink()


if __name__ == "__main__":
    target = Path(__file__).parent / "old_run"
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / target.name
        made.mkdir()
        make(Path(sys.argv[1]).resolve(), made)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
