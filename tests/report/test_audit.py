"""The audit of models: closed forms of linear networks, pairs, units, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from torch import Tensor

import run_lib
from configs.digits import get_config
from data import load_dataset
from experiment.runtime import InvalidRun, Runtime
from report import audit as module
from report.audit import audit

MATRIX = torch.eye(64) + 0.3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
SYMMETRIC = (MATRIX + MATRIX.T) / 2
CALLS: list[int] = []


def linear(x: Tensor, label: Tensor) -> Tensor:
    """ε = A x."""
    CALLS.append(len(x))
    return (x.flatten(1) @ MATRIX.T.to(x)).view_as(x)


def symmetric(x: Tensor, label: Tensor) -> Tensor:
    return (x.flatten(1) @ SYMMETRIC.to(x)).view_as(x)


def linear_of_unit_interval(x: Tensor, label: Tensor) -> Tensor:
    """``linear`` of images in [−1, 1], given them in [0, 1]."""
    return linear(2 * x - 1, label)


def settings(**fields: object) -> ConfigDict:
    config = get_config("u")
    config.update_from_flattened_dict(
        {
            **{"data.centered": True, "model.prediction": "epsilon", "eval.enable_sampling": False},
            **{"eval.asym_images": 4, "eval.asym_levels": 3, "eval.asym_probes": 0, "eval.nll_images": 4},
            **{"eval.batch_size": 5, "likelihood.num_steps": 8},
            **{name.replace("__", "."): value for name, value in fields.items()},
        }
    )
    return config


def results(workdir: Path, *models: str, **fields: object) -> dict:
    names = ",".join(f"{__name__}:{model}" for model in models)
    table = audit(settings(**fields), workdir, Runtime("cpu"), names)
    assert (workdir / "audit" / "table.md").read_text() == table
    return json.loads((workdir / "audit" / "results.json").read_text())


def test_linear_networks(tmp_path: Path, forget_accelerator) -> None:
    """s = −A x/σ: NAsym is that of A, σ⁴ Asym is σ² that of A, and a symmetric A has neither. What is kept is not
    computed again, and pairs differ by what their means do."""
    forget_accelerator()
    found = results(tmp_path, "linear", "symmetric")
    first, second = found["models"].values()
    ratios = np.array(found["noise_to_signal"])
    asym, norm = 0.5 * float(((MATRIX - MATRIX.T) ** 2).sum()), float((MATRIX**2).sum())
    assert first["nasym"] == pytest.approx(asym / (2 * norm), rel=1e-4)
    assert first["scaled_asym_by_level"] == pytest.approx(asym * ratios**2, rel=1e-4)
    assert second["nasym"] < 1e-12 and (tmp_path / "audit" / "audit.png").exists()
    (difference,) = found["differences"].values()
    for name in ("nasym", "scaled_asym", "bits_per_dim"):
        assert difference[name]["mean"] == pytest.approx(second[name] - first[name], rel=1e-6)
        low, high = difference[name]["interval"]
        assert low <= difference[name]["mean"] <= high
    CALLS.clear()
    again = results(tmp_path, "linear", "symmetric")
    assert not CALLS and again == found


def test_one_image_has_no_error(tmp_path: Path, forget_accelerator) -> None:
    forget_accelerator()
    found = results(tmp_path, "linear", "symmetric", eval__asym_images=1, eval__nll_images=1)
    for model in found["models"].values():
        assert model["nasym_se"] is model["bits_per_dim_se"] is model["nll_nats_per_dim_se"] is None
    (difference,) = found["differences"].values()
    assert difference["bits_per_dim"]["interval"] is None and difference["nasym"]["mean"] < 0


@pytest.mark.slow
def test_units_of_the_images_do_not_matter(tmp_path: Path, forget_accelerator) -> None:
    """The same function of images in [−1, 1] and in [0, 1], where its Asym is 16 times as large."""
    forget_accelerator()
    probed = {"eval__asym_probes": 2, "eval__enable_bpd": False}
    sigma = {"model__sigma_min": 0.02, "model__sigma_max": 50.0} | probed
    centered = results(tmp_path / "a", "linear", **sigma)
    half = {"model__sigma_min": 0.01, "model__sigma_max": 25.0, "data__centered": False} | probed
    unit = results(tmp_path / "b", "linear_of_unit_interval", **half)
    (one,), (other,) = centered["models"].values(), unit["models"].values()
    assert unit["noise_to_signal"] == pytest.approx(centered["noise_to_signal"])
    for name in ("nasym_by_level", "scaled_asym_by_level"):  # the same images, noise and probes
        assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_what_is_refused(tmp_path: Path, forget_accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_accelerator()
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("work has begun"))
    np.savez(tmp_path / "numbers.npz", train=np.eye(64).reshape(-1, 1, 8, 8), test=np.zeros((4, 1, 8, 8)))
    numbers = {"data__dataset": "array", "data__path": str(tmp_path / "numbers.npz")}
    for models, fields, message in (
        ("missing", {}, "--model=missing: .*no checkpoint there"),
        (f"{__name__}:linear,{__name__}:linear", {}, "stands there twice"),
        (f"{__name__}:linear", {"data__image_size": 4}, "image_size"),
        (f"{__name__}:linear", numbers, "eval.enable_bpd=True: audits count the bits of levels, and numbers-test has"),
        (f"{__name__}:linear", {"model__sigma_max": 0.011}, "no noise level in common"),
    ):
        if "sigma" in str(fields):
            monkeypatch.setattr(module, "LEAST_RATIO", 1.0)
        with pytest.raises(InvalidRun, match=message) as error:
            audit(settings(**fields), tmp_path, Runtime("cpu"), models)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "audit").exists()


def test_a_network_by_import_path_scores_a_data_set(tmp_path: Path, forget_accelerator) -> None:
    """Its NLL by item is that of its audit, and at σ(1) the norm of σs = −A x of each item is what it is."""
    forget_accelerator()
    model = f"{__name__}:symmetric"
    path = run_lib.score(settings(likelihood__divergence="exact"), tmp_path / "w", Runtime("cpu"), model)
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    columns = dict(zip(header, np.array(rows, dtype=float).T, strict=True))
    audited = results(tmp_path / "a", "symmetric", likelihood__divergence="exact")["models"][model]
    assert columns["nll_bits_per_dim"].mean() == pytest.approx(audited["nll_bits_per_dim"], rel=1e-6)
    # So does an evaluation: of 17 levels, which the network does not know of.
    evaluated = run_lib.evaluate(settings(likelihood__divergence="exact"), tmp_path / "w", Runtime("cpu"), model)
    assert evaluated["nll_bits_per_dim"] == pytest.approx(audited["nll_bits_per_dim"], rel=1e-6)
    test = load_dataset("digits", image_size=8, num_channels=1)[1]
    levels, _ = test.batch([int(i) for i in columns["index"]])
    x = 2 * (levels + 0.5) / test.num_levels - 1
    expected = (x.flatten(1) @ SYMMETRIC).norm(dim=1) / 8
    np.testing.assert_allclose(columns["score_norm_t1.0"], expected, rtol=1e-4)
