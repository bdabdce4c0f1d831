"""Schrödinger bridges of MNIST, 28×28: 30 steps, U-Net (De Bortoli et al., NeurIPS 2021).

python -m schrodinger_bridge.main --config=configs/dsb/mnist.py --workdir=runs/dsb/mnist --config.data.download=True
torchrun --nproc_per_node=4 -m schrodinger_bridge.main --config=configs/dsb/mnist.py:3-8 --workdir=runs/dsb/mnist_3_8

The argument is all (to N(0, 1)) or FROM-TO, digits or all. Between two sets, of letters and of digits perhaps, with
all-all, --config.data.dataset=npz and --config.data.path=letters.npz; --config.final.* is the other end. It has not
been run to its end: it is for a GPU.
"""

from configs.dsb.common import image_config, join_classes


def get_config(pair="all"):
    config = image_config("MNIST", 28, 1)
    config.bridge.update(num_ipf=20, num_steps=30)
    config.training.update(n_iters=5000, batch_size=128, cache_size=2560, refresh_freq=500, save_freq=1000)
    config.evaluation.update(num_samples=1000, batch_size=250)
    return join_classes(config, pair)
