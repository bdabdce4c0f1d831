"""What is compared with: the public code's step computes the same as ours."""

from __future__ import annotations

import pytest
import torch
from oracles import SDES, gaussian_2d

from benchmarks.likelihood import paper_log_prob
from benchmarks.public_code import in_public_style, public_loss
from experiment.randomness import rademacher_like
from likelihood import LIKELIHOOD_EPS
from losses import Objective
from models import NoiseLevel, UnconstrainedScore


@pytest.fixture
def model(small_unet) -> UnconstrainedScore:
    return UnconstrainedScore(small_unet(image_size=16, num_channels=3, attn_resolutions=(8,)), NoiseLevel(SDES["ve"]))


def test_the_network_in_the_public_style_computes_the_same(model):
    public = in_public_style(model)
    x, t = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    torch.testing.assert_close(public(x, t), model(x, t), rtol=1e-11, atol=1e-11)
    kinds = {type(module).__name__ for module in public.modules()}
    assert {"_Attention", "_Resample", "_Mix"} <= kinds and not {"Attention", "FIRDown", "FIRUp"} & kinds
    x.requires_grad_()
    assert "_Conv" not in str(public(x, t).grad_fn.next_functions)


def test_the_public_step_has_the_gradient_of_the_trace_estimator(model):
    public = in_public_style(model)
    x0 = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    ours = Objective(model, qc_weight=0.3, qc_estimator="trace")
    ours(x0, torch.Generator().manual_seed(0))["loss"].backward()
    public_loss(public, x0, torch.Generator().manual_seed(0), 0.3, 1).backward()
    # Transposed matrices in attention: compared by name and up to their shape.
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    scale = max(g.abs().max().item() for g in expected.values())
    found = {name: p.grad for name, p in public.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if gradient.shape != expected[name].shape:
            gradient = gradient.T[:, :, None, None]
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("family", SDES)
def test_likelihood_of_the_public_code(family):
    """Two runs of the network at every point, and the density of a Gaussian: two orthogonal probes give the trace."""
    sde, calls = SDES[family], []
    gaussian = gaussian_2d(sde)
    x = gaussian.sample(4, torch.Generator().manual_seed(0))

    def score(position, t):
        calls.append(1)
        return gaussian.score(position, t)

    probe = rademacher_like(x, torch.Generator().manual_seed(0))
    probes = (probe, probe * torch.tensor([1.0, -1.0]))
    found = [paper_log_prob(sde, score, x, v, 1e-7, 1e-7) for v in probes]
    assert sum(runs for _, runs in found) == len(calls) and all(runs % 2 == 0 for _, runs in found)
    exact = gaussian.log_prob(x, torch.full((4,), LIKELIHOOD_EPS, dtype=torch.float64))
    # The prior is not quite the noised density at the end.
    assert (sum(value for value, _ in found) / 2 - exact).abs().max() < 0.1
