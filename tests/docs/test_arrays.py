"""docs/arrays.md: the six data sets are made as it says, and each trains; some are evaluated, sampled and scored."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import ROOT, blocks, commands, run_program

from report.auroc import write_auroc
from run_lib import load

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
TEXT = (ROOT / "docs" / "arrays.md").read_text()
SMALL = ("training.n_iters=2", "training.batch_size=4", "sampling.num_steps=2", "likelihood.num_steps=4")
SMALL += ("eval.num_samples=40", "eval.nll_images=4", "eval.asym_images=2", "eval.asym_levels=1", "eval.asym_probes=1")


def run(command: list[str], *extra: str) -> None:
    words = [word.replace("--config=configs", f"--config={ROOT}/configs") for word in command[1:]]
    run_program([*words, *(f"--config.{override}" for override in (*SMALL, *extra))], only_parse=False)


@pytest.mark.slow
def test_the_six_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_accelerator: Callable) -> None:
    monkeypatch.chdir(tmp_path)
    forget_accelerator()
    conditional, code, figure = blocks(TEXT, "python")
    exec(code.replace('"train": 400, "test": 100', '"train": 60, "test": 42'), {})
    for command in commands(TEXT)[:9]:
        run(command)
    shapes = {
        "ecg": (1, 128),
        "denoised": (1, 128),
        "mri": (2, 32, 24),
        "volumes": (1, 8, 16, 16),
        "photos": (3, 48, 64),
        "ring": (2,),
    }
    for name, shape in shapes.items():
        assert load(tmp_path / "runs" / name).shape == shape
        assert (tmp_path / "runs" / name / "samples/step_00000002.png").stat().st_size > 1000
    found: dict = {"conditions": torch.zeros(2, 1, 128)}
    exec(conditional.replace("conditions=y))", "conditions=y, num_steps=2))"), found)
    assert found["x"].shape == (2, 1, 128) and found["y"].mean() < 0.1
    exec(figure, {})
    assert (tmp_path / "arrays/denoised.png").stat().st_size > 1000
    metrics = json.loads((tmp_path / "runs/ecg/eval/metrics.json").read_text())
    assert metrics["nll_bits_per_dim"] is None and metrics["fid"] is None
    assert all(metrics[name] > 0 for name in ("sliced_w2", "sliced_w2_se", "marginal_w1_se", "spectrum_error_se"))
    with np.load(tmp_path / "runs/ecg/eval/distributions.npz", allow_pickle=False) as curves:
        assert curves["spectrum_real"].shape == (1, 65)


def test_vectors_are_trained_evaluated_sampled_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_accelerator: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Samples are in the data's units, a resumed run keeps its normalisation, other data are told apart."""
    monkeypatch.chdir(tmp_path)
    forget_accelerator()
    random, unit = np.random.default_rng(0), np.array([1e3, 1e-3])
    halves = {half: 5 * unit + unit * random.standard_normal((50, 2)) for half in ("train", "test")}
    np.savez("in.npz", **halves)
    np.savez("out.npz", train=halves["train"], test=halves["test"] + 40 * unit)
    main = ["python", "main.py", "--config=configs/own_arrays.py:vectors", "--workdir=w", "--device=cpu"]
    main += ["--config.data.path=in.npz", "--config.training.snapshot_sampling=False"]
    run([*main, "--mode=train"])
    assert "step 0 to 2 of 4 items of array, 2\n" in caplog.text
    before = load("w").images
    np.testing.assert_allclose(before.offset, halves["train"].mean(0), rtol=1e-12)
    np.testing.assert_allclose(before.scale, halves["train"].std(0), rtol=1e-12)
    run([*main, "--mode=train"], "training.n_iters=3")
    assert load("w").images == before and load("w").step == 3
    for mode in ("eval", "sample", "score"):
        run([*main, f"--mode={mode}"])
    run([*main, "--mode=score"], "data.path=out.npz")
    [samples] = (tmp_path / "w/samples").glob("*/samples.npz")
    with np.load(samples, allow_pickle=False) as file:
        x = file["samples"]
    assert x.shape == (64, 2) and x.dtype == np.float64
    # σ(1) = 10, and two steps do not get far from that: the spread in units of the data.
    assert (x.std(0) / unit < 30).all() and (x.std(0) / unit > 0.1).all()
    inside, outside = sorted((tmp_path / "w/scores").glob("*.csv"), key=lambda path: "out" in path.name)
    rows = inside.read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("index,nll_nats_per_dim,score_norm_t0.1,")
    table = write_auroc(inside, outside)
    assert "| nll_nats_per_dim | 1 ± 0 |" in table or "| nll_nats_per_dim | 1.0" in table, table
    # NaN, a missing half and another shape are refused in one line, before anything is written.
    halves["test"][3, 1] = np.nan
    np.savez("bad.npz", **halves)
    for changes, message in (
        (("data.path=bad.npz",), "bad-test: item 3 has values that are not finite"),
        (("data.shape=(3,)",), "data.shape=(3,), but item 0 of in-"),
        (("data.random_flip=True",), "data.random_flip=True: flips images"),
        (("model.embedding_type=fourier", "training.sde=vpsde", "model.scale_by_sigma=False"), "vector_mlp only for"),
    ):
        other = [argument.replace("--workdir=w", "--workdir=new") for argument in main]
        with pytest.raises(SystemExit) as caught, contextlib.suppress(KeyboardInterrupt):
            run([*other, "--mode=train"], *changes)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "new" / "config.json").exists()
