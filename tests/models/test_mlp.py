"""The network of points, times and classes: every layer by hand, its start at zero, what it depends on."""

from __future__ import annotations

import numpy as np
import torch

from conservativeness import jacobian
from models.mlp import TimeConditionalMLP


def perturbed(network: TimeConditionalMLP) -> TimeConditionalMLP:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.double()


def test_network_by_hand():
    network = perturbed(TimeConditionalMLP(2, width=8, depth=2, input_scale=3.0))
    x, label = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0.0, 1.5, 40.0, 300.0, 999.0]).double()
    p = {name: value.numpy() for name, value in network.state_dict().items()}

    def linear(values, name):
        return values @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def silu(values):
        return values / (1 + np.exp(-values))

    angles = label.numpy()[:, None] * np.float32(10_000.0) ** -(np.arange(16) / 15)
    features = silu(linear(np.concatenate([np.sin(angles), np.cos(angles)], 1), "label.1"))
    z = linear(x.numpy() / 3, "first")
    for k in range(2):
        scale, shift = np.split(linear(features, f"modulations.{k}"), 2, axis=1)
        z = z + linear(silu((1 + scale) * z + shift), f"layers.{k}")
    expected = linear(silu(z), "last")
    # The frequencies are in single precision, at angles of up to 999.
    np.testing.assert_allclose(network(x, label).detach().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_network_starts_at_zero_and_knows_label_and_class():
    fresh = TimeConditionalMLP(2, num_classes=3)
    x, label, classes = torch.randn(4, 2), torch.full((4,), 10.0), torch.tensor([0, 1, 2, 3])
    assert torch.equal(fresh(x, label, classes), torch.zeros(4, 2))
    network = perturbed(fresh)
    x, label = x.double(), label.double()
    values = network(x[:1].expand(4, 2), label, classes)
    assert len(values.unique(dim=0)) == 4  # the last one is the class "none"
    assert not torch.allclose(network(x, label), network(x, 2 * label))
    wide = TimeConditionalMLP(2, outputs=5)
    assert wide(torch.zeros(3, 2), torch.zeros(3)).shape == (3, 5)
    _, j = jacobian(lambda x, t: network(x, t, classes), x, label)
    assert torch.isfinite(j).all() and j.abs().max() > 0
