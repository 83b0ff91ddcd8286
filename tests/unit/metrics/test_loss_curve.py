"""The picture of the losses."""

from __future__ import annotations

import json

from megamask.metrics import loss_curve


def test_the_curve_is_drawn(tmp_path):
    from matplotlib.image import imread

    metrics = tmp_path / "metrics.jsonl"
    loss_curve.plot_curve(metrics, tmp_path / "empty.png")
    lines = [{"step": n, "train/loss": 6.0, "valid/loss": 5.0, "valid/unigram_loss": 7.0} for n in (10, 20)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss_curve.plot_curve(metrics, tmp_path / "curve.png")
    empty, curve = imread(tmp_path / "empty.png"), imread(tmp_path / "curve.png")
    assert empty.shape == curve.shape and (empty != curve).any()


def test_the_curve_shows_the_sources_with_the_highest_losses(tmp_path):
    lines = [{f"valid/s{n}/loss": float(n), f"valid/s{n}/accuracy": 0.5} for n in range(loss_curve.CURVES + 3)]
    lines.append({"valid/loss": 99.0, "train/loss": 98.0})
    drawn = [f"valid/s{n}/loss" for n in range(3, loss_curve.CURVES + 3)]
    assert loss_curve._sources(lines) == sorted(drawn)
    assert loss_curve._sources([{"valid/loss": 1.0, "valid/s/loss": None}]) == []
