"""NCSN on CIFAR-10, with technique 5 of Song and Ermon, NeurIPS 2020.

python main.py --config=configs/ve/ncsn/cifar10_5.py --workdir=runs/cifar10_ncsn_5 --mode=train
"""

from configs.presets import NCSN_LEVELS, ncsn_config


def get_config():
    return ncsn_config(NCSN_LEVELS, moving_average=True)
