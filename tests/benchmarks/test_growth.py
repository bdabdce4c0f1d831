"""How time grows: slopes of curves, and the command in small."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import growth


def test_slope_is_the_exponent_of_the_upper_half():
    """Of y = x² above 8 and constant below."""
    points = [{"value": x, "seconds": max(x, 8) ** 2.0, "GFLOP": 0.0} for x in (1, 2, 4, 8, 16, 32, 64)]
    assert growth.slope(points, "seconds") == pytest.approx(2)
    assert growth.slope(points, "GFLOP") is None and growth.slope(points[:1], "seconds") is None


@pytest.mark.parametrize("side", growth.AXES["resolution"][1])
def test_networks_of_every_resolution_can_be_built(side, monkeypatch):
    """On the meta device: without memory for their weights."""
    monkeypatch.setattr(growth, "make_trainer", lambda *_: None)
    found = growth.works("resolution", "data.image_size", side, SimpleNamespace(torch_device=torch.device("meta")))
    assert found["sampling: a score"]().shape == (1, 3, side, side)


@pytest.mark.slow
def test_benchmark_of_growth(tmp_path, monkeypatch):
    """Operations of a training step are in proportion to the batch, and of a QC step linear in the probes."""
    monkeypatch.setattr(growth, "SIZE", growth.SIZE | {"model.nf": 8, "model.num_res_blocks": 1, "data.image_size": 16})
    monkeypatch.setattr(growth, "FEATURES", 16)
    for axis, values in {"batch": (1, 2, 4), "probes": (1, 2, 3), "items": (200, 400)}.items():
        monkeypatch.setitem(growth.AXES, axis, (growth.AXES[axis][0], values))
    table = growth.run(axes=("batch", "probes", "items"), rounds=1, output=str(tmp_path))
    found = growth.curves(json.loads((tmp_path / "results.json").read_text())["rows"])
    for what in ("training step, U", "training step, QC", "sampling: a score", "likelihood: a step"):
        one, two, four = (row["GFLOP"] for row in found["batch", what])
        assert two == pytest.approx(2 * one) and four == pytest.approx(4 * one) and what in table
    one, two, three = (row["GFLOP"] for row in found["probes", "training step, QC"])
    assert three - two == pytest.approx(two - one) and two > one
    assert {what for axis, what in found if axis == "items"} == {
        "FID with its error",
        "KID",
        "precision, recall, density, coverage",
        "keep samples",
    }
    assert (tmp_path / "growth.png").exists()
