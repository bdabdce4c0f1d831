"""NCSN on CelebA 64×64, with techniques 1, 2, 4 and 5 of Song and Ermon, NeurIPS 2020.

python main.py --config=configs/ve/ncsn/celeba_1245.py --workdir=runs/celeba_ncsn_1245 --mode=train
"""

from configs.presets import CELEBA_LEVELS, ncsn_config


def get_config():
    return ncsn_config(CELEBA_LEVELS, celeba=True, moving_average=True)
