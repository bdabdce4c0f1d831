"""The models that are part of this repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from data import load_dataset
from run_lib import load

ROOT = Path(__file__).parents[3]


def test_they_are_the_models_of_their_cards() -> None:
    """Of 24 evenly spaced test images, those of the card, at t = 0.5: QC's Jacobian is less antisymmetric, in each of
    them. Eight samples are digits in so far as no pixel is out of range."""
    test = load_dataset("digits", image_size=8, num_channels=1)[1]
    levels, _ = test.batch([i * len(test) // 24 for i in range(24)])
    nasym = {}
    for name in ("digits_u", "digits_qc"):
        score = load(ROOT / "pretrained" / name)
        assert score.step == 2500 and "2500 steps" in (ROOT / "pretrained" / name / "README.md").read_text()
        mean, std = score.sde.marginal(score.images.to_model(levels), t := torch.full((24,), 0.5))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        nasym[name] = score.asymmetry(mean + std[:, None, None, None] * noise, t).nasym
        x = score.sample(8, method="few_step", solver="dpmpp_2m_sde", num_steps=19)
        assert float(x.min()) > -0.5 and float(x.max()) < 1.5 and float(x.std()) > 0.2
    assert (nasym["digits_qc"] < nasym["digits_u"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_u", "digits_qc"])
def test_likelihood_is_that_of_the_card(name: str) -> None:
    """The mean over all test images, with the noise of the evaluation that the card is from."""
    score, test = load(ROOT / "pretrained" / name), load_dataset("digits", image_size=8, num_channels=1)[1]
    levels, _ = test.batch(range(len(test)))
    card = (ROOT / "pretrained" / name / "README.md").read_text()
    expected = float(re.search(r"nll_bits_per_dim \| ([\d.]+)", card)[1])
    assert float(score.bits_per_dim(levels, seed=score.config.seed).mean()) == pytest.approx(expected, abs=1e-4)
    assert json.loads((ROOT / "pretrained" / name / "config.json").read_text())["data"]["dataset"] == "digits"
