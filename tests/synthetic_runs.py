"""Working directories as ``main.py`` leaves them after training and evaluation, without either."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 60


def metrics(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "nll_bits_per_dim": 3.0,
        "nll_bits_per_dim_se": 0.01,
        "asym": 2.0e8,
        "asym_se": 1.0e7,
        "nasym": 2.0e-3,
        "nasym_se": 1.0e-4,
        "fid": 5.25,
        "kid": 0.004,
        "kid_se": 0.0005,
        "inception_score": 8.5,
        "precision": 0.61,
        "recall": 0.55,
        "nfe_sampling": 1999,
        "nfe_likelihood": 151.37,
        "num_samples": 1000,
        "checkpoint_step": 6000,
        "nll_images": 360,
        "asym_images": 360,
        "test_images": 360,
        "likelihood": "rademacher divergence, rk45, rtol 1e-05, atol 1e-05",
        "features": "classifier-digits",
        "reference": "training images",
        "num_reference": 1437,
        "backend": "torch",
        "sampler": "PC, euler_maruyama + none, 100 steps",
        "feature_test_accuracy": 0.975,
        "outside_range": 0.25,
        "parameters": 79_585,
        "code_version": "0123456789ab",
        "hardware": "a processor, torch 2.14",
        "something_new": [1, 2],
    }
    return values | changes


def make_run(
    path: Path,
    parameterization: str = "unconstrained",
    qc_weight: float = 0.0,
    *,
    dataset: str = "digits",
    channels: int = 1,
    size: int = 8,
    num_levels: int = 17,
    nll: np.ndarray | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A working directory as ``main.py`` leaves it after training and evaluation."""
    rng = np.random.default_rng(seed)
    (path / "eval").mkdir(parents=True)
    config = {
        "seed": 42,
        "label": "",
        "data": {"dataset": dataset, "path": "", "image_size": size},
        "model": {"name": "ncsnpp", "parameterization": parameterization, "embedding_type": "fourier"},
        "training": {"qc_weight": qc_weight, "reduce_mean": False, "log_freq": 100},
    }
    (path / "config.json").write_text(json.dumps(config))
    values = metrics(**changes)
    (path / "eval" / "metrics.json").write_text(json.dumps(values))
    conservative = parameterization == "conservative"
    rows = []
    for k in range(1, STEPS + 1):
        row = {"step": 100 * k, "loss": 1.0, "dsm": (5 / k + 0.5) * math.exp(0.15 * rng.standard_normal()), "lr": 2e-4}
        if qc_weight > 0:
            row["qc"] = None if k % 4 else 0.4 * math.exp(-k / 30 + 0.3 * rng.standard_normal())
        rows.append(row)
        if k % 20 == 0:
            rows.append({"step": 100 * k, "eval_loss": 5 / k + 0.55})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    t = np.arange(1, 51) / 50
    sigma = 0.01 * 5000**t
    scale = 1e-13 if conservative else values["nasym"]
    nasym = scale * 3 * np.exp(-(((t - 0.3) / 0.2) ** 2)) + 0.05 * scale
    asym = nasym * 64 / sigma**4 * 20
    np.savez(
        path / "eval" / "asymmetry.npz",
        t=t, sigma=sigma, asym=asym, asym_se=0.1 * asym, nasym=nasym, nasym_se=0.1 * nasym,
    )  # fmt: skip
    shade = np.linspace(0, num_levels - 1, size)[None, :, None, None] * np.ones((12, 1, size, channels))
    noise = rng.integers(-2, 3, shade.shape)
    images = np.clip(shade + noise, 0, num_levels - 1).astype(np.uint8)
    np.savez(path / "eval" / "samples.npz", images=images, num_levels=np.array(num_levels))
    if nll is not None:
        np.savez(path / "eval" / "nll.npz", nll_bits_per_dim=nll)
    return path


def u_qc_and_c(tmp_path: Path) -> tuple[Path, Path, Path]:
    """U, QC and C on digits."""
    return (
        make_run(tmp_path / "u"),
        make_run(tmp_path / "qc", qc_weight=1e-4, seed=1, nasym=8e-4, nasym_se=4e-5, asym=5e7, asym_se=2e6, fid=5.5),
        make_run(
            tmp_path / "c", "conservative", seed=2, nll_bits_per_dim=4.1, asym=3e-5, asym_se=1e-6, nasym=1e-13,
            nasym_se=1e-14, precision=None,
        ),
    )  # fmt: skip
