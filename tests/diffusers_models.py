"""Small random models that the library diffusers makes and saves itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs pip install -r requirements-published.txt"
)
BLOCKS = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4)
BLOCKS |= dict(sample_size=8, in_channels=1, out_channels=1)
DDPM_BLOCKS = BLOCKS | dict(
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), dropout=0.1
)
NCSNPP_BLOCKS = BLOCKS | dict(
    **dict.fromkeys(("in_channels", "out_channels"), 3),  # the skip blocks know no others, and have 32 groups
    block_out_channels=(32, 32),
    time_embedding_type="fourier",
    down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
)
TRAINED = torch.linspace(0.003, 0.3, 20).tolist()
LADDERS = {
    "linear": ("epsilon", dict(num_train_timesteps=1000)),
    "scaled_linear": ("sample", dict(num_train_timesteps=100, beta_schedule="scaled_linear", beta_end=0.1)),
    "squaredcos_cap_v2": ("v_prediction", dict(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")),
    "trained_betas": ("epsilon", dict(num_train_timesteps=20, trained_betas=TRAINED)),
    "zero_terminal_snr": (
        "v_prediction",
        dict(num_train_timesteps=20, beta_start=0.05, beta_end=0.3, rescale_betas_zero_snr=True),
    ),
}
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def saved_ddpm(folder: Path, name: str, **options_of_network: object):
    """A random network and its scheduler, saved by the library; network, scheduler, levels."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    prediction, options = LADDERS[name]
    torch.manual_seed(1)
    network = UNet2DModel(**DDPM_BLOCKS | options_of_network).eval()
    scheduler = DDPMScheduler(prediction_type=prediction, clip_sample=False, **options)
    DDPMPipeline(network, scheduler).save_pretrained(folder)
    return network, scheduler, torch.tensor([0, 7, options["num_train_timesteps"] - 2])
