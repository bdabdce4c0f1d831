"""A small VP model of scikit-learn's 8×8 digits, for the image figure of the tutorial.

python main.py --config=tutorial_example/configs.py --workdir=W --mode=train

The README has its bits/dim.
"""

from configs.defaults import base_config
from configs.presets import VP


def get_config():
    config = base_config(VP)
    config.data.update(dataset="digits", image_size=8, num_channels=1, random_flip=False, uniform_dequantization=True)
    config.model.update(nf=16, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0, ema_rate=0.99)
    config.optim.update(lr=1e-3, warmup=100)
    config.training.update(
        batch_size=128,
        n_iters=2000,
        eval_freq=500,
        snapshot_freq=0,
        snapshot_freq_for_preemption=250,
        snapshot_sampling=False,
    )
    config.sampling.update(predictor="ancestral_sampling", num_steps=500)
    return config
