"""Schrödinger bridges of scikit-learn's 8×8 digits: to a Gaussian, and from one digit to another, on a laptop.

python -m schrodinger_bridge.main --config=configs/dsb/digits.py --workdir=runs/dsb/digits
python -m schrodinger_bridge.main --config=configs/dsb/digits.py:3-8 --workdir=runs/dsb/digits_3_8

The argument is all (to N(0, 1)) or FROM-TO, two digits. The expected numbers are in schrodinger_bridge/README.md.
"""

from configs.dsb.common import image_config, join_classes


def get_config(pair="all"):
    config = image_config("digits", 8, 1)
    config.bridge.update(num_ipf=6, num_steps=20, gamma_min=1e-3, gamma_max=0.1)
    config.model.update(nf=16, ch_mult=(1, 2), num_res_blocks=1, ema_rate=0.995)
    config.optim.lr = 1e-3
    config.training.update(n_iters=1000, batch_size=128, cache_size=1280, refresh_freq=200)
    config.evaluation.update(num_samples=360, batch_size=360)
    return join_classes(config, pair)
