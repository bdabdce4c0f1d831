"""The benchmark of training steps: what it compares computes the same, and its table holds what it should."""

from __future__ import annotations

import pytest
import torch
from oracles import SDES

from benchmarks import training_step
from benchmarks.public_code import PublicEMA, in_public_style, public_step
from losses import Objective
from models import EMA
from models.score import NoiseLevel, UnconstrainedScore

CPU = torch.device("cpu")
SMALL = dict(nf=8, num_res_blocks=1, batch_size=4, precision="fp32")


def score_model(small_unet) -> UnconstrainedScore:
    return UnconstrainedScore(small_unet(image_size=16, num_channels=3), NoiseLevel(SDES["ve"]))


def test_the_public_style_network_computes_the_same(small_unet):
    model = score_model(small_unet)
    public = in_public_style(model)
    x, t = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    torch.testing.assert_close(public(x, t), model(x, t), rtol=1e-11, atol=1e-11)
    kinds = {type(module).__name__ for module in public.modules()}
    assert {"_Attention", "_Resample", "_Mix"} <= kinds and not {"Attention", "FIRDown", "FIRUp"} & kinds
    x.requires_grad_()
    assert "_Conv" not in str(public(x, t).grad_fn.next_functions)


def test_the_public_step_has_the_gradient_of_the_trace_estimator(small_unet):
    model = score_model(small_unet)
    public = in_public_style(model)
    x0 = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    ours = Objective(model, qc_weight=0.3, qc_probes=2, qc_estimator="trace")
    ours(x0, torch.Generator().manual_seed(0))["loss"].backward()
    public_step(Objective(public, qc_weight=0.3), x0, torch.Generator().manual_seed(0), probes=2)
    # Transposed matrices in attention: compared by name and up to their shape.
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    scale = max(g.abs().max().item() for g in expected.values())
    found = {name: p.grad for name, p in public.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if gradient.shape != expected[name].shape:
            gradient = gradient.T[:, :, None, None]
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-10 * scale)


def test_the_public_moving_average_is_ours(small_unet):
    model = score_model(small_unet)
    averages = EMA(model, 0.9), PublicEMA(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        for average in averages:
            average.update(model)
    ours = [p for p, q in zip(averages[0].model.parameters(), model.parameters(), strict=True) if q.requires_grad]
    for mine, theirs in zip(ours, averages[1].shadows, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_operations_are_those_of_a_convolution():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    x = torch.rand(2, 3, 8, 8)
    forward = 2 * 9 * 3 * 5 * 64 * 2
    assert training_step.operations_of(lambda: layer(x)) == forward
    assert training_step.operations_of(lambda: layer(x).sum().backward()) == 2 * forward  # no gradient of x


def test_benchmark_measures_and_prints(monkeypatch):
    names = ("U", "U, paper", "U, bf16", "QC, K = 1", "QC, K = 1, paper", "QC, K = 1, every 4th step")
    variants = {name: training_step.VARIANTS[name] for name in names}
    steps = {name: training_step.build(variant, SMALL, CPU) for name, variant in variants.items()}
    times = training_step.measure(steps, variants, 1, CPU)
    assert all(len(values) == 1 and values[0] > 0 for values in times.values())
    operations = {name: training_step.operations_of_step(variant, SMALL, CPU) for name, variant in variants.items()}
    # 3F, 9F, 3F + 13F, and a quarter of the difference.
    u = operations["U"]
    assert operations["U, paper"] == pytest.approx(u, rel=0.05)  # blurs multiply by the zeros that they insert
    assert 2.9 < operations["QC, K = 1"] / u < 3.5 < 5 < operations["QC, K = 1, paper"] / u < 7
    assert operations["QC, K = 1, every 4th step"] == pytest.approx(u + (operations["QC, K = 1"] - u) / 4, rel=0.01)
    text = training_step.tables(times, operations, training_step.operations_of_passes(SMALL, CPU))
    assert "| QC step / U step, K = 1 | ≤ 3.3 |" in text and "| U step, bf16 / float32 | ≤ 0.65 |" in text
    assert "K = 4" not in text


def test_compiled_network_is_for_single_derivatives(small_unet, monkeypatch):
    model = score_model(small_unet)
    calls = []

    def compiled(network):
        return lambda *args: calls.append(1) or network(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    names = set(model.state_dict())
    model.compile_network()
    x, t = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    expected = model(x, t)
    assert len(calls) == 1 and set(model.state_dict()) == names
    torch.testing.assert_close(model(x.requires_grad_(), t), expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1
