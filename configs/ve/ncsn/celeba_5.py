"""NCSN on CelebA 64×64, with technique 5 of Song and Ermon, NeurIPS 2020.

python main.py --config=configs/ve/ncsn/celeba_5.py --workdir=runs/celeba_ncsn_5 --mode=train
"""

from configs.presets import NCSN_LEVELS, ncsn_config


def get_config():
    return ncsn_config(NCSN_LEVELS, celeba=True, moving_average=True)
