"""Section 6: closed forms of the autoencoder's asymmetry, estimators in two dimensions, the command and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoencoder_example import main as example
from conservativeness import asymmetry, jacobian
from models.autoencoder import OneLayerAutoencoder


def autoencoder(dimension: int = 2, hidden: int = 2, seed: int = 0) -> OneLayerAutoencoder:
    """Double precision, β drawn from [0.5, 1.5] instead of 1."""
    generator = torch.Generator().manual_seed(seed)
    model = OneLayerAutoencoder(dimension, hidden, generator=generator).double()
    with torch.no_grad():
        model.activation.beta.uniform_(0.5, 1.5, generator=generator)
    return model


def points(dimension: int = 2, count: int = 50) -> tuple[Tensor, Tensor]:
    x = 4 * torch.randn(count, dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.zeros(count, dtype=torch.float64)


def slopes(model: OneLayerAutoencoder, x: Tensor) -> Tensor:
    """h′_k(x) (B, H), written out."""
    z, beta = x @ model.W + model.b, model.activation.beta
    s = 1 / (1 + torch.exp(-beta * z))
    return (s + beta * z * s * (1 - s)).detach()


def set_weights(model: OneLayerAutoencoder, **weights: Tensor) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            getattr(model, name).copy_(value)


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize(("dimension", "hidden"), [(2, 2), (3, 5), (4, 1)])
def test_score_and_jacobian_are_the_formula(dimension, hidden):
    model = autoencoder(dimension, hidden)
    x, t = points(dimension)
    value, j = jacobian(model, x, t)
    z = x @ model.W + model.b
    h = z / (1 + torch.exp(-model.activation.beta * z))
    torch.testing.assert_close(value, torch.stack([model.R @ row + model.c for row in h]), rtol=1e-12, atol=1e-12)
    expected = torch.stack([model.R @ torch.diag(slope) @ model.W.T for slope in slopes(model, x)])
    torch.testing.assert_close(j, expected, rtol=1e-12, atol=1e-12)
    # Asym in traces.
    asym = (expected @ expected.mT - expected @ expected).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(asymmetry(model, x, t).asym, asym.detach(), rtol=1e-10, atol=1e-12)


def test_in_two_dimensions_each_unit_adds_its_cross_product():
    """Asym = (Σ_k h′_k r_k × w_k)²; the criteria are √2 |Σ_k r_k × w_k| and (2 Σ_k (r_k × w_k)²)^½."""
    model = autoencoder(2, 3)
    x, t = points()
    cross = (model.R[0] * model.W[1] - model.R[1] * model.W[0]).detach()
    torch.testing.assert_close(asymmetry(model, x, t).asym, (slopes(model, x) @ cross) ** 2, rtol=1e-10, atol=1e-14)
    assert model.product_asymmetry() == pytest.approx(2**0.5 * abs(cross.sum().item()), rel=1e-12)
    assert model.unit_asymmetry() == pytest.approx((2 * (cross**2).sum().item()) ** 0.5, rel=1e-12)
    assert model.weight_difference() == pytest.approx(((model.W - model.R) ** 2).sum().item() ** 0.5, rel=1e-12)


@pytest.mark.parametrize("factors", [[1.0, 1.0, 1.0], [0.5, -2.0, 3.0]], ids=["tied", "parallel"])
def test_parallel_columns_are_conservative(factors):
    model = autoencoder(4, 3)
    set_weights(model, W=model.R * torch.tensor(factors))
    x, t = points(4)
    result = asymmetry(model, x, t)
    assert result.jacobian_norm_squared.min() > 1e-4
    assert result.asym.max() < 1e-28
    assert model.product_asymmetry() < 1e-14 and model.unit_asymmetry() < 1e-14
    assert (model.weight_difference() == 0) == (factors == [1.0, 1.0, 1.0])


def test_a_symmetric_product_is_not_enough():
    """W = RS with symmetric S has RWᵀ = WRᵀ, and Asym = (S₁₂ (h′₁ − h′₂) det R)²."""
    model = autoencoder()
    s = torch.tensor([[0.7, 1.1], [1.1, -0.4]], dtype=torch.float64)
    set_weights(model, W=model.R @ s)
    x, t = points()
    assert model.product_asymmetry() < 1e-15 < 0.1 < model.unit_asymmetry()
    slope = slopes(model, x)
    expected = (1.1 * (slope[:, 0] - slope[:, 1]) * torch.linalg.det(model.R.detach())) ** 2
    asym = asymmetry(model, x, t).asym
    torch.testing.assert_close(asym, expected, rtol=1e-9, atol=1e-15)
    assert asym.mean() > 1e-3
    # It is where all units have the same slope: a linear h.
    model.activation.beta.data.zero_()
    assert asymmetry(model, x, t).asym.max() < 1e-28


def test_initial_weights_are_uniform_and_keyed():
    model = OneLayerAutoencoder(40, 60, generator=torch.Generator().manual_seed(3))
    drawn = {name: value.detach() for name, value in model.named_parameters() if "beta" not in name}
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {
        "R": (40, 60),
        "W": (40, 60),
        "b": (60,),
        "c": (40,),
    }
    for value in drawn.values():
        n = value.numel()
        assert -1 <= value.min() < -0.9 < 0.9 < value.max() < 1
        # Five standard errors: the variance of a uniform number is 1/3, that of its square 4/45.
        assert abs(value.mean().item()) < 5 * (1 / 3 / n) ** 0.5
        assert abs((value**2).mean().item() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    assert torch.equal(model.activation.beta, torch.ones(60))
    again = OneLayerAutoencoder(40, 60, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.R, OneLayerAutoencoder(40, 60, generator=torch.Generator().manual_seed(4)).R)
    with pytest.raises(ValueError, match="dimension=2, hidden=0: at least 1"):
        OneLayerAutoencoder(2, 0, generator=torch.Generator())


# ------------------------------------------------------------------------------------------------------- the estimators


def one_probe(model: nn.Module, estimator: str, seed: int = 0, *, create_graph: bool = False) -> Tensor:
    x, t = points()
    generator = torch.Generator().manual_seed(seed)
    return asymmetry(model, x, t, probes=1, estimator=estimator, generator=generator, create_graph=create_graph).asym


def test_one_antisymmetric_probe_is_exact_in_two_dimensions():
    """½ r² ‖v‖² with ‖v‖² = 2 and r = J₂₁ − J₁₂."""
    model = autoencoder()
    torch.testing.assert_close(one_probe(model, "antisymmetric"), one_probe(model, "exact"), rtol=1e-10, atol=1e-14)


def test_one_trace_probe_is_off_by_the_rotation_times_the_shear():
    """r² + r v₁v₂ (J₁₁ − J₂₂) with v₁v₂ = ±1."""
    model = autoencoder()
    x, t = points()
    j = jacobian(model, x, t)[1].detach()
    r, shear = j[:, 1, 0] - j[:, 0, 1], j[:, 0, 0] - j[:, 1, 1]
    error = one_probe(model, "trace") - r**2
    torch.testing.assert_close(error.abs(), (r * shear).abs(), rtol=1e-9, atol=1e-12)
    assert 0 < (error * r * shear > 0).sum() < len(x)


def test_at_a_conservative_score_only_the_trace_form_has_a_noisy_gradient():
    """So only its training does not come to rest there, although the gradient vanishes on average."""
    model = autoencoder()
    set_weights(model, W=model.R * torch.tensor([0.5, -2.0]))

    def gradients(estimator: str, count: int) -> Tensor:
        rows = []
        for seed in range(count):
            loss = one_probe(model, estimator, seed, create_graph=True).mean()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (model.R, model.W))]))
        return torch.stack(rows)

    for estimator in ("exact", "antisymmetric"):
        assert gradients(estimator, 3).abs().max() < 1e-14
    noisy = gradients("trace", 200)
    assert noisy.norm(dim=1).mean() > 0.01
    standard_error = noisy.std(0) / 200**0.5
    assert (noisy.mean(0).abs() < 4.5 * standard_error + 1e-14).all()


# ---------------------------------------------------------------------------------------------------------- the command


def read_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_grid_is_the_papers():
    x = example.grid()
    assert x.shape == (1600, 2) and len(x.unique(dim=0)) == 1600
    assert x.min() == -10 and x.max() == 10
    axis = x[:, 0].unique()
    torch.testing.assert_close(axis.diff(), torch.full((39,), 20 / 39), rtol=1e-5, atol=0)


def test_run_follows_the_public_code_and_resumes(tmp_path, monkeypatch):
    """The public code's numbers for seed 8, to the digits they are printed with; then the workdir and its files."""
    workdir = tmp_path / "run"
    text = example.run(workdir, seeds=1, estimator="exact", n_iters=1000, jobs=1)
    log = workdir / "runs" / "exact" / "seed_8" / "metrics.jsonl"
    curve = {row["step"]: row for row in read_log(log)}
    assert list(curve) == [0, 200, 400, 600, 800, 1000]
    for step in (0, 1000):
        l_qc, product, difference = example.REFERENCE[step]
        assert curve[step]["l_qc"] == pytest.approx(l_qc, rel=0.5 / 26 if step == 0 else 0.5 / 71)
        assert curve[step]["product_asymmetry"] / 2**0.5 == pytest.approx(product, abs=0.005)
        assert curve[step]["weight_difference"] == pytest.approx(difference, abs=0.0005)
    assert [row["l_qc"] for row in curve.values()] == sorted((row["l_qc"] for row in curve.values()), reverse=True)
    # The loss is the mean over the steps since the last row, all of them between the two values of L_QC.
    assert curve[1000]["l_qc"] < curve[1000]["loss"] < curve[800]["l_qc"]

    results = json.loads((workdir / "results.json").read_text())
    assert results["experiment"] == "autoencoder_example" and results["settings"]["n_iters"] == 1000
    (row,) = results["rows"]
    assert row["seed"] == 8 and row["estimator"] == "exact"
    # Of the log's last row, what depends on the weights alone.
    assert set(row) - set(curve[1000]) == {"estimator", "seed", "greatest_late_l_qc"}
    assert set(curve[1000]) - set(row) == {"loss", "lr", "seconds", "steps_per_second"}
    assert all(row[name] == curve[1000][name] for name in set(row) & set(curve[1000]))
    assert row["greatest_late_l_qc"] == curve[0]["l_qc"]
    assert (workdir / "table.md").read_text() == text
    assert "| 1000 | 7.1e-02 | 7.1e-02 | 4.3e-01                | 4.3e-01 | 0.925     | 0.925  |" in text
    assert (workdir / "autoencoder.png").read_bytes()[:4] == b"\x89PNG"

    # Finished runs are kept, more seeds join them, and other settings are refused.
    before = log.stat()
    with monkeypatch.context() as patched:
        patched.setattr(example, "asymmetry", None)
        assert example.run(workdir, seeds=1, estimator="exact", n_iters=1000, jobs=1) == text
    assert log.stat() == before
    with pytest.raises(ValueError, match="other settings: n_iters was 1000, is 400"):
        example.run(workdir, seeds=1, estimator="exact", n_iters=400, jobs=1)
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"exact, seed 8: .*metrics\.jsonl has been cut short"):
        example.run(workdir, seeds=1, estimator="exact", n_iters=1000, jobs=1)


def test_all_estimators_and_several_seeds(tmp_path):
    text = example.run(tmp_path, seeds=2, n_iters=100, jobs=1)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    names = [(row["estimator"], row["seed"]) for row in rows]
    assert names == [(name, seed) for name in ("exact", "antisymmetric", "trace") for seed in (8, 9)]
    by_name = dict(zip(names, rows, strict=True))
    for (estimator, seed), row in by_name.items():
        (start, end) = read_log(tmp_path / "runs" / estimator / f"seed_{seed}" / "metrics.jsonl")
        assert row["l_qc"] == end["l_qc"] < 0.9 * start["l_qc"]
        assert f"|{estimator}|{seed}|100|" in text.replace(" ", "")
    for seed in (8, 9):
        exact, antisymmetric, trace = (by_name[name, seed]["l_qc"] for name in example.ESTIMATORS)
        assert antisymmetric == pytest.approx(exact, rel=1e-4)
        assert 1e-6 < abs(trace / exact - 1) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "--seeds=0: at least 1"),
        ({"jobs": -1}, "--jobs=-1: at least 1"),
        ({"n_iters": 0}, "--n_iters=0: at least 1"),
        ({"estimator": "hutchinson"}, "--estimator=hutchinson: allowed are exact, antisymmetric, trace, all"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        example.run(tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []
