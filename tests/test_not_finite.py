"""Numbers that are not finite stop a program where they appear; no file holds one, and none holds what came of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run_lib import CPU, tiny_config
from torch import nn

import run_lib
from checkpoints import read_checkpoint, write_checkpoint
from experiment.files import write_json
from experiment.runtime import Runtime
from features import extraction
from models import EMA
from training import Hook, fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    run_lib.train(tiny_config(training__n_iters=2), workdir, CPU)
    return workdir


def linear_fit(folder: Path, *, average: bool = False, rate: float = 1.0, **options) -> None:
    """Descends 10¹⁰ w from 0 in single precision: loss and gradient are finite, whatever comes of w."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    fit(
        module,
        torch.optim.SGD(module.parameters(), lr=rate),
        lambda module, step, positions: {"loss": 1e10 * module[0].sum()},
        folder,
        **dict(n_iters=1, ema=EMA(module, 0.9) if average else None) | options,
    )


def test_weights_are_looked_at_before_they_are_saved(tmp_path, monkeypatch):
    """A step too long to come back from, whose own loss and gradient are finite; and an average that is not."""
    with pytest.raises(FloatingPointError, match="train: 0 is not finite at or before step 1; that step is not saved"):
        linear_fit(tmp_path / "weights", rate=1e30)
    monkeypatch.setattr(EMA, "update", lambda self, module: self.model[0].data.fill_(math.nan))
    with pytest.raises(FloatingPointError, match="0 is not finite"):
        linear_fit(tmp_path / "average", average=True)
    assert not list(tmp_path.rglob("*.pt"))
    linear_fit(tmp_path / "good")
    assert len(list(tmp_path.rglob("*.pt"))) == 1


@pytest.mark.parametrize("source", ["hook", "observe"])
def test_what_is_logged_is_finite(tmp_path, source):
    """A test loss, say: training does not end as if all were well, however often it is started."""
    given = {"eval_loss": math.nan}
    what = {"hooks": [Hook(1, lambda step: given)]} if source == "hook" else {"observe": lambda: given}
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="eval_loss: not finite"):
            linear_fit(tmp_path, **what)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("part", ["model", "ema"])
def test_weights_that_are_not_finite_are_not_used(trained, tmp_path, part):
    """Of a checkpoint from elsewhere: refused by name, before any work."""
    state = read_checkpoint(trained / "checkpoints" / "step_00000002.pt")
    weights = state["ema"]["model"] if part == "ema" else state["model"]
    next(iter(weights.values())).view(-1)[0] = math.inf
    path = tmp_path / "w" / "checkpoints" / "step_00000002.pt"
    write_checkpoint(path, state)
    for work in (run_lib.train, run_lib.evaluate, run_lib.sample) if part == "ema" else (run_lib.train,):
        with pytest.raises(run_lib.InvalidRun, match=rf"{path}: network\.\S+ is not finite"):
            work(tiny_config(training__n_iters=4), tmp_path / "w", CPU)
    files = [file for file in (tmp_path / "w").rglob("*") if file.is_file()]
    assert [file for file in files if file.suffix != ".lock"] == [path]


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("nll", {}),
        ("nll", {"likelihood.solver": "rk45"}),
        ("asymmetry", {}),
        ("sample", {}),
        ("sample", {"sampling.method": "ode", "sampling.solver": "heun", "sampling.num_steps": 2}),
        ("sample", {"sampling.method": "ode", "sampling.solver": "rk45"}),
        ("sample", {"sampling.method": "few_step", "sampling.solver": "heun", "sampling.num_steps": 2}),
        ("sample_features", {}),
    ],
)
def test_a_network_that_gives_nan_stops_an_evaluation(trained, tmp_path, monkeypatch, stage, overrides):
    """The line names the stage, the items and the checkpoint, and nothing of it is kept."""
    config = tiny_config(training__n_iters=2, eval__num_samples=4, eval__batch_size=2, eval__nll_images=2)
    enabled = {"nll": "enable_bpd", "asymmetry": "enable_asymmetry"}.get(stage, "enable_sampling")
    for name in ("enable_bpd", "enable_asymmetry", "enable_sampling"):
        config.eval[name] = name == enabled
    config.update_from_flattened_dict(overrides)
    if stage == "sample_features":
        bad = torch.full((2, 3), math.nan)
        good = np.ones((4, 3), dtype=np.float32)
        monkeypatch.setattr("features.quality.SampleQuality.reference", lambda self: (tmp_path, good))
        monkeypatch.setattr("features.quality.extract_features", lambda *_, **options: extraction.Features(bad, bad))
    else:
        original = run_lib.TrainedScore.__call__
        monkeypatch.setattr(
            run_lib.TrainedScore,
            "__call__",
            lambda self, x, t: original(self, x, t) * torch.where(t < 0.9, math.nan, 1.0).view(-1, 1, 1, 1),
        )
    with pytest.raises(FloatingPointError) as error:
        run_lib.evaluate(config, tmp_path / "w", CPU, trained / "checkpoints" / "step_00000002.pt")
    said = str(error.value)
    assert said.startswith(f"{stage}{' w, step 2' if stage != 'sample_features' else ''}, items 0 to 1: ")
    assert "finite" in said and "\n" not in said
    assert not list((tmp_path / "w" / "eval").rglob(f"*{stage}*.npz"))
    assert not list((tmp_path / "w" / "eval").rglob("metrics.json"))


def test_what_was_computed_before_is_kept(tmp_path):
    def compute(items: range) -> dict[str, np.ndarray]:
        return {"good": np.ones(len(items)), "bad": np.array([math.nan if i == 5 else i for i in items])}

    with pytest.raises(FloatingPointError, match=r"^work, items 4 to 5: bad: not finite$"):
        Runtime("cpu").compute(tmp_path / "result.npz", "key", 8, 2, compute, description="work")
    assert sorted(path.name for path in tmp_path.rglob("*.npz")) == ["0-1.npz", "2-3.npz"]


def test_json_that_would_not_be_json_is_not_written(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"fid": 1.0})
    with pytest.raises(FloatingPointError, match=rf"{path} is not written: a\.b, fid is not finite"):
        write_json(path, {"name": "nan", "a": {"b": [1, math.inf]}, "fid": math.nan})
    assert json.loads(path.read_text()) == {"fid": 1.0}
